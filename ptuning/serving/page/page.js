// The page: its views, and the key.

import { key, models, useKey } from "/page/api.js";
import * as batch from "/page/batch.js";
import * as jobs from "/page/jobs.js";
import { $, attempt, make, say, show } from "/page/parts.js";
import * as prompts from "/page/prompts.js";
import * as searches from "/page/searches.js";
import * as ask from "/page/try.js";

const SHOWN = 500;
const views = [...document.querySelectorAll("[role=tab]")].map((tab) => tab.id.slice(4));

async function load() {
  const all = await models(true);
  const names = all.slice(0, SHOWN).map((each) => make("option", { value: each.id }));
  $("start-names").replaceChildren(...names);
  await ask.offer();
}

for (const view of views) {
  $(`tab-${view}`).addEventListener("click", () => show(view));
  $(`tab-${view}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const place = { Home: 0, End: views.length - 1 }[event.key] ?? (step && (views.indexOf(view) + step + views.length) % views.length);
    if (place === undefined) return;
    event.preventDefault();
    show(views[place], true);
  });
}

$("key").value = key();
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  attempt(async () => {
    await load();
    say(key() ? "the key is used in this tab, and forgotten with it" : "no key is used");
    document.dispatchEvent(new CustomEvent("view", { detail: location.hash.slice(1) || "try" }));
  });
});

for (const view of [ask, prompts, jobs, searches, batch]) view.begin();
attempt(load).then(() => show(views.includes(location.hash.slice(1)) ? location.hash.slice(1) : "try"));
