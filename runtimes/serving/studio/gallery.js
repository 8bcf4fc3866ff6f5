// The gallery: what was generated, the newest first, kept in this browser. A record holds one image, or two compared.

import { byId, element, icon } from "./dom.js";
import * as runs from "./runs.js";
import * as store from "./store.js";

const PAGE = 60;
const addresses = new Map();
let records = [], shown = PAGE, current = "", open = () => {};

/** Read what is stored; `choose(id)` is called for the record or run that is clicked. */
export async function load(choose) {
  open = choose;
  records = inOrder(await store.all("images"));
  draw();
}

export const find = id => records.find(record => record.id === id);

export const newest = () => records[0];

/** The records of a run, the first image first. */
export const ofRun = run => records.filter(record => record.run === run);

/** The record after (1) or before (-1) one, or undefined. */
export const neighbour = (id, by) => visible()[visible().findIndex(record => record.id === id) + by];

/** Add the records of a run that is done. */
export async function add(made) {
  for (const record of made) await store.put("images", record);
  records = inOrder([...made, ...records]);
  draw();
}

/** Remove a record; what it was is returned, for `restore`. */
export async function remove(id) {
  const record = find(id);
  records = records.filter(other => other !== record);
  await store.remove("images", id);
  draw();
  return record;
}

/** Undo `remove`. */
export async function restore(record) {
  await store.put("images", record);
  records = inOrder([...records, record]);
  draw();
}

/** Remove everything; the jobs that made it are returned. */
export async function removeAll() {
  const jobs = new Set(records.flatMap(record => record.images.map(image => image.job)));
  records = [];
  await store.clear("images");
  for (const address of addresses.values()) URL.revokeObjectURL(address);
  addresses.clear();
  byId("filter").value = "";
  draw();
  return jobs;
}

/** Mark the record or run that the stage shows. */
export function mark(id) {
  current = id;
  for (const button of byId("tiles").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.id === id));
  }
}

/** Address of an image's content within this page. */
export function addressOf(record, index = 0) {
  const name = `${record.id}/${index}`;
  if (!addresses.has(name)) addresses.set(name, URL.createObjectURL(record.images[index].blob));
  return addresses.get(name);
}

/** Whether images of a job are among the records. */
export const hasJob = job => records.some(record => record.images.some(image => image.job === job));

/** Names of files that records start from. */
export const filesInUse = () => new Set(records.flatMap(({ settings }) => [settings.image, settings.mask]));

/** The newest first; the images of a run as they were counted. */
const inOrder = found => found.sort((a, b) => b.created - a.created || (a.id < b.id ? -1 : 1));

function visible() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return records;
  return records.filter(record => {
    const text = [record.settings.prompt, ...record.images.map(image => image.model), record.settings.seed].join(" ").toLowerCase();
    return words.every(word => text.includes(word));
  });
}

/** Draw all tiles; those that are there already stay, so that the focus does. */
export function draw() {
  const found = visible();
  const before = new Map([...byId("tiles").children].map(tile => [tile.dataset.key, tile]));
  const tiles = [...runs.active().map(run => runTile(run, before.get(run.id))),
                 ...found.slice(0, shown).map(record => before.get(record.id) ?? recordTile(record))];
  const focused = document.activeElement;
  byId("tiles").replaceChildren(...tiles);
  if (byId("tiles").contains(focused)) focused.focus({ preventScroll: true });
  byId("gallery-count").textContent = records.length ? String(records.length) : "";
  byId("filter").hidden = byId("delete-all").hidden = !records.length;
  byId("show-more").hidden = found.length <= shown;
  byId("gallery-empty").hidden = tiles.length > 0;
  byId("gallery-empty").textContent = records.length ? "Nothing fits this filter."
    : "Images that you generate are kept here, in this browser, with everything needed to make them again.";
  mark(current);
}

function tile(key, label, ...children) {
  const button = element("button", { type: "button", "aria-label": label, onclick: () => open(key) }, ...children);
  button.dataset.id = key;
  const item = element("li", { class: "tile" }, button);
  item.dataset.key = key;
  return item;
}

function recordTile(record) {
  const names = record.images.map(image => image.model).join(" and ");
  const image = element("img", { src: addressOf(record), alt: "", loading: "lazy", decoding: "async" });
  const made = tile(record.id, `${record.settings.prompt || "Without a prompt"}, seed ${record.settings.seed}, ${names}`, image);
  if (record.images.length > 1) made.firstChild.append(element("span", { class: "badge" }, icon("compare")));
  return made;
}

function runTile(run, before) {
  const made = before ?? tile(run.id, `Being generated: ${run.settings.prompt || "without a prompt"}`,
                              element("div", { class: "under-way" }, element("progress", { max: "1", "aria-label": "Progress" })));
  made.classList.add("active");
  const { preview } = run.sides[0];
  let image = made.querySelector("img");
  if (preview && !image) {
    image = element("img", { alt: "" });
    made.firstChild.prepend(image);
  }
  if (preview) image.src = preview;
  made.querySelector("progress").value = Math.min(...run.sides.map(side => (side.total ? side.step / side.total : 0)));
  return made;
}

byId("filter").addEventListener("input", () => { shown = PAGE; draw(); });
byId("show-more").addEventListener("click", () => { shown += PAGE; draw(); });
