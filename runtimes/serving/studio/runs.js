// Runs: what one press of Generate starts. One job of the server, or two beside each other for a comparison.

import * as api from "./api.js";
import { randomSeed } from "./settings.js";
import * as store from "./store.js";

const underWay = new Map();
let watchers = { changed: () => {}, completed: async () => {}, ended: () => {} };

/** Runs that have not ended, the newest first. */
export const active = () => [...underWay.values()].sort((a, b) => b.created - a.created);

export const byKey = id => underWay.get(id);

/** Call `changed(run)` on every step, `completed(run)` when all its images are there, `ended(run)` when it is gone. */
export function watch(given) {
  watchers = given;
}

/** Start a run. Its seed is fixed now: what a comparison shows then differs by the model alone.
 *
 * @throws {ServerError} the server does not take it; nothing was started then.
 */
export async function start(settings, files) {
  const fixed = { ...settings, seed: settings.seed ?? randomSeed() };
  const models = [fixed.model, ...(fixed.compare ? [fixed.compare] : [])];
  const run = { id: crypto.randomUUID?.() ?? String(Math.random()), settings: fixed, created: Date.now(), sides: [] };
  try {
    for (const model of models) run.sides.push(side(model, await api.submit(fixed, model, files)));
  } catch (error) {
    for (const { job } of run.sides) api.cancel(job).catch(() => {});
    throw error;
  }
  underWay.set(run.id, run);
  await store.put("runs", saved(run));
  watchers.changed(run);
  attend(run);
  return run;
}

/** Go on with the runs that were under way when the page was left. */
export async function resume() {
  for (const { id, settings, created, jobs } of await store.all("runs")) {
    const run = { id, settings, created, sides: jobs.map(({ model, job }) => side(model, { id: job })) };
    underWay.set(id, run);
    watchers.changed(run);
    attend(run);
  }
}

/** End a run, at the server too. */
export async function cancel(id) {
  const run = underWay.get(id);
  if (!run || run.cancelled) return;
  run.cancelled = true;
  run.abort.abort();
  await leave(run);
  // One that has ended in this very moment cannot be cancelled any more, which is as good.
  await Promise.allSettled(run.sides.map(({ job }) => api.cancel(job)));
}

function side(model, job) {
  return { model, job: job.id, status: job.status ?? "queued", position: job.position ?? 0, step: 0, total: 0,
           preview: null, images: [], digest: "", request: job.request ?? {}, seconds: null };
}

function saved(run) {
  return { id: run.id, settings: run.settings, created: run.created,
           jobs: run.sides.map(({ model, job }) => ({ model, job })) };
}

async function attend(run) {
  run.abort = new AbortController();
  try {
    await Promise.all(run.sides.map(side => attendSide(run, side)));
    await watchers.completed(run);
    await leave(run);
  } catch (error) {
    if (run.cancelled) return;
    run.error = error;
    run.abort.abort();
    for (const { job, status } of run.sides) if (status === "queued" || status === "running") api.cancel(job).catch(() => {});
    await leave(run);
  }
}

async function attendSide(run, side) {
  const { signal } = run.abort;
  const end = await api.follow(side.job, data => {
    take(side, data);
    watchers.changed(run);
  }, signal);
  side.status = end.status;
  if (end.status !== "completed") throw new api.ServerError(end.reason || `The job was ${end.status}.`);
  side.step = side.total = end.total || side.total || 1;
  side.digest = end.digest ?? "";
  side.request = end.request;
  side.seconds = end.seconds ?? null;
  side.images = await Promise.all(end.images.map(async found => ({ ...found, blob: await api.image(found.url, signal) })));
  watchers.changed(run);
}

function take(side, data) {
  side.status = data.status ?? side.status;
  side.position = data.position ?? side.position;
  side.step = data.step ?? side.step;
  side.total = data.total ?? side.total;
  if (data.preview) {
    if (side.preview) URL.revokeObjectURL(side.preview);
    side.preview = URL.createObjectURL(decoded(data.preview));
  }
}

function decoded(text) {
  return new Blob([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))], { type: "image/png" });
}

async function leave(run) {
  underWay.delete(run.id);
  await store.remove("runs", run.id);
  watchers.ended(run);
  for (const { preview } of run.sides) if (preview) URL.revokeObjectURL(preview);
}
