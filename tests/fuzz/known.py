"""Faults of diffusers that ours does not copy: by name, with the upstream line, and what diffusers does once mended.

A fault is only recognized where diffusers with the mend in place does what ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from runtimes.schedulers import CLASS_NAMES
from tests.fuzz.case import Case, Request
from tests.fuzz.theirs import make_latents

Mend = Callable[[Any, Request, list[Any]], dict[str, Any]]


@dataclass(frozen=True)
class KnownFault:
    """A deviation on purpose.

    Attributes:
        name: in the report.
        upstream: file and line of diffusers 0.42.1.
        why: what upstream does and what ours does instead.
        concerns: whether a case may meet it.
        mend: makes a loaded pipeline do the right thing; given it, the request and its generators. What it returns
            are further arguments of the call.
        mend_lora: writes a LoRA file anew so that diffusers reads it right, where the fault is in reading files.
    """

    name: str
    upstream: str
    why: str
    concerns: Callable[[Case], bool]
    mend: Mend
    mend_lora: Callable[[Path], None] | None = None


def _expand_whole_words(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    """Words of several vectors: each added token that the tokenizer finds, and no other text, is spelled out."""
    import re

    def convert(prompt: str, tokenizer: Any) -> str:
        added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        whole = re.compile("|".join(map(re.escape, added)), re.IGNORECASE)
        lowered = {token.lower(): token for token in added}

        def spelled(match: re.Match[str]) -> str:
            token = lowered[match[0].lower()]
            further: list[str] = []
            while f"{token}_{len(further) + 1}" in tokenizer.added_tokens_encoder:
                further.append(f"{token}_{len(further) + 1}")
            return " ".join([match[0], *further])

        return whole.sub(spelled, prompt)

    pipe._maybe_convert_prompt = convert
    return {}


def _pass_generators(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    from inspect import signature

    step = pipe.scheduler.step
    if "generator" in signature(step).parameters:
        # `partial` keeps the signature, by which pipelines decide what they pass on.
        pipe.scheduler.step = partial(step, generator=generators if len(generators) > 1 else generators[0])
    return {}


def _scale_samples(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    """The initial noise and every sample at the scale that the scheduler has once its timesteps are set."""
    from diffusers.utils.torch_utils import randn_tensor

    pipe.scheduler.set_timesteps(request.steps)
    if type(pipe).__name__ == "LDMPipeline":
        return {}

    def scaled(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (pipe.scheduler.scale_model_input(args[0], args[1]), *args[1:]), kwargs

    pipe.unet.register_forward_pre_hook(scaled, with_kwargs=True, prepend=True)
    size = pipe.unet.config.sample_size
    shape = (len(request.seeds), pipe.unet.config.in_channels,
             *((request.height // 8, (request.width or 0) // 8) if request.height else (size, size)))
    noise = make_latents(request, *shape[1:]) if request.latents else None
    drawn = randn_tensor(shape, generator=generators) if noise is None else torch_from(noise)
    return {"latents": drawn * pipe.scheduler.init_noise_sigma}


def _encode_for_each(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    """One image under a mask is encoded for each result, from the generator of each."""
    encode = pipe._encode_vae_image

    def for_each(image: Any, generator: Any) -> Any:
        several = isinstance(generator, list) and len(image) == 1
        return encode(image.repeat(len(generator), 1, 1, 1) if several else image, generator)

    pipe._encode_vae_image = for_each
    return {}


def _nothing(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    """The pipeline is left as it is: a file was mended."""
    return {}


def own_alphas(file: Path) -> None:
    """Write a LoRA file anew with every alpha multiplied into its module's matrix, which then needs none."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    if not all(key.startswith("lora_") for key in tensors):
        return  # PEFT's, whose metadata holds the scales
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem, alpha = key.removesuffix(".alpha"), float(tensors.pop(key).double().reshape(-1)[0])
        down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        if up in tensors:
            tensors[up] = tensors[up].float() * (alpha / len(tensors[down]))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


ENDS = {"conv_in": "conv_in", "input_blocks_0_0": "conv_in", "conv_out": "conv_out", "out_2": "conv_out",
        "time_embedding_linear_1": "time_embedding.linear_1", "time_embed_0": "time_embedding.linear_1",
        "time_embedding_linear_2": "time_embedding.linear_2", "time_embed_2": "time_embedding.linear_2",
        "add_embedding_linear_1": "add_embedding.linear_1", "label_emb_0_0": "add_embedding.linear_1",
        "add_embedding_linear_2": "add_embedding.linear_2", "label_emb_0_2": "add_embedding.linear_2"}


def named_ends(file: Path) -> None:
    """Write a kohya LoRA that changes a U-Net's ends, and text encoders, anew under PEFT's names, its alphas
    multiplied in.
    """
    from safetensors.torch import load_file, save_file

    own_alphas(file)
    tensors, named = load_file(file), {}
    for key, tensor in tensors.items():
        stem, part = key.split(".", 1)
        module = f"unet.{ENDS[end]}" if (end := stem.removeprefix("lora_unet_")) in ENDS else _of_text(stem)
        if module is None:
            return
        named[f"{module}.{part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = tensor
    save_file(named, file)


def _of_text(stem: str) -> str | None:
    """A text encoder's module by PEFT's name, None if it is something else."""
    import re

    found = re.fullmatch(r"lora_te(\d?)_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)", stem)
    if found is None:
        return None
    encoder = "text_encoder_2" if found[1] == "2" else "text_encoder"
    return f"{encoder}.text_model.encoder.layers.{found[2]}.{found[3]}.{found[4]}"


def _exact_roots(pipe: Any, request: Request, generators: list[Any]) -> dict[str, Any]:
    """Noise levels by square roots that are rounded correctly."""
    import torch

    set_timesteps, power = pipe.scheduler.set_timesteps, torch.Tensor.__pow__

    def rounded(base: Any, exponent: Any) -> Any:
        return base.double().sqrt().to(base.dtype) if exponent == 0.5 else power(base, exponent)

    @wraps(set_timesteps)
    def exact(*args: Any, **kwargs: Any) -> None:
        with patch.object(torch.Tensor, "__pow__", rounded):
            set_timesteps(*args, **kwargs)

    pipe.scheduler.set_timesteps = exact
    return {}


def _method(case: Case) -> str | None:
    named = case.model.edits.get("model_index.json", {}).get("scheduler", ("diffusers", ""))
    return case.request.scheduler or CLASS_NAMES.get(named[1])


def torch_from(array: Any) -> Any:
    """A tensor."""
    import torch

    return torch.from_numpy(array)


def _has_words(case: Case) -> bool:
    return bool(case.model.words or case.embeddings)


KNOWN: tuple[KnownFault, ...] = (
    KnownFault(
        "the last bit of torch's square roots decides a middle of KDPM2 ancestral",
        "schedulers/scheduling_k_dpm_2_ancestral_discrete.py:331 (sigmas_next**2 - sigmas_up**2)",
        "where levels are far apart, as karras makes two of them, their difference has two digits in float32, and "
        "torch's roots are off by a last bit that depends on the processor. Ours are rounded correctly.",
        lambda case: _method(case) == "kdpm2-ancestral", _exact_roots),
    KnownFault(
        "under a mask one image is encoded once for all results",
        "pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py:751 (_encode_vae_image: a generator for each "
        "row of the image, which then is repeated), and XL's",
        "results after the first are made from the first generator's draw, and draw nothing from their own: an image "
        "depends on its company. Ours draws for each image from its own seed.",
        lambda case: case.request.mode == "mask" and len(case.request.seeds) > 1, _encode_for_each),
    KnownFault(
        "kohya names of a U-Net's ends are passed over",
        "loaders/lora_conversion_utils.py (_convert_unet_lora_key knows blocks and their parts)",
        "what a kohya LoRA adds to the embeddings of time and sizes is left out; ours merges it.",
        lambda case: any(lora.form.startswith("kohya") and "ends" in lora.parts for lora in case.loras), _nothing,
        named_ends),
    KnownFault(
        "the alphas of a kohya LoRA are taken for one",
        "utils/peft_utils.py:179-189 (get_peft_kwargs: its patterns are no modules' names)",
        "attention projections and text encoders get the file's most common alpha, as do modules without one. Ours "
        "gives each its own, 1 to those without.",
        lambda case: any(lora.form.startswith("kohya") for lora in case.loras), _nothing, own_alphas),
    KnownFault(
        "a word of several vectors is spelled out inside longer words and only in the tokenizer's spelling",
        "loaders/textual_inversion.py:187 (_maybe_convert_prompt: `prompt.replace(token, replacement)`)",
        "`<cat>` of two vectors also becomes `<cat> <cat>_1` inside `<cat>-toy` and `<cat>_1`; a word with capitals is "
        "looked up in lower case and keeps its first vector alone. Ours spells out whole tokens, all vectors "
        "(stable-diffusion-webui#1054).",
        _has_words, _expand_whole_words),
    KnownFault(
        "LDM pipelines give their scheduler no generator",
        "pipelines/latent_diffusion/pipeline_latent_diffusion.py:205 and "
        "deprecated/latent_diffusion_uncond/pipeline_latent_diffusion_uncond.py:122 (scheduler.step without generator)",
        "fresh noise of ancestral and stochastic samplers comes from the global state, so a seed means nothing; ours "
        "draws it from the seed.",
        lambda case: case.model.kind.startswith("ldm"), _pass_generators),
    KnownFault(
        "LDM pipelines scale the initial noise before timesteps are set, or nothing at all",
        "pipelines/latent_diffusion/pipeline_latent_diffusion.py:176 (neither init_noise_sigma nor scale_model_input) "
        "and deprecated/latent_diffusion_uncond/pipeline_latent_diffusion_uncond.py:103 (before set_timesteps)",
        "samplers in sigma form start from noise of another size than their first step expects; ours scales it.",
        lambda case: case.model.kind.startswith("ldm"), _scale_samples),
)
