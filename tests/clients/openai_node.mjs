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
const file = await client.files.create({ file: await toFile(Buffer.from(line), "lines.jsonl"), purpose: "batch" });
if ((await (await client.files.content(file.id)).text()) !== line) throw new Error("content");
let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
while (!["completed", "failed"].includes(batch.status)) {
  await new Promise((done) => setTimeout(done, 500));
  batch = await client.batches.retrieve(batch.id);
}
const row = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
if (row.response.body.choices[0].message.content !== label) throw new Error(JSON.stringify(row));
const listed = [];
for await (const each of client.batches.list()) listed.push(each.id);
if (!listed.includes(batch.id) || !(await client.files.delete(file.id)).deleted) throw new Error("list");
const { version } = JSON.parse(readFileSync("node_modules/openai/package.json"));
console.log(JSON.stringify({ version, ran: ["chat", "stream", "responses", "responses stream", "files", "batches"] }));
