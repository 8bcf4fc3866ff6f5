"""Stable Diffusion 1.x and 2.x, and any pipeline of the same parts: CLIP text encoder, U-Net, AutoencoderKL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporters.families.base import (
    ComponentSpec,
    Family,
    Shapes,
    check_shapes,
    config_value,
    pixels_to_latents,
    scaled,
)
from runtimes.errors import InputError
from runtimes.manifest import PipelineFacts
from runtimes.tensors import Axis, ShapeRange, TensorSpec

if TYPE_CHECKING:
    from exporters.source import ComponentSource, Source

# U-Net inputs that Stable Diffusion's sampling loop cannot supply: a config that asks for one is refused.
_UNFED = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim",
          "timestep_post_act_input")
_CLASSES = {"text_encoder": ("CLIPTextModel",), "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",)}


def _components(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    """The four networks; `shapes` overrides ranges (batch in images, height and width in pixels)."""
    check_shapes(shapes)
    _check(source)
    unet, vae = source.components["unet"].config, source.components["vae"].config
    channels, pixels = vae["latent_channels"], vae.get("in_channels", 3)
    factor, multiple = _vae_factor(source), 2 ** (len(unet["block_out_channels"]) - 1)
    width_of_context, tokens = unet["cross_attention_dim"], _tokens(source)

    images = shapes.get("batch", ShapeRange(1, 1, 8))
    height, width = (
        pixels_to_latents(shapes, name, factor, multiple, _default_rows(size, multiple))
        for name, size in zip(("height", "width"), _sample_size(source), strict=True)
    )
    sequence = shapes.get("sequence", ShapeRange(1, tokens, tokens))
    if sequence.max > tokens:
        raise InputError(f"sequence={sequence.max} is longer than the text encoder's {tokens} positions",
                         where="--shapes", fix=f"at most {tokens}")

    guided = Axis("images, doubled under guidance", ShapeRange(images.min, 2 * images.opt, 2 * images.max))
    single = Axis("images", images)
    words = Axis("tokens of the prompt, padded", sequence)
    latent = {"height": Axis("latent rows", height, multiple), "width": Axis("latent columns", width, multiple)}
    image = {
        "image_height": Axis("pixel rows", scaled(height, factor), factor * multiple),
        "image_width": Axis("pixel columns", scaled(width, factor), factor * multiple),
    }
    latents = ("batch", channels, "height", "width")
    return {
        "text_encoder": ComponentSpec(
            "text_encoder", "text_encoder",
            (TensorSpec("input_ids", "int64", ("batch", "sequence"), "token numbers"),),
            (TensorSpec("last_hidden_state", "float32", ("batch", "sequence", width_of_context),
                        "after the last layer norm"),),
            {"batch": guided, "sequence": words},
        ),
        "unet": ComponentSpec(
            "unet", "unet",
            (TensorSpec("sample", "float32", latents, "noisy latents"),
             TensorSpec("timestep", "float32", ("batch",), "0 to the number of training steps, may be fractional"),
             TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", width_of_context),
                        "last_hidden_state of the text encoder")),
            (TensorSpec("out_sample", "float32", ("batch", unet["out_channels"], "height", "width"),
                        "epsilon, v or sample, as the scheduler's prediction_type says"),),
            {"batch": guided, "sequence": words, **latent},
        ),
        "vae_encoder": ComponentSpec(
            "vae_encoder", "vae",
            (TensorSpec("sample", "float32", ("batch", pixels, "image_height", "image_width"), "RGB, -1 to 1"),),
            (TensorSpec("latent_parameters", "float32", ("batch", 2 * channels, "height", "width"),
                        "mean, then log-variance; not scaled"),),
            {"batch": single, **latent, **image},
        ),
        "vae_decoder": ComponentSpec(
            "vae_decoder", "vae",
            (TensorSpec("latent_sample", "float32", latents, "latents divided by the scaling factor"),),
            (TensorSpec("sample", "float32", ("batch", vae.get("out_channels", 3), "image_height", "image_width"),
                        "RGB, about -1 to 1, not clipped"),),
            {"batch": single, **latent, **image},
        ),
    }


def _facts(source: Source) -> PipelineFacts:
    _check(source)
    vae, factor, (rows, columns) = source.components["vae"].config, _vae_factor(source), _sample_size(source)
    return PipelineFacts(
        latent_channels=vae["latent_channels"],
        vae_scale_factor=factor,
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),  # absent in configs older than diffusers 0.12
        height=rows * factor,
        width=columns * factor,
        tokens=_tokens(source),
    )


def _check(source: Source) -> None:
    """Refuse what the sampling loop of this family would run wrongly.

    Raises:
        InputError: another network class, a U-Net input that nothing feeds, channels or widths that disagree.
    """
    for name, classes in _CLASSES.items():
        found = source.components[name]
        if found.class_name not in classes:
            raise InputError(f"{name} is a {found.class_name}, which this family cannot run",
                             where=str(source.path / "model_index.json"), fix=f"use {' or '.join(classes)}")
    text, unet, vae = (source.components[name] for name in _CLASSES)
    for component, keys in ((unet, ("in_channels", "out_channels")), (vae, ("latent_channels",)),
                            (text, ("hidden_size", "max_position_embeddings"))):
        for key in keys:
            config_value(component.config, key, int, _place(component))
    config_value(unet.config, "block_out_channels", (list, tuple), _place(unet))
    config_value(vae.config, "block_out_channels", (list, tuple), _place(vae))
    for key in _UNFED:
        if unet.config.get(key):
            raise InputError(f"{key}={unet.config[key]!r} needs an input that {source.pipeline_class} does not feed",
                             where=_place(unet), fix="use a U-Net without it")
    _check_widths(text, unet, vae)


def _check_widths(text: ComponentSource, unet: ComponentSource, vae: ComponentSource) -> None:
    latent, given = vae.config["latent_channels"], unet.config["in_channels"]
    if given != latent:
        inpaint = given == 2 * latent + 1
        raise InputError(
            f"in_channels is {given}, the VAE has {latent} latent channels"
            + (": an inpainting U-Net that also takes a mask and the masked image" if inpaint else ""),
            where=_place(unet), fix="use a U-Net whose in_channels are the VAE's latent_channels")
    if unet.config["out_channels"] != latent:
        raise InputError(f"out_channels is {unet.config['out_channels']}, the VAE has {latent} latent channels",
                         where=_place(unet), fix="variance-predicting U-Nets are not supported")
    context, hidden = unet.config.get("cross_attention_dim"), text.config["hidden_size"]
    if context != hidden:
        raise InputError(f"cross_attention_dim is {context!r:.40}, the text encoder's hidden_size {hidden}",
                         where=_place(unet), fix="combine a U-Net and a text encoder that were trained together")


def _place(component: ComponentSource) -> str:
    return str(component.folder / "config.json")


def _vae_factor(source: Source) -> int:
    factor: int = 2 ** (len(source.components["vae"].config["block_out_channels"]) - 1)
    return factor


def _tokens(source: Source) -> int:
    """Prompt length: the text encoder's positions, or the tokenizer's limit where that is lower."""
    positions: int = source.components["text_encoder"].config["max_position_embeddings"]
    limit: Any = source.tokenizer_config("tokenizer").get("model_max_length")
    return min(positions, int(limit)) if isinstance(limit, int | float) and limit >= 1 else positions


def _sample_size(source: Source) -> tuple[int, int]:
    """Default latent rows and columns: `sample_size` is one number or a pair."""
    unet = source.components["unet"]
    size = config_value(unet.config, "sample_size", (int, list, tuple), _place(unet))
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(rows), int(columns)


def _default_rows(size: int, multiple: int) -> ShapeRange:
    """From the smallest possible picture to four times the trained side."""
    common = max(multiple, size // multiple * multiple)
    return ShapeRange(multiple, common, 4 * common)


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    source_components=("text_encoder", "unet", "vae"),
    tokenizers=("tokenizer",),
    components=_components,
    facts=_facts,
)
