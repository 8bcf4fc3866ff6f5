"""Parts that several families share: axes, text encoders, U-Nets, autoencoders. A family is put together from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.families.declaration import ComponentSpec, Shapes, check_shapes, config_value, pixels_to_latents, scaled
from exporters.source.model_folder import ComponentSource, Source
from runtimes.bundle.roles import (
    Codec,
    Coder,
    Conditioner,
    Denoiser,
    GuidanceRole,
    Process,
    Roles,
    TextEncoder,
)
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError

CONTEXT, HIDDEN = "encoder_hidden_states", "last_hidden_state"
ENCODED = {"moments": "latent_parameters", "latents": "latents"}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
# U-Net inputs that no sampling loop here supplies: a config that asks for one is refused.
_UNFED = ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "timestep_post_act_input")
# An `encoder_hid_dim_type` that asks for none: the U-Net brings what the text encoders give to the width it wants.
_PROJECTED = "text_proj"


@dataclass(frozen=True)
class PipelineAxes:
    """The axes of a pipeline's components.

    Attributes:
        images: batch of the autoencoder; `rows` is the U-Net's and the text encoders', doubled under guidance.
        latent: "height" and "width" in latent rows and columns.
        image: "image_height" and "image_width" in pixels.
    """

    images: Axis
    rows: Axis
    latent: Mapping[str, Axis]
    image: Mapping[str, Axis]


def pipeline_axes(source: Source, vae: ComponentSource, shapes: Shapes, *, guided: bool = True) -> PipelineAxes:
    """Axes as the configs allow them; `shapes` overrides ranges (batch in images, height and width in pixels).

    Args:
        guided: whether the sampling loop doubles the U-Net's batch.

    Raises:
        InputError: an unknown axis, or pixels that do not fit.
    """
    check_shapes(shapes)
    factor, multiple = vae_factor(vae), row_multiple(source, vae, shapes)
    images = shapes.get("batch", ShapeRange(1, 1, 8))
    least = 2 ** (len(source.components["unet"].config["block_out_channels"]) - 1)
    height, width = (
        pixels_to_latents(shapes, name, factor * multiple, factor, ShapeRange(min(least, size), size, 4 * size))
        for name, size in zip(("height", "width"), sample_size(source), strict=True)
    )
    single = Axis("images", images)
    return PipelineAxes(
        single,
        Axis("images, doubled under guidance", ShapeRange(images.min, 2 * images.opt, 2 * images.max))
        if guided else single,
        {"height": Axis("latent rows", height, multiple), "width": Axis("latent columns", width, multiple)},
        {"image_height": Axis("pixel rows", scaled(height, factor), factor * multiple),
         "image_width": Axis("pixel columns", scaled(width, factor), factor * multiple)},
    )


def row_multiple(source: Source, vae: ComponentSource, shapes: Shapes) -> int:
    """What latent rows and columns are multiples of: 2 to the number of times that the U-Net halves them.

    1 where the model's own size, or one that is asked for, is no such multiple.

    UNet2DConditionModel then doubles to the size that it halved (`forward_upsample_size`), and its graph does so at
    every size; see `exporters.onnx.trace`.

    Raises:
        InputError: such a size with a U-Net of another class, which cannot run it.
    """
    unet, factor = source.components["unet"], vae_factor(vae)
    multiple: int = 2 ** (len(unet.config["block_out_channels"]) - 1)
    asked = [(f"{name}={size} pixels", "--shapes", size) for name in ("height", "width") if name in shapes
             for size in (shapes[name].min, shapes[name].opt, shapes[name].max)]
    own = [(f"sample_size {size}", place(unet), size * factor)
           for name, size in zip(("height", "width"), sample_size(source), strict=True) if name not in shapes]
    uneven = [(what, where) for what, where, size in (*asked, *own) if size % (factor * multiple)]
    if not uneven:
        return multiple
    if unet.class_name != "UNet2DConditionModel":
        raise InputError(f"{uneven[0][0]} is not a multiple of what the U-Net halves to, {factor * multiple} pixels",
                         where=uneven[0][1], fix=f"give --shapes height and width in steps of {factor * multiple}")
    return 1


def words_axis(shapes: Shapes, tokens: int) -> Axis:
    """The axis of tokens that a text encoder reads: `context_axis` within its positions."""
    wanted = context_axis(shapes, tokens).range
    return Axis("tokens of the prompt, padded", ShapeRange(*(min(s, tokens) for s in (wanted.min, wanted.opt,
                                                                                      wanted.max))))


def context_axis(shapes: Shapes, tokens: int) -> Axis:
    """The axis of tokens that the U-Net takes: the text encoder's, or several windows of it for long prompts.

    Raises:
        InputError: longer than the text encoder's positions, and not by whole windows.
    """
    sequence = shapes.get("sequence", ShapeRange(1, tokens, tokens))
    if sequence.max > tokens and sequence.max % tokens:
        raise InputError(f"sequence={sequence.max} is longer than the text encoder's {tokens} positions",
                         where="--shapes", fix=f"at most {tokens}, or for long prompts a multiple of it")
    return Axis("tokens of the prompt, padded", sequence)


def text_encoder(name: str, part: str, outputs: tuple[TensorSpec, ...], axes: PipelineAxes, words: Axis,
                 ) -> ComponentSpec:
    """A network from token numbers to the given outputs."""
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"), "token numbers")
    return ComponentSpec(name, part, (ids,), outputs, {"batch": axes.rows, "sequence": words})


def unet(source: Source, axes: PipelineAxes, context: int | None = None, words: Axis | None = None,
         added: tuple[TensorSpec, ...] = ()) -> ComponentSpec:
    """The denoising network.

    Args:
        context: width of encoder_hidden_states, None for a network that takes none.
        words: axis of their tokens.
        added: inputs of this family alone, after the usual ones.
    """
    config = source.components["unet"].config
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("sample", "float32", ("batch", config["in_channels"], "height", "width"), "noisy latents"),
        TensorSpec("timestep", "float32", ("batch",), "0 to the number of training steps, may be fractional"),
    )
    named: dict[str, Axis] = {"batch": axes.rows, **axes.latent}
    if words is not None and context is not None:
        inputs += (TensorSpec(CONTEXT, "float32", ("batch", "sequence", context),
                              "what the text encoders make of the prompt"),)
        named["sequence"] = words
    output = TensorSpec("out_sample", "float32", ("batch", config["out_channels"], "height", "width"),
                        "epsilon, v or sample, as the scheduler's prediction_type says")
    return ComponentSpec("unet", "unet", (*inputs, *added), (output,), named)


def autoencoder(vae: ComponentSource, axes: PipelineAxes) -> dict[str, ComponentSpec]:
    """Both halves of a VAE. One that is no variational autoencoder gives latents instead of a distribution."""
    channels, config = vae.config["latent_channels"], vae.config
    named = {"batch": axes.images, **axes.latent, **axes.image}
    if vae.class_name == "AutoencoderKL":
        encoded = TensorSpec(ENCODED["moments"], "float32", ("batch", 2 * channels, "height", "width"),
                             "mean, then log-variance; not scaled")
    else:
        encoded = TensorSpec(ENCODED["latents"], "float32", ("batch", channels, "height", "width"), "not scaled")
    return {
        "vae_encoder": ComponentSpec(
            "vae_encoder", vae.name,
            (TensorSpec("sample", "float32", ("batch", config.get("in_channels", 3), "image_height", "image_width"),
                        "RGB, -1 to 1"),),
            (encoded,), named),
        "vae_decoder": ComponentSpec(
            "vae_decoder", vae.name,
            (TensorSpec("latent_sample", "float32", ("batch", channels, "height", "width"),
                        "latents divided by the scaling factor"),),
            (TensorSpec("sample", "float32", ("batch", config.get("out_channels", 3), "image_height", "image_width"),
                        "RGB, about -1 to 1, not clipped"),),
            named),
    }


def check_class(source: Source, name: str, *classes: str) -> ComponentSource:
    """One component, whose class must be one that the family runs.

    Raises:
        InputError: of another class.
    """
    found = source.components[name]
    if found.class_name not in classes:
        raise InputError(f"{name} is a {found.class_name}, which this family cannot run",
                         where=str(source.path / "model_index.json"), fix=f"use {' or '.join(classes)}")
    return found


def check_numbers(component: ComponentSource, *keys: str) -> None:
    """Whole numbers that the specs are made of.

    Raises:
        InputError: missing or of another type.
    """
    for key in keys:
        config_value(component.config, key, int, place(component))


def check_unet(source: Source, vae: ComponentSource, *, added: tuple[str | None, ...] = (None,),
               inpaints: bool = False) -> None:
    """Refuse a U-Net that the sampling loop would run wrongly.

    Args:
        added: values that addition_embed_type may have; "text" is made from the prompt that the U-Net is fed anyway.
        inpaints: whether the loop can also feed a mask and the masked image.

    Raises:
        InputError: an input that nothing feeds, or channels that disagree with the VAE's.
    """
    found = source.components["unet"]
    check_numbers(found, "in_channels", "out_channels")
    config_value(found.config, "block_out_channels", (list, tuple), place(found))
    sample_size(source)
    unfed = [key for key in _UNFED if found.config.get(key) is not None]
    if found.config.get("encoder_hid_dim_type") not in (None, _PROJECTED):
        unfed.append("encoder_hid_dim_type")
    if found.config.get("addition_embed_type") not in added:
        unfed.append("addition_embed_type")
    if unfed:
        raise InputError(
            f"{unfed[0]}={found.config.get(unfed[0])!r} needs an input that the sampling loop here does not feed",
            where=place(found), fix="use a U-Net without it")
    latent, given = vae.config["latent_channels"], found.config["in_channels"]
    if given != latent and not (inpaints and given == 2 * latent + 1):
        inpaint = given == 2 * latent + 1
        raise InputError(
            f"in_channels is {given}, the VAE has {latent} latent channels"
            + (": an inpainting U-Net that also takes a mask and the masked image" if inpaint else ""),
            where=place(found),
            fix=f"name StableDiffusion{'XL' * ('text_time' in added)}InpaintPipeline as _class_name in model_index.json"
            if inpaint else "use a U-Net whose in_channels are the VAE's latent_channels")
    if found.config["out_channels"] != latent:
        raise InputError(f"out_channels is {found.config['out_channels']}, the VAE has {latent} latent channels",
                         where=place(found), fix="variance-predicting U-Nets are not supported")


def check_vae(source: Source, name: str, *classes: str) -> ComponentSource:
    """The autoencoder, if its config says all that is needed.

    Raises:
        InputError: of another class, a missing number, other images than RGB, or codes of another width.
    """
    vae = check_class(source, name, *(classes or AUTOENCODERS))
    check_numbers(vae, "latent_channels")
    config_value(vae.config, block_key(vae), (list, tuple), place(vae))
    for key in ("in_channels", "out_channels"):
        if vae.config.get(key, 3) != 3:
            raise InputError(f"{key} is {vae.config[key]}, images have 3 channels", where=place(vae),
                             fix="use an autoencoder of RGB images")
    if vae.config.get("vq_embed_dim") not in (None, vae.config["latent_channels"]):
        raise InputError(f"vq_embed_dim is {vae.config['vq_embed_dim']}, latent_channels differs", where=place(vae),
                         fix="use a VQModel whose codes are as wide as its latents")
    return vae


def check_context(source: Source, width: int, of: str) -> None:
    """Refuse a U-Net that was trained with another text encoder.

    Raises:
        InputError: its cross_attention_dim, the same for every block, is not the width of what the text encoders give;
            nor is encoder_hid_dim, where the U-Net projects that itself.
    """
    found = source.components["unet"]
    key = "encoder_hid_dim" if found.config.get("encoder_hid_dim_type") == _PROJECTED else "cross_attention_dim"
    context = found.config.get(key)
    if any(each != width for each in (context if isinstance(context, list | tuple) else [context])):
        raise InputError(f"{key} is {context!r:.40}, the text encoder's {of} {width}",
                         where=place(found), fix="combine a U-Net and a text encoder that were trained together")


def place(component: ComponentSource) -> str:
    """The file an error about a config points to."""
    return str(component.folder / "config.json")


def block_key(vae: ComponentSource) -> str:
    """The key of the widths of an autoencoder's levels."""
    return "decoder_block_out_channels" if vae.class_name == "AutoencoderTiny" else "block_out_channels"


def vae_factor(vae: ComponentSource) -> int:
    """Pixels per latent row."""
    factor: int = 2 ** (len(vae.config[block_key(vae)]) - 1)
    return factor


def scaling_factor(vae: ComponentSource) -> float:
    """What latents are multiplied by; absent in configs older than diffusers 0.12.

    Raises:
        InputError: not a number.
    """
    usual = 1.0 if vae.class_name == "AutoencoderTiny" else 0.18215
    return float(config_value({"scaling_factor": usual, **vae.config}, "scaling_factor", (int, float), place(vae)))


def channel_statistics(vae: ComponentSource) -> dict[str, Any]:
    """Mean and deviation of the latents' channels, as XL's classes take them: only if both are there.

    Raises:
        InputError: not a number for each channel, or a deviation of zero.
    """
    values = {key: vae.config.get(key) for key in ("latents_mean", "latents_std")}
    if any(value is None for value in values.values()):
        return {}
    found = {}
    for key, value in values.items():
        numbers = value if isinstance(value, list | tuple) else []
        if len(numbers) != vae.config["latent_channels"] or not all(isinstance(n, int | float) for n in numbers) or (
                key == "latents_std" and 0 in numbers):
            raise InputError(f"{key} is {value!r:.60}, expected {vae.config['latent_channels']} numbers, one a channel",
                             where=place(vae), fix="get the config of this autoencoder again")
        found[key] = tuple(float(n) for n in numbers)
    return found


def reads(name: str, tokens: int, hidden: str = HIDDEN, pooled: str = "") -> TextEncoder:
    """The role of a text encoder whose tokenizer is named as in all of diffusers' folders: tokenizer_2 of
    text_encoder_2."""
    return TextEncoder(name, name.replace("text_encoder", "tokenizer"), tokens, hidden, pooled, adapter=name)


def roles(source: Source, vae: ComponentSource, conditioner: Conditioner, *, statistics: bool = False,
          guides_below_one: bool = False) -> Roles:
    """The roles of any pipeline of a U-Net and this autoencoder.

    Args:
        conditioner: what the U-Net takes besides sample and timestep.
        statistics: whether the pipeline's class looks at the mean and deviation of the latents' channels.
        guides_below_one: see `GuidanceRole`.
    """
    factor, (rows, columns) = vae_factor(vae), sample_size(source)
    gives = "moments" if vae.class_name == "AutoencoderKL" else "latents"
    codec = Codec(
        Coder("vae_encoder", "sample", ENCODED[gives]), Coder("vae_decoder", "latent_sample", "sample"),
        latent_channels=vae.config["latent_channels"], factor=factor, scaling_factor=scaling_factor(vae),
        height=rows * factor, width=columns * factor, gives=gives,
        **(channel_statistics(vae) if statistics else {}))
    guidance = GuidanceRole("cfg" if conditioner.encoders else "none", guides_below_one)
    return Roles(Denoiser("unet", adapter="unet"), codec, conditioner, Process(modes=source.modes), guidance)


def tokens_of(source: Source, tokenizer: str, positions: int) -> int:
    """Prompt length: the text encoder's positions, or the tokenizer's limit where that is lower."""
    limit: Any = source.tokenizer_config(tokenizer).get("model_max_length")
    return min(positions, int(limit)) if isinstance(limit, int | float) and limit >= 1 else positions


def sample_size(source: Source) -> tuple[int, int]:
    """Default latent rows and columns: `sample_size` is one number or a pair.

    Raises:
        InputError: it is neither.
    """
    found = source.components["unet"]
    size = config_value(found.config, "sample_size", (int, list, tuple), place(found))
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(f"sample_size is {size!r:.40}, expected one number of rows and columns, or both",
                         where=place(found), fix="get the config of this U-Net again")
    return pair[0], pair[1]
