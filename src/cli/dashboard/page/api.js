// The control API, as this page's server passes it on.

// The session or the server is gone: this page can do nothing any more.
export class Lost extends Error {}

// A request that was refused, with the reason.
export class Refused extends Error {}

async function send(method, path, body) {
  const options = { method, credentials: "same-origin", cache: "no-store", redirect: "error" };
  if (body !== undefined) options.body = typeof body === "string" ? body : JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Lost("The dashboard’s server has ended. Run “bulkhead dashboard” again.");
  }
  if (answer.status === 401) {
    throw new Lost("This page’s session has ended. Run “bulkhead dashboard” and open the address that it prints.");
  }
  if (answer.ok) return answer;
  let message = `The request failed (${answer.status}).`;
  try {
    message = (await answer.json()).message || message;
  } catch {
    // Not a message of the API.
  }
  throw new Refused(message);
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, body) => (await send("POST", path, body ?? "")).json();
export const put = async (path, body) => (await send("PUT", path, body)).json();
export const remove = async (path) => (await send("DELETE", path)).json();

const MAX_LINE = 256 * 1024;

// Calls `take` with each status until the stream ends.
export async function follow(take) {
  const answer = await send("GET", "/v1/events");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) return;
    buffer += value;
    if (buffer.length > MAX_LINE) return;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) if (line) take(JSON.parse(line));
  }
}
