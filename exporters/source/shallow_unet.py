"""Splits a U-Net in two graphs, for the step cache (reused deep features): Ma et al., DeepCache, arXiv 2312.00858.

    unet           sample, timestep, prompt -> prediction, deep_feature
    unet_shallow   sample, timestep, prompt, deep_feature of an earlier step -> prediction

Between neighbouring steps the deep layers' output hardly changes, and the shallow layers see what does. The cut is
before the last layer of the last up block, which is the paper's branch 0: what runs at every step is the first
convolution, whose output that layer takes as its skip connection, that layer, and the output convolution.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CachingUNet(nn.Module):
    """The whole U-Net with the feature that `ShallowUNet` takes as a second output: (B, F, H, W) float32.

    Every array is float32: noisy latents and prediction (B, C, H, W), timesteps (B,), embedded prompts (B, S, D).
    """

    def __init__(self, model: Any) -> None:
        """Wrap the network; nothing is copied."""
        super().__init__()
        self.model = model
        self._deep: list[Tensor] = []
        last = model.up_blocks[-1].resnets[-1]
        self._width = last.in_channels - model.conv_in.out_channels
        last.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The layer's input is the deep feature and the skip connection, one after the other on the channel axis."""
        self._deep.append(inputs[0][:, : self._width])

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The network's prediction and the feature before its last layer."""
        self._deep.clear()
        output = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output, self._deep.pop()


class ShallowUNet(nn.Module):
    """The layers of the U-Net that still run when its deep feature is given: a shorter UNet2DConditionModel.forward.

    Every array is float32: noisy latents and prediction (B, C, H, W), timesteps (B,), embedded prompts (B, S, D), the
    deep feature (B, F, H, W).
    """

    def __init__(self, model: Any) -> None:
        """Take over the shallow layers without copying them; the deep ones are not referenced."""
        super().__init__()
        block = model.up_blocks[-1]
        self.time_proj, self.time_embedding = model.time_proj, model.time_embedding
        self.conv_in, self.resnet = model.conv_in, block.resnets[-1]
        self.attention = block.attentions[-1] if hasattr(block, "attentions") else None
        self.conv_norm_out, self.conv_act, self.conv_out = model.conv_norm_out, model.conv_act, model.conv_out

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, deep_feature: Tensor
    ) -> tuple[Tensor]:
        """The prediction under another step's deep feature."""
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden = self.resnet(torch.cat([deep_feature, self.conv_in(sample)], dim=1), embedding)
        if self.attention is not None:
            hidden = self.attention(hidden, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        if self.conv_norm_out is not None:
            hidden = self.conv_act(self.conv_norm_out(hidden))
        return (self.conv_out(hidden),)
