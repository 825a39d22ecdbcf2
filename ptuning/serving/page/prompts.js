// The view "Prompts": versions, their metrics and origin, and the champion.

import { get, models, post } from "/page/api.js";
import { $, attempt, button, facts, make, number, say, show } from "/page/parts.js";
import { offer } from "/page/try.js";

const SHOWN = 200;

const measured = (metrics) => Object.entries(metrics || {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`).join(", ");

export async function list(again = false) {
  const all = await models(again);
  const served = new Map(all.filter((each) => each.soft_prompt && each.soft_prompt !== each.id).map((each) => [each.soft_prompt, each.id]));
  const wanted = $("filter").value.trim().toLowerCase();
  const versions = all.filter((each) => each.soft_prompt === each.id && each.id.toLowerCase().includes(wanted));
  versions.sort((one, two) => one.id.localeCompare(two.id, "en", { numeric: true }));
  $("prompt-count").textContent = versions.length > SHOWN ? `the first ${SHOWN} of ${versions.length} versions` : `${versions.length} versions`;
  $("versions").replaceChildren(...versions.slice(0, SHOWN).map((each) => {
    const name = served.get(each.id);
    return make("tr", {},
      make("th", { scope: "row" }, each.id),
      make("td", {}, name || ""),
      make("td", {}, String(each.length || "")),
      make("td", {}, (each.labels || []).slice(0, 6).join(", ") + ((each.labels || []).length > 6 ? ", ..." : "")),
      make("td", {}, measured(each.metrics)),
      make("td", {},
        button("Details", () => details(each.id), `Details of ${each.id}`),
        button("Try", () => attempt(async () => { await offer(each.id); show("try", true); }), `Try ${each.id}`),
        button("Promote", () => move("promote", { model: each.id }), `Promote ${each.id}`),
        name ? button("Roll back", () => move("rollback", { model: name }), `Roll back ${name}`) : null));
  }));
}

async function move(what, body) {
  const done = await post(`/v1/admin/${what}`, body);
  await list(true);
  say(`${done.champion} is the champion`);
}

async function details(id) {
  const found = await get(`/v1/admin/prompts/${encodeURIComponent(id)}`);
  const card = found.card;
  const words = make("table", {}, make("caption", {}, "Words of the base that are nearest to each virtual token (cosine)"));
  for (const [place, near] of (found.nearest_words || []).entries()) {
    const cells = near.map(([word, cosine]) => make("span", {}, `${JSON.stringify(word)} ${cosine.toFixed(2)}`));
    words.append(make("tr", {}, make("th", { scope: "row" }, String(place)), make("td", { className: "words" }, ...cells)));
  }
  $("details").replaceChildren(...[
    make("h3", {}, `${found.name}:${found.version}`),
    facts([
      ["Base", card.base],
      ["Aliases", found.aliases.join(", ")],
      ["Size", `${card.length} virtual tokens, ${card.init || "unknown"} at the start`],
      ["Input", card.template?.input],
      ["Metrics", measured(card.metrics)],
      ["Run", found.lineage.run_id],
      ["Data", Object.entries(found.lineage.data).map(([split, hash]) => `${split} ${hash.slice(0, 19)}`).join(", ")],
      ["Parent", found.lineage.parent_versions.join(", ") || found.lineage.parent?.slice(0, 12)],
      ["Promotions", found.promotions.map((each) => `${each.kind} by ${each.by} on ${new Date(each.time_ms).toISOString().slice(0, 16)}`).join(", ")],
      ["Norms", Object.entries(found.norms).map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`).join(", ")],
      ["Words", found.nearest_words ? "" : found.missing],
    ]),
    found.nearest_words ? words : null,
  ].filter(Boolean));
  $("details").scrollIntoView({ block: "nearest" });
}

export function begin() {
  $("filter").addEventListener("input", () => attempt(() => list()));
  document.addEventListener("view", (event) => event.detail === "prompts" && attempt(() => list(true)));
}
