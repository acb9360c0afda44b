// The rest of the page: runs, evaluation, findings, settings; theme; and asking for news.
function showRuns() {
  byId("written").textContent = `${data.runs.length} run${data.runs.length > 1 ? "s" : ""}, written ${data.written}`;
  byId("run-cards").replaceChildren(...data.runs.map((run, i) => {
    const card = make("div", undefined, "card"), facts = make("dl");
    for (const [name, value] of Object.entries(run.facts)) {
      facts.append(make("dt", name), make("dd", typeof value === "number" ? number(value) : value));
    }
    card.append(dotted(i), make("p", run.folder, "hint"), make("p", `${number(run.done, 9)} of ${run.total === null ? "?" : number(run.total, 9)} steps done`));
    if (run.total) {
      const bar = make("div", undefined, "split"), part = make("i");
      part.style.width = `${Math.min(100, 100 * run.done / run.total)}%`;
      part.style.background = color(i);
      bar.append(part);
      card.append(bar);
    }
    card.append(facts, ...run.notes.map((note) => make("p", note, "note")));
    return card;
  }));
  const settings = table(["setting", ...data.runs.map((_, i) => dotted(i))],
    data.settings.map((row) => [make("code", row.key), ...row.values.map((value) => value ?? "-")]),
    data.runs.length > 1 ? "All settings are the same." : "One run alone: name two or more to compare their settings.");
  settings.classList.add("tall");
  byId("settings-table").replaceChildren(settings);
  const found = data.runs.flatMap((run, i) => run.findings.map((finding) => [dotted(i), number(finding.step, 9), finding.text]));
  const list = table(["run", "step", "finding"], found.reverse(), "No warnings.");
  list.classList.add("tall");
  byId("finding-list").replaceChildren(list);
}

function evaluationTable() {
  const { steps, others, methods } = data.evaluation, box = make("div", undefined, "results");
  const value = (result) => {
    const cell = make("span", result.value.toFixed(3), "value");
    cell.append(make("small", ` [${result.low.toFixed(3)}, ${result.high.toFixed(3)}]`), make("small", result.step === null ? result.label : `step ${number(result.step, 9)}`, "when"));
    return cell;
  };
  // Values with their intervals on a common scale from 0 to 1: before in grey, after in the run's colour.
  const picture = (run, ...results) => {
    const track = make("span", undefined, "track");
    results.forEach((result, k) => {
      const hue = k === results.length - 1 ? color(run) : "var(--soft)", span = make("i"), dot = make("b");
      const at = (x) => `${100 * Math.max(0, Math.min(1, x))}%`;
      span.style.cssText = `left: ${at(result.low)}; width: ${at(result.high - result.low)}; background: ${hue}`;
      dot.style.cssText = `left: ${at(result.value)}; background: ${hue}`;
      track.append(span, dot);
    });
    return track;
  };
  const set = (row) => {
    const cell = make("span", row.set);
    cell.append(make("small", `${number(row.problems, 9)} problems`, "when"));
    return cell;
  };
  const rows = steps.map((row) => [set(row), row.measure, dotted(row.run), value(row.first), value(row.last),
    make("b", `${row.last.value < row.first.value ? "" : "+"}${(row.last.value - row.first.value).toFixed(3)}`),
    picture(row.run, row.first, row.last), value(row.best)]);
  box.append(table(["set", "measure", "run", "before", "after", "change", "0 to 1", "best"], rows, others.length ? "None during training." : "There are no results in evaluation/ yet."));
  if (others.length) {
    box.append(make("h3", "Models evaluated by themselves"), table(["set", "measure", "run", "value", "0 to 1"],
      others.map((row) => [set(row), row.measure, dotted(row.run), value(row.only), picture(row.run, row.only)])));
  }
  if (methods.length) box.append(make("p", `In brackets: ${methods.join("; ")}. Answers are in the runs' evaluation/ folders.`, "hint"));
  return box;
}

const SHORT = { "Held-out evaluation": "Evaluation", "Time and throughput": "Time", "Findings of the health panel": "Findings", "Settings that differ": "Settings" };
function showLinks() {
  byId("nav").replaceChildren(...[...document.querySelectorAll("main section")].map((section) => {
    const title = section.querySelector("h2").textContent, link = make("a", SHORT[title] ?? title);
    link.href = `#${section.id}`;
    return link;
  }));
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
byId("smoothing").onchange = () => { smoothing = Number(byId("smoothing").value); showCharts(); };
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; showCharts(); } });
showRuns();
fillFilters();
showSamples();
setTheme(system.matches ? "dark" : "light");
showLinks();
if (data.refresh) setTimeout(refresh, 1000 * data.refresh);
