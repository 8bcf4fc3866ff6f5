"""Model folders: which pipeline, what its JSON files say, how its weights lie in files, what its tokenizer learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.fuzz import schedulers
from tests.fuzz.case import ABSENT, Model
from tests.fuzz.choices import Choices
from tests.fuzz.models import KINDS
from tests.fuzz.weight_files import LAYOUTS, STALE, UNREADABLE

VERSIONS = ("0.42.1", "0.6.0", "0.8.1", "0.9.0", "0.18.2", ABSENT)
NETWORKS = {"ldm": ("unet", "vqvae"), "ldm-text": ("bert", "unet", "vqvae"),
            "xl": ("text_encoder", "text_encoder_2", "unet", "vae"), "refiner": ("text_encoder_2", "unet", "vae")}
SD_NETWORKS = ("text_encoder", "unet", "vae")
_SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
CLASSES = {"sd": _SD, "sd2": _SD, "inpaint": ("StableDiffusionInpaintPipeline", *_SD[:2]),
           "xl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
           "refiner": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
           "ldm": ("LDMPipeline",), "ldm-text": ("LDMTextToImagePipeline",)}

# Words that textual inversion added before the folder was saved -> vectors. Prefixes of each other, capitals, a plain
# word, a word that stands inside others.
WORDS: tuple[Mapping[str, int], ...] = (
    {}, {"<toy>": 1}, {"<cat-toy>": 3}, {"<cat>": 2, "<cat>-toy": 1}, {"<Toy>": 2}, {"sks": 1}, {"catty": 2},
    {"<a>": 1, "<a>b": 3})

# Edits of one JSON file that need no other weights: key -> values, the first of which leaves the file alone.
UNET: Mapping[str, tuple[Any, ...]] = {
    "sample_size": (8, 32, 64, [8, 12]), "center_input_sample": (False, True),
    "flip_sin_to_cos": (True, False), "freq_shift": (0, 1), "act_fn": ("silu", "gelu"), "norm_eps": (1e-5, 1e-3),
    "mid_block_scale_factor": (1, 2.0), "upcast_attention": (False, True), "resnet_skip_time_act": (False, True),
    "timestep_post_act": (None, "silu"), "dropout": (0.0, 0.1)}
VAE: Mapping[str, tuple[Any, ...]] = {
    "scaling_factor": (0.18215, 0.35, ABSENT), "force_upcast": (True, False, ABSENT), "shift_factor": (None, 0.1),
    "sample_size": (32, 64, ABSENT)}
TEXT: Mapping[str, tuple[Any, ...]] = {
    "eos_token_id": (None, 2, ABSENT), "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5, 1e-3),
    "torch_dtype": (ABSENT, "float16"), "dtype": ("float32", "float16"), "pad_token_id": (None, 1, 0),
    "attention_dropout": (0.0, 0.1)}
TOKENIZER: Mapping[str, tuple[Any, ...]] = {
    "pad_token": ("<|endoftext|>", "!"), "model_max_length": (16, 12), "tokenizer_class": ("CLIPTokenizer", ABSENT),
    "add_prefix_space": (ABSENT, False, True), "do_lower_case": (ABSENT, True, False),
    "clean_up_tokenization_spaces": (ABSENT, True)}


def choose(choices: Choices) -> Model:
    """A model folder, adapters apart."""
    kind = choices.pick("model.kind", tuple(KINDS), often=1)
    build = choices.pick("model.networks", KINDS[kind][1], often=2)
    edits: dict[str, dict[str, Any]] = {"model_index.json": _index(choices, kind)}
    named, config = schedulers.choose(choices)
    edits["scheduler/scheduler_config.json"] = config
    edits["model_index.json"]["scheduler"] = ["diffusers", named]
    networks = NETWORKS.get(kind, SD_NETWORKS)
    for name in networks:
        edits[f"{name}/config.json"] = _network(choices, kind, name, build)
    edits = {file: changes for file, changes in edits.items() if changes}
    layout, dtype = _layout(choices), choices.pick("files.dtype", ("float32", "float16", "bfloat16"), often=4)
    layouts = {} if layout == "plain" else {choices.pick(f"files.network of {kind}", networks, counted=False): layout}
    dtypes = {} if dtype == "float32" else {choices.pick(f"files.network of {kind}", networks, counted=False): dtype}
    renamed = () if kind == "ldm" else tuple(name for name in networks if name not in ("unet", "bert"))
    old = tuple(name for name in renamed if choices.flag(f"files.old names of {name}", often=3))
    if kind.startswith("ldm"):
        return Model(kind, build, edits, layouts, dtypes, old)
    for name in _tokenizers(networks):
        if choices.invalid == "tokenizer longer than its encoder":
            edits[f"{name}/tokenizer_config.json"] = {"model_max_length": 77}
        elif changes := _some(choices, "tokenizer", TOKENIZER, often=2):
            edits[f"{name}/tokenizer_config.json"] = changes
    vae = choices.pick("model.vae=", ("", "plain", "plain-vae", "tiny-vae"), often=12)
    return Model(kind, build, edits, layouts, dtypes, old, choices.flag("tokenizer.old files", often=2),
                 choices.pick("tokenizer.words", WORDS, often=5), vae)


def _layout(choices: Choices) -> str:
    if choices.invalid in UNREADABLE:
        return choices.invalid
    if choices.invalid in ("pickle", "stale files"):
        return "pickle alone" if choices.invalid == "pickle" else STALE[0]
    apart = (*UNREADABLE, *STALE, "pickle alone")
    return choices.pick("files.layout", tuple(name for name in LAYOUTS if name not in apart), often=8)


def _tokenizers(networks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.replace("text_encoder", "tokenizer") for name in networks if name.startswith("text_encoder"))


def _index(choices: Choices, kind: str) -> dict[str, Any]:
    classes = CLASSES[kind]
    if kind in ("inpaint", "refiner"):  # the other classes cannot feed their U-Nets
        classes = classes[1:] if choices.invalid == "class for other channels" else classes[:1]
    named = choices.pick(f"model.class of {kind}", classes, often=1, counted=len(classes) == len(CLASSES[kind]))
    edits: dict[str, Any] = {"_class_name": named}
    _edit(choices, "model._diffusers_version", "_diffusers_version", VERSIONS, edits)
    if kind in ("sd", "sd2", "inpaint"):
        checker = choices.pick("model.safety_checker", ("null", "absent", "without its folder"), often=4)
        if checker != "null":
            edits["safety_checker"] = (
                ABSENT if checker == "absent" else ["stable_diffusion", "StableDiffusionSafetyChecker"])
        _edit(choices, "model.requires_safety_checker", "requires_safety_checker", (False, True, ABSENT), edits)
    if kind in ("xl", "refiner"):
        usual = kind == "xl"
        _edit(choices, f"model.force_zeros_for_empty_prompt of {kind}", "force_zeros_for_empty_prompt",
              (usual, not usual, ABSENT), edits)
    return edits


def _network(choices: Choices, kind: str, name: str, build: str) -> dict[str, Any]:
    """Edits of one network's config.json."""
    edits: dict[str, Any] = {}
    if name == "unet":
        if kind != "ldm":
            edits = _some(choices, "unet", UNET, often=1)
        if choices.invalid == "sample_size":
            edits["sample_size"] = ABSENT
    elif name == "vae":
        edits = {} if build.startswith("tiny") else _some(choices, "vae", VAE, often=2)
        normalized = choices.flag("vae.latents_mean and latents_std", often=3) if kind in ("xl", "refiner") else (
            choices.invalid == "latents_mean of Stable Diffusion")
        if normalized and not build.startswith("tiny"):
            edits |= {"latents_mean": [0.1, -0.2, 0.05, 0.3], "latents_std": [0.9, 1.1, 1.3, 0.8]}
    elif name.startswith("text_encoder"):
        edits = _some(choices, "text_encoder", TEXT, often=2)
        if choices.invalid == "attention mask":
            edits["use_attention_mask"] = True
    if choices.invalid == "unknown key":
        edits["foo"] = 1
    if not name.startswith(("text_encoder", "bert")):
        versions = VERSIONS[:-1] if name == "unet" else VERSIONS
        _edit(choices, f"{name}._diffusers_version", "_diffusers_version", versions, edits)
        if name == "unet" and choices.invalid == "U-Net without a version":
            edits["_diffusers_version"] = ABSENT
    return edits


def _some(choices: Choices, part: str, values: Mapping[str, tuple[Any, ...]], often: int) -> dict[str, Any]:
    """None, one or two keys with another value."""
    edits: dict[str, Any] = {}
    for _ in range(choices.pick(f"{part}.edits", (0, 1, 2), often)):
        key = choices.pick(f"{part}.key", tuple(values), counted=False)
        _edit(choices, f"{part}.{key}", key, values[key], edits)
    return edits


def _edit(choices: Choices, name: str, key: str, values: tuple[Any, ...], edits: dict[str, Any]) -> None:
    """The first value leaves the file as it is."""
    value = choices.pick(name, values)
    if value is not values[0]:
        edits[key] = value
