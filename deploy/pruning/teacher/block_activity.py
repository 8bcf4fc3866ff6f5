"""Records the activity of a U-Net's blocks, which attention transfer compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_FEATURES = ("down_blocks", "mid_block", "up_blocks")


class Observed:
    """A U-Net as a function, whose blocks' activity can be recorded.

    Args:
        network: with diffusers' block names.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._found: dict[str, Tensor] | None = None
        blocks = [(name, m) for name, m in network.named_modules()
                  if name.startswith(_FEATURES) and name.count(".") == (not name.startswith("mid"))]
        for name, block in blocks:
            block.register_forward_hook(self._hook(name))

    def __call__(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """The prediction: latents (B, C, H, W), timesteps (B,), embedded prompts (B, S, D), float32 -> (B, C, H, W)."""
        output: Tensor = self.network(sample, timestep, states, return_dict=False)[0]
        return output

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Collect the activations of every block, by name, of the call inside: `activity`'s maps (B, H * W) float32."""
        self._found = {}
        try:
            yield self._found
        finally:
            self._found = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._found is not None:
                self._found[name] = activity(output[0] if isinstance(output, tuple) else output)

        return keep


def activity(features: Tensor) -> Tensor:
    """Features (B, C, H, W) float32 -> (B, H * W): mean square over channels, divided by its mean over the image."""
    maps = features.square().mean(1).flatten(1)
    return maps / maps.mean(1, keepdim=True).clamp(min=1e-6)

