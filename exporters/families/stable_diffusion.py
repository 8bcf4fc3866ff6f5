"""Stable Diffusion 1.x and 2.x, and any pipeline of the same parts: CLIP text encoder, U-Net, autoencoder."""

from __future__ import annotations

from exporters.families import parts
from exporters.families.declaration import ComponentSpec, Family, Shapes
from exporters.source.model_folder import ComponentSource, Source
from runtimes.bundle.roles import Conditioner, Roles
from runtimes.bundle.tensors import TensorSpec

INPAINTING = "StableDiffusionInpaintPipeline"  # its U-Net may also take a mask and the masked image, 9 channels


def _components(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    """The four networks; `shapes` overrides ranges (batch in images, height and width in pixels)."""
    vae = _check(source)
    axes, context = parts.pipeline_axes(source, vae, shapes), source.components["text_encoder"].config["hidden_size"]
    words = parts.words_axis(shapes, _tokens(source))
    hidden = TensorSpec(parts.HIDDEN, "float32", ("batch", "sequence", context), "after the last layer norm")
    return {
        "text_encoder": parts.text_encoder("text_encoder", "text_encoder", (hidden,), axes, words),
        "unet": parts.unet(source, axes, context, parts.context_axis(shapes, _tokens(source))),
        **parts.autoencoder(vae, axes),
    }


def _roles(source: Source) -> Roles:
    vae = _check(source)
    return parts.roles(source, vae, Conditioner((parts.reads("text_encoder", _tokens(source)),), parts.CONTEXT))


def _check(source: Source) -> ComponentSource:
    """Refuse what the sampling loop of this family would run wrongly; gives the autoencoder.

    Raises:
        InputError: another network class, a U-Net input that nothing feeds, channels or widths that disagree.
    """
    text = parts.check_class(source, "text_encoder", "CLIPTextModel")
    parts.check_class(source, "unet", "UNet2DConditionModel")
    vae = parts.check_vae(source, "vae", "AutoencoderKL", "AutoencoderTiny")
    parts.check_numbers(text, "hidden_size", "max_position_embeddings")
    parts.check_unet(source, vae, added=(None, "text"), inpaints=source.pipeline_class == INPAINTING)
    parts.check_context(source, text.config["hidden_size"], "hidden_size")
    return vae


def _tokens(source: Source) -> int:
    return parts.tokens_of(source, "tokenizer", source.components["text_encoder"].config["max_position_embeddings"])


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    source_components=("text_encoder", "unet", "vae"),
    tokenizers=("tokenizer",),
    components=_components,
    roles=_roles,
)
