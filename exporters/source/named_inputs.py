"""Wrappers that give each network the inputs and outputs of its exported graph, by name and in order.

They share the network's weights: nothing is copied.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from exporters.source.shallow_unet import CachingUNet, ShallowUNet
from runtimes.bundle.roles import Role


class TextEncoder(nn.Module):
    """input_ids (B, S) int64 -> the chosen outputs, float32.

    last_hidden_state (B, S, C) is after the last layer norm, penultimate_hidden_state (B, S, C) before the last layer
    and without the norm, text_embeds (B, P) the projection of the end marker's last state.
    """

    def __init__(self, model: nn.Module, outputs: tuple[str, ...] = ()) -> None:
        """Wrap the network.

        Args:
            model: a CLIPTextModel, CLIPTextModelWithProjection or LDMBertModel.
            outputs: names in order; last_hidden_state by default.
        """
        super().__init__()
        self.model, self.outputs = model, outputs or ("last_hidden_state",)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """input_ids (B, S) int64 token ids -> the chosen hidden states and embeddings, float32.

        Returns:
            last_hidden_state and penultimate_hidden_state are (B, S, C), text_embeds is (B, P).
        """
        penultimate = "penultimate_hidden_state" in self.outputs
        result = self.model(input_ids=input_ids, output_hidden_states=penultimate, return_dict=True)
        return tuple(result.hidden_states[-2] if name == "penultimate_hidden_state" else getattr(result, name)
                     for name in self.outputs)


class UNet(nn.Module):
    """sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), all float32 -> out_sample (B, C, H, W).

    Every array is float32: noisy latents (B, C, H, W), training timesteps (B,), embedded prompts (B, S, D); the
    prediction of the noise, or of what else the network was trained for, is (B, C, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap the network."""
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """The network's prediction."""
        return (self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class TextTimeUNet(UNet):
    """As `UNet`, with text_embeds (B, P) and time_ids (B, 5 or 6) float32: Stable Diffusion XL.

    time_ids are sizes and offsets in pixels, and the refiner's aesthetic score.
    """

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> tuple[Tensor]:
        """The network's prediction."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return (self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0],)


class PlainUNet(UNet):
    """As `UNet` without any text: a UNet2DModel."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        """The network's prediction."""
        return (self.model(sample, timestep, return_dict=False)[0],)


def unet(model: Any, outputs: tuple[str, ...] = ()) -> nn.Module:
    """The wrapper with the inputs that a U-Net has, and its deep feature where that is an output too."""
    if "deep_feature" in outputs:
        return CachingUNet(model)
    if "cross_attention_dim" not in model.config:
        return PlainUNet(model)
    return TextTimeUNet(model) if model.config.addition_embed_type == "text_time" else UNet(model)


class VaeEncoder(nn.Module):
    """sample (B, 3, fH, fW) float32 in [-1, 1] -> latent_parameters (B, 2C, H, W): mean, then log-variance.

    Every array is float32: pixels (B, 3, fH, fW) in -1 to 1, and what describes their latents (B, 2C, H, W).
    Autoencoders without a distribution (VQModel, AutoencoderTiny) give latents (B, C, H, W).
    """

    def __init__(self, model: Any, outputs: tuple[str, ...] = ()) -> None:
        """Take over one half of an autoencoder."""
        super().__init__()
        self.encoder, self.quant_conv = model.encoder, getattr(model, "quant_conv", None) or nn.Identity()

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        """Moments of the posterior, or latents; sampling and scaling stay outside."""
        return (self.quant_conv(self.encoder(sample)),)


class VaeDecoder(nn.Module):
    """latent_sample (B, C, H, W) float32, divided by the scaling factor -> sample (B, 3, fH, fW).

    Every array is float32: latents (B, C, H, W) as the encoder's mean has them, and pixels (B, 3, fH, fW), -1 to 1
    but not clipped.
    """

    def __init__(self, model: Any, outputs: tuple[str, ...] = ()) -> None:
        """Take over one half of an autoencoder."""
        super().__init__()
        self.decoder, self.post_quant_conv = model.decoder, getattr(model, "post_quant_conv", None) or nn.Identity()

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """The image, not clipped."""
        return (self.decoder(self.post_quant_conv(latent_sample)),)


class VqDecoder(VaeDecoder):
    """As `VaeDecoder` of a VQModel: every latent first becomes the nearest entry of the codebook."""

    def __init__(self, model: Any, outputs: tuple[str, ...] = ()) -> None:
        """Take over codebook and decoder."""
        super().__init__(model)
        self.codebook, self.spatial = model.quantize.embedding, model.config.norm_type == "spatial"

    def nearest(self, latent_sample: Tensor) -> Tensor:
        """(B, H, W) int64, the entry of each latent. |z - e|^2 = z^2 + e^2 - 2 e z; z^2 is the same for every entry."""
        latents, codes = latent_sample.permute(0, 2, 3, 1), self.codebook.weight
        return torch.argmin((codes * codes).sum(1) - 2 * latents @ codes.T, dim=-1)

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """The image, not clipped."""
        quantized = self.codebook(self.nearest(latent_sample)).permute(0, 3, 1, 2)
        hidden = self.post_quant_conv(quantized)
        return (self.decoder(hidden, quantized) if self.spatial else self.decoder(hidden),)


def decoder(model: Any, outputs: tuple[str, ...] = ()) -> nn.Module:
    """The wrapper for the kind of autoencoder."""
    return VqDecoder(model) if hasattr(model, "quantize") else VaeDecoder(model)


class SafetyChecker(nn.Module):
    """clip_input (B, 3, H, W) float32 -> special_scores (B, 3), concept_scores (B, 17): cosines less their thresholds.

    What StableDiffusionSafetyChecker.forward decides from them is `runtimes.codec.safety_checker.flags`.
    """

    def __init__(self, model: Any, outputs: tuple[str, ...] = ()) -> None:
        """Wrap the network."""
        super().__init__()
        self.model = model

    def forward(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """clip_input (B, 3, H, W) float32, pixels as CLIP normalizes them -> scores (B, 3) and (B, 17) float32.

        Above zero the concept is in the image.
        """
        model, normalize = self.model, nn.functional.normalize
        embeds = normalize(model.visual_projection(model.vision_model(clip_input)[1]))
        return (embeds @ normalize(model.special_care_embeds).T - model.special_care_embeds_weights,
                embeds @ normalize(model.concept_embeds).T - model.concept_embeds_weights)


WRAPPERS: dict[Role, Callable[[Any, tuple[str, ...]], nn.Module]] = {
    Role.TEXT_ENCODER: TextEncoder,
    Role.DENOISER: unet,
    Role.SHALLOW: lambda model, outputs: ShallowUNet(model),
    Role.IMAGE_ENCODER: VaeEncoder,
    Role.IMAGE_DECODER: decoder,
    Role.SAFETY_CHECKER: SafetyChecker,
}
