import { ChatOpenAI } from "@langchain/openai";
import { readFileSync } from "node:fs";
import { z } from "zod";

const options = { apiKey: process.env.CLIENT_KEY, maxRetries: 0, configuration: { baseURL: process.env.CLIENT_URL } };
const model = new ChatOpenAI({ model: "fruits", ...options });
const { content } = await model.invoke("the old hammer");
if (!["fruit", "tool"].includes(content)) throw new Error(content);
let text = "";
for await (const part of await model.stream("the old hammer")) text += part.content;
if (text !== content) throw new Error(text);
const schema = z.object({ kind: z.enum(["fruit", "tool"]) });
const ran = ["invoke", "stream"];
for (const method of ["jsonSchema", "functionCalling"]) {
  const found = await model.withStructuredOutput(schema, { method, name: "Kind" }).invoke("the old hammer");
  if (found.kind !== content) throw new Error(`${method}: ${JSON.stringify(found)}`);
  ran.push(`withStructuredOutput ${method}`);
}
const responses = await new ChatOpenAI({ model: "fruits", useResponsesApi: true, ...options }).invoke("the old hammer");
if (responses.text !== content) throw new Error(JSON.stringify(responses));
const { version } = JSON.parse(readFileSync("node_modules/@langchain/openai/package.json"));
console.log(JSON.stringify({ version, ran: [...ran, "responses"] }));
