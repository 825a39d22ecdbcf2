// A line chart as SVG: a few series over steps, with a table of the same numbers for those who do not see it.

import { make, number } from "/page/parts.js";

const SPACE = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [640, 240, 48, 12, 28, 26];

function draw(tag, attributes, text = "") {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// Round numbers that divide a range into about as many parts.
export function ticks(low, high, parts) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / parts));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => span / each <= parts);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at += 1) found.push(at * step);
  return found;
}

// `series`: [name, [[step, value], ...]] each.
export function chart(title, series) {
  const shown = series.filter(([, points]) => points.length);
  const points = shown.flatMap(([, each]) => each);
  if (!points.length) return make("p", { className: "hint", textContent: "No measurements yet." });
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const [first, last] = [Math.min(...steps), Math.max(...steps, Math.min(...steps) + 1)];
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const x = (step) => LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - low) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  const ends = shown.map(([name, each]) => `${name} ${number(each.at(-1)[1])} at step ${each.at(-1)[0]}`).join(", ");
  const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": `${title}: ${ends}` });
  for (const value of ticks(low, high, 4)) {
    picture.append(draw("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid" }));
    picture.append(draw("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  for (const step of ticks(first, last, 6).filter(Number.isInteger)) {
    picture.append(draw("text", { x: x(step), y: HEIGHT - 8, "text-anchor": "middle" }, String(step)));
  }
  shown.forEach(([name, each], place) => {
    const kind = place ? "two" : "one";
    picture.append(draw("polyline", { points: each.map(([step, value]) => `${x(step)},${y(value)}`).join(" "), class: `line ${kind}` }));
    for (const [step, value] of each.length < 40 ? each : each.slice(-1)) {
      picture.append(draw("circle", { cx: x(step), cy: y(value), r: 2.5, class: kind }));
    }
    const legend = draw("text", { x: WIDTH - RIGHT - 110 * (shown.length - place), y: 12 });
    legend.append(draw("tspan", { class: kind }, "● "), name);
    picture.append(legend);
  });
  const body = make("tbody");
  for (const step of [...new Set(steps)].sort((one, two) => one - two)) {
    const cells = shown.map(([, each]) => each.find(([at]) => at === step)?.[1]);
    body.append(make("tr", {}, make("th", { scope: "row" }, String(step)),
      ...cells.map((value) => make("td", {}, value === undefined ? "" : number(value)))));
  }
  const head = make("tr", {}, ...["step", ...shown.map(([name]) => name)].map((name) => make("th", { scope: "col" }, name)));
  const table = make("table", {}, make("thead", {}, head), body);
  return make("div", {}, picture, make("details", {}, make("summary", {}, "Numbers"), table));
}
