// Requests to this server. The key stays in this tab: sessionStorage ends with it.

const KEY = "ptuning-key";
const TRIES = 10;
const AGAIN_MS = 2000;

export const key = () => sessionStorage.getItem(KEY) || "";

export function useKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (options.json !== undefined) {
    headers["content-type"] = "application/json";
    options = { ...options, body: JSON.stringify(options.json) };
  }
  let response;
  for (let tries = 0; ; tries += 1) {
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch {
      throw new Error("the server does not respond");
    }
    if (response.status !== 503 || tries === TRIES) break; // a part of the server is starting, and nothing was done
    await new Promise((resolve) => { setTimeout(resolve, AGAIN_MS); });
  }
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not in this server's format */ }
  throw new Error(message);
}

export const get = async (path) => (await request(path)).json();
export const getText = async (path) => (await request(path)).text();
export const post = async (path, json) => (await request(path, { method: "POST", json })).json();
export const act = async (path) => (await request(path, { method: "POST" })).json();

export async function upload(name, content, purpose) {
  const body = new FormData();
  body.append("purpose", purpose);
  body.append("file", content, name);
  return (await request("/v1/files", { method: "POST", body })).json();
}

// The events of a streamed answer, one object each.
export async function* stream(path, json) {
  const response = await request(path, { method: "POST", json: { ...json, stream: true } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

let known;

export async function models(again = false) {
  if (!known || again) known = get("/v1/models").then((answer) => answer.data);
  try {
    return await known;
  } catch (error) {
    known = undefined;
    throw error;
  }
}
