import OpenAI, { toFile } from "openai";
import { readFileSync } from "node:fs";

const client = new OpenAI({ baseURL: process.env.CLIENT_URL, apiKey: process.env.CLIENT_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "the old hammer" }];
const answer = await client.chat.completions.create({ model: "fruits", messages });
const label = answer.choices[0].message.content;
if (!["fruit", "tool"].includes(label)) throw new Error(label);
let text = "";
for await (const part of await client.chat.completions.create({ model: "fruits", messages, stream: true }))
  text += part.choices[0]?.delta?.content ?? "";
if (text !== label) throw new Error(text);
const response = await client.responses.create({ model: "fruits", input: "the old hammer" });
if (response.output_text !== label) throw new Error(JSON.stringify(response));
const stream = client.responses.stream({ model: "fruits", input: "the old hammer" });
if ((await stream.finalResponse()).output_text !== label) throw new Error("stream");
const body = { model: "fruits", messages };
const line = JSON.stringify({ custom_id: "a", method: "POST", url: "/v1/chat/completions", body }) + "\n";
const upload = async (content, purpose = "batch") =>
  client.files.create({ file: await toFile(Buffer.from(content), "lines.jsonl"), purpose });
const file = await upload(line);
if ((await (await client.files.content(file.id)).text()) !== line) throw new Error("content");
let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
while (!["completed", "failed"].includes(batch.status)) {
  await new Promise((done) => setTimeout(done, 500));
  batch = await client.batches.retrieve(batch.id);
}
const answered = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
if (answered.response.body.choices[0].message.content !== label) throw new Error(JSON.stringify(answered));
const listed = [];
for await (const each of client.batches.list()) listed.push(each.id);
if (!listed.includes(batch.id) || !(await client.files.delete(file.id)).deleted) throw new Error("list");
if ((await client.batches.cancel(batch.id).catch((error) => error)).status !== 400) throw new Error("cancel of what has ended");
const stopped = await client.batches.create({ input_file_id: (await upload(line)).id, endpoint: "/v1/chat/completions", completion_window: "24h" });
if (!["cancelling", "cancelled", undefined].includes((await client.batches.cancel(stopped.id).catch(() => ({}))).status)) throw new Error("cancel");

const kinds = { plum: "fruit", pear: "fruit", saw: "tool", drill: "tool" };
const row = (number) => ([text, kind]) =>
  JSON.stringify({ messages: [{ role: "user", content: `${text} ${number}` }, { role: "assistant", content: kind }] });
const rows = Array.from({ length: 16 }, (_, number) => Object.entries(kinds).map(row(number))).flat().join("\n");
const training = await upload(rows, "fine-tune");
const { jobs } = client.fineTuning;
const [base] = (await client.models.list()).data;
const asked = { model: base.id, training_file: training.id, metadata: { team: "node" } };
const reached = async (id, wanted) => {
  for (;;) {
    const found = await jobs.retrieve(id);
    if (found.status === wanted) return found;
    if (["failed", "cancelled", "succeeded"].includes(found.status)) throw new Error(JSON.stringify(found));
    await new Promise((done) => setTimeout(done, 500));
  }
};
const first = await jobs.create({ ...asked, hyperparameters: { n_epochs: 50, batch_size: 1 } });
if ((await jobs.pause(first.id)).status !== "paused") throw new Error("pause");
await reached(first.id, "paused");
if (!["queued", "validating_files"].includes((await jobs.resume(first.id)).status)) throw new Error("resume");
if ((await jobs.cancel(first.id)).status !== "cancelled") throw new Error("cancel");
const second = await jobs.create({ ...asked, suffix: "node", hyperparameters: { n_epochs: 2 } });
const trained = await reached(second.id, "succeeded");
const own = [];
for await (const each of jobs.list({ limit: 1, metadata: { team: "node" } })) own.push(each.id);
if (own.join() !== [second.id, first.id].join()) throw new Error(own.join());
const said = [];
for await (const event of jobs.listEvents(second.id, { limit: 2 })) said.push(event.type);
if (!said.includes("metrics")) throw new Error(said.join());
const [checkpoint] = (await jobs.checkpoints.list(second.id)).data;
for (const model of [trained.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint]) {
  const told = await client.chat.completions.create({ model, messages });
  if (!["fruit", "tool"].includes(told.choices[0].message.content)) throw new Error(JSON.stringify(told));
}
const { version } = JSON.parse(readFileSync("node_modules/openai/package.json"));
console.log(JSON.stringify({ version, ran: ["chat", "stream", "responses", "responses stream", "files", "batches", "fine-tuning jobs"] }));
