// The image that a run starts from, and the mask over it: chosen, dropped, pasted or generated before.

import { byId, sha256, toast } from "./dom.js";
import { paintMask } from "./mask_editor.js";
import * as store from "./store.js";

const MOST_SIDE = 2048; // pixels of what is stored and painted on; more would be scaled down for the model anyway
const view = byId("input-view");
let held = null; // {sheet: canvas of the image, image: sha256, mask: sha256 or "", strokes}
let changed = () => {};

/** Call this when there is another image or mask. */
export function onChange(call) {
  changed = call;
}

/** Names of image and mask, as settings have them, and the image's size. */
export function current() {
  return held ? { image: held.image, mask: held.mask, width: held.sheet.width, height: held.sheet.height }
    : { image: "", mask: "", width: 0, height: 0 };
}

/** Start from a file. */
export async function use(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return problem("This browser cannot read that file as an image.");
  }
  const scale = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const sheet = sheetOf(Math.max(Math.round(bitmap.width * scale), 1), Math.max(Math.round(bitmap.height * scale), 1));
  const pen = sheet.getContext("2d");
  pen.fillStyle = "#fff"; // what is transparent in it becomes white, not black
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, sheet.width, sheet.height);
  bitmap.close();
  held = { sheet, image: await stored(await png(sheet)), mask: "", strokes: [] };
  show();
}

/** Start from what settings name; false where this browser does not have it. */
export async function restore(image, mask) {
  if (!image) {
    if (held) remove();
    return true;
  }
  const [file, over] = [await store.get("files", image), mask ? await store.get("files", mask) : null];
  if (!file) {
    remove();
    return false;
  }
  const bitmap = await createImageBitmap(file.blob);
  const sheet = sheetOf(bitmap.width, bitmap.height);
  sheet.getContext("2d").drawImage(bitmap, 0, 0);
  held = { sheet, image, mask: over ? mask : "", strokes: over?.strokes ?? [] };
  show();
  return !mask || Boolean(over);
}

/** Start from noise again. */
export function remove() {
  held = null;
  byId("file").value = "";
  show();
}

/** Image and mask for a request that makes this size: its middle, scaled; without loss. */
export async function files(settings) {
  const found = {};
  for (const name of ["image", "mask"]) {
    if (!settings[name]) continue;
    const file = await store.get("files", settings[name]);
    if (!file) throw new Error(`The ${name} is not in this browser any more: choose it again.`);
    found[name] = await cropped(file.blob, settings.width, settings.height, name === "mask");
  }
  return found;
}

async function cropped(blob, width, height, crisp) {
  const bitmap = await createImageBitmap(blob);
  if (bitmap.width === width && bitmap.height === height) return blob;
  const sheet = sheetOf(width, height);
  const pen = sheet.getContext("2d");
  pen.imageSmoothingEnabled = !crisp; // a mask has no half-transparent pixels
  pen.imageSmoothingQuality = "high";
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [wide, high] = [bitmap.width * scale, bitmap.height * scale];
  pen.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
  return png(sheet);
}

function show() {
  byId("drop").hidden = held !== null;
  byId("input-image").hidden = held === null;
  problem("");
  if (held) {
    const scale = Math.min(1, 264 / Math.max(held.sheet.width, held.sheet.height));
    Object.assign(view, { width: Math.max(held.sheet.width * scale, 1), height: Math.max(held.sheet.height * scale, 1) });
    view.getContext("2d").drawImage(held.sheet, 0, 0, view.width, view.height);
    byId("mask-button").lastElementChild.textContent = held.mask ? "Change the mask" : "Paint a mask";
    if (held.mask) showMask(held.mask);
  }
  changed();
}

async function showMask(name) {
  const { blob } = await store.get("files", name);
  const bitmap = await createImageBitmap(blob);
  if (held?.mask !== name) return;
  const tint = sheetOf(view.width, view.height);
  const pen = tint.getContext("2d");
  pen.fillStyle = `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--mask").trim().split(/\s+/)} / 62%)`.replaceAll(",", " ");
  pen.fillRect(0, 0, tint.width, tint.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(bitmap, 0, 0, tint.width, tint.height);
  view.getContext("2d").drawImage(tint, 0, 0);
}

async function stored(blob, more = {}) {
  const name = await sha256(blob);
  await store.put("files", { sha256: name, blob, ...more });
  return name;
}

function sheetOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

function png(sheet) {
  return new Promise(resolve => sheet.toBlob(resolve, "image/png"));
}

function problem(text) {
  byId("image-problem").textContent = text;
}

function imageIn(transfer) {
  return [...transfer?.files ?? []].find(file => file.type.startsWith("image/"));
}

byId("file").addEventListener("change", event => {
  const [file] = event.target.files;
  if (file) use(file);
});
byId("image-remove").addEventListener("click", () => { remove(); byId("file").focus(); });
byId("mask-button").addEventListener("click", async () => {
  const painted = await paintMask(held.sheet, held.strokes);
  byId("mask-button").focus();
  if (!painted) return;
  held.strokes = painted.mask ? painted.strokes : [];
  held.mask = painted.mask ? await stored(painted.mask, { strokes: held.strokes }) : "";
  show();
});

document.addEventListener("paste", event => {
  const file = imageIn(event.clipboardData);
  if (!file || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  use(file);
  toast("Starting from the pasted image");
});
let depth = 0; // dragenter and dragleave come for every element below the pointer
const dragsFiles = event => [...event.dataTransfer?.types ?? []].includes("Files") && !document.querySelector("dialog[open]");
document.addEventListener("dragenter", event => { if (dragsFiles(event)) { depth++; byId("drop-cover").hidden = false; } });
document.addEventListener("dragleave", event => { if (dragsFiles(event) && --depth <= 0) { depth = 0; byId("drop-cover").hidden = true; } });
document.addEventListener("dragover", event => { if (dragsFiles(event)) event.preventDefault(); });
document.addEventListener("drop", event => {
  if (!dragsFiles(event)) return;
  event.preventDefault();
  depth = 0;
  byId("drop-cover").hidden = true;
  const file = imageIn(event.dataTransfer);
  if (file) use(file);
  else problem("That is no image.");
});
