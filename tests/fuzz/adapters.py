"""LoRA and embedding files of a case: what they are chosen to be, and how they are written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.case import Embedding, Lora, Model
from tests.fuzz.choices import Choices
from tests.fuzz.folders import NETWORKS, SD_NETWORKS
from tests.fuzz.models import base

Tensors = dict[str, Any]
# part of a network -> what the names of its modules end with, or contain
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": ("proj_in", "proj_out"),
    "convolutions": ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv", "conv_shortcut", "time_emb_proj"),
    "ends": ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"),
}
TEXT_PARTS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
METADATA = ("none", "alpha", "rank pattern", "alpha pattern", "alpha pattern as a regular expression", "rslora",
            "pattern that fits nothing")
ODDITIES = ("alpha of another form", "duplicate", "leftover", "half a LoRA", "dora")


# ---- names: module of a network -> stem of its keys, and what down and up are called ------------------------------


def _plain(network: str, module: str) -> str:
    return f"{network}.text_model.{module}" if network.startswith("text") else f"{network}.{module}"


def _processor(network: str, module: str) -> str:
    """diffusers up to 0.16: attention alone, `attn1.processor.to_q_lora`."""
    if network.startswith("text"):
        return _plain(network, module)
    place, _, last = module.removesuffix(".0").rpartition(".")
    return f"unet.{place}.processor.{last}_lora"


def _kohya(network: str, module: str, xl: bool = False) -> str:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    middle = "_text_model_" if network.startswith("text") else "_"
    return prefix[network] + middle + module.replace(".", "_")


def original_name(module: str, layers: int) -> str:
    """A U-Net module by its name in CompVis' openaimodel.py, as kohya's files of XL spell it."""
    parts = module.split(".")
    if parts[0] == "mid_block":
        number = {"attentions": 1, "resnets": 2 * int(parts[2])}[parts[1]]
        return f"middle_block.{number}." + _inner(".".join(parts[3:]), parts[1])
    if parts[0] not in ("down_blocks", "up_blocks"):
        ends = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
                "add_embedding.linear_2": "label_emb.0.2"}
        return ends[module]
    block, kind, layer = int(parts[1]), parts[2], int(parts[3])
    rest, side = ".".join(parts[4:]), "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
    if kind == "downsamplers":
        return f"{side}.{block * (layers + 1) + layers + 1}.0.op"
    first = block * (layers + 1) + (parts[0] == "down_blocks")
    if kind == "upsamplers":
        return f"{side}.{first + layers}.2.{rest}"
    return f"{side}.{first + layer}.{int(kind == 'attentions')}." + _inner(rest, kind)


def _inner(rest: str, kind: str) -> str:
    if kind == "attentions":
        return rest
    names = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
             "conv_shortcut": "skip_connection"}
    return names.get(rest, rest)


# form -> (parts of the U-Net that it has names for, the names of down and up)
FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, str]]] = {
    "peft": (tuple(PARTS), ("lora_A.weight", "lora_B.weight")),
    "diffusers 0.2": (tuple(PARTS), ("lora.down.weight", "lora.up.weight")),
    "diffusers 0.1": (("attention",), ("down.weight", "up.weight")),
    "kohya": (tuple(PARTS), ("lora_down.weight", "lora_up.weight")),
    "kohya, original names": (tuple(PARTS), ("lora_down.weight", "lora_up.weight")),
}


def _alphas() -> Mapping[str, Callable[[float, int], Any]]:
    """How an alpha is written -> the tensor, from its value and the number of the module."""
    import torch

    return {
        "missing": lambda value, i: None,
        "float32 ()": lambda value, i: torch.tensor(value),
        "float32 (1,)": lambda value, i: torch.tensor([value]),
        "float32 (1, 1)": lambda value, i: torch.tensor([[value]]),
        "int64 ()": lambda value, i: torch.tensor(int(value)),
        "float16 ()": lambda value, i: torch.tensor(value).half(),
        "bfloat16 ()": lambda value, i: torch.tensor(value).bfloat16(),
        "of every second": lambda value, i: torch.tensor(value) if i % 2 else None,
        "other for each": lambda value, i: torch.tensor(value + i),
    }


ALPHAS = ("missing", "float32 ()", "float32 (1,)", "float32 (1, 1)", "int64 ()", "float16 ()", "bfloat16 ()",
          "of every second", "other for each")
EMBEDDINGS = ("diffusers", "diffusers, one row", "emb_params")
TOKENS = ("<toy>", "<Toy>", "<cat-toy>", "<cat>", "sks", "catty", "<toy>2", "über")


def choose_loras(choices: Choices, model: Model) -> tuple[Lora, ...]:
    """None, one or two files."""
    if model.kind.startswith("ldm"):
        return ()
    count = 1 if choices.invalid in ODDITIES else choices.pick("lora.files", (0, 1, 2), often=1)
    return tuple(_lora(choices, model) for _ in range(count))


def _lora(choices: Choices, model: Model) -> Lora:
    xl = model.kind in ("xl", "refiner")
    form = choices.pick("lora.form", tuple(FORMS) if xl else tuple(FORMS)[:4])
    encoders = [n for n in NETWORKS.get(model.kind, SD_NETWORKS) if n.startswith("text")]
    parts = [choices.pick("lora.part", FORMS[form][0])]
    for name in encoders:
        if choices.flag(f"lora.changes {name}", often=1):
            parts.append(name)
    if form == "peft":
        metadata = choices.pick("lora.metadata", METADATA)
    else:
        metadata = "none"
    return Lora(
        form=form, parts=tuple(parts), rank=choices.pick("lora.rank", (4, 1, 8)),
        mixed_ranks=choices.flag("lora.mixed ranks", often=1),
        alpha=choices.pick("lora.alpha", ALPHAS) if form.startswith("kohya") else "missing", metadata=metadata,
        dtype=choices.pick("lora.dtype", ("float32", "float16")),
        scale=choices.pick("lora.scale", (1.0, 0.5, -0.7, 0.0)),
        oddity=choices.invalid if choices.invalid in ODDITIES else "")


def choose_embeddings(choices: Choices, model: Model) -> tuple[Embedding, ...]:
    """None, one or two files of different words."""
    if model.kind.startswith("ldm") or model.kind == "refiner":
        return ()
    found: dict[str, Embedding] = {}
    for _ in range(choices.pick("embedding.files", (0, 1, 2), often=1)):
        form = "clip_l and clip_g" if model.kind == "xl" else choices.pick("embedding.form", EMBEDDINGS)
        taken = {word.lower() for word in (*model.words, *found)}  # the tokenizer reads lower case
        token = choices.pick("embedding.token", tuple(t for t in TOKENS if t.lower() not in taken))
        if choices.invalid.startswith("word"):
            token = "!" if choices.invalid == "word of the vocabulary" else next(iter(model.words), token)
        vectors = 1 if form == "diffusers, one row" else choices.pick("embedding.vectors", (1, 2, 3))
        found[token] = Embedding(form, token, vectors)
    return tuple(found.values())


# ---- files --------------------------------------------------------------------------------------------------------


def _modules(model: Model, network: str, parts: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules that a LoRA changes, with the shapes of their weights: the first two of each ending."""
    from safetensors import safe_open

    folder = base(model.kind, model.build) / network
    endings = [e for part in parts if part in PARTS for e in PARTS[part]] if network == "unet" else TEXT_PARTS
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as tensors:
        shapes = {key.removesuffix(".weight").removeprefix("text_model."): tuple(tensors.get_slice(key).get_shape())
                  for key in sorted(tensors.keys()) if key.endswith(".weight")}
    for ending in endings:
        fitting = [name for name in shapes if f".{name}".endswith(f".{ending}") and len(shapes[name]) > 1]
        yield from ((name, shapes[name]) for name in fitting[:2])


def write_lora(lora: Lora, model: Model, file: Path, number: int) -> None:
    """Write a LoRA for a model."""
    import torch
    from safetensors.torch import save_file

    dtype, alphas = getattr(torch, lora.dtype), _alphas()
    generator = torch.Generator().manual_seed(number)
    tensors: Tensors = {}
    networks = [*(["unet"] if set(lora.parts) & set(PARTS) else []), *(p for p in lora.parts if p not in PARTS)]
    ranks: dict[str, int] = {}
    for network in networks:
        for i, (module, shape) in enumerate(_modules(model, network, lora.parts)):
            rank = lora.rank * (2 if lora.mixed_ranks and i % 2 else 1)
            ranks[f"{network}.{module}"] = rank
            down = torch.randn(rank, *shape[1:], generator=generator) / max(shape[1], 1) ** 0.5
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.2
            written = "float32 ()" if lora.oddity == "alpha of another form" else lora.alpha
            alpha = alphas[written](float(lora.rank) / 2 + 1, i)
            stem = _stem(lora, model, network, module)
            tensors |= _entry(lora, stem, down.to(dtype), up.to(dtype), alpha, network)
    _add_oddity(lora, tensors)
    text = _metadata(lora, ranks)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file,
              metadata={"format": "pt", **({"lora_adapter_metadata": json.dumps(text)} if text else {})})


def _stem(lora: Lora, model: Model, network: str, module: str) -> str:
    if lora.form == "diffusers 0.1":
        return _processor(network, module)
    if not lora.form.startswith("kohya"):
        return _plain(network, module)
    if lora.form != "kohya" and network == "unet":
        module = original_name(module, 2 if model.build == "two-layers" else 1)
    return _kohya(network, module, model.kind in ("xl", "refiner"))


def _entry(lora: Lora, stem: str, down: Any, up: Any, alpha: Any, network: str) -> Tensors:
    names = FORMS[lora.form][1]
    if network.startswith("text") and lora.form.startswith("diffusers"):
        names = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
    found = {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up}
    return found if alpha is None else {**found, f"{stem}.alpha": alpha}


def _add_oddity(lora: Lora, tensors: Tensors) -> None:
    import torch

    first = next((key for key in tensors if key.endswith(FORMS[lora.form][1][0])), None)
    if first is None:
        return
    stem = first.removesuffix("." + FORMS[lora.form][1][0])
    ups = [key for key in tensors if key.startswith(stem) and key.endswith(FORMS[lora.form][1][1])]
    if lora.oddity == "half a LoRA" and ups:
        del tensors[ups[0]]
    elif lora.oddity == "leftover":
        for key in (first, *ups):
            tensors[key.replace("attn", "other").replace("conv", "other").replace("proj", "other")
                    .replace("net", "other", 1) if key.startswith("lora") else key.replace(".", ".other.", 1)] = (
                tensors[key].clone())
    elif lora.oddity == "dora" and ups:
        tensors[f"{stem}.dora_scale" if lora.form.startswith("kohya") else f"{stem}.lora_magnitude_vector"] = (
            torch.ones(len(tensors[ups[0]])))
    elif lora.oddity == "duplicate" and lora.form == "peft":
        for key in (first, *ups):  # the same module once more, in the spelling of diffusers 0.2
            twin = key.replace("lora_A.weight", "lora.down.weight").replace("lora_B.weight", "lora.up.weight")
            tensors[twin] = tensors[key] * 0.5


def _metadata(lora: Lora, ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's config for every network, as diffusers writes it into the file."""
    found: dict[str, Any] = {}
    if lora.metadata == "none":
        return found
    for network in {place.partition(".")[0] for place in ranks}:
        modules = sorted(p.partition(".")[2] for p in ranks if p.startswith(f"{network}."))
        own: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": modules, "peft_type": "LORA"}
        own["rank_pattern"] = {m: ranks[f"{network}.{m}"] for m in modules if ranks[f"{network}.{m}"] != lora.rank}
        some = random.Random(len(modules)).choice(modules)
        if lora.metadata == "alpha":
            own["lora_alpha"] = 2 * lora.rank
        elif lora.metadata == "alpha pattern":
            own["alpha_pattern"] = {some: 3 * lora.rank}
        elif lora.metadata == "alpha pattern as a regular expression":
            own["alpha_pattern"] = {r".*attn\d.*to_[qk]|.*conv\d|.*fc1|.*proj_in|.*linear_\d": 3 * lora.rank}
        elif lora.metadata == "rslora":
            own["use_rslora"] = True
        elif lora.metadata == "pattern that fits nothing":
            own["alpha_pattern"] = {"nowhere.at_all": 3 * lora.rank}
        elif lora.metadata == "rank pattern":
            own["rank_pattern"] = {**own["rank_pattern"], some: ranks[f"{network}.{some}"]}
        found |= {f"{network}.{key}": value for key, value in own.items()}
    return found


def write_embedding(embedding: Embedding, file: Path, number: int) -> None:
    """Write a textual inversion; text encoders have widths 16 and 24."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(100 + number)
    rows = torch.randn(embedding.vectors, 16, generator=generator) * 0.5
    if embedding.form == "clip_l and clip_g":
        second = torch.randn(embedding.vectors, 24, generator=generator) * 0.5
        save_file({"clip_l": rows, "clip_g": second}, file)
    else:
        key = "emb_params" if embedding.form == "emb_params" else embedding.token
        save_file({key: rows[0] if embedding.form == "diffusers, one row" else rows}, file)
