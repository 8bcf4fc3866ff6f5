"""What one side did with a case: every feed of its networks and the result; or why it would not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        result: (B, H, W, 3) in 0..1 or, for the output "latents", (B, C, H/f, W/f).
    """

    calls: list[dict[str, Array]] = field(default_factory=list)
    encoded: list[Array] = field(default_factory=list)
    decoded: list[Array] = field(default_factory=list)
    result: Array | None = None


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


def record_diffusers(pipe: Any, trace: Trace) -> None:
    """Note every call of a diffusers pipeline's U-Net and autoencoder."""
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
    vae.encode = _noting(vae.encode, trace.encoded)
    vae.decode = _noting(vae.decode, trace.decoded)


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
