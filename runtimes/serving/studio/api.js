// The server's HTTP interface. Addresses are relative to the page, so that it works below a proxy's path.

import { requestFields } from "./settings.js";

const ENDED = ["completed", "failed", "cancelled"];
const KEY = "studio.key";
let key = readKey();
let askForKey = async () => null;

/** An answer of the server that is not a success, with its own words. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = "", code = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** The server cannot be reached at all. */
export class Unreachable extends Error {}

/** What is called when the server wants a key: gives one, or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => Boolean(key);

/** Use this key from now on; it is kept until the tab is closed. */
export function useKey(given) {
  key = given;
  try { sessionStorage.setItem(KEY, given); } catch { /* then until the page is left */ }
}

function readKey() {
  try { return sessionStorage.getItem(KEY) ?? ""; } catch { return ""; }
}

/** Entries of the served models. */
export async function models() {
  return (await json("v1/models")).data;
}

/** Accept a job for one model. Files are Blobs: `image`, and `mask` whose transparent part is painted anew. */
export async function submit(settings, model, files, signal) {
  const fields = { ...requestFields(settings, model) };
  for (const [name, file] of Object.entries(files)) fields[name] = await base64(file);
  // The same key on every attempt: one that is sent again, since the key of the server was missing, is still one job.
  const headers = { "Content-Type": "application/json", "Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-") };
  return json("v1/jobs", { method: "POST", headers, body: JSON.stringify(fields), signal });
}

async function base64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** A job as it is now; its images have addresses that hold for a while. */
export const job = (id, signal) => json(`v1/jobs/${encodeURIComponent(id)}`, { signal });

/** End a job; one that has ended stays as it is. */
export async function cancel(id) {
  await asked(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** Ended jobs of this key, the newest first. */
export async function completedJobs() {
  const found = [];
  for (let after = ""; found.length < 1000; ) {
    const page = await json(`v1/jobs?limit=100${after && `&after=${encodeURIComponent(after)}`}`);
    found.push(...page.data.filter(job => job.status === "completed"));
    if (!page.has_more) break;
    after = page.data.at(-1).id;
  }
  return found;
}

/** Content of an image by the address that its job gives. */
export async function image(address, signal) {
  // Whatever name of the server a proxy made the address of, it is asked where this page came from.
  return (await asked(address.slice(address.indexOf("v1/images/")), { signal })).blob();
}

/** Follow a job to its end: `update` gets `{status, position, step, total, preview}` as far as they changed; the job
 * as it is at its end is returned. */
export async function follow(id, update, signal) {
  for (let failures = 0; ; ) {
    try {
      for await (const { name, data } of events(`v1/jobs/${encodeURIComponent(id)}/events`, signal)) {
        failures = 0;
        if (name === "end") return data;
        if (name === "error") throw new ServerError(data.error.message, { param: data.error.param, code: data.error.code });
        update(newsOf(name, data));
      }
      const now = await job(id, signal);
      if (ENDED.includes(now.status)) return now;
    } catch (error) {
      if (signal.aborted || !passing(error) || ++failures > 30) throw error;
    }
    await new Promise(resolve => setTimeout(resolve, Math.min(200 * 2 ** failures, 4000)));
  }
}

/** Whether a job may still be followed after this: the server is away for a moment, and comes back with its jobs. */
const passing = error => error instanceof Unreachable || (error instanceof ServerError && error.status === 503);

function newsOf(name, data) {
  if (name === "position") return { status: "queued", position: data.position };
  if (name === "step") return { status: "running", step: data.step, total: data.total };
  return name === "preview" ? { status: "running", preview: data.b64_json } : {};
}

async function json(address, options) {
  const answer = await asked(address, options);
  try {
    return await answer.json();
  } catch {
    throw new ServerError("The server's answer cannot be read.", { status: answer.status });
  }
}

async function asked(address, options = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let answer;
    try {
      answer = await fetch(new URL(address, document.baseURI), { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The server does not answer.");
    }
    if (answer.ok) return answer;
    const error = await failure(answer);
    const given = answer.status === 401 ? await askForKey(error.message, Boolean(key)) : null;
    if (given === null) throw error;
    useKey(given);
  }
}

async function failure(answer) {
  const said = (await answer.json().catch(() => ({}))).error ?? {};
  return new ServerError(said.message ?? `The server answers ${answer.status} ${answer.statusText}`.trim(), {
    status: answer.status, param: said.param ?? "", code: said.code ?? "",
    retryAfter: Number(answer.headers.get("Retry-After")) || 0,
  });
}

/** Server-sent events as `{name, data}`. EventSource itself cannot send a key. */
async function* events(address, signal) {
  const answer = await asked(address, { headers: { Accept: "text/event-stream" }, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(error => {
        throw signal.aborted ? error : new Unreachable("The server stopped answering.");
      });
      if (done) return;
      const messages = (text + value).replaceAll("\r\n", "\n").split("\n\n");
      text = messages.pop();
      for (const message of messages) {
        const event = parsed(message);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(message) {
  let name = "message";
  const lines = [];
  for (const line of message.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
  }
  if (!lines.length) return null;
  try {
    return { name, data: JSON.parse(lines.join("\n")) };
  } catch {
    return null;
  }
}
