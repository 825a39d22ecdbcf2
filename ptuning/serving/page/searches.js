// The searches below the jobs, for administrators: their trials, and what a person tells them.

import { get, post } from "/page/api.js";
import { chart } from "/page/chart.js";
import { $, attempt, button, make, number, say } from "/page/parts.js";

const AGAIN_MS = 2000;
const PLACE = "/v1/admin/searches";
let followed = null;
let compared = null;
let timer = null;

async function list() {
  let found = [];
  try {
    found = (await get(PLACE)).data;
  } catch { /* for administrators only; the jobs are for all who may tune */ }
  $("searches").hidden = !found.length;
  if (!found.length) return;
  $("search-count").textContent = `${found.length} ${found.length === 1 ? "search" : "searches"} in the storage of this server`;
  $("search-rows").replaceChildren(...found.map((each) => make("tr", {}, make("th", { scope: "row" }, each.name),
    make("td", {}, each.status), make("td", {}, `${each.ended} of ${each.trials} ended`),
    make("td", {}, each.best === null ? "" : `${each.metric} ${number(each.best)} (${each.best_trial})`),
    make("td", {}, button("Follow", () => follow(each.name), `Follow ${each.name}`)))));
}

async function follow(name) {
  if (followed !== name) compared = null;
  followed = name;
  await look();
}

async function look() {
  clearTimeout(timer);
  const search = await get(`${PLACE}/${encodeURIComponent(followed)}`);
  $("search-details").hidden = false;
  $("search-name").textContent = `${search.name}: ${search.status}`;
  for (const id of ["clone-form", "extend-form"]) $(id).hidden = search.status === "finished";
  const curve = (run) => [`${run} ${search.metric}`, search.data.find((each) => each.run === run)?.curve || []];
  const shown = [...new Set([search.best_trial, compared])].filter(Boolean);
  $("search-curves").replaceChildren(chart(`${search.metric} of ${search.name}`, shown.map(curve)));
  const focused = document.activeElement?.getAttribute("aria-label");
  $("trials").replaceChildren(...search.data.map((each) => row(search, each)));
  if (focused && document.activeElement === document.body) $("trials").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  const told = search.interventions.slice().reverse().map((each) => make("li", {},
    `${new Date(each.created_at * 1000).toLocaleTimeString()} ${each.by}: ${sentence(each)}`));
  $("told").replaceChildren(...(told.length ? told : [make("li", {}, "nothing")]));
  if (search.status !== "finished" && !$("jobs").hidden) timer = setTimeout(() => attempt(look), AGAIN_MS);
}

function sentence(told) {
  if (told.taken) return told.answer;
  if (told.taken === false) return `refused: ${told.answer}`;
  const what = told.action === "extend" ? `${told.more} further trials` : `${told.action} ${told.trial}`;
  return `${what}: no driver has taken it yet`;
}

function row(search, trial) {
  const actions = [button("Compare", async () => choose(trial.run), `Compare ${trial.run}`)];
  if (search.status !== "finished") {
    if (trial.status === "running") actions.push(button("Stop", () => tell({ action: "stop", trial: trial.run }), `Stop ${trial.run}`));
    if (!trial.finalist) actions.push(button("Clone", async () => { await choose(trial.run); $("clone-changes").focus(); }, `Clone ${trial.run}`));
  }
  const best = trial.curve.at(-1);
  const settings = Object.entries(trial.settings).map(([name, value]) => `${name.replace(/^.*\./, "")} ${typeof value === "number" ? number(value) : value}`);
  return make("tr", {}, make("th", { scope: "row" }, trial.run),
    make("td", {}, trial.message && trial.status === "failed" ? `${trial.status}: ${trial.message}` : trial.status),
    make("td", {}, String(trial.step)), make("td", {}, best ? number(best[1]) : ""),
    make("td", {}, settings.join(", ") + (trial.origin ? ` (a clone of ${trial.origin})` : "")), make("td", {}, ...actions));
}

async function choose(run) {
  compared = run;
  $("clone-trial").value = run;
  await look();
}

async function tell(body) {
  await post(`${PLACE}/${encodeURIComponent(followed)}`, body);
  await look();
  say(`${followed} was told; its driver answers below`);
}

// "a.b=1 c.d=x" -> {"a.b": 1, "c.d": "x"}
function changes(text) {
  const found = {};
  for (const word of text.trim().split(/[\s,]+/)) {
    const [name, value] = [word.slice(0, word.indexOf("=")), word.slice(word.indexOf("=") + 1)];
    if (!name || !word.includes("=") || !value) throw new Error(`${word}: is not a change; write key=value, such as train.learning_rate=0.1`);
    found[name] = Number.isNaN(Number(value)) ? value : Number(value);
  }
  return found;
}

export function begin() {
  $("clone-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(() => tell({ action: "clone", trial: $("clone-trial").value, changes: changes($("clone-changes").value), warm: $("warm").checked }), event.submitter);
  });
  $("extend-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(() => tell({ action: "extend", more: Number($("more").value) }), event.submitter);
  });
  document.addEventListener("view", (event) => {
    clearTimeout(timer);
    if (event.detail !== "jobs") return;
    attempt(async () => {
      await list();
      if (followed && !$("searches").hidden) await look();
    });
  });
}
