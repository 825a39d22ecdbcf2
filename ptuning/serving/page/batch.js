// The view "Batch": a table (CSV) in, the same table with answers out, through files and batches of the API.

import { get, getText, models, post, upload } from "/page/api.js";
import { $, attempt, make } from "/page/parts.js";

const AGAIN_MS = 1000;
const ENDPOINT = "/v1/chat/completions";
const MOST = 50000;
const SHOWN = 20;
let table = null;

// RFC 4180: quoted fields may contain commas, line breaks and doubled quotes.
export function parse(text) {
  const rows = [[]];
  let field = "";
  let quoted = false;
  const end = () => { rows.at(-1).push(field); field = ""; };
  for (let at = 0; at < text.length; at += 1) {
    const letter = text[at];
    if (quoted) {
      if (letter !== '"') field += letter;
      else if (text[at + 1] === '"') { field += '"'; at += 1; } else quoted = false;
    } else if (letter === '"' && field === "") quoted = true;
    else if (letter === ",") end();
    else if (letter === "\n") { end(); rows.push([]); } else if (letter !== "\r") field += letter;
  }
  if (quoted) throw new Error("the table has a quote that is not closed");
  end();
  return rows.filter((row) => row.length > 1 || row[0] !== "");
}

export const written = (rows) => rows.map((row) => row.map((each) =>
  (/[",\r\n]/.test(each) ? `"${each.replaceAll('"', '""')}"` : each)).join(",")).join("\r\n") + "\r\n";

async function take(file) {
  const rows = parse((await file.text()).replace(/^\ufeff/, ""));
  if (rows.length < 2) throw new Error("the table has no rows below its names of columns");
  if (rows.length - 1 > MOST) throw new Error(`the table has more than ${MOST} rows; divide it, or use ptuning predict`);
  const wrong = rows.findIndex((row) => row.length !== rows[0].length);
  if (wrong > 0) throw new Error(`row ${wrong} has ${rows[wrong].length} fields, the names of columns are ${rows[0].length}`);
  table = { name: file.name, rows };
  $("column").replaceChildren(...rows[0].map((name, place) => make("option", { value: String(place) }, name)));
  $("column").disabled = false;
  $("column").value = String(Math.max(0, rows[0].findIndex((name) => /text|input|message|review/i.test(name))));
  $("batch-state").textContent = `${rows.length - 1} rows`;
  $("download").hidden = true;
  preview(rows);
}

function preview(rows) {
  const cells = (row, tag) => make("tr", {}, ...row.map((each) => make(tag, tag === "th" ? { scope: "col" } : {}, each)));
  $("preview").replaceChildren(make("caption", {}, `the first ${Math.min(SHOWN, rows.length - 1)} of ${rows.length - 1} rows`),
    make("thead", {}, cells(rows[0], "th")), make("tbody", {}, ...rows.slice(1, SHOWN + 1).map((row) => cells(row, "td"))));
}

async function run() {
  if (!table) throw new Error("choose a table");
  const { name, rows } = table;
  const [column, model] = [Number($("column").value), $("batch-model").value];
  const lines = rows.slice(1).map((row, place) => JSON.stringify({
    custom_id: String(place), method: "POST", url: ENDPOINT, body: { model, messages: [{ role: "user", content: row[column] }] },
  }));
  const file = await upload(`${name}.jsonl`, new Blob([`${lines.join("\n")}\n`]), "batch");
  let batch = await post("/v1/batches", { input_file_id: file.id, endpoint: ENDPOINT, completion_window: "24h" });
  $("batch-progress").hidden = false;
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    await new Promise((resolve) => { setTimeout(resolve, AGAIN_MS); });
    batch = await get(`/v1/batches/${batch.id}`);
    const { total, completed, failed } = batch.request_counts;
    $("batch-progress").value = total ? (completed + failed) / total : 0;
    $("batch-state").textContent = `${batch.status}: ${completed} of ${total || lines.length} rows answered`;
  }
  const problem = batch.errors?.data?.[0];
  if (problem) throw new Error(`line ${problem.line}: ${problem.message}`);
  const answers = new Array(lines.length).fill("");
  const errors = new Array(lines.length).fill("");
  for (const id of [batch.output_file_id, batch.error_file_id].filter(Boolean)) {
    for (const line of (await getText(`/v1/files/${id}/content`)).split("\n").filter(Boolean)) {
      const found = JSON.parse(line);
      const body = found.response?.body;
      answers[Number(found.custom_id)] = body?.choices?.[0]?.message?.content ?? "";
      errors[Number(found.custom_id)] = body?.error?.message || found.error?.message || "";
    }
  }
  const wrong = errors.some(Boolean);
  const done = rows.map((row, place) => [...row, place ? answers[place - 1] : "answer", ...(wrong ? [place ? errors[place - 1] : "error"] : [])]);
  preview(done);
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([written(done)], { type: "text/csv" }));
  $("download").download = name.replace(/(\.csv)?$/i, "-answered.csv");
  $("download").hidden = false;
  $("batch-state").textContent = `${batch.status}: ${lines.length} rows, ${errors.filter(Boolean).length} of them with an error`;
}

export function begin() {
  $("table").addEventListener("change", () => attempt(() => take($("table").files[0])));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) attempt(() => take(event.dataTransfer.files[0]));
    });
  }
  $("batch-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(run, event.submitter).finally(() => { $("batch-progress").hidden = true; });
  });
  document.addEventListener("view", (event) => event.detail === "batch" && attempt(async () => {
    const first = (await models()).find((each) => each.soft_prompt);
    if (first && !$("batch-model").value) $("batch-model").value = first.id;
  }));
}
