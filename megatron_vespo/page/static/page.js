"use strict";
// Everything from a run is put on the page as text, never as HTML.
let data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8a8a"];
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const PAGE = 20;
const FIELDS = ["reward", "length", "log_w", "phi"];
const root = document.documentElement, byId = (id) => document.getElementById(id), form = byId("filters");
const color = (i) => COLORS[i % COLORS.length];
let charts = [], shown = PAGE;

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}
const number = (value, digits = 4) => value === null || value === undefined ? "-"
  : value !== 0 && Math.abs(value) < 1e-3 ? Number(value).toExponential(1) : Number(value).toLocaleString("en", { maximumSignificantDigits: digits });
function dotted(run) {
  const title = make("h3"), dot = make("span", "", "dot");
  dot.style.background = color(run);
  title.append(dot, data.runs[run].name);
  return title;
}
function table(heading, rows, empty) {
  if (!rows.length) return make("p", empty, "empty");
  const result = make("table");
  for (const [tag, row] of [["th", heading], ...rows.map((row) => ["td", row])]) {
    const line = result.insertRow();
    for (const cell of row) line.append(make(tag, cell));
  }
  return result;
}

function showRuns() {
  byId("written").textContent = `${data.runs.length} run${data.runs.length > 1 ? "s" : ""}, written ${data.written}`;
  byId("run-cards").replaceChildren(...data.runs.map((run, i) => {
    const card = make("div", undefined, "card");
    card.append(dotted(i), make("p", run.folder, "hint"), make("p", `${run.done} of ${run.total ?? "?"} steps done`));
    card.append(...run.notes.map((note) => make("p", note, "note")));
    return card;
  }));
  const at = ([step, value]) => `${number(value)} (step ${step})`;
  byId("evaluation-table").replaceChildren(table(["run", "set", "first accuracy", "last", "best"],
    data.evaluation.map((row) => [data.runs[row.run].name, row.set, at(row.first), at(row.last), at(row.best)]), "Nothing has been evaluated yet."));
  byId("settings-table").replaceChildren(table(["setting", ...data.runs.map((run) => run.name)],
    data.settings.map((row) => [row.key, ...row.values.map((value) => value ?? "-")]),
    data.runs.length > 1 ? "All settings are the same." : "One run alone: name two or more to compare their settings."));
  const found = data.runs.flatMap((run) => run.findings.map((finding) => [run.name, finding.step, finding.text]));
  const list = byId("finding-list");
  list.className = "wide";
  list.replaceChildren(table(["run", "step", "finding"], found, "No warnings."));
}

function timeSplit() {
  const cards = data.time_split.map((split, i) => {
    const card = make("div", undefined, "card"), bar = make("div", undefined, "split"), facts = make("div", undefined, "facts");
    Object.entries(split).forEach(([name, share], k) => {
      const part = make("i"), fact = make("span"), dot = make("span", "", "dot");
      part.style.width = `${100 * share}%`;
      part.style.background = dot.style.background = color(k);
      fact.append(dot, `${name} ${number(100 * share, 2)} %`);
      bar.append(part);
      facts.append(fact);
    });
    card.append(dotted(i), make("p", "Share of the time of all steps; the rest is grey", "hint"), bar, facts);
    return card;
  });
  const box = make("div", undefined, "cards");
  box.append(...cards);
  return box;
}

function draw(chart, place) {
  const style = getComputedStyle(root), soft = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const labels = [...new Set(chart.lines.map((item) => item.label))], several = data.runs.length > 1;
  const series = chart.lines.map((item) => {
    const k = labels.indexOf(item.label);
    const name = several ? data.runs[item.run].name + (item.label ? `: ${item.label}` : "") : item.label || chart.title;
    return { label: name, stroke: color(several ? item.run : k), dash: several ? DASHES[k % DASHES.length] : [], width: 1.75, spanGaps: true,
      points: { show: item.points[0].length < 30, size: 5 }, value: (_, value) => number(value) };
  });
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
  const options = { width: place.clientWidth, height: 210, series: [{ label: "step" }, ...series], scales: { x: { time: false } },
    axes: [{ ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] },
      { ...axis, size: 64, values: (_, ticks) => ticks.map((value) => number(value)) }] };
  charts.push(new uPlot(options, uPlot.join(chart.lines.map((item) => item.points)), place));
}

function showCharts() {
  const top = scrollY;
  for (const chart of charts) chart.destroy();
  charts = [];
  const places = [];
  byId("chart-sections").replaceChildren(...data.sections.map((name) => {
    const section = make("section"), box = make("div", undefined, "charts");
    section.id = name.toLowerCase().replaceAll(" ", "-");
    section.append(make("h2", name));
    if (name === "Time and throughput") section.append(timeSplit(), make("p"));
    for (const chart of data.charts.filter((item) => item.section === name)) {
      const card = make("div", undefined, "card"), title = make("h3", chart.title), place = make("div", undefined, "plot");
      if (chart.unit) title.append(" ", make("span", `(${chart.unit})`, "unit"));
      card.append(title, make("p", chart.text, "hint"), place);
      box.append(card);
      places.push([chart, place]);
    }
    section.append(box.children.length ? box : make("p", "Nothing has been measured yet.", "empty"));
    return section;
  }));
  for (const [chart, place] of places) draw(chart, place);
  byId("nav").replaceChildren(...[...document.querySelectorAll("main section")].map((section) => {
    const link = make("a", section.querySelector("h2").textContent);
    link.href = `#${section.id}`;
    return link;
  }));
  scrollTo(0, top);
}

function fillChoice(select, entries, fallback) {
  const before = select.options.length ? select.value : fallback;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  select.value = entries.some(([value]) => value === before) ? before : fallback;
}
function fillFilters() {
  fillChoice(form.elements.run, [["", "all"], ...data.runs.map((run, i) => [String(i), run.name])], "");
  const steps = [...new Set(data.samples.map((sample) => sample.step))].sort((a, b) => a - b);
  fillChoice(form.elements.step, [["", "all"], ...steps.map((step) => [String(step), String(step)])], "");
  byId("sample-hint").textContent = `${data.samples.length} samples on this page; ${data.left_out} more are in the runs' rollouts/ folders and were left out.`;
}
function selected() {
  const run = form.elements.run.value, step = form.elements.step.value;
  const ranges = FIELDS.map((field) => [field, ...["min", "max"].map((end) => form.elements[`${field}_${end}`].value)]);
  return data.samples.filter((sample) => (run === "" || sample.run === Number(run)) && (step === "" || sample.step === Number(step)) &&
    ranges.every(([field, low, high]) => (low === "" && high === "") || (typeof sample[field] === "number" &&
      (low === "" || sample[field] >= Number(low)) && (high === "" || sample[field] <= Number(high)))));
}
function response(sample) {
  const { text, log_mu, log_pi, version } = sample.tokens, box = make("pre", undefined, "tokens");
  if (!text.length) {
    box.textContent = sample.response || "(empty response)";
    return box;
  }
  text.forEach((word, i) => {
    const token = make("span", word), known = typeof log_pi[i] === "number" && typeof log_mu[i] === "number";
    const difference = known ? log_pi[i] - log_mu[i] : 0;
    token.style.background = `rgba(${difference < 0 ? "213, 94, 0" : "0, 114, 178"}, ${0.75 * Math.min(1, Math.abs(difference))})`;
    token.tabIndex = -1;
    token.onmouseenter = token.onclick = () => {
      byId("token").textContent = `${JSON.stringify(word)}: log mu ${number(log_mu[i])}, log pi ${number(log_pi[i])}` +
        `${known ? `, difference ${number(difference)}` : ""} nats, weight version ${version[i]}` +
        `${sample.policy_version === null ? "" : `, ${sample.policy_version - version[i]} updates old`}`;
    };
    box.append(token);
  });
  return box;
}
function showSamples() {
  const found = selected();
  byId("count").textContent = `${found.length} of ${data.samples.length} samples` + (found.length > shown ? `, the first ${shown} are shown` : "");
  byId("sample-list").replaceChildren(...found.slice(0, shown).map((sample) => {
    const card = make("article", undefined, "card"), facts = make("div", undefined, "facts");
    const parts = { step: sample.step, reward: number(sample.reward), advantage: number(sample.advantage), "log W": number(sample.log_w),
      phi: number(sample.phi), tokens: sample.length, end: sample.finish_reason, expected: sample.label };
    facts.append(...Object.entries(parts).map(([name, value]) => make("span", `${name} ${value ?? "-"}`)));
    const title = dotted(sample.run);
    title.append(`, sample ${sample.sample}`);
    card.append(title, facts, make("pre", sample.prompt, "prompt"), response(sample));
    if (sample.reward_error) card.append(make("p", sample.reward_error, "note"));
    if (sample.cut) card.append(make("p", "Cut for this page; the whole text is in rollouts/.", "hint"));
    return card;
  }));
  if (!found.length) byId("sample-list").append(make("p", data.samples.length ? "No sample fits these filters." : "No samples were kept.", "empty"));
  byId("more").hidden = found.length <= shown;
}

async function refresh() {
  try {
    const answer = await fetch("content.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const fresh = { ...(await answer.json()), refresh: data.refresh };
    const changed = JSON.stringify({ ...fresh, written: 0 }) !== JSON.stringify({ ...data, written: 0 });
    data = fresh;
    byId("connection").textContent = "";
    showRuns();
    if (changed) { showCharts(); fillFilters(); showSamples(); }
  } catch (error) {
    byId("connection").textContent = "(no answer from the server; what it said last is shown)";
  }
  setTimeout(refresh, 1000 * data.refresh);
}

const system = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name) { root.dataset.theme = name; showCharts(); }
byId("theme").onclick = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
system.onchange = () => setTheme(system.matches ? "dark" : "light");
for (const box of form.querySelectorAll("fieldset")) {
  for (const [end, hint] of [["min", "from"], ["max", "to"]]) {
    const input = make("input");
    Object.assign(input, { type: "number", step: "any", name: `${box.dataset.field}_${end}`, placeholder: hint, ariaLabel: `${box.dataset.field} ${hint}` });
    box.append(input, " ");
  }
}
form.oninput = () => { shown = PAGE; showSamples(); };
form.onreset = () => setTimeout(form.oninput);
form.onsubmit = (event) => event.preventDefault();
byId("more").onclick = () => { shown += PAGE; showSamples(); };
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; showCharts(); } });
showRuns();
fillFilters();
showSamples();
setTheme(system.matches ? "dark" : "light");
if (data.refresh) setTimeout(refresh, 1000 * data.refresh);
