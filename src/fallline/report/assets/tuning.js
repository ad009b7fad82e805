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
