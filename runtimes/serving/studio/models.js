// What the served models can do, as `GET /v1/models` says, in the terms of the form.

const RATIOS = ["1:1", "3:2", "2:3", "16:9", "9:16"];
const QUALITIES = ["draft", "standard", "high"];
const NOT_MEASURED = "Not measured of this model yet: one run of “deploy tradeoffs” does that.";

/** Facts of one entry of the answer. */
export function factsOf(entry) {
  const [width, height] = entry.size.split("x").map(Number);
  return {
    id: entry.id, digest: entry.digest, family: entry.family, precision: entry.precision,
    width: { ...entry.widths }, height: { ...entry.heights },
    default: { width, height, steps: entry.steps, guidance: entry.guidance_scale ?? null, scheduler: entry.scheduler ?? "" },
    schedulers: entry.schedulers, edits: entry.edits, prompts: entry.takes_prompt, most: entry.limits,
    qualities: QUALITIES.map(name => ({
      name, there: entry.qualities.includes(name), ...entry.presets?.[name],
      why: entry.qualities.includes(name) ? "" : NOT_MEASURED,
    })),
  };
}

/** Sizes to offer, the model's own first: `{name, width, height}`, each of about as many pixels. */
export function shapesOf(facts) {
  const own = facts.default;
  const shapes = [{ name: ratioName(own.width, own.height), width: own.width, height: own.height }];
  for (const name of RATIOS) {
    const ratio = ratioOf(name);
    const size = sizeOf(facts, ratio);
    const close = Math.abs(Math.log(size.width / size.height / ratio)) < 0.12;
    if (close && !shapes.some(shape => shape.name === name || (shape.width === size.width && shape.height === size.height))) {
      shapes.push({ name, ...size });
    }
  }
  return shapes;
}

/** The size of about this width:height and the pixels of the model's own that the model takes. */
export function sizeOf(facts, ratio) {
  const area = facts.default.width * facts.default.height;
  return { width: fitting(facts.width, Math.sqrt(area * ratio)), height: fitting(facts.height, Math.sqrt(area / ratio)) };
}

/** Whether it takes more than one size. */
export const resizable = facts => facts.width.least < facts.width.most || facts.height.least < facts.height.most;

/** What is wrong with a size, or an empty text. */
export function sizeProblem(facts, width, height) {
  for (const [word, value, side] of [["Width", width, facts.width], ["Height", height, facts.height]]) {
    if (!(value >= side.least && value <= side.most) || value % side.multiple) {
      return `${word}: ${side.least} to ${side.most} in steps of ${side.multiple}.`;
    }
  }
  return "";
}

function fitting(side, wanted) {
  const near = Math.round(wanted / side.multiple) * side.multiple;
  return Math.min(Math.max(near, side.least), side.most);
}

function ratioOf(name) {
  const [width, height] = name.split(":").map(Number);
  return width / height;
}

function ratioName(width, height) {
  return RATIOS.find(name => Math.abs(Math.log(width / height / ratioOf(name))) < 0.03) ?? `${width}×${height}`;
}
