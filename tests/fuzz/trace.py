"""What one side did with a case: every feed of its networks and the result; or why it would not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from runtimes.backends.session import Arrays, Session, WrappedSession

Array = np.ndarray[Any, Any]


@dataclass
class Trace:
    """Feeds in order, and the result.

    Attributes:
        calls: of the denoiser: sample, timestep, encoder_hidden_states, text_embeds, time_ids; rows first.
        encoded: images that the autoencoder encoded, (N, 3, H, W) in -1..1 each.
        decoded: latents that it decoded.
        codes: of autoencoders with a codebook, the entry of each latent: (B * H * W,) int64.
        result: (B, H, W, 3) in 0..1 or, for the output "latents", (B, C, H/f, W/f).
        codebook: of diffusers' side: what makes images of entries, and the entries.
    """

    calls: list[dict[str, Array]] = field(default_factory=list)
    encoded: list[Array] = field(default_factory=list)
    decoded: list[Array] = field(default_factory=list)
    codes: list[Array] = field(default_factory=list)
    result: Array | None = None
    codebook: Codebook | None = None


@dataclass(frozen=True)
class Codebook:
    """Of diffusers' autoencoder: its entries (K, C), and its decoder after the choice of entries.

    Attributes:
        image_of: codes (B, H, W) int64 -> (B, fH, fW, 3) float32 in 0..1.
    """

    entries: Array
    image_of: Callable[[Array], Array]


@dataclass(frozen=True)
class Stopped:
    """A side that gave no result.

    Attributes:
        stage: "build" for reading model and adapters, "request" for the call.
        kind: class of the exception.
        text: its message.
        where: of a DeployError, the file or argument.
        exit_code: that the command line would end with; of diffusers' side 0.
        networks_ran: whether a network had been called before.
    """

    stage: str
    kind: str
    text: str
    where: str = ""
    exit_code: int = 0
    networks_ran: bool = False


def record_diffusers(pipe: Any, trace: Trace, *, eight_bit: bool = False) -> None:
    """Note every call of a diffusers pipeline's U-Net and autoencoder; `eight_bit` images are Pillow's."""
    def on_unet(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | dict(kwargs)
        sample = _numpy(named["sample"])
        call = {"sample": sample,
                "timestep": np.broadcast_to(np.asarray(_numpy(named["timestep"]), np.float64), (len(sample),))}
        if named.get("encoder_hidden_states") is not None:
            call["encoder_hidden_states"] = _numpy(named["encoder_hidden_states"])
        if named.get("timestep_cond") is not None:
            call["timestep_cond"] = _numpy(named["timestep_cond"])
        call |= {name: _numpy(value) for name, value in (named.get("added_cond_kwargs") or {}).items()}
        trace.calls.append(call)

    vae = pipe.vae if hasattr(pipe, "vae") else pipe.vqvae
    pipe.unet.register_forward_pre_hook(on_unet, with_kwargs=True)
    vae.encode = _noting(_of_plain_strides(vae.encode), trace.encoded)
    if hasattr(vae, "quantize"):
        vae.quantize.embedding.register_forward_hook(
            lambda module, args, output: trace.codes.append(_numpy(args[0]).reshape(-1).astype(np.int64)))
        trace.codebook = Codebook(_numpy(vae.quantize.embedding.weight), partial(_image_of, vae, vae.decode, eight_bit))
    vae.decode = _noting(vae.decode, trace.decoded)


def _image_of(vae: Any, decode: Any, eight_bit: bool, codes: Array) -> Array:
    import torch

    with torch.no_grad():
        entries = vae.quantize.embedding.weight[torch.from_numpy(codes)].permute(0, 3, 1, 2)
        image = decode(entries, force_not_quantize=True).sample
    found = _numpy((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    return np.round(found * 255) / 255 if eight_bit else found


@contextlib.contextmanager
def record_codes(trace: Trace) -> Iterator[None]:
    """Note the entries that our decoders choose meanwhile."""
    from exporters.source.named_inputs import VqDecoder

    nearest = VqDecoder.nearest

    def noted(self: Any, latent_sample: Any) -> Any:
        found = nearest(self, latent_sample)
        trace.codes.append(_numpy(found).reshape(-1).astype(np.int64))
        return found

    VqDecoder.nearest = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        VqDecoder.nearest = nearest  # type: ignore[method-assign]


def _of_plain_strides(encode: Any) -> Any:
    """Images from numpy have the strides of channels last, for which PyTorch's GroupNorm sums less exactly: where a
    mask leaves nothing of an image, latents are 2e-2 from those in float64, and 7e-7 with the plain strides of ours.
    """
    return lambda images, *args, **kwargs: encode(images.contiguous(), *args, **kwargs)


def _noting(function: Any, found: list[Array]) -> Any:
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(_numpy(first))
        return function(first, *args, **kwargs)

    return call


def _numpy(value: Any) -> Array:
    array: Array = value.detach().float().numpy().copy() if hasattr(value, "detach") else np.asarray(value)
    return array


class Recorded(WrappedSession):
    """One of our sessions under the ranges of its component, with its feeds noted."""

    def __init__(self, inner: Session, component: Any, trace: Trace) -> None:
        super().__init__(inner, component)
        self._trace = trace

    def _run(self, feeds: Arrays) -> dict[str, Array]:
        copies = {name: np.array(value) for name, value in feeds.items()}
        if self.name == "unet":
            self._trace.calls.append(copies)
        elif self.name == "vae_encoder":
            self._trace.encoded.append(copies["sample"])
        elif self.name == "vae_decoder":
            self._trace.decoded.append(copies["latent_sample"])
        return super()._run(feeds)
