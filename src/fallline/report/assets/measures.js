// --- what was measured beside the loss, and two of its kinds against each other ---

function measures() {
  const names = analysis.measures;
  const heads = ["choice", ...names.flatMap((name) => [name, `− ${record.baseline}`])];
  const cells = order.filter((i) => Object.keys(about[i].measures).length).map((i) => [
    choices[i].label, ...names.flatMap((name) => {
      const of = about[i].measures[name];
      return of ? [of.text.value, of.text.difference] : ["", ""];
    })]);
  return [
    el("p", { class: "note" }, "Mean ± deviation over seeds at the end, and the difference from the baseline with its interval; the intervals of one measure hold all at once with 95 %."),
    table(heads, cells),
    ...(analysis.trade_off ? tradeOff(names, analysis.trade_off) : []),
  ];
}

// A path a choice: its mean over seeds from the first evaluation to the last, which is marked; a dot a seed at the end.
function tradeOff(names, pair) {
  const axes = { x: pair[0], y: pair[1] };
  const drawn = order.filter((i) => names.some((name) => about[i].measures[name]));
  const plot = chart("Two measures against each other",
    "One path for each choice, from the first evaluation to the last. The numbers are in the table above.", (root, width) => {
      const height = Math.max(280, Math.min(420, width * 0.5));
      const left = 58, right = width - 14, top = 12, bottom = height - 42;
      const paths = drawn.flatMap((i) => {
        const [x, y] = [axes.x, axes.y].map((name) => about[i].measures[name]);
        if (!x || !y) return [];
        const points = x.path.map((v, k) => [v, y.path[k]]).filter(([a, b]) => known(a) && known(b));
        const ends = finals(i).map((r) => r.measures || {}).map((m) => [m[axes.x], m[axes.y]]).filter(([a, b]) => known(a) && known(b));
        return points.length ? [{ i, points, ends }] : [];
      });
      const all = (k) => paths.flatMap((p) => [...p.points, ...p.ends].map((at) => at[k]));
      if (!paths.length) { root.append(text(left, top + 20, "No choice has both.", { class: "tick" })); return 40; }
      const [x0, x1] = widened(Math.min(...all(0)), Math.max(...all(0)), 0.05);
      const [y0, y1] = widened(Math.min(...all(1)), Math.max(...all(1)), 0.05);
      const X = linear(x0, x1, left, right), Y = linear(y0, y1, bottom, top);
      const grid = ticks(y0, y1, height / 60);
      for (const v of grid.at) {
        root.append(line(left, Y(v), right, Y(v), { class: "grid" }));
        root.append(text(left - 8, Y(v) + 4, fixed(v, grid.places), { class: "tick", "text-anchor": "end" }));
      }
      axisBelow(root, X, x0, x1, bottom, top, axes.x, null, left, right);
      root.append(text(left, top - 2, axes.y, { class: "tick" }));
      for (const { i, points, ends } of paths) {
        const { color, dash, shape: kind, width: thick } = look[i];
        const d = points.map(([a, b], k) => `${k ? "L" : "M"}${X(a).toFixed(1)},${Y(b).toFixed(1)}`).join("");
        root.append(svg("path", { d, fill: "none", style: `stroke:${color}`, "stroke-width": thick, "stroke-opacity": 0.55, "stroke-dasharray": dash, "data-choice": i }));
        for (const [a, b] of ends) root.append(svg("circle", { cx: X(a), cy: Y(b), r: 3, style: `fill:${color}`, "fill-opacity": 0.35 }));
        const [a, b] = points[points.length - 1];
        const mark = shape(kind, X(a), Y(b), 5, { style: `fill:${color}` });
        mark.append(svg("title", {}, choices[i].label));
        root.append(mark);
      }
      return height;
    });
  const key = el("ul", { class: "key" }, ...drawn.map((i) => el("li", {},
    svg("svg", { viewBox: "0 0 16 12", width: 16, height: 12, "aria-hidden": "true" }, shape(look[i].shape, 8, 6, 4, { style: `fill:${look[i].color}` })),
    ` ${choices[i].label}`)));
  const pick = (which) => el("label", {}, `${which === "x" ? "Across" : "Up"} `, el("select", {
    change: (event) => { axes[which] = event.target.value; plot.redraw(); },
  }, ...names.map((name) => el("option", { value: name, selected: name === axes[which] ? "" : null }, name))));
  return [
    el("h3", {}, "One against the other"),
    el("p", { class: "note" }, "Line: the mean over seeds from the first evaluation on; mark: its end; dot: a seed's end."),
    el("div", { class: "switches" }, pick("x"), pick("y")), plot.box, key,
  ];
}
