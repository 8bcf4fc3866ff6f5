"""Stable Diffusion XL: the base model with two text encoders, the refiner with the second one alone, Turbo and LCM.

Podell et al., arXiv 2307.01952: the context is the last but one hidden state of each text encoder side by side
(section 2.1); the U-Net also gets the second one's pooled embedding and sizes as numbers (section 2.2).
"""

from __future__ import annotations

from exporters.families import parts
from exporters.families.declaration import ComponentSpec, Family, Shapes, config_value
from exporters.source.model_folder import ComponentSource, Source
from runtimes.bundle.roles import NUMBERS, Conditioner, Roles
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import InputError

INPAINTING = "StableDiffusionXLInpaintPipeline"  # its U-Net may also take a mask and the masked image, 9 channels
FIRST, SECOND = "text_encoder", "text_encoder_2"
_CLASSES = {FIRST: "CLIPTextModel", SECOND: "CLIPTextModelWithProjection"}
# What the numbers of `time_ids` mean, in order: StableDiffusionXLPipeline._get_add_time_ids.
BASE_IDS = NUMBERS[:6]
REFINER_IDS = (*BASE_IDS[:4], "aesthetic_score")
HIDDEN, POOLED, SIZES = "penultimate_hidden_state", "text_embeds", "time_ids"


def _components(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    """Up to five networks; `shapes` overrides ranges (batch in images, height and width in pixels)."""
    vae = _check(source)
    axes, words = parts.pipeline_axes(source, vae, shapes), parts.words_axis(shapes, _tokens(source))
    pooled = TensorSpec(POOLED, "float32", ("batch", source.components[SECOND].config["projection_dim"]),
                        "pooled embedding of the second text encoder")
    sizes = TensorSpec(SIZES, "float32", ("batch", len(_ids(source))), ", ".join(_ids(source)))
    encoders = {}
    for name in _encoders(source):
        hidden = TensorSpec(HIDDEN, "float32",
                            ("batch", "sequence", source.components[name].config["hidden_size"]),
                            "before the last layer, without the final layer norm")
        outputs = (hidden, pooled) if name == SECOND else (hidden,)
        encoders[name] = parts.text_encoder(name, name, outputs, axes, words)
    context = parts.context_axis(shapes, _tokens(source))
    return {**encoders, "unet": parts.unet(source, axes, _context(source), context, (pooled, sizes)),
            **parts.autoencoder(vae, axes)}


def _roles(source: Source) -> Roles:
    vae = _check(source)
    encoders = tuple(parts.reads(name, _tokens(source), HIDDEN, POOLED if name == SECOND else "")
                     for name in _encoders(source))
    zeros = source.options.get("force_zeros_for_empty_prompt", True)
    conditioner = Conditioner(encoders, parts.CONTEXT, POOLED, {SIZES: _ids(source)}, "zeros" if zeros else "text")
    return parts.roles(source, vae, conditioner, statistics=True)


def _check(source: Source) -> ComponentSource:
    """Refuse what the sampling loop of this family would run wrongly; gives the autoencoder.

    Raises:
        InputError: another network class, a U-Net input that nothing feeds, channels or widths that disagree.
    """
    if (FIRST in source.components) != ("tokenizer" in source.tokenizers):
        raise InputError("of text_encoder and tokenizer it has one alone", where=str(source.path / "model_index.json"),
                         fix="save the whole pipeline again, with both or without")
    for name in _encoders(source):
        encoder = parts.check_class(source, name, _CLASSES[name])
        parts.check_numbers(encoder, "hidden_size", "max_position_embeddings")
    parts.check_numbers(source.components[SECOND], "projection_dim")
    unet = parts.check_class(source, "unet", "UNet2DConditionModel")
    vae = parts.check_vae(source, "vae", "AutoencoderKL", "AutoencoderTiny")
    parts.check_unet(source, vae, added=("text_time",), inpaints=source.pipeline_class == INPAINTING)
    parts.check_context(source, _context(source), "hidden sizes together")
    each = config_value(unet.config, "addition_time_embed_dim", int, parts.place(unet))
    wanted = config_value(unet.config, "projection_class_embeddings_input_dim", int, parts.place(unet))
    pooled = source.components[SECOND].config["projection_dim"]
    if pooled + each * len(_ids(source)) != wanted:
        raise InputError(
            f"projection_class_embeddings_input_dim is {wanted}, but the pooled embedding has {pooled} numbers and "
            f"{len(_ids(source))} sizes have {each} each", where=parts.place(unet),
            fix="check requires_aesthetics_score in model_index.json: true for the refiner alone")
    return vae


def _encoders(source: Source) -> tuple[str, ...]:
    return tuple(name for name in (FIRST, SECOND) if name in source.components)


def _ids(source: Source) -> tuple[str, ...]:
    return REFINER_IDS if source.options.get("requires_aesthetics_score") else BASE_IDS


def _context(source: Source) -> int:
    return sum(source.components[name].config["hidden_size"] for name in _encoders(source))


def _tokens(source: Source) -> int:
    return min(parts.tokens_of(source, name.replace("text_encoder", "tokenizer"),
                               source.components[name].config["max_position_embeddings"])
               for name in _encoders(source))


STABLE_DIFFUSION_XL = Family(
    name="stable-diffusion-xl",
    source_components=(SECOND, "unet", "vae"),
    optional=(FIRST, "tokenizer"),
    tokenizers=("tokenizer_2",),
    components=_components,
    roles=_roles,
)
