"""Makes networks for diffusers' pipeline that are of the real class, cost little and record their calls.

Pipelines check the types of their parts and read their configs, so each is an instance of its class on meta weights
whose `forward` (`encode` and `decode` of an autoencoder) does something else. Text encoders and the autoencoder's
encoder compute for real, with the weights that the *weights* level has compared, loaded for one call.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.parity.upstream.standin import stand_in
from exporters.adapters.lora_merging import merge
from exporters.onnx.streaming import unread_module
from exporters.quiet import quiet
from exporters.source.model_folder import read_json
from exporters.source.networks import empty_network, load_module

Array = np.ndarray[Any, Any]


@dataclass
class Calls:
    """What one side fed its networks, in order.

    Attributes:
        denoiser: inputs of every call by name; rows are images, the negative prompts' first under guidance.
        text: text encoder -> (tokens,) int64 of every prompt that it read.
        encoded: images for the autoencoder, (3, H, W) float32 in -1..1 each.
        decoded: latents that the decoder was given, (C, H/f, W/f) float32 each.
    """

    denoiser: list[dict[str, Array]] = field(default_factory=list)
    text: dict[str, list[Array]] = field(default_factory=dict)
    encoded: list[Array] = field(default_factory=list)
    decoded: list[Array] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all."""
        self.denoiser, self.text, self.encoded, self.decoded = [], {}, [], []


@dataclass(frozen=True)
class Network:
    """Where a component lies.

    Attributes:
        folder: with config.json and weights.
        library, class_name: as in model_index.json.
        adapter: what LoRAs call it.
        beside: LoRA that lies beside the weights, or None.
    """

    folder: Path
    library: str
    class_name: str
    adapter: str
    beside: Path | None = None

    def meta(self, **methods: Any) -> Any:
        """An instance of the class without weights, whose `device` says CPU, with these methods."""
        with quiet():
            module = empty_network(self.folder, self.library, self.class_name, read_json(self.folder / "config.json"))
        kind = type(module)
        also = {"device": property(lambda _: torch.device("cpu")), "dtype": property(lambda _: torch.float32)}
        module.__class__ = type(kind.__name__, (kind,), {**also, **methods, "__module__": kind.__module__})
        return module.eval()

    def unread(self) -> Any:
        """The network with room for weights that nobody has touched, which the kernel gives no memory."""
        return unread_module(self.folder, self.library, self.class_name)[0]

    def loaded(self) -> Any:
        """The network with its weights and the LoRA beside them, float32."""
        module = load_module(self.folder, self.library, self.class_name, check=False)
        if self.beside is not None:
            merge(module, self.adapter, self.beside, 1.0)
        return module


def denoiser(network: Network, calls: Calls, channels: int) -> Any:
    """A denoiser that answers with `stand_in` and records what it is fed, whatever it is called."""

    def forward(self: Any, sample: Any, timestep: Any, encoder_hidden_states: Any = None, return_dict: bool = True,
                **others: Any) -> Any:
        feeds = {"sample": _array(sample), "timestep": _timesteps(timestep, len(sample))}
        feeds |= _named({"encoder_hidden_states": encoder_hidden_states, **others})
        calls.denoiser.append(feeds)
        result = torch.from_numpy(stand_in(feeds, channels))
        return _Output(sample=result) if return_dict else (result,)

    return network.meta(forward=forward)


def text_encoder(network: Network, calls: Calls, name: str) -> Any:
    """A text encoder whose weights are in memory during a call alone; records the tokens that it is given."""

    def forward(self: Any, input_ids: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.text.setdefault(name, []).extend(input_ids.numpy().astype(np.int64).copy())
        with torch.inference_mode():
            return network.loaded()(input_ids, *arguments, **keywords)

    return network.meta(forward=forward)


def autoencoder(network: Network, calls: Calls, factor: int) -> Any:
    """An autoencoder that encodes for real, records both ways, and decodes to grey.

    Images from numpy have the strides of channels last, for which PyTorch's GroupNorm sums less exactly: 5e-2 against
    2e-4 where a tensor varies by 1e-4 around 0.3, as a masked image does of which little is left. Ours has plain ones.
    """

    def encode(self: Any, x: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.encoded.extend(_array(x))
        with torch.inference_mode():
            return network.loaded().encode(x.contiguous(), *arguments, **keywords)

    def decode(self: Any, z: Any, return_dict: bool = True, **others: Any) -> Any:
        calls.decoded.extend(_array(z))
        rows, _, height, width = z.shape
        result = torch.zeros(rows, int(self.config.get("out_channels", 3)), height * factor, width * factor)
        return _Output(sample=result) if return_dict else (result,)

    return network.meta(encode=encode, decode=decode)


class _Output(dict[str, Any]):
    """What diffusers' networks return: attributes and items."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.__dict__.update(values)


def _named(values: dict[str, Any], prefix: str = "") -> dict[str, Array]:
    """Everything that is not None, flat; `added_cond_kwargs` by the names within."""
    found: dict[str, Array] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _named(value)
        elif isinstance(value, torch.Tensor):
            found[name] = _array(value)
        elif value is not None:
            found[name] = np.asarray(value)
    return found


def _array(tensor: Any) -> Array:
    array: Array = tensor.detach().cpu().numpy().copy()
    return array


def _timesteps(timestep: Any, rows: int) -> Array:
    """(rows,) float64, whatever a scheduler calls a timestep."""
    value = timestep.detach().cpu().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (rows,)).copy()
