// The viewer of samples: filters, and responses token by token.
const PAGE = 20;
const FIELDS = ["reward", "length", "log_w", "phi"];
const form = byId("filters"), tip = byId("token"), tokenFacts = new WeakMap(); // token -> what gives its figures
let shown = PAGE;

function fillChoice(select, entries) {
  const before = select.value;
  select.replaceChildren(new Option("all", ""), ...entries.map(([value, text]) => new Option(text, value)));
  select.value = entries.some(([value]) => value === before) ? before : "";
  select.parentElement.hidden = entries.length < 2;
}
function fillFilters() {
  const all = (field) => [...new Set(data.samples.map((sample) => sample[field]))];
  fillChoice(form.elements.run, data.runs.map((run, i) => [String(i), run.name]));
  fillChoice(form.elements.step, all("step").sort((a, b) => b - a).map((step) => [String(step), String(step)]));
  fillChoice(form.elements.source, all("data_source").filter(Boolean).sort().map((source) => [source, source]));
  byId("inserted-key").hidden = !data.samples.some((sample) => sample.tokens.inserted_text.length);
  byId("sample-hint").textContent = `${number(data.samples.length, 9)} samples on this page` + (data.left_out
    ? `; ${number(data.left_out, 9)} more are in the runs' rollouts/ folders and were left out.` : ", all that the runs kept.");
}
function selected() {
  const { run, step, source } = Object.fromEntries(["run", "step", "source"].map((name) => [name, form.elements[name].value]));
  const ranges = FIELDS.map((field) => [field, ...["min", "max"].map((end) => form.elements[`${field}_${end}`].value)]);
  return data.samples.filter((sample) => (run === "" || sample.run === Number(run)) && (step === "" || sample.step === Number(step)) &&
    (source === "" || sample.data_source === source) &&
    ranges.every(([field, low, high]) => (low === "" && high === "") || (typeof sample[field] === "number" &&
      (low === "" || sample[field] >= Number(low)) && (high === "" || sample[field] <= Number(high)))))
    .sort((a, b) => b.step - a.step || a.run - b.run);
}

function word(text, className, facts) {
  const token = make("span", text, className + (text.includes("\n") ? " newline" : ""));
  tokenFacts.set(token, () => `${JSON.stringify(text)}\n${facts()}`);
  return token;
}
function sampled(sample, i) {
  const { text, log_mu, log_pi, version } = sample.tokens, known = typeof log_pi[i] === "number" && typeof log_mu[i] === "number";
  const difference = known ? log_pi[i] - log_mu[i] : 0;
  const token = word(text[i] ?? "", "", () => `log mu ${number(log_mu[i])}, log pi ${number(log_pi[i])} nats\n` +
    `${known ? `difference ${number(difference)} nats\n` : ""}weight version ${version[i] ?? "-"}` +
    (sample.policy_version === null || version[i] === null ? "" : `, ${sample.policy_version - version[i]} updates old`));
  token.style.background = `rgba(${difference < 0 ? "213, 94, 0" : "0, 114, 178"}, ${0.75 * Math.min(1, Math.abs(difference))})`;
  return token;
}
function response(sample) {
  const { text, inserted_text, inserted_before } = sample.tokens, box = make("pre", undefined, "tokens");
  if (!text.length && !inserted_text.length) {
    box.textContent = sample.response || "(empty response)";
    return box;
  }
  let next = 0;
  for (let i = 0; i <= text.length; i += 1) {
    for (; next < inserted_text.length && inserted_before[next] <= i; next += 1) {
      box.append(word(inserted_text[next] ?? "", "inserted", () => "inserted: the policy saw it and did not sample it"));
    }
    if (i < text.length) box.append(sampled(sample, i));
  }
  return box;
}
function sampleCard(sample) {
  const card = make("article", undefined, "card sample"), facts = make("div", undefined, "facts"), title = dotted(sample.run);
  title.append(make("span", ` step ${sample.step}, sample ${sample.sample ?? "?"}`, "unit"));
  const terms = Object.entries(sample.reward_terms ?? {}).map(([name, value]) => [`reward ${name}`, number(value)]);
  const parts = [["reward", number(sample.reward)], ...terms, ["advantage", number(sample.advantage)], ["log W", number(sample.log_w)],
    ["phi", number(sample.phi)], ["tokens", number(sample.length, 9)], ["end", sample.finish_reason], ["expected", sample.label], ["source", sample.data_source]];
  facts.append(...parts.filter(([, value]) => value !== null && value !== "").map(([name, value]) => {
    const fact = make("span", `${name} `);
    fact.append(make("b", value));
    return fact;
  }));
  card.append(title, facts, make("pre", sample.prompt, "prompt"), response(sample));
  if (sample.reward_error) card.append(make("p", sample.reward_error, "note"));
  if (sample.cut) card.append(make("p", "Cut for this page; the whole text is in rollouts/.", "hint"));
  return card;
}
function showSamples() {
  const found = selected();
  tip.hidden = true;
  byId("count").textContent = `${number(found.length, 9)} of ${number(data.samples.length, 9)} samples` +
    (found.length > shown ? `, the first ${shown} are shown` : "");
  byId("sample-list").replaceChildren(...found.slice(0, shown).map(sampleCard));
  if (!found.length) byId("sample-list").append(make("p", data.samples.length ? "No sample fits these filters." : "No samples were kept.", "empty"));
  byId("more").hidden = found.length <= shown;
}

// The figures of the token that is pointed at or tapped, below it or, where there is no room, above.
function showToken(event) {
  const facts = tokenFacts.get(event.target);
  tip.hidden = facts === undefined;
  if (tip.hidden) return;
  tip.textContent = facts();
  const at = event.target.getClientRects()[0], own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8))}px`;
  tip.style.top = `${at.bottom + own.height + 12 > innerHeight ? at.top - own.height - 6 : at.bottom + 6}px`;
}
byId("sample-list").onmouseover = byId("sample-list").onclick = showToken;
byId("sample-list").onmouseleave = () => { tip.hidden = true; };
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

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
