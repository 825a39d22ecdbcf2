import OpenAI from "openai";
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
const { version } = JSON.parse(readFileSync("node_modules/openai/package.json"));
console.log(JSON.stringify({ version, ran: ["chat", "stream", "responses", "responses stream"] }));
