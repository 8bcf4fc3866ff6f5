// The large view: nothing yet, a run under way, what it made, one image of the gallery, or an error.

import { byId, copyOf, copyText, element, icon } from "./dom.js";
import { comparison } from "./comparison.js";
import * as gallery from "./gallery.js";
import { linkTo } from "./settings.js";

const stage = byId("stage");
const MOST_ENLARGED = 6; // times: a small image is not blown up beyond recognition
let showing = { kind: "", id: "" };
let perform = {};

/** What the buttons do: `idea(text)`, `cancel(run)`, `open(record)`, `turn(by)`, `reuse`, `startFrom`, `remove`. */
export function onActions(given) {
  perform = given;
}

/** What is shown: `{kind, id}` of "empty", "run", "group", "image" or "error". */
export const current = () => showing;

function set(kind, id, ...children) {
  const inside = stage.contains(document.activeElement);
  showing = { kind, id };
  stage.replaceChildren(...children);
  if (inside) stage.focus({ preventScroll: true });
  gallery.mark(id);
}

/** Nothing was generated yet. */
export function showEmpty(ideas, title = "", text = "") {
  const empty = copyOf("empty-template");
  if (title) {
    empty.querySelector("h2").textContent = title;
    empty.querySelector("p").textContent = text;
  }
  empty.querySelector(".ideas").append(...ideas.map(idea => element("li", {}, element("button", {
    type: "button", onclick: () => perform.idea(idea) }, idea))));
  set("empty", "", empty);
}

/** Why there is no image, in the server's words. */
export function showError(message, retry) {
  const again = retry && element("button", { type: "button", onclick: retry }, "Try again");
  set("error", "", element("div", { class: "empty failed", role: "alert" }, icon("alert"),
                           element("h2", {}, "No image this time"), element("p", {}, message), ...(again ? [again] : [])));
}

// ---- a run

/** Show a run, or how far it is now if it is shown already. */
export function showRun(run) {
  if (showing.kind !== "run" || showing.id !== run.id) {
    const made = copyOf("run-template");
    const { width, height, n } = run.settings;
    const previews = element("div", { class: "previews" }, ...run.sides.map(side => preview(run, side, n * width, height)));
    previews.style.setProperty("--columns", String(run.sides.length));
    made.querySelector(".canvas").append(previews);
    made.querySelector("progress").setAttribute("aria-label", "Progress");
    made.querySelector(".cancel").addEventListener("click", () => perform.cancel(run));
    set("run", run.id, made);
  }
  const share = run.sides.map(side => (side.total ? side.step / side.total : 0));
  stage.querySelector("progress").value = Math.min(...share);
  stage.querySelector(".progress-text").textContent = progressText(run);
  run.sides.forEach((side, index) => {
    const figure = stage.querySelectorAll(".preview")[index];
    figure.classList.toggle("waiting", !side.preview);
    figure.style.setProperty("--blur", `${Math.round(8 * (1 - share[index])) + 1}px`);
    const image = figure.querySelector("img");
    image.hidden = !side.preview;
    if (side.preview) image.src = side.preview;
  });
}

function preview(run, side, width, height) {
  const figure = element("figure", { class: "preview fit" }, element("img", { alt: `Preview of ${run.settings.prompt || "the image"}` }));
  if (run.sides.length > 1) figure.append(element("figcaption", {}, side.model));
  fitted(figure, width, height);
  return figure;
}

/** In words: the place in the queue, or the step. */
export function progressText(run) {
  const texts = run.sides.map(side => {
    if (side.status === "completed") return "done";
    if (side.status === "queued") return side.position ? `waiting, ${side.position} before it` : "waiting, next in line";
    return side.total ? `step ${side.step} of ${side.total}` : "starting";
  });
  if (texts.length > 1) return run.sides.map((side, index) => `${side.model}: ${texts[index]}`).join(" · ");
  return texts[0][0].toUpperCase() + texts[0].slice(1);
}

/** All images of a run that made several. */
export function showGroup(records) {
  const { width, height } = records[0].settings;
  const columns = columnsFor(records.length, width / height);
  const rows = Math.ceil(records.length / columns);
  const group = element("div", { class: "previews group" }, ...records.map((record, index) => {
    const image = element("img", { src: gallery.addressOf(record), alt: "" });
    const button = element("button", { type: "button", class: "fit", "aria-label": `Image ${index + 1} of ${records.length}, seed ${record.settings.seed}`,
                                       onclick: () => perform.open(record.id) }, image);
    fitted(button, width, height);
    return button;
  }));
  group.style.setProperty("--columns", String(columns));
  group.style.setProperty("--rows", String(rows));
  set("group", records[0].run, element("div", { class: "canvas" }, group),
      element("p", { class: "hint group-hint" }, `${records.length} images of “${records[0].settings.prompt}”. Choose one to see it large.`));
}

/** The number of columns in which so many images of this shape are largest. */
function columnsFor(count, ratio) {
  const place = stage.clientWidth / Math.min(Math.max(innerHeight * 0.58, 280), 720);
  const sizes = Array.from({ length: count }, (_, index) => Math.min(place / (index + 1), ratio / Math.ceil(count / (index + 1))));
  return sizes.indexOf(Math.max(...sizes)) + 1;
}

// ---- an image

/** One record of the gallery: an image, or two under a slider. */
export function showRecord(record) {
  const made = copyOf("shown-template");
  const { width, height } = record.settings;
  const urls = record.images.map((_, index) => gallery.addressOf(record, index));
  const view = urls.length > 1 ? comparison(urls, record.images.map(image => image.model), record.settings)
    : element("img", { src: urls[0], alt: record.settings.prompt || "Generated image" });
  view.classList.add("fit");
  fitted(view, width, height);
  made.querySelector(".frame").append(view);
  for (const [name, by] of [["previous", -1], ["next", 1]]) {
    const button = made.querySelector(`.${name}`);
    button.hidden = !gallery.neighbour(record.id, by);
    button.addEventListener("click", () => perform.turn(by));
  }
  const prompt = made.querySelector(".about-prompt");
  prompt.textContent = record.settings.prompt || "Without a prompt";
  prompt.classList.toggle("none", !record.settings.prompt);
  made.querySelector(".about-flag").hidden = !record.images.some(image => image.flagged);
  made.querySelector(".facts").append(...factsOf(record).flatMap(([word, value]) => [element("dt", {}, word), element("dd", {}, value)]));
  connect(made, record, urls);
  set("image", record.id, made);
}

function connect(made, record, urls) {
  made.querySelector(".reuse").addEventListener("click", () => perform.reuse(record));
  made.querySelector(".start").addEventListener("click", () => perform.startFrom(record));
  made.querySelector(".link").addEventListener("click", () => copyText(linkTo(record.settings, record.images[0].digest), "Link copied: it makes this image again"));
  made.querySelector(".delete").addEventListener("click", () => perform.remove(record));
  const first = made.querySelector(".download");
  const links = urls.map((url, index) => {
    const link = index ? first.cloneNode(true) : first;
    link.href = url;
    link.download = fileName(record, index);
    if (urls.length > 1) {
      link.lastElementChild.textContent = `Download ${record.images[index].model}`;
      link.classList.add("wide");
    }
    return link;
  });
  if (links.length > 1) made.querySelector(".actions").append(...links);
}

function factsOf({ settings, images, created }) {
  const bundles = images.map(({ model, digest }) => (digest ? `${model} (${digest.slice(0, 8)})` : model)).join(" and ");
  const seconds = images.map(image => image.seconds).filter(Boolean).map(value => `${value.toFixed(value < 10 ? 2 : 1)} s`).join(" and ");
  const facts = [
    [images.length > 1 ? "Models" : "Model", bundles], ["Seed", settings.seed], ["Size", `${settings.width} × ${settings.height}`],
    ["Quality", settings.quality], ["Steps", settings.steps], ["Guidance", settings.guidance], ["Scheduler", settings.scheduler],
    ["Not", settings.negative_prompt], ["From", settings.image && (settings.mask ? "an image, under a mask" : "an image")],
    ["Strength", settings.strength], ["Took", seconds],
    ["Made", new Date(created).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })],
  ];
  return facts.filter(([, value]) => value !== null && value !== "" && value !== undefined).map(([word, value]) => [word, String(value)]);
}

/** A name for a file: the prompt as far as file names go, and the seed. */
export function fileName(record, index) {
  const { prompt, seed } = record.settings;
  const words = prompt.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60).toLowerCase();
  const model = record.images.length > 1 ? `-${record.images[index].model}` : "";
  const ending = { jpeg: "jpg" }[record.settings.format] ?? record.settings.format;
  return `${words || "image"}-${seed}${model}.${ending}`;
}

/** As large as its place allows, whatever its shape; studio.css has the formula. */
function fitted(view, width, height) {
  view.style.setProperty("--ratio", String(width / height));
  view.style.setProperty("--most", `${Math.max(width, height) < 256 ? MOST_ENLARGED * width : 2 * width}px`);
}
