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
