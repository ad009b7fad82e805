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
