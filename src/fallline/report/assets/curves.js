// --- loss curves ---

const AXES = {
  tokens: { name: "tokens", format: (v) => brief(v) },
  seconds: { name: "training seconds: step × measured step time", format: seconds },
  step: { name: "step", format: (v) => brief(v) },
};
function xs(curve, i, axis) {
  if (!curve) return null;
  if (axis !== "seconds") return curve[axis] || null;
  const time = choices[i].time;
  return time && !time.void ? curve.step.map((s) => s * time.step) : null;
}
const lostCurves = (i) => (choices[i].runs || [])
  .filter((r) => r.kind === "final" && r.curve && r.curve.step && r.curve.step.length)
  .map((r) => r.curve);

function curves() {
  const drawn = order.filter((i) => about[i].curve || lostCurves(i).length);
  if (!drawn.length) return [el("p", { class: "note" }, "No run left a curve.")];
  const has = (axis) => drawn.some((i) => xs(about[i].curve || lostCurves(i)[0], i, axis));
  let axis = ["tokens", "step"].find(has);
  let end = false;
  let at = null;
  const shown = new Set(analysis.shown.filter((i) => drawn.includes(i)));
  const position = el("p", { class: "at", "aria-live": "polite" });
  const values = new Map();
  let geometry = null;

  const plot = chart("Validation loss of each choice as training goes on",
    "A line is the mean over seeds and the band its range. The numbers are in the tables below.", (root, width) => {
      const height = Math.max(300, Math.min(440, width * 0.5));
      const left = 46, right = width - 10, top = 10, bottom = height - 42;
      const visible = drawn.filter((i) => shown.has(i));
      const lines = [];
      for (const i of visible) {
        const main = xs(about[i].curve, i, axis);
        if (main) lines.push({ i, x: main, y: about[i].curve.mean, low: about[i].curve.low, high: about[i].curve.high });
        for (const lost of lostCurves(i)) {
          const x = xs(lost, i, axis);
          if (x) lines.push({ i, x, y: lost.val_loss, lost: true });
        }
      }
      const furthest = Math.max(0, ...lines.map((l) => l.x[l.x.length - 1])) || 1;
      const nearest = end ? furthest / 2 : 0;
      const ys = [], starts = [];
      for (const l of lines) {
        starts.push(l.y.find(known));
        l.x.forEach((x, k) => {
          if (x >= nearest) for (const v of [l.y[k], l.low && l.low[k], l.high && l.high[k]]) if (known(v)) ys.push(v);
        });
      }
      let [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
      // What diverges leaves the frame instead of flattening the rest.
      const middle = quantile(starts.filter(known), 0.5);
      if (known(middle) && high > low + 3 * Math.abs(middle - low) && middle > low) high = low + 1.2 * (middle - low);
      [low, high] = widened(low, high, 0.04);
      const X = linear(nearest, furthest, left, right), Y = linear(low, high, bottom, top);
      const clip = `frame-${Math.round(width)}`;
      root.append(svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: left, y: top - 4, width: right - left + 6, height: bottom - top + 4 }))));
      const grid = ticks(low, high, height / 60);
      for (const v of grid.at) {
        root.append(line(left, Y(v), right, Y(v), { class: "grid" }));
        root.append(text(left - 8, Y(v) + 4, fixed(v, grid.places), { class: "tick", "text-anchor": "end" }));
      }
      axisBelow(root, X, nearest, furthest, bottom, bottom, AXES[axis].name, AXES[axis].format, left, right);
      const inside = svg("g", { "clip-path": `url(#${clip})` });
      root.append(inside);
      for (const l of lines.filter((one) => one.low)) {
        const ok = l.x.map((_, k) => k).filter((k) => known(l.low[k]));
        const path = [...ok.map((k) => `${X(l.x[k])},${Y(l.high[k])}`), ...ok.reverse().map((k) => `${X(l.x[k])},${Y(l.low[k])}`)];
        inside.append(svg("polygon", { points: path.join(" "), style: `fill:${look[l.i].color}`, "fill-opacity": 0.13 }));
      }
      for (const l of lines) {
        const { color, dash, shape: kind, width: thick } = look[l.i];
        let d = "", pen = "M";
        l.x.forEach((x, k) => {
          if (!known(l.y[k])) { pen = "M"; return; }
          d += `${pen}${X(x).toFixed(1)},${Y(l.y[k]).toFixed(1)}`;
          pen = "L";
        });
        inside.append(svg("path", { d, fill: "none", style: `stroke:${color}`, "stroke-width": l.lost ? 1 : thick, "stroke-dasharray": dash, "stroke-linejoin": "round", "data-choice": l.i }));
        const finite = l.x.map((_, k) => k).filter((k) => known(l.y[k]));
        if (l.lost && finite.length) {
          const k = finite[finite.length - 1];
          inside.append(crossed(X(l.x[k]), Y(l.y[k]), color, `${choices[l.i].label}: a seed ended here`));
        } else if (!l.lost) {
          const every = Math.max(1, Math.ceil(finite.length / 7));
          finite.filter((_, n) => (finite.length - 1 - n) % every === 0).forEach((k) =>
            inside.append(shape(kind, X(l.x[k]), Y(l.y[k]), 3.2, { style: `fill:${color}` })));
        }
      }
      const cursor = svg("g", { class: "cursor" });
      const hit = svg("rect", { class: "hit", x: left, y: top, width: right - left, height: bottom - top });
      const follow = (event) => {
        const box = root.getBoundingClientRect();
        show(nearest + (event.clientX - box.left - left) / (right - left) * (furthest - nearest));
      };
      hit.addEventListener("pointermove", follow);
      hit.addEventListener("pointerdown", follow);
      hit.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
      root.append(cursor, hit);
      const stops = [...new Set(lines.filter((l) => !l.lost).flatMap((l) => l.x).filter((x) => x >= nearest))].sort((a, b) => a - b);
      geometry = { X, Y, top, bottom, lines, stops, cursor, nearest, furthest };
      show(at);
      return height;
    });

  // The recorded point nearest to `x` of each line; none beyond its end.
  function show(x) {
    const { X, Y, top, bottom, lines, stops, cursor } = geometry;
    at = x === null || !stops.length ? null : stops.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    cursor.replaceChildren();
    values.forEach((node) => node.replaceChildren());
    if (at === null) {
      position.textContent = "Mean final loss; point at the chart, or focus it and use the arrow keys, for the loss on the way.";
      values.forEach((node, i) => node.append(about[i].text.loss ? about[i].text.loss.split(" ")[0] : about[i].verdict));
      return;
    }
    cursor.append(line(X(at), top, X(at), bottom, { class: "cross" }));
    for (const l of lines.filter((one) => !one.lost)) {
      const k = l.x.reduce((best, v, n) => (Math.abs(v - at) < Math.abs(l.x[best] - at) ? n : best), 0);
      if (at > l.x[l.x.length - 1] * 1.0001 || !known(l.y[k])) continue;
      cursor.append(svg("circle", { cx: X(l.x[k]), cy: Y(l.y[k]), r: 4.5, fill: "none", style: `stroke:${look[l.i].color}`, "stroke-width": 1.6 }));
      values.get(l.i).append(fixed(l.y[k], 4));
    }
    position.textContent = `Mean loss nearest to ${axis === "seconds" ? seconds(at) : `${brief(at)} ${axis === "step" ? "steps" : "tokens"}`}:`;
  }
  plot.box.tabIndex = 0;
  plot.box.setAttribute("role", "group");
  plot.box.setAttribute("aria-label", "Loss curves; the arrow keys move along them");
  plot.box.addEventListener("keydown", (event) => {
    const { stops } = geometry;
    const here = at === null ? stops.length : stops.indexOf(at);
    const next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: stops.length - 1 }[event.key];
    if (event.key === "Escape") show(null);
    else if (next !== undefined && stops.length) show(stops[Math.max(0, Math.min(stops.length - 1, next))]);
    else return;
    event.preventDefault();
  });

  const legend = el("div", { class: "legend", role: "group", "aria-label": "Choices shown" }, ...drawn.map((i) => {
    const value = el("span", { class: "value" });
    values.set(i, value);
    const { color, dash, shape: kind, width } = look[i];
    const swatch = svg("svg", { viewBox: "0 0 34 12", height: 12, "aria-hidden": "true" },
      line(0, 6, 34, 6, { style: `stroke:${color}`, "stroke-width": width, "stroke-dasharray": dash }),
      shape(kind, 17, 6, 3.4, { style: `fill:${color}` }));
    const button = el("button", {
      type: "button", "aria-pressed": String(shown.has(i)), title: choices[i].label, click: () => {
        if (!shown.delete(i)) shown.add(i);
        button.setAttribute("aria-pressed", shown.has(i));
        plot.redraw();
      },
    }, swatch, el("span", { class: "label" }, fit(choices[i].label, 165)), value);
    return button;
  }));
  const showSet = (set) => {
    shown.clear();
    set.forEach((i) => shown.add(i));
    drawn.forEach((i, n) => legend.children[n].setAttribute("aria-pressed", shown.has(i)));
    plot.redraw();
  };
  const missing = drawn.filter((i) => !xs(about[i].curve || lostCurves(i)[0], i, "seconds"));
  const note = el("p", { class: "note" });
  const describe = () => {
    note.textContent = "Line: mean over the seeds that finished; band: their least and greatest value; thin line with a cross: a seed that did not finish."
      + (axis === "seconds" && missing.length ? ` Without a valid step time and so not drawn: ${missing.map((i) => choices[i].label).join(", ")}.` : "");
  };
  describe();
  return [note, el("div", { class: "switches" },
    toggle("Across", Object.keys(AXES).map((a) => [a, { tokens: "tokens", seconds: "seconds", step: "steps" }[a], has(a)]), () => axis,
      (a) => { axis = a; at = null; describe(); plot.redraw(); }),
    toggle("Show", [[false, "whole run", true], [true, "second half", true]], () => end, (v) => { end = v; at = null; plot.redraw(); }),
    drawn.length > analysis.shown.length && el("span", {},
      el("button", { type: "button", click: () => showSet(drawn) }, "all choices"), " ",
      el("button", { type: "button", click: () => showSet(analysis.shown) }, `first ${analysis.shown.length}`))),
  plot.box, position, legend];
}

function toggle(name, options, current, set) {
  const buttons = options.map(([value, label, possible]) => {
    const button = el("button", { type: "button", "aria-pressed": String(current() === value), "data-value": value, click: () => {
      set(value);
      buttons.forEach((b, n) => b.setAttribute("aria-pressed", options[n][0] === current()));
    } }, label);
    button.disabled = !possible;
    return button;
  });
  return el("span", { class: "switch", role: "group", "aria-label": name }, el("span", {}, name), ...buttons);
}
