// The form: settings in, settings out, and what the chosen model allows.

import { byId, element } from "./dom.js";
import * as inputImage from "./input_image.js";
import { factsOf, resizable, shapesOf, sizeOf, sizeProblem } from "./models.js";
import { DEFAULTS, LARGEST_SEED, randomSeed } from "./settings.js";

const DRAFT = "studio.draft";
const GUIDANCE = 7.5; // where its slider stands while the model decides
const TITLES = { draft: "Draft", standard: "Standard", high: "High" };
const PROBLEMS = ["prompt", "negative", "image", "strength", "model", "quality", "size", "seed", "count", "steps", "guidance",
                  "scheduler", "format"];
let models = [];
let comparing = false;

const number = id => (byId(id).value.trim() === "" ? null : Number(byId(id).value));
const chosen = name => byId("form").querySelector(`input[name="${name}"]:checked`)?.value;

/** The models that may be chosen: entries of `GET /v1/models`. */
export function offer(entries) {
  const before = models.length ? read() : draft();
  models = entries.map(factsOf);
  const options = () => models.map(({ id }) => element("option", { value: id }, id));
  byId("model").replaceChildren(...options());
  byId("compare").replaceChildren(...options());
  byId("compare-button").disabled = models.length < 2;
  byId("compare-button").title = models.length < 2 ? "The server has one model only" : "Compare with another model";
  fill(before);
}

/** The model of this name, or undefined. */
export const modelOf = id => models.find(model => model.id === id);

export const model = () => modelOf(byId("model").value);

/** What the form says; size and seed as they are filled in. */
export function read() {
  const { image, mask } = inputImage.current();
  return {
    prompt: byId("prompt").value.trim(), negative_prompt: byId("negative").value.trim(), model: byId("model").value,
    compare: comparing ? byId("compare").value : "", quality: chosen("quality") ?? DEFAULTS.quality,
    width: number("width"), height: number("height"), seed: number("seed"), n: number("count") ?? 1, steps: number("steps"),
    guidance: number("guidance"), scheduler: byId("scheduler").value, format: byId("format").value,
    strength: number("strength"), image, mask,
  };
}

/** Fill in settings; what this server does not have is left as the model has it. Image and mask are not touched. */
export function fill(settings) {
  const text = value => (value === null ? "" : String(value));
  byId("prompt").value = settings.prompt;
  byId("negative").value = settings.negative_prompt;
  if (modelOf(settings.model)) byId("model").value = settings.model;
  else if (models.length) byId("model").value = models[0].id;
  for (const [id, value] of [["seed", settings.seed], ["count", settings.n], ["steps", settings.steps],
                             ["guidance", settings.guidance], ["strength", settings.strength], ["width", settings.width],
                             ["height", settings.height]]) byId(id).value = text(value);
  byId("format").value = settings.format;
  compareWith(settings.compare);
  showModel(settings);
  byId("advanced").open ||= settings.steps !== null || settings.guidance !== null || Boolean(settings.scheduler);
  clearProblems();
  saveDraft();
}

/** Settings of the form as it was left, or the defaults. */
export function draft() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(DRAFT) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveDraft() {
  if (!models.length) return; // what was saved knows a model; this does not
  try { localStorage.setItem(DRAFT, JSON.stringify(read())); } catch { /* not there: the form is empty after a reload */ }
}

/** Mark a field with what is wrong; false where no field is meant. */
export function showProblem(field, text) {
  if (!PROBLEMS.includes(field)) return false;
  byId(`${field}-problem`).textContent = text;
  const control = field === "size" ? byId("width") : byId(field);
  if (control) {
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-describedby", `${field}-problem`);
    if (byId("advanced").contains(control)) byId("advanced").open = true;
    if (field === "size") byId("dimensions").hidden = false;
    control.focus();
  }
  byId(`${field}-problem`).scrollIntoView({ block: "nearest" });
  return true;
}

export function clearProblems() {
  for (const field of PROBLEMS) {
    byId(`${field}-problem`).textContent = "";
    for (const control of [byId(field), byId("width")]) {
      control?.removeAttribute("aria-invalid");
      control?.removeAttribute("aria-describedby");
    }
  }
}

/** Whether the settings can be sent; the first field that cannot is marked. */
export function check() {
  clearProblems();
  const facts = model();
  const bounds = [["count", 1, facts.most.images, true], ["seed", 0, LARGEST_SEED, true], ["steps", 1, facts.most.steps, true],
                  ["guidance", 0, 100, false], ["strength", 0.01, 1, false]];
  for (const [field, least, most, whole] of bounds) {
    const value = number(field);
    const unreadable = byId(field).validity.badInput;
    if (unreadable || (value !== null && (!(value >= least && value <= most) || (whole && !Number.isInteger(value))))) {
      return !showProblem(field, `${whole ? "A whole number, " : ""}${least} to ${most}.`);
    }
  }
  const wrong = sizeProblem(facts, number("width"), number("height"));
  return !wrong || !showProblem("size", wrong);
}

// ---- what follows from the model

function showModel(settings) {
  const facts = model();
  if (!facts) return;
  byId("model-facts").textContent = [facts.family, facts.precision, facts.digest.slice(0, 12)].filter(Boolean).join(" · ");
  byId("prompt").disabled = byId("negative").disabled = !facts.prompts;
  byId("image-field").hidden = !facts.edits;
  const schedulers = facts.schedulers.map(name => element("option", { value: name }, name));
  const own = facts.default.scheduler ? `The model's own (${facts.default.scheduler})` : "The model's own";
  byId("scheduler").replaceChildren(element("option", { value: "" }, own), ...schedulers);
  byId("scheduler").value = facts.schedulers.includes(settings.scheduler) ? settings.scheduler : "";
  byId("count").max = facts.most.images;
  byId("steps").max = facts.most.steps;
  byId("steps-range").max = Math.min(facts.most.steps, 60);
  showQualities(facts, settings.quality);
  showSizes(facts);
  showTunables();
}

function showQualities(facts, wanted) {
  const there = facts.qualities.filter(quality => quality.there).map(quality => quality.name);
  const now = there.includes(wanted) ? wanted : "standard";
  byId("quality").replaceChildren(...facts.qualities.map(quality => {
    const input = element("input", { type: "radio", name: "quality", value: quality.name, disabled: !quality.there });
    input.checked = quality.name === now;
    return element("label", { class: "choice", title: quality.why }, input, TITLES[quality.name]);
  }));
  byId("quality-hint").textContent = there.length > 1 ? "" : "Draft and high need one run of “deploy tradeoffs” with this model.";
}

function showSizes(facts) {
  const shapes = shapesOf(facts);
  const { width: wide, height: high } = inputImage.current();
  if (wide) {
    const size = sizeOf(facts, wide / high);
    if (!shapes.some(shape => shape.width === size.width && shape.height === size.height)) shapes.push({ name: "Image", ...size });
  }
  if (sizeProblem(facts, number("width"), number("height"))) setSize(shapes[0]);
  const now = shapes.findIndex(shape => shape.width === number("width") && shape.height === number("height"));
  const choices = shapes.map((shape, index) => shapeChoice(shape, String(index), index === now));
  if (resizable(facts)) choices.push(shapeChoice({ name: "Custom", width: 1, height: 1, free: true }, "free", now < 0));
  byId("shapes").replaceChildren(...choices);
  byId("shapes").onchange = event => {
    const shape = shapes[Number(event.target.value)];
    if (shape) setSize(shape);
    byId("dimensions").hidden = Boolean(shape);
    showSizeHint(facts);
    if (!shape) byId("width").focus();
  };
  byId("dimensions").hidden = now >= 0;
  for (const side of ["width", "height"]) {
    Object.assign(byId(side), { min: facts[side].least, max: facts[side].most, step: facts[side].multiple });
  }
  showSizeHint(facts);
}

function shapeChoice(shape, value, checked) {
  const input = element("input", { type: "radio", name: "shape", value });
  input.checked = checked;
  const outline = element("i", { class: shape.free && "free", "aria-hidden": "true" });
  const scale = 24 / Math.max(shape.width, shape.height);
  outline.style.width = `${Math.max(Math.round(shape.width * scale), 8)}px`;
  outline.style.height = `${Math.max(Math.round(shape.height * scale), 8)}px`;
  return element("label", { class: "shape" }, input, outline, shape.name);
}

function setSize({ width, height }) {
  byId("width").value = String(width);
  byId("height").value = String(height);
}

function showSizeHint(facts) {
  const { width, height } = { width: number("width"), height: number("height") };
  const free = byId("dimensions").hidden;
  byId("size-hint").textContent = free ? `${width} × ${height} pixels`
    : `${facts.width.least} to ${facts.width.most} wide, ${facts.height.least} to ${facts.height.most} high, in steps of ${facts.width.multiple}.`;
  const given = inputImage.current();
  const crops = given.width && Math.abs(Math.log(given.width / given.height * height / width)) > 0.01;
  byId("image-hint").textContent = !given.width ? "" : `${given.width} × ${given.height}${crops ? `, its middle is used for ${width} × ${height}` : ""}`;
}

/** Fields that are empty while the model decides: their placeholder and slider show what it decides. */
function showTunables() {
  const facts = model();
  if (!facts) return;
  const quality = facts.qualities.find(({ name }) => name === chosen("quality")) ?? {};
  const { image, mask } = inputImage.current();
  const decided = {
    steps: [quality.steps ?? facts.default.steps, String(quality.steps ?? facts.default.steps)],
    guidance: [facts.default.guidance ?? GUIDANCE, String(facts.default.guidance ?? "auto")],
    strength: [mask ? 1 : 0.8, "auto"],
  };
  for (const [id, [value, text]] of Object.entries(decided)) {
    byId(id).placeholder = text;
    byId(`${id}-range`).value = String(number(id) ?? value);
  }
  byId("strength-field").hidden = !image;
  const set = [["steps", "steps"], ["guidance", "guidance"]].filter(([id]) => number(id) !== null).map(([id, word]) => `${number(id)} ${word}`);
  byId("sampling-facts").textContent = [...set, byId("scheduler").value].filter(Boolean).join(", ") || "the model's defaults";
}

function compareWith(other) {
  comparing = Boolean(other) && models.length > 1 && Boolean(modelOf(other)) && other !== byId("model").value;
  byId("compare-field").hidden = !comparing;
  byId("compare-button").setAttribute("aria-pressed", String(comparing));
  if (comparing) byId("compare").value = other;
  for (const option of byId("compare").options) option.disabled = option.value === byId("model").value;
}

// ---- events

const form = byId("form");
form.addEventListener("input", event => {
  const id = event.target.id;
  if (id.endsWith("-range")) byId(id.replace("-range", "")).value = event.target.value;
  if (id === "width" || id === "height") showSizeHint(model());
  if (event.target.getAttribute("aria-invalid")) clearProblems();
  showTunables();
  saveDraft();
});
byId("model").addEventListener("change", () => {
  const other = byId("compare").value;
  compareWith(comparing ? (other === byId("model").value ? models.find(({ id }) => id !== other).id : other) : "");
  showModel(read());
  saveDraft();
});
byId("compare-button").addEventListener("click", () => {
  compareWith(comparing ? "" : models.find(({ id }) => id !== byId("model").value)?.id);
  saveDraft();
});
byId("dice").addEventListener("click", () => { byId("seed").value = String(randomSeed()); saveDraft(); });
for (const [id, by] of [["fewer", -1], ["more", 1]]) {
  byId(id).addEventListener("click", () => {
    byId("count").value = String(Math.min(Math.max((number("count") ?? 1) + by, 1), Number(byId("count").max)));
    saveDraft();
  });
}
byId("turn").addEventListener("click", () => { setSize({ width: number("height"), height: number("width") }); saveDraft(); });
byId("reset").addEventListener("click", () => {
  const { prompt, negative_prompt, image, mask } = read();
  fill({ ...DEFAULTS, prompt, negative_prompt, model: byId("model").value, image, mask });
});
inputImage.onChange(() => {
  const facts = model();
  if (facts) {
    const { width, height } = inputImage.current();
    if (width) setSize(sizeOf(facts, width / height));
    showSizes(facts);
  }
  showTunables();
  saveDraft();
});
