// Puts the parts together: what happens on Generate, on a click, on a key, on a link.

import * as api from "./api.js";
import { announce, byId, confirmed, toast } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as inputImage from "./input_image.js";
import * as runs from "./runs.js";
import { DEFAULTS, FIELD_OF, ofHash } from "./settings.js";
import * as stage from "./stage.js";
import * as store from "./store.js";

const IDEAS = ["red apple", "birthday cake", "sailboat", "a snowy mountain", "octopus"];
let sending = false;

// ---- generating

async function generate() {
  if (sending || !form.model() || !form.check()) return;
  sending = true;
  byId("generate").setAttribute("aria-busy", "true");
  hideNotice();
  try {
    const settings = form.read();
    const run = await runs.start(settings, await inputImage.files(settings));
    stage.showRun(run);
    announce("Generating");
    if (window.matchMedia("(max-width: 860px)").matches) byId("stage").scrollIntoView({ block: "start", behavior: "smooth" });
  } catch (error) {
    if (!form.showProblem(FIELD_OF[error.param] ?? "", error.message)) showNotice(error.message, generate);
  } finally {
    sending = false;
    byId("generate").removeAttribute("aria-busy");
  }
}

async function cancel(run) {
  await runs.cancel(run.id);
  toast("Cancelled");
}

runs.watch({
  changed(run) {
    gallery.draw();
    if (stage.current().kind === "run" && stage.current().id === run.id) {
      stage.showRun(run);
      document.title = `${stage.progressText(run)} · Studio`;
    }
  },
  async completed(run) {
    await gallery.add(recordsOf(run));
  },
  ended(run) {
    document.title = "Studio · ldm-deploy";
    gallery.draw();
    const seen = stage.current().kind === "run" && stage.current().id === run.id;
    if (run.error) {
      const again = () => { form.fill(run.settings); generate(); };
      if (seen) stage.showError(run.error.message, again);
      else showNotice(run.error.message, again);
    } else if (seen) {
      showRun(run.id);
      if (!run.cancelled) announce("The image is there");
    }
  },
});

/** What a run made, as the gallery keeps it: every image with settings that make it again, alone. */
function recordsOf(run) {
  const [first] = run.sides;
  return first.images.map((image, index) => ({
    id: `${run.id}-${String(index).padStart(2, "0")}`, run: run.id, created: run.created,
    settings: { ...run.settings, ...(run.sides.length === 1 ? decided(first.request, first.model) : {}), n: 1, seed: image.seed },
    images: run.sides.map(side => ({ ...side.images[index], model: side.model, digest: side.digest || form.modelOf(side.model)?.digest,
                                     seconds: side.seconds, job: side.job })),
  }));
}

/** What was decided where the form left it open: by the quality, or by the model. */
function decided(request, model) {
  const known = { steps: request.steps ?? form.modelOf(model)?.default.steps, guidance: request.guidance_scale, scheduler: request.scheduler, strength: request.strength };
  return Object.fromEntries(Object.entries(known).filter(([, value]) => value !== undefined && value !== null));
}

// ---- what the server still has

/** Add the images of jobs that this browser does not have: of another browser, or of a program. */
async function fetchJobs() {
  byId("fetch").setAttribute("aria-busy", "true");
  try {
    const missing = (await api.completedJobs()).filter(job => !gallery.hasJob(job.id) && job.images.length);
    let count = 0;
    for (const job of missing) {
      const made = await recordsOfJob(job);
      await gallery.add(made);
      count += made.length;
    }
    toast(count ? `${count} ${count === 1 ? "image" : "images"} added` : "The server has no other images of yours");
    if (stage.current().kind === "empty") showRecord();
  } catch (error) {
    showNotice(error.message, fetchJobs);
  } finally {
    byId("fetch").removeAttribute("aria-busy");
  }
}

async function recordsOfJob(job) {
  const { request, images, model } = job;
  const contents = await Promise.all(images.map(image => api.image(image.url)));
  const { width, height } = await createImageBitmap(contents[0]);
  const settings = { ...DEFAULTS, prompt: String(request.prompt ?? ""), negative_prompt: String(request.negative_prompt ?? ""), model,
                     width, height, format: images[0].kind,
                     image: request.files?.image?.[0] ?? "", mask: request.files?.mask?.[0] ?? "", ...decided(request, model) };
  return images.map((image, index) => ({
    id: `${job.id}-${String(index).padStart(2, "0")}`, run: job.id, created: 1000 * job.created_at,
    settings: { ...settings, seed: image.seed },
    images: [{ ...image, blob: contents[index], model, digest: job.digest ?? "", seconds: job.seconds ?? null, job: job.id }],
  }));
}

/** Let the server forget jobs of which nothing is in the gallery any more; what it has forgotten already is as good. */
async function forget(jobs) {
  for (const job of jobs) if (job && !gallery.hasJob(job)) await api.cancel(job).catch(() => {});
}

// ---- showing

/** A run or a record by its id; what is newest if neither is there. */
function open(id) {
  const run = runs.byKey(id);
  if (run) stage.showRun(run);
  else showRecord(gallery.find(id));
  if (window.matchMedia("(max-width: 860px)").matches) byId("stage").scrollIntoView({ block: "start", behavior: "smooth" });
}

function showRecord(record) {
  const shown = record ?? gallery.newest();
  if (shown) stage.showRecord(shown);
  else stage.showEmpty(IDEAS);
}

/** What a run made: its image, or all of them. */
function showRun(id) {
  const made = gallery.ofRun(id);
  if (made.length > 1) stage.showGroup(made);
  else showRecord(made[0]);
}

stage.onActions({
  cancel, open,
  idea(text) {
    byId("prompt").value = text;
    form.saveDraft();
    generate();
  },
  turn(by) {
    const next = gallery.neighbour(stage.current().id, by);
    if (next) stage.showRecord(next);
  },
  async reuse(record) {
    await fill(record.settings);
    byId("prompt").focus();
    toast("The settings are in the form");
  },
  async startFrom(record) {
    await inputImage.use(record.images[0].blob);
    byId("mask-button").focus();
    toast("Starting from this image");
  },
  async remove(record) {
    const next = gallery.neighbour(record.id, 1) ?? gallery.neighbour(record.id, -1);
    await gallery.remove(record.id);
    showRecord(next);
    const forgetting = setTimeout(() => forget(record.images.map(image => image.job)), 9000);
    toast("Deleted", "Undo", async () => {
      clearTimeout(forgetting);
      await gallery.restore(record);
      stage.showRecord(record);
    });
  },
});

async function fill(settings) {
  const there = await inputImage.restore(settings.image, settings.mask);
  form.fill(settings);
  if (!there) form.showProblem("image", "The image that it starts from is not in this browser: choose it again.");
}

/** Fill the form from the address, if it says something; the address is plain again afterwards. */
async function readLink() {
  const link = ofHash(location.hash);
  if (!link) return false;
  history.replaceState(null, "", location.pathname + location.search);
  const { settings, bundle } = link;
  await fill(settings);
  const facts = form.modelOf(settings.model);
  if (settings.model && !facts) showNotice(`The link was made with the model “${settings.model}”, which this server does not have.`);
  else if (bundle && facts?.digest && !facts.digest.startsWith(bundle)) {
    showNotice(`The link was made with another build of ${settings.model} (${bundle.slice(0, 8)}): the image may differ.`);
  }
  stage.showEmpty([], "Settings of a link", "They are in the form. Press Generate to make the image.");
  return true;
}

// ---- messages

let retry = () => {};

function showNotice(text, again = null) {
  byId("notice-text").textContent = text;
  byId("notice-retry").hidden = !again;
  retry = again ?? (() => {});
  byId("notice").hidden = false;
}

function hideNotice() {
  byId("notice").hidden = true;
}

byId("notice-close").addEventListener("click", hideNotice);
byId("notice-retry").addEventListener("click", () => { hideNotice(); retry(); });

let asking = null; // requests that fail at the same time ask once

api.onKeyNeeded((message, given) => {
  asking ??= askForKey(given ? message : "").finally(() => { asking = null; });
  return asking;
});

function askForKey(reason) {
  const dialog = byId("key-dialog");
  byId("key-button").hidden = false;
  byId("key-reason").textContent = reason || "This server answers only with a key.";
  byId("key").value = "";
  dialog.showModal();
  return new Promise(resolve => {
    const end = key => { dialog.onclose = null; dialog.close(); resolve(key); };
    byId("key-form").onsubmit = event => { event.preventDefault(); end(byId("key").value.trim() || null); };
    byId("key-cancel").onclick = () => end(null);
    dialog.onclose = () => end(null);
  });
}

byId("key-button").addEventListener("click", async () => {
  const key = await askForKey("");
  if (key === null) return;
  api.useKey(key);
  hideNotice();
  start();
});
if (api.hasKey()) byId("key-button").hidden = false;

// ---- keys and buttons

byId("form").addEventListener("submit", event => { event.preventDefault(); generate(); });
byId("keys-button").addEventListener("click", () => byId("keys-dialog").showModal());
byId("keys-close").addEventListener("click", () => byId("keys-dialog").close());
byId("delete-all").addEventListener("click", async () => {
  if (!await confirmed("Delete all images?", "They are removed from this browser and from the server, and cannot be brought back.", "Delete all")) return;
  const jobs = await gallery.removeAll();
  showRecord();
  await forget(jobs);
});
byId("fetch").addEventListener("click", fetchJobs);

document.addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]")) return;
  const { key, target } = event;
  const typing = target.matches("input:not([type=radio]), textarea, select");
  const shown = stage.current();
  if (key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (key === "Escape") {
    const run = (shown.kind === "run" && runs.byKey(shown.id)) || runs.active()[0];
    if (!run) return;
    cancel(run);
  } else if (typing || target.matches("[type=radio]")) return;
  else if (key === "/") byId("prompt").focus();
  else if (shown.kind === "image" && key === "ArrowLeft") stageTurn(-1);
  else if (shown.kind === "image" && key === "ArrowRight") stageTurn(1);
  else if (shown.kind === "image" && key === "Delete") byId("stage").querySelector(".delete").click();
  else return;
  event.preventDefault();
});

function stageTurn(by) {
  const next = gallery.neighbour(stage.current().id, by);
  if (next) stage.showRecord(next);
}

window.addEventListener("hashchange", readLink);

// ---- the beginning

/** Remove files that nothing starts from any more. */
async function tidy() {
  const used = gallery.filesInUse();
  for (const run of await store.all("runs")) used.add(run.settings.image).add(run.settings.mask);
  const { image, mask } = form.read();
  used.add(image).add(mask);
  for (const { sha256 } of await store.all("files")) if (!used.has(sha256)) await store.remove("files", sha256);
}

async function start() {
  try {
    form.offer(await api.models());
  } catch (error) {
    showNotice(error.message, start);
  }
}

async function begin() {
  const draft = form.draft();
  await gallery.load(open);
  showRecord();
  await start();
  if (!await readLink()) await fill(draft);
  await runs.resume();
  const [newest] = runs.active();
  if (newest) stage.showRun(newest);
  await tidy();
  document.documentElement.dataset.ready = "true";
}

begin();
