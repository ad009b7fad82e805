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
    ["trained", (i) => choices[i].trained ? brief(choices[i].trained) : ""],
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
  const { answer, measures: beside, memory: space, time: speed, caveats } = analysis.summary;
  const whole = (s) => s.replace(/, (?=[^\s\]]+\])/g, ",\u00a0").replace(/± /g, "±\u00a0");
  const paragraphs = (sentences) => sentences.map((s) => el("p", {}, whole(s)));
  return el("div", { class: "summary" },
    el("div", { class: "answer" }, ...paragraphs(answer)),
    ...(beside.length ? [el("h3", {}, "Measures"), ...paragraphs(beside)] : []),
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
      machine.device && `${machine.device}${machine.threads ? `, ${machine.threads} ${machine.threads === 1 ? "thread" : "threads"}` : ""}`,
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
      : about.length > 1 && about.every((c) => ["baseline", "not comparable"].includes(c.verdict))
        ? "None: the losses are not of the same thing; see the measures, where there are some."
        : "No interval: it takes two common seeds that differ."), forest()),
  ...(analysis.measures.length ? [section("measures", "Measures", ...measures())] : []),
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
