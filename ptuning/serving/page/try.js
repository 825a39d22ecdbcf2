// The view "Try": one text, and the answers of the base and of soft prompts side by side.

import { get, models, post, stream } from "/page/api.js";
import { $, attempt, make, say } from "/page/parts.js";

const SHOWN = 60;
const MOST = 8;
const CHECKPOINTS = /-checkpoints(:\d+)?$/; // of jobs: shown if they are looked for
const chosen = new Set();
let offered = false; // the default choice is made once: later an empty choice is the user's

export async function offer(name = null) {
  if (name) {
    chosen.clear();
    chosen.add(name);
  }
  const all = await models();
  const wanted = $("search").value.trim().toLowerCase(); // after the wait: an earlier call never shows an older search
  const base = all[0].id;
  const named = all.filter((each) => chosen.has(each.id) || (wanted ? each.id.toLowerCase().includes(wanted) : !CHECKPOINTS.test(each.id)));
  const extra = [...chosen].filter((id) => !all.some((each) => each.id === id)).map((id) => ({ id }));
  if (!offered && !chosen.size) (all.length > 1 ? [base, all[1].id] : [base]).forEach((id) => chosen.add(id));
  offered = true;
  const boxes = [...extra, ...named].slice(0, SHOWN).map((each) => {
    const box = make("input", { type: "checkbox", value: each.id, checked: chosen.has(each.id) });
    box.addEventListener("change", () => (box.checked ? chosen.add(each.id) : chosen.delete(each.id)));
    const champion = each.soft_prompt && each.soft_prompt !== each.id ? ` (${each.soft_prompt})` : "";
    return make("label", { className: "choice" }, box, each.id === base ? `${each.id} (the base)` : `${each.id}${champion}`);
  });
  $("choices").replaceChildren(...boxes);
  if (named.length > SHOWN) $("choices").append(make("span", { className: "hint" }, `and ${named.length - SHOWN} more`));
}

function card(title) {
  const parts = { answer: make("p", { className: "answer" }), bars: make("div"), facts: make("p", { className: "facts" }) };
  $("answers").append(make("article", { className: "card" }, make("h3", {}, title), parts.answer, parts.bars, parts.facts));
  return parts;
}

async function* pieces(about, text) {
  const options = { stream_options: { include_usage: true } };
  if (about.soft_prompt) {
    const messages = [{ role: "user", content: text }];
    for await (const event of stream("/v1/chat/completions", { model: about.id, messages, ...options })) {
      yield [event.choices?.[0]?.delta?.content || "", event.usage];
    }
  } else {
    const body = { model: about.id, prompt: text, max_tokens: 24, temperature: 0, ...options };
    for await (const event of stream("/v1/completions", body)) yield [event.choices?.[0]?.text || "", event.usage];
  }
}

async function ask(title, about, text) {
  const parts = card(title);
  const began = performance.now();
  try {
    let usage;
    for await (const [piece, spent] of pieces(about, text)) {
      parts.answer.textContent += piece;
      usage = spent || usage;
    }
    const took = performance.now() - began;
    const details = usage?.prompt_tokens_details || {};
    parts.facts.textContent = [
      `${Math.round(took)} ms`,
      usage && `${usage.prompt_tokens} tokens read, ${details.cached_tokens || 0} of them cached`,
      details.virtual_tokens && `${details.virtual_tokens} virtual`,
      usage && `${usage.completion_tokens} generated`,
    ].filter(Boolean).join(" · ");
    if (about.labels) await bars(parts.bars, about, text);
  } catch (error) {
    parts.answer.textContent = error.message;
    parts.answer.className = "answer wrong";
  }
}

async function bars(place, about, text) {
  const [found] = (await post("/v1/classify", { model: about.id, input: [text] })).data;
  const shares = Object.entries(found.probabilities).sort(([, one], [, two]) => two - one).slice(0, 10);
  place.replaceChildren(...shares.map(([label, share]) => {
    const meter = make("meter", { min: 0, max: 1, value: share, ariaLabel: `probability of ${label}` });
    return make("div", { className: "bar" }, make("span", {}, label), meter, make("span", {}, `${(share * 100).toFixed(1)} %`));
  }));
}

export function begin() {
  $("search").addEventListener("input", () => attempt(() => offer()));
  document.addEventListener("view", (event) => event.detail === "try" && attempt(async () => {
    await models(true);
    await offer();
  }));
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async () => {
      const ids = [...chosen];
      if (!ids.length) throw new Error("choose who answers");
      if (ids.length > MOST) throw new Error(`choose at most ${MOST}: ${ids.length} are chosen`);
      $("answers").replaceChildren();
      const [text, front] = [$("text").value, $("front").value.trim()];
      const base = (await models())[0];
      const asked = [];
      for (const id of ids) {
        // The whole card of a soft prompt: the list has none for those that were not asked before.
        const about = id === base.id ? base : await get(`/v1/models/${encodeURIComponent(id)}`);
        asked.push(ask(id === base.id ? `${id} (the base)` : about.soft_prompt || id, about, text));
      }
      if (front) asked.push(ask("the base with the text prompt", base, `${front}\n${text}`));
      await Promise.all(asked);
      say(`${asked.length} answers`);
    }, event.submitter);
  });
}
