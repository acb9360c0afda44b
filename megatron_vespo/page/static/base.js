"use strict";
// What all parts of the page use. Everything from a run is put on it as text, never as HTML.
let data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement, byId = (id) => document.getElementById(id);

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}
const formats = {}; // making one takes long
function number(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  if (value !== 0 && Math.abs(value) < 1e-3) return Number(value).toExponential(1);
  const notation = digits < 9 && Math.abs(value) >= 1e5 ? "compact" : "standard", key = notation + digits;
  formats[key] ??= new Intl.NumberFormat("en", { maximumSignificantDigits: digits, notation });
  return formats[key].format(value);
}
function dotted(run) {
  const title = make("h3"), dot = make("span", "", "dot");
  dot.style.background = color(run);
  title.append(dot, data.runs[run].name);
  return title;
}
// A table of texts and elements, in a box that scrolls by itself.
function table(heading, rows, empty) {
  if (!rows.length) return make("p", empty, "empty");
  const result = make("table"), box = make("div", undefined, "wide");
  for (const [tag, row] of [["th", heading], ...rows.map((row) => ["td", row])]) {
    const line = result.insertRow();
    row.forEach((content, k) => {
      const cell = make(tag);
      cell.dataset.label = heading[k].textContent ?? heading[k]; // beside the cell on a phone
      cell.append(content);
      line.append(cell);
    });
  }
  box.append(result);
  return box;
}
