// The record, how each choice looks, and what charts are made of. First of the scripts that page.py puts into one function.
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
