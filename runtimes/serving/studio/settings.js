// What an image is generated from, as one plain object: in the form, in a link, in a request, beside an image.

export const DEFAULTS = Object.freeze({
  prompt: "", negative_prompt: "", model: "", compare: "", quality: "standard", width: null, height: null, seed: null,
  n: 1, steps: null, guidance: null, scheduler: "", format: "png", strength: null, image: "", mask: "",
});
const WHOLE = ["width", "height", "seed", "n", "steps"];
const NUMBERS = [...WHOLE, "guidance", "strength"];
export const LARGEST_SEED = 4294967295;

/** A seed as good as any other. */
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Address of this page that fills its form with the settings. */
export function linkTo(settings, digest = "") {
  const said = Object.entries(settings).filter(([name, value]) => name in DEFAULTS && value !== DEFAULTS[name]);
  const words = new URLSearchParams(said.map(([name, value]) => [name, String(value)]));
  if (digest) words.set("bundle", digest.slice(0, 16));
  return `${location.origin}${location.pathname}#${words}`;
}

/** Settings of a link's hash with the bundle that it names, or null if it says nothing of the kind. */
export function ofHash(hash) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  const known = [...words].filter(([name, value]) => name in DEFAULTS && (!NUMBERS.includes(name) || readable(name, value)));
  if (!known.length) return null;
  const read = known.map(([name, value]) => [name, NUMBERS.includes(name) ? Number(value) : value]);
  return { settings: { ...DEFAULTS, ...Object.fromEntries(read) }, bundle: words.get("bundle") ?? "" };
}

function readable(name, value) {
  const number = Number(value);
  return value.trim() !== "" && Number.isFinite(number) && number >= 0 && (!WHOLE.includes(name) || Number.isInteger(number));
}

/** Fields of a request to the server for one model; what is left to the model is left out. */
export function requestFields(settings, model) {
  const fields = {
    model, prompt: settings.prompt, negative_prompt: settings.negative_prompt || null, n: settings.n,
    size: settings.width && settings.height ? `${settings.width}x${settings.height}` : null,
    quality: settings.quality, seed: settings.seed, num_inference_steps: settings.steps,
    guidance_scale: settings.guidance, scheduler: settings.scheduler || null, output_format: settings.format,
    strength: settings.image ? settings.strength : null,
  };
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));
}

/** The field of the form that an error of the server is about, by the request's field. */
export const FIELD_OF = {
  prompt: "prompt", negative_prompt: "negative", n: "count", images_per_prompt: "count", size: "size", height: "size", width: "size", aspect: "size",
  quality: "quality", seed: "seed", num_inference_steps: "steps", steps: "steps", guidance_scale: "guidance",
  scheduler: "scheduler", output_format: "format", strength: "strength", image: "image", mask: "image", model: "model",
};
