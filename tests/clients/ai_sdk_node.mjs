import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, streamText } from "ai";
import { readFileSync } from "node:fs";
import { z } from "zod";

const provider = createOpenAI({ baseURL: process.env.CLIENT_URL, apiKey: process.env.CLIENT_KEY });
const prompt = "the old hammer";
const { text } = await generateText({ model: provider("fruits"), prompt, maxRetries: 0 });
if (!["fruit", "tool"].includes(text)) throw new Error(text);
let streamed = "";
for await (const part of streamText({ model: provider("fruits"), prompt, maxRetries: 0 }).textStream) streamed += part;
if (streamed !== text) throw new Error(streamed);
const schema = z.object({ kind: z.enum(["fruit", "tool"]) });
const { object } = await generateObject({ model: provider("fruits"), prompt, schema, maxRetries: 0 });
if (object.kind !== text) throw new Error(JSON.stringify(object));
const chat = await generateText({ model: provider.chat("fruits"), prompt, maxRetries: 0 });
if (chat.text !== text) throw new Error(chat.text);
const { version } = JSON.parse(readFileSync("node_modules/@ai-sdk/openai/package.json"));
console.log(JSON.stringify({ version, ran: ["generateText (responses)", "streamText", "generateObject", "chat"] }));
