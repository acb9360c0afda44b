// The curves, a card each: every run in its colour, in every chart the same.
const COLORS = 7;
const choices = new Map(); // title of a chart -> the line that is shown of several runs
const hidden = new Set(); // runs by place, and lines of a single run by chart and label
let plots = [], smoothing = 0;

const color = (i) => `var(--c${i % COLORS})`;
const resolved = (i) => getComputedStyle(root).getPropertyValue(`--c${i % COLORS}`).trim();

// Average of the points so far, of which one so many steps back counts 1/e.
function smooth([steps, values], width) {
  let sum = 0, weight = 0;
  return [steps, values.map((value, i) => {
    const kept = i ? Math.exp((steps[i - 1] - steps[i]) / width) : 0;
    sum = kept * sum + value;
    weight = kept * weight + 1;
    return sum / weight;
  })];
}

// What is drawn: of several runs one line each, of a single run all its lines.
function curves(chart) {
  const labels = [...new Set(chart.lines.map((line) => line.label))], several = data.runs.length > 1;
  const choice = labels.includes(choices.get(chart.title)) ? choices.get(chart.title) : labels[0];
  const drawn = chart.lines.filter((line) => !several || line.label === choice).map((line) => ({
    ...line, key: several ? line.run : `${chart.title}: ${line.label}`, hue: several ? line.run : labels.indexOf(line.label),
    name: several ? data.runs[line.run].name : line.label,
  }));
  return { drawn, labels, choice: several && labels.length > 1 ? choice : null };
}

function draw(chart, card) {
  const { drawn } = curves(chart), tables = [], series = [{}], bands = [], legend = [];
  const few = drawn.every((line) => line.points[0].length < 35);
  const add = (options) => series.push({ spanGaps: true, ...options }) - 1;
  for (const line of drawn) {
    const [steps, values, low, high] = line.points, stroke = resolved(line.hue), show = !hidden.has(line.key), own = [];
    const points = { show: few || steps.length < 2, size: 5, fill: stroke };
    if (low) {
      tables.push([steps, low, high]);
      own.push(add({ show, width: 0, points: { show: false } }), add({ show, width: 0, points: { show: false } }));
      bands.push({ series: [own[1], own[0]], fill: `${stroke}26` });
    }
    tables.push([steps, values]);
    own.push(add({ show, stroke: smoothing ? `${stroke}40` : stroke, width: smoothing ? 1 : 1.75, points: smoothing ? { show: false } : points }));
    if (smoothing) {
      tables.push(smooth(line.means ?? line.points, smoothing));
      own.push(add({ show, stroke, width: 2, points: { ...points, show: steps.length < 2 } }));
    }
    legend.push({ ...line, own });
  }
  const style = getComputedStyle(root), grid = { stroke: style.getPropertyValue("--line"), width: 1 };
  const axis = { stroke: style.getPropertyValue("--soft"), grid, ticks: { ...grid, size: 4 }, font: "11px system-ui, sans-serif" };
  const place = card.querySelector(".plot");
  const options = {
    width: place.clientWidth, height: 190, series, bands, legend: { show: false }, scales: { x: { time: false } }, padding: [8, 17, 0, 0],
    axes: [{ ...axis, size: 28, gap: 3, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] },
      { ...axis, size: 52, gap: 4, space: 34, values: (_, ticks) => ticks.map((value) => number(value)) }],
    cursor: { y: false, sync: { key: "step" }, points: { size: 7 } },
    hooks: { setCursor: [(plot) => showValues(plot, legend, card)] },
  };
  const plot = new uPlot(options, uPlot.join(tables), place);
  plots.push(plot);
  card.querySelector(".legend").replaceChildren(...legend.map((line) => {
    const entry = make("button"), dot = make("span", "", "dot");
    dot.style.background = color(line.hue);
    entry.type = "button";
    entry.ariaPressed = String(!hidden.has(line.key));
    entry.append(dot, make("span", line.name, "name"), line.value = make("b"));
    entry.disabled = drawn.length === 1;
    entry.onclick = () => {
      if (!hidden.delete(line.key)) hidden.add(line.key);
      showCharts();
    };
    return entry;
  }), make("span", "", "at"));
  showValues(plot, legend, card);
}

// The values where the pointer is, or the last ones. A run that has none just there shows the one before.
function showValues(plot, legend, card) {
  const steps = plot.data[0], place = plot.cursor.idx ?? steps.length - 1;
  for (const line of legend) {
    const values = plot.data[line.own.at(-1)];
    let i = place;
    while (i > 0 && values[i] == null) i -= 1;
    line.value.textContent = number(values[i], 3);
  }
  card.querySelector(".at").textContent = `step ${number(steps[place], 12)}`;
}

function chartCard(chart) {
  const card = make("article", undefined, "card chart"), title = make("h3", chart.title), { labels, choice } = curves(chart);
  if (chart.unit) title.append(" ", make("span", `(${chart.unit})`, "unit"));
  const head = make("div", undefined, "chart-head");
  head.append(title);
  if (choice !== null) {
    const select = make("select");
    select.ariaLabel = `Line of ${chart.title}`;
    select.append(...labels.map((label) => new Option(label, label, false, label === choice)));
    select.onchange = () => { choices.set(chart.title, select.value); showCharts(); };
    head.append(select);
  }
  card.append(head, make("p", chart.text, "hint"), make("div", undefined, "plot"), make("div", undefined, "legend"));
  return card;
}

function timeSplit() {
  const box = make("div", undefined, "cards");
  box.append(...data.time_split.filter((split) => Object.keys(split.phases).length).map((split) => {
    const card = make("div", undefined, "card"), bar = make("div", undefined, "split"), facts = make("div", undefined, "facts");
    const rest = 1 - Object.values(split.phases).reduce((sum, share) => sum + share, 0);
    for (const [name, share] of Object.entries({ ...split.phases, other: Math.max(0, rest) })) {
      const hue = name === "other" ? "var(--line)" : `var(--p${data.phases.indexOf(name)})`;
      const part = make("i"), fact = make("span"), dot = make("span", "", "dot");
      part.style.width = `${100 * share}%`;
      part.style.background = dot.style.background = hue;
      part.title = name;
      fact.append(dot, `${name} `, make("b", `${share < 1e-3 ? "<0.1" : number(100 * share, 2)} %`));
      bar.append(part);
      facts.append(fact);
    }
    card.append(dotted(split.run), make("p", "Share of the time of all steps", "hint"), bar, facts);
    return card;
  }));
  return box;
}

function showCharts() {
  const top = scrollY;
  for (const plot of plots) plot.destroy();
  plots = [];
  const cards = [];
  byId("chart-sections").replaceChildren(...data.sections.map((name, place) => {
    const section = make("section"), box = make("div", undefined, "charts");
    section.id = name.toLowerCase().replaceAll(" ", "-");
    section.append(make("h2", name));
    if (name === "Held-out evaluation") section.append(evaluationTable());
    if (name === "Time and throughput") section.append(timeSplit());
    for (const chart of data.charts.filter((item) => item.section === name)) {
      const card = chartCard(chart);
      box.append(card);
      cards.push([chart, card]);
    }
    if (box.children.length) section.append(box);
    else if (place) section.append(make("p", "Nothing has been measured yet.", "empty"));
    return section;
  }));
  for (const [chart, card] of cards) draw(chart, card);
  scrollTo(0, top);
}
