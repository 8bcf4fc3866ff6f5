"""Latent diffusion as first published, arXiv 2112.10752: unconditional with a codebook, and from text by LDMBert."""

from __future__ import annotations

from exporters.families import parts
from exporters.families.declaration import ComponentSpec, Family, Shapes
from exporters.source.model_folder import ComponentSource, Source
from runtimes.bundle.roles import Conditioner, Roles
from runtimes.bundle.tensors import TensorSpec

VAE = "vqvae"  # what both pipelines call their autoencoder, whichever class it has


def _unconditional(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    """The U-Net and the autoencoder's halves; nothing is guided, so the batch is never doubled."""
    vae = _check_unconditional(source)
    axes = parts.pipeline_axes(source, vae, shapes, guided=False)
    return {"unet": parts.unet(source, axes), **parts.autoencoder(vae, axes)}


def _check_unconditional(source: Source) -> ComponentSource:
    parts.check_class(source, "unet", "UNet2DModel")
    vae = parts.check_vae(source, VAE)
    parts.check_unet(source, vae)
    return vae


def _text_to_image(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    vae = _check_text_to_image(source)
    axes, context = parts.pipeline_axes(source, vae, shapes), source.components["bert"].config["d_model"]
    words = parts.words_axis(shapes, _tokens(source))
    hidden = TensorSpec(parts.HIDDEN, "float32", ("batch", "sequence", context), "after the last layer norm")
    return {"text_encoder": parts.text_encoder("text_encoder", "bert", (hidden,), axes, words),
            "unet": parts.unet(source, axes, context, parts.context_axis(shapes, _tokens(source))),
            **parts.autoencoder(vae, axes)}


def _check_text_to_image(source: Source) -> ComponentSource:
    text = parts.check_class(source, "bert", "LDMBertModel")
    parts.check_class(source, "unet", "UNet2DConditionModel")
    vae = parts.check_vae(source, VAE)
    parts.check_numbers(text, "d_model", "max_position_embeddings")
    parts.check_unet(source, vae)
    parts.check_context(source, text.config["d_model"], "d_model")
    return vae


def _text_to_image_roles(source: Source) -> Roles:
    vae = _check_text_to_image(source)
    reader = parts.reads("text_encoder", _tokens(source))
    return parts.roles(source, vae, Conditioner((reader,), parts.CONTEXT), guides_below_one=True)


def _tokens(source: Source) -> int:
    """77 in LDMTextToImagePipeline.__call__, which ignores the tokenizer's own limit."""
    return min(77, int(source.components["bert"].config["max_position_embeddings"]))


UNCONDITIONAL = Family(
    name="ldm-unconditional",
    source_components=("unet", VAE),
    tokenizers=(),
    components=_unconditional,
    roles=lambda source: parts.roles(source, _check_unconditional(source), Conditioner()),
)
TEXT_TO_IMAGE = Family(
    name="ldm-text-to-image",
    source_components=("bert", "unet", VAE),
    tokenizers=("tokenizer",),
    components=_text_to_image,
    roles=_text_to_image_roles,
)
