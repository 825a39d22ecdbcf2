// The view "Jobs": upload rows, start a job, follow its curves, and try its checkpoints.

import { act, get, models, post, upload } from "/page/api.js";
import { chart } from "/page/chart.js";
import { $, attempt, button, facts, make, number, say, show } from "/page/parts.js";
import { offer } from "/page/try.js";

const AGAIN_MS = 2000;
const ENDED = ["succeeded", "failed", "cancelled"];
const PLACE = "/v1/fine_tuning/jobs";
const MOST_EVENTS = 1000;
let followed = null;
let timer = null;

async function start() {
  const file = await upload($("rows").files[0].name, $("rows").files[0], "fine-tune");
  const supervised = {};
  if ($("epochs").value) supervised.hyperparameters = { n_epochs: Number($("epochs").value) };
  if ($("input").value || $("target").value) supervised.template = { input: $("input").value, target: $("target").value };
  const body = { model: $("start").value, training_file: file.id, method: { type: "supervised", supervised } };
  if ($("suffix").value) body.suffix = $("suffix").value;
  followed = (await post(PLACE, body)).id;
  say(`the job ${followed} was created`);
  await look();
}

function row(job) {
  const change = (what) => async () => { await act(`${PLACE}/${job.id}/${what}`); await look(); };
  const buttons = [button("Follow", async () => { followed = job.id; await look(); }, `Follow ${job.id}`)];
  if (["queued", "running"].includes(job.status)) buttons.push(button("Pause", change("pause"), `Pause ${job.id}`));
  if (job.status === "paused") buttons.push(button("Resume", change("resume"), `Resume ${job.id}`));
  if (!ENDED.includes(job.status)) buttons.push(button("Cancel", change("cancel"), `Cancel ${job.id}`));
  if (job.fine_tuned_model) buttons.push(tryButton(job.fine_tuned_model));
  return make("tr", {}, make("th", { scope: "row" }, job.id), make("td", {}, job.status), make("td", {}, job.soft_prompt || ""),
    make("td", {}, job.trained_tokens ? number(job.trained_tokens) : ""), make("td", {}, ...buttons));
}

const tryButton = (model) => button("Try", async () => { await offer(model); show("try", true); }, `Try ${model}`);

async function look() {
  clearTimeout(timer);
  let goes = true; // after an answer that failed, too
  try {
    const jobs = (await get(`${PLACE}?limit=50`)).data;
    $("job-count").textContent = `${jobs.length} jobs, the newest first`;
    const focused = document.activeElement?.getAttribute("aria-label");
    $("job-rows").replaceChildren(...jobs.map(row));
    if (focused && document.activeElement === document.body) $("job-rows").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
    const job = jobs.find((each) => each.id === followed);
    if (job) await follow(job);
    goes = jobs.some((each) => !ENDED.includes(each.status) && each.status !== "paused");
  } finally {
    clearTimeout(timer);
    if (goes && !$("jobs").hidden) timer = setTimeout(() => attempt(look), AGAIN_MS);
  }
}

async function follow(job) {
  const [events, checkpoints] = await Promise.all([
    get(`${PLACE}/${job.id}/events?limit=${MOST_EVENTS}`),
    get(`${PLACE}/${job.id}/checkpoints?limit=10`),
  ]);
  const measured = events.data.filter((event) => event.type === "metrics").map((event) => event.data);
  const series = (...names) => measured.flatMap((data) => {
    const name = names.find((each) => typeof data[each] === "number");
    return name ? [[data.step, data[name]]] : [];
  }).sort(([one], [two]) => one - two);
  const open = $("job").querySelector("details")?.open;
  const curves = chart(`Loss of ${job.id}`, [["training loss", series("train_loss")], ["validation loss", series("full_valid_loss", "valid_loss")]]);
  if (open) curves.querySelector("details").open = true;
  const said = events.data.filter((event) => event.type !== "metrics").slice(0, 30);
  const finish = job.estimated_finish ? new Date(job.estimated_finish * 1000).toLocaleTimeString() : "";
  $("job").replaceChildren(...[
    make("h3", {}, job.id),
    facts([["Status", job.status], ["Starts from", job.model], ["Result", job.soft_prompt || job.fine_tuned_model],
      ["Finished at about", finish], ["Error", job.error?.message]]),
    curves,
    checkpoints.data.length ? make("h3", {}, "Checkpoints") : null,
    ...checkpoints.data.map((each) => make("p", {}, `step ${each.step_number}: `,
      `${Object.entries(each.metrics).map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`).join(", ")} `,
      tryButton(each.fine_tuned_model_checkpoint))),
    make("h3", {}, "Events"),
    make("ul", { className: "log", tabIndex: 0, ariaLabel: "Events, the newest first" }, ...said.map((event) =>
      make("li", {}, `${new Date(event.created_at * 1000).toLocaleTimeString()} ${event.message}`))),
  ].filter(Boolean));
}

export function begin() {
  $("job-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(start, event.submitter);
  });
  document.addEventListener("view", (event) => {
    clearTimeout(timer);
    if (event.detail !== "jobs") return;
    attempt(async () => {
      const all = await models();
      if (!$("start").value) $("start").value = all[0].id;
      await look();
    });
  });
}
