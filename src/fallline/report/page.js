"use strict";
(() => {
  const record = JSON.parse(document.getElementById("data").textContent);
  const { choices, analysis } = record;
  const about = analysis.choices;
  const order = analysis.order;
  const MINUS = "\u2212";
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  const PHASES = [...new Set(choices.flatMap((c) => Object.keys((c.time && c.time.phases) || {})))];
  const PHASE_FILL = { data: 4, draw: 4, forward: 1, backward: 0, update: 2, other: 3 };
  const phaseFill = (phase) => (phase in PHASE_FILL ? PHASE_FILL[phase] : 5);
  const PARTS = ["weights", "gradients", "optimizer", "rest"];

  // Colour and dash together are the choice's own for up to 28 choices beside the baseline.
  const look = [];
  order.forEach((choice, rank) => {
    const base = choices[choice].label === record.baseline;
    const k = rank - 1;
    look[choice] = base || k < 0
      ? { color: "var(--c0)", dash: "", shape: 0, width: 2.4 }
      : { color: `var(--c${1 + k % 7})`, dash: DASHES[(k % 7 + Math.floor(k / 7)) % 4], shape: 1 + k % 5, width: 1.8 };
  });

  // --- elements: text only ever becomes text nodes ---

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.filter((c) => c !== null && c !== undefined && c !== false));
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const ruler = document.createElement("canvas").getContext("2d");
  function textWidth(text) {
    ruler.font = `13px ${getComputedStyle(document.body).fontFamily}`;
    return ruler.measureText(text).width;
  }
  // The middle goes: what tells long labels apart is often at their end.
  function fit(text, width) {
    if (textWidth(text) <= width) return text;
    const letters = Array.from(text);
    for (let keep = letters.length - 1; keep > 2; keep--) {
      const head = Math.floor(keep / 2);
      const short = `${letters.slice(0, head).join("")}…${letters.slice(letters.length - (keep - head)).join("")}`;
      if (textWidth(short) <= width) return short;
    }
    return "…";
  }

  // --- numbers ---

  const known = (v) => v !== null && v !== undefined;
  const signed = (text) => (/[1-9]/.test(text) ? text.replace("-", MINUS) : text.replace("-", ""));
  const fixed = (v, places) => signed(v.toFixed(places));
  function brief(v, unit) {
    for (const [size, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(v) >= size) return `${+(v / size).toPrecision(3)} ${name}`;
    }
    return `${+v.toPrecision(3)}${unit || ""}`;
  }
  function seconds(v) {
    if (v >= 7200) return `${+(v / 3600).toPrecision(3)} h`;
    return v >= 120 ? `${+(v / 60).toPrecision(3)} min` : `${+v.toPrecision(3)} s`;
  }
  function ticks(low, high, count) {
    const raw = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return { at: found, places: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }
  const linear = (low, high, from, to) => (v) => from + (high > low ? (v - low) / (high - low) : 0.5) * (to - from);
  function widened(low, high, share) {
    const room = (high - low) * share || Math.abs(high) * 0.05 || 1;
    return [low - room, high + room];
  }
  function quantile(values, q) {
    const sorted = [...values].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  }

  // --- charts: drawn for the width they have, again when it changes ---

  function chart(label, description, draw) {
    const box = el("div", { class: "chart" });
    let last = 0;
    const redraw = () => {
      const width = Math.floor(box.clientWidth);
      if (!width) return;
      last = width;
      const root = svg("svg", { role: "img", "aria-label": label }, svg("desc", {}, description));
      const height = draw(root, width);
      root.setAttribute("viewBox", `0 0 ${width} ${height}`);
      root.setAttribute("height", height);
      box.replaceChildren(root);
    };
    new ResizeObserver(() => { if (Math.floor(box.clientWidth) !== last) redraw(); }).observe(box);
    return { box, redraw };
  }
  const line = (x1, y1, x2, y2, more) => svg("line", { x1, y1, x2, y2, ...more });
  const text = (x, y, content, more) => svg("text", { x, y, ...more }, content);

  function shape(kind, x, y, r, more) {
    if (kind === 0) return svg("circle", { cx: x, cy: y, r, ...more });
    const corners = {
      1: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
      2: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
      3: [[0, -1.25], [1.2, 1], [-1.2, 1]],
      4: [[0, 1.25], [1.2, -1], [-1.2, -1]],
      5: [[-1.4, -.5], [-.5, -.5], [-.5, -1.4], [.5, -1.4], [.5, -.5], [1.4, -.5], [1.4, .5], [.5, .5], [.5, 1.4], [-.5, 1.4], [-.5, .5], [-1.4, .5]],
    }[kind];
    return svg("polygon", { points: corners.map(([a, b]) => `${x + a * r},${y + b * r}`).join(" "), ...more });
  }
  const crossed = (x, y, color, label) =>
    svg("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, style: `stroke:${color}`, "stroke-width": 1.8, fill: "none" },
      label ? svg("title", {}, label) : null);

  function axisBelow(root, scale, low, high, y, top, name, format, left, right) {
    const { at, places } = ticks(low, high, Math.max(2, (right - left) / 85));
    for (const v of at) {
      const x = scale(v);
      root.append(line(x, top, x, y, { class: "grid" }));
      root.append(text(x, y + 16, format ? format(v) : fixed(v, places), { class: "tick", "text-anchor": "middle" }));
    }
    root.append(line(left, y, right, y, { class: "axis" }));
    root.append(text((left + right) / 2, y + 34, name, { class: "tick", "text-anchor": "middle" }));
  }

  // One row a choice: its label before the row, or above it where that would leave no room.
  function rows(root, width, indices, side) {
    const narrow = width < 430;
    const gutter = narrow ? 0 : Math.min(width * 0.34, Math.max(...indices.map((i) => textWidth(choices[i].label))) + 14);
    const height = narrow ? 46 : 30;
    const room = narrow ? 0 : side;
    const y = (row) => 6 + row * height + (narrow ? 32 : height / 2);
    const base = (row) => (narrow ? 6 + row * height + 15 : y(row) + 4.5);
    const labels = svg("g", { class: "rows" });
    indices.forEach((i, row) => {
      const label = text(0, base(row), fit(choices[i].label, narrow ? width - side - 8 : gutter - 12));
      label.append(svg("title", {}, choices[i].label));
      labels.append(label);
    });
    // Text that belongs to a row: right of the plot, or at the end of the label's line.
    const remark = (row, content) => labels.append(text(width, base(row), content, { "text-anchor": "end" }));
    // Last, so that grid lines pass behind the text.
    const close = () => { root.append(labels); return 6 + indices.length * height + 46; };
    return { left: gutter + (narrow ? 6 : 0), right: width - room - (narrow ? 8 : 0), y, bottom: 6 + indices.length * height + 4, remark, close };
  }

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

  // --- final losses and differences ---

  const finals = (i) => (choices[i].runs || []).filter((r) => r.kind === "final" && r.status === "done" && known(r.loss));

  function losses() {
    const comparable = order.filter((i) => about[i].verdict !== "not comparable");
    const all = comparable.flatMap((i) => finals(i).map((r) => r.loss));
    if (!all.length) return el("p", { class: "note" }, "No final loss.");
    return chart("Final validation loss of each seed and their mean", "One row for each choice; the numbers are in the table below.", (root, width) => {
      const frame = rows(root, width, order, 92);
      const [low, high] = widened(Math.min(...all), Math.max(...all), 0.05);
      const X = linear(low, high, frame.left, frame.right);
      axisBelow(root, X, low, high, frame.bottom, 4, "final validation loss", null, frame.left, frame.right);
      order.forEach((i, row) => {
        const y = frame.y(row), { color, shape: kind } = look[i];
        if (!about[i].loss.n || about[i].verdict === "not comparable") { frame.remark(row, about[i].verdict); return; }
        for (const r of finals(i)) {
          root.append(svg("circle", { cx: X(r.loss), cy: y, r: 4, style: `fill:${color}`, "fill-opacity": 0.4 },
            svg("title", {}, `seed ${r.seed}: ${fixed(r.loss, 4)}`)));
        }
        const x = X(about[i].loss.mean);
        root.append(line(x, y - 9, x, y + 9, { style: `stroke:${color}`, "stroke-width": 2.4 }));
        const { failed, planned } = about[i].seeds;
        frame.remark(row, failed ? `${failed} of ${planned} failed` : about[i].text.loss.split(" ")[0]);
      });
      return frame.close();
    }).box;
  }

  function forest() {
    const others = order.filter((i) => choices[i].label !== record.baseline);
    const with_ = others.filter((i) => about[i].difference);
    if (!with_.length) return el("p", { class: "note" }, "There is no difference to show.");
    return chart(`Difference in final validation loss from ${record.baseline}`, "A dot is the mean over common seeds and the bar its interval; the numbers are in the table below.", (root, width) => {
      const side = 12 + Math.max(...others.map((i) => textWidth(about[i].text.difference || about[i].verdict)));
      const frame = rows(root, width, others, side);
      const bounds = [0], means = with_.map((i) => Math.abs(about[i].difference.mean));
      const reach = 3 * Math.max(...means) || 1;
      for (const i of with_) {
        const d = about[i].difference;
        for (const v of [d.mean, d.low, d.high]) if (known(v)) bounds.push(Math.max(-reach, Math.min(reach, v)));
      }
      const [low, high] = widened(Math.min(...bounds), Math.max(...bounds), 0.06);
      const X = linear(low, high, frame.left, frame.right);
      const held = (v) => Math.max(low, Math.min(high, v));
      axisBelow(root, X, low, high, frame.bottom, 4, `loss ${MINUS} ${fit(record.baseline, 90)}'s`, null, frame.left, frame.right);
      root.append(line(X(0), 2, X(0), frame.bottom, { class: "zero" }));
      others.forEach((i, row) => {
        const y = frame.y(row), d = about[i].difference, color = look[i].color;
        frame.remark(row, about[i].text.difference || about[i].verdict);
        if (!d) return;
        if (known(d.low)) {
          root.append(line(X(held(d.low)), y, X(held(d.high)), y, { style: `stroke:${color}`, "stroke-width": 2 }));
          for (const [v, way] of [[d.low, 1], [d.high, -1]]) {
            const x = X(held(v));
            root.append(held(v) === v
              ? line(x, y - 5, x, y + 5, { style: `stroke:${color}`, "stroke-width": 2 })
              : svg("path", { d: `M${x + 6 * way},${y - 5}L${x},${y}L${x + 6 * way},${y + 5}`, fill: "none", style: `stroke:${color}`, "stroke-width": 2 }));
          }
        }
        const claimed = about[i].verdict === "lower" || about[i].verdict === "higher";
        root.append(svg("circle", { cx: X(d.mean), cy: y, r: 4.8, style: `fill:${claimed ? color : "var(--ground)"};stroke:${color}`, "stroke-width": 2 },
          svg("title", {}, `${choices[i].label}: ${about[i].verdict}`)));
      });
      return frame.close();
    }).box;
  }

  // --- stacked bars: memory and step time ---

  function bars(label, indices, parts, total, remark, side, name, format, unit) {
    return chart(label, "One stacked bar for each choice; the numbers are in the table below.", (root, width) => {
      const frame = rows(root, width, indices, side);
      const top = Math.max(...indices.map(total)) * 1.02 || 1;
      const X = linear(0, top, frame.left, frame.right);
      axisBelow(root, (v) => X(v * unit), 0, top / unit, frame.bottom, 4, name, null, frame.left, frame.right);
      indices.forEach((i, row) => {
        let from = 0;
        for (const [part, amount, color] of parts(i)) {
          if (!(amount > 0)) continue;
          const x = X(from), w = X(from + amount) - x;
          root.append(svg("rect", { x, y: frame.y(row) - 8, width: Math.max(0.5, w - (w > 3 ? 1 : 0)), height: 16, style: `fill:var(--p${color})` },
            svg("title", {}, `${choices[i].label}, ${part}: ${format(amount)}`)));
          from += amount;
        }
        frame.remark(row, remark(i));
      });
      return frame.close();
    }).box;
  }
  const key = (items) => el("ul", { class: "key" }, ...items.map(([name, color]) =>
    el("li", {}, el("i", { style: `background:var(--p${color})` }), name)));
  const others = (what) => order.filter((i) => !choices[i][what] && about[i].loss.n).map((i) => choices[i].label);
  const lacking = (what) => others(what).length ? el("p", { class: "note" }, `Not measured: ${others(what).join(", ")}.`) : null;

  function memory() {
    const measured = order.filter((i) => choices[i].memory);
    if (!measured.length) return [el("p", { class: "note" }, "Memory was not measured.")];
    const gib = Math.max(...measured.map((i) => choices[i].memory.peak)) >= 1000 * 2 ** 20;
    const [unit, name] = gib ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];
    const kinds = [...new Set(measured.map((i) => choices[i].memory.kind))];
    const how = { resident: "resident memory of the process above its state after import", allocated: "allocated by torch on the device" };
    return [
      el("p", { class: "note" }, `Peak: ${kinds.map((k) => how[k] || k).join("; ")}. Rest: activations, workspace, data and the allocator, as the peak less the others.`),
      key(PARTS.map((part, n) => [part === "optimizer" ? "optimizer state" : part, n])),
      bars("Peak memory of each choice by what holds it", measured,
        (i) => PARTS.every((p) => !known(choices[i].memory[p])) ? [["peak", choices[i].memory.peak, 3]] : PARTS.map((p, n) => [p, choices[i].memory[p], n]),
        (i) => Math.max(choices[i].memory.peak, PARTS.reduce((sum, p) => sum + Math.max(0, choices[i].memory[p] || 0), 0)),
        (i) => about[i].text.peak, 76, `peak memory, ${name}`, (v) => `${fixed(v / unit, 2)} ${name}`, unit),
      lacking("memory"),
    ];
  }

  function time() {
    const measured = order.filter((i) => choices[i].time && !choices[i].time.void);
    const voids = order.filter((i) => choices[i].time && choices[i].time.void);
    const said = voids.length ? el("p", { class: "note" }, `Void, as the timing varied too much to be a result: ${voids.map((i) => choices[i].label).join(", ")}.`) : null;
    if (!measured.length) return [said || el("p", { class: "note" }, "Step times were not measured.")];
    const parts = (i) => {
      const { step, phases } = choices[i].time;
      const named = PHASES.filter((p) => phases && phases[p]).map((p) => [p, phases[p], phaseFill(p)]);
      return [...named, ["other", step - named.reduce((sum, p) => sum + p[1], 0), phaseFill("other")]];
    };
    const used = new Set(measured.flatMap((i) => parts(i).filter((p) => p[1] > 0.005 * choices[i].time.step).map((p) => p[0])));
    const remark = (i) => {
      const t = about[i].text;
      if (!t.ratio) return t.step;
      return `${t.step}, ×${t.ratio}${t.ratio_spread ? ` ± ${t.ratio_spread}` : ""}`;
    };
    const apart = measured.filter((i) => choices[i].time.interleaved === false);
    return [
      el("p", { class: "note" }, `Median step; × is the ratio to ${record.baseline}'s, ± its interquartile range over rounds.`
        + (apart.length ? ` Not timed in turns with the others: ${apart.map((i) => choices[i].label).join(", ")}.` : "")),
      said,
      key([...PHASES, "other"].filter((p) => used.has(p)).map((p) => [p, phaseFill(p)])),
      bars("Time of one step of each choice by phase", measured, parts,
        (i) => Math.max(choices[i].time.step, parts(i).reduce((sum, p) => sum + Math.max(0, p[1]), 0)),
        remark, 14 + Math.max(...measured.map((i) => textWidth(remark(i)))), "step, ms", (v) => `${+(1e3 * v).toPrecision(3)} ms`, 1e-3),
      lacking("time"),
    ];
  }

  // --- tuning: one small panel a choice, with common axes ---

  const trials = (i) => (choices[i].runs || []).filter((r) => r.kind === "trial" && r.value > 0);
  function tuning() {
    const tuned = order.filter((i) => trials(i).length);
    if (!tuned.length) return null;
    const all = tuned.flatMap(trials);
    const good = all.filter((r) => r.status === "done" && known(r.loss)).map((r) => r.loss);
    const values = all.map((r) => Math.log10(r.value));
    const [x0, x1] = widened(Math.min(...values), Math.max(...values), 0.05);
    const top = good.length ? quantile(good, 0.95) : 1;
    const [y0, y1] = good.length ? widened(Math.min(...good), top, 0.08) : [0, 1];
    const panel = (i) => {
      const { color, shape: kind } = look[i];
      const pick = choices[i].tuned;
      const sorted = trials(i).sort((a, b) => a.value - b.value);
      const done = (r) => r.status === "done" && known(r.loss);
      const note = pick ? `${about[i].text.tuned}${pick.edge ? ", on the edge of what was tried" : ""}` : "none chosen";
      return el("div", {}, el("h3", { title: choices[i].label }, fit(choices[i].label, 220)), el("p", { class: "note" }, note),
        chart(`Loss of ${choices[i].label} by tuned value`, "The values are in the table of runs.", (root, width) => {
          const left = 36, right = width - 8, head = 10, bottom = 132;
          const X = linear(x0, x1, left, right), Y = linear(y0, y1, bottom, head);
          const grid = ticks(y0, y1, 4.5);
          for (const v of grid.at) {
            root.append(line(left, Y(v), right, Y(v), { class: "grid" }));
            root.append(text(left - 6, Y(v) + 4, fixed(v, grid.places), { class: "tick", "text-anchor": "end" }));
          }
          root.append(line(left, bottom, right, bottom, { class: "axis" }));
          const every = Math.max(1, Math.ceil((x1 - x0) / ((right - left) / 46)));
          for (let e = Math.ceil(x0); e <= x1; e += every) {
            root.append(line(X(e), bottom, X(e), bottom + 4, { class: "axis" }));
            root.append(text(X(e), bottom + 17, e >= -3 && e <= 3 ? `${+(10 ** e).toPrecision(1)}` : `1e${e}`, { class: "tick", "text-anchor": "middle" }));
          }
          const at = (r) => [X(Math.log10(r.value)), Math.max(head, Y(r.loss))];
          const path = sorted.filter(done).map((r) => at(r).join(",")).join(" ");
          root.append(svg("polyline", { points: path, fill: "none", style: `stroke:${color}`, "stroke-width": 1.3 }));
          for (const r of sorted) {
            if (!done(r)) { root.append(crossed(X(Math.log10(r.value)), head, "var(--soft)", `${r.value}: ${r.status}`)); continue; }
            const [x, y] = at(r);
            root.append(r.loss > y1
              ? svg("path", { d: `M${x - 4},${head + 5}L${x},${head}L${x + 4},${head + 5}`, fill: "none", style: `stroke:${color}`, "stroke-width": 1.8 }, svg("title", {}, `${r.value}: ${r.loss}`))
              : shape(kind, x, y, 3.2, { style: `fill:${color}` }));
            if (pick && Math.abs(r.value / pick.value - 1) < 1e-6) {
              root.append(svg("circle", { cx: x, cy: y, r: 8, fill: "none", style: `stroke:${pick.edge ? "var(--c2)" : "var(--ink)"}`, "stroke-width": 1.5, "stroke-dasharray": pick.edge ? "3 2" : null }));
            }
          }
          return bottom + 24;
        }).box);
    };
    return [el("p", { class: "note" }, `Final loss of each trial by ${record.tune ? record.tune.key : "value"}, on common axes. Ring: chosen; dashed ring: chosen on the edge; cross: a trial that was given up or failed; arrow: beyond the frame.`),
      el("div", { class: "panels" }, ...tuned.map(panel))];
  }

  // --- tables ---

  function table(heads, lines, textual) {
    const left = new Set(textual || []);
    return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" }, el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", { scope: "col", class: left.has(h) ? "text" : null }, h)))),
      el("tbody", {}, ...lines.map((cells) => el("tr", {}, ...cells.map((cell, n) => n === 0
        ? el("th", { scope: "row", title: cell }, fit(cell, 165))
        : el("td", { class: left.has(heads[n]) ? "text" : null }, known(cell) ? String(cell) : "")))))));
  }

  function numbers() {
    const columns = [
      [record.tune ? record.tune.key : "tuned", (i, t) => t.tuned],
      ["seeds", (i) => `${about[i].seeds.done}/${about[i].seeds.planned}`],
      ["steps", (i) => choices[i].steps],
      ["val loss, mean ± sd", (i, t) => t.loss.replace(/ \(.*/, "")],
      [`difference from ${record.baseline}`, (i, t) => t.difference],
      ["verdict", (i) => about[i].verdict],
      ["peak", (i, t) => t.peak], ["weights", (i, t) => t.weights], ["gradients", (i, t) => t.gradients],
      ["optimizer", (i, t) => t.optimizer], ["rest", (i, t) => t.rest],
      ["step", (i, t) => t.step && t.step + (t.step_spread ? ` ± ${t.step_spread}` : "")],
      ["ratio", (i, t) => t.ratio && t.ratio + (t.ratio_spread ? ` ± ${t.ratio_spread}` : "")],
      ["load", (i) => choices[i].time && known(choices[i].time.load) ? fixed(choices[i].time.load, 1) : ""],
      ...PHASES.map((phase) => [phase, (i, t) => t[`phase ${phase}`]]),
    ];
    const cells = order.map((i) => [choices[i].label, ...columns.map(([, cell]) => cell(i, about[i].text) || "")]);
    const filled = columns.map((_, n) => n).filter((n) => cells.some((row) => row[n + 1] !== ""));
    return table(["choice", ...filled.map((n) => columns[n][0])], cells.map((row) => [row[0], ...filled.map((n) => row[n + 1])]), ["verdict"]);
  }

  function runs() {
    const tunedKey = record.tune ? record.tune.key : "value";
    const lines = order.flatMap((i) => (choices[i].runs || []).map((r) => [
      choices[i].label, r.kind, r.seed, known(r.value) ? +(+r.value).toPrecision(4) : "", r.status,
      known(r.loss) ? fixed(r.loss, 4) : "", known(r.seconds) ? fixed(r.seconds, 1) : "", r.folder, r.error]));
    return lines.length
      ? table(["choice", "kind", "seed", tunedKey, "status", "val loss", "seconds", "folder", "error"], lines, ["kind", "status", "folder", "error"])
      : el("p", { class: "note" }, "No run was made.");
  }

  function flat(value, head) {
    if (value && typeof value === "object" && !Array.isArray(value)) {
      return Object.entries(value).flatMap(([k, v]) => flat(v, head ? `${head}.${k}` : k));
    }
    return [[head, typeof value === "string" ? value : JSON.stringify(value)]];
  }
  const keys = (mapping) => el("div", { class: "scroll" }, el("table", { class: "keys" }, el("tbody", {},
    ...flat(mapping, "").map(([k, v]) => el("tr", {}, el("th", { scope: "row" }, k), el("td", {}, v))))));
  const folded = (name, content) => el("details", {}, el("summary", {}, name), content);

  // --- the page ---

  const section = (id, title, ...content) => el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...content);
  function summary() {
    const { answer, memory: space, time: speed, caveats } = analysis.summary;
    const whole = (s) => s.replace(/, (?=[^\s\]]+\])/g, ",\u00a0").replace(/± /g, "±\u00a0");
    const paragraphs = (sentences) => sentences.map((s) => el("p", {}, whole(s)));
    return el("div", { class: "summary" },
      el("div", { class: "answer" }, ...paragraphs(answer)),
      el("h3", {}, "Memory"), ...paragraphs(space),
      el("h3", {}, "Time"), ...paragraphs(speed),
      el("h3", {}, "What to keep in mind"), el("ul", {}, ...caveats.map((s) => el("li", {}, s))));
  }
  function theme() {
    const dark = () => {
      const set = document.documentElement.dataset.theme;
      return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    };
    const button = el("button", { type: "button", class: "theme", click: () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      name();
    } });
    const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
    name();
    return button;
  }

  const machine = record.machine || {};
  const when = record.created ? record.created.replace("T", " ").replace("Z", " UTC") : null;
  const seeds = (record.seeds || []).length;
  const tuned = tuning();
  document.title = `${record.name}: comparison`;
  document.getElementById("report").replaceChildren(
    el("header", {},
      el("h1", {}, `${record.name}: ${choices.length} ${choices.length === 1 ? "choice" : "choices"} compared`),
      el("p", { class: "about" }, [
        when, `${seeds} ${seeds === 1 ? "seed" : "seeds"}`, record.equal && `equal ${record.equal}`,
        record.tune ? `${record.tune.key} tuned` : "untuned", `baseline ${record.baseline}`,
        machine.device && `${machine.device}${machine.threads ? `, ${machine.threads} threads` : ""}`,
        record.fallline && `Fallline ${record.fallline}`].filter(Boolean).join(" · ")),
      record.command && el("code", { class: "command" }, record.command),
      theme()),
    section("summary", "Summary", summary()),
    section("curves", "Loss curves", ...curves()),
    section("losses", "Final losses",
      el("h3", {}, "By seed"), el("p", { class: "note" }, "Dot: a seed; bar: their mean."), losses(),
      el("h3", {}, `Paired differences from ${record.baseline}`),
      el("p", { class: "note" }, analysis.intervals
        ? "Bar: interval; all hold at once with 95 %. Filled: zero is outside and a claim is made; hollow: no claim."
        : "No interval: it takes two common seeds that differ."), forest()),
    section("memory", "Memory", ...memory().filter(Boolean)),
    section("time", "Step time", ...time().filter(Boolean)),
    ...(tuned ? [section("tuning", "Tuning", ...tuned)] : []),
    section("numbers", "Numbers", numbers()),
    section("record", "Record",
      folded("All runs", runs()),
      folded("What each choice changes", keys(Object.fromEntries(order.map((i) => [choices[i].label, choices[i].changes || {}])))),
      record.recipe && folded("Base recipe", keys(record.recipe)),
      folded("Versions, data, model and hashes", keys({ machine, data: record.data || {}, model: record.model || {}, source: record.sources || {} }))),
    el("footer", {}, "The numbers of this page are in report.json, its runs in report.csv, in the same folder."));
})();
