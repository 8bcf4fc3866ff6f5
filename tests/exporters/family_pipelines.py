"""Small random-weight pipelines of every family, made and saved by diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS = 16


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    from tests.runtimes.vocabulary import make_vocabulary

    vocab, merges = make_vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def clip_encoder(tokenizer: Any, width: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def conditional_unet(context: int, channels: int = 4, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": channels, "out_channels": 4, "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": context,
        "attention_head_dim": 2, "norm_num_groups": 8, **changes})


def autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{
        "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
        **changes})


def vq_model() -> Any:
    from diffusers import VQModel

    return VQModel(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                   up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, num_vq_embeddings=32, norm_num_groups=4)


def scheduler(**changes: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                            "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def stable_diffusion(kind: str = "StableDiffusionPipeline", channels: int = 4, prediction: str = "epsilon",
                     vae: Any = None, **unet: Any) -> Any:
    import diffusers

    tokenizer = clip_tokenizer()
    return getattr(diffusers, kind)(
        vae=vae or autoencoder(), text_encoder=clip_encoder(tokenizer, 16), tokenizer=tokenizer,
        unet=conditional_unet(16, channels, **unet), scheduler=scheduler(prediction_type=prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tiny_decoder() -> Any:
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return stable_diffusion(vae=AutoencoderTiny(num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **widths))


def xl(numbers: int = 6, vae: dict[str, Any] | None = None, **unet: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, **(vae or {})), text_encoder=clip_encoder(tokenizer, 16),
        tokenizer=tokenizer, text_encoder_2=clip_encoder(tokenizer, 24, projected=True), tokenizer_2=tokenizer,
        unet=conditional_unet(40, addition_embed_type="text_time", addition_time_embed_dim=8,
                              projection_class_embeddings_input_dim=24 + 8 * numbers, **unet),
        scheduler=scheduler(), add_watermarker=False)


def xl_inpainting() -> Any:
    from diffusers import StableDiffusionXLInpaintPipeline

    return StableDiffusionXLInpaintPipeline(**xl(in_channels=9).components, add_watermarker=False)


def refiner() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(scaling_factor=0.13025), text_encoder=None, tokenizer=None,
        text_encoder_2=clip_encoder(tokenizer, 24, projected=True), tokenizer_2=tokenizer,
        unet=conditional_unet(24, addition_embed_type="text_time", addition_time_embed_dim=8,
                              projection_class_embeddings_input_dim=24 + 8 * 5),
        scheduler=scheduler(), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
        add_watermarker=False)


def unconditional() -> Any:
    from diffusers import LDMPipeline, UNet2DModel

    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8, norm_num_groups=8,
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return LDMPipeline(vqvae=vq_model(), unet=unet, scheduler=scheduler(steps_offset=0))


def text_to_image() -> Any:
    from diffusers import LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red apple ##s cat on the house blue dog , ! 3 ##d".split()
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(words), encoder_layers=1, encoder_ffn_dim=32, d_model=16,
                                      encoder_attention_heads=2, head_dim=8, max_position_embeddings=77))
    # diffusers takes pixels per latent from its vae_scale_factor, but checks and divides by 8
    levels = {"block_out_channels": (8, 8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}
    return LDMTextToImagePipeline(vqvae=autoencoder(**levels), bert=bert, tokenizer=tokenizer,
                                  unet=conditional_unet(16), scheduler=scheduler(steps_offset=0))


# as Playground v2.5 has them: far enough from 0 and 1 to show
STATISTICS = {"latents_mean": [-1.6, 1.1, 0.5, -2.2], "latents_std": [8.4, 5.9, 5.3, 7.1]}
PIPELINES: dict[str, Callable[[], Any]] = {
    "sd2": lambda: stable_diffusion(prediction="v_prediction", upcast_attention=True, use_linear_projection=True),
    "inpaint": lambda: stable_diffusion("StableDiffusionInpaintPipeline", channels=9),
    "tiny-decoder": tiny_decoder,
    "xl": xl,
    "xl-inpaint": xl_inpainting,
    "xl-normalized": lambda: xl(vae=STATISTICS),
    "sd-normalized": lambda: stable_diffusion(vae=autoencoder(**STATISTICS)),
    "refiner": refiner,
    "ldm": unconditional,
    "ldm-text": text_to_image,
}


def make_pipeline(name: str) -> Any:
    """A pipeline with weights in which prompts, sizes and guidance matter and images have contrast."""
    import torch
    from diffusers.models.attention_processor import Attention

    from exporters.quiet import quiet

    torch.manual_seed(0)
    with quiet():
        pipe = PIPELINES[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # LDMBert has dropout
    vae = pipe.vae if hasattr(pipe, "vae") else pipe.vqvae
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 3
        if hasattr(vae.decoder, "conv_out"):
            vae.decoder.conv_out.weight *= 6
        for layer in pipe.unet.modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                layer.to_out[0].weight *= 20
        if hasattr(getattr(pipe.unet, "add_embedding", None), "linear_2"):
            pipe.unet.add_embedding.linear_2.weight *= 5
        if hasattr(vae, "quantize"):
            vae.quantize.embedding.weight.normal_()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline_of(name: str, folder: Path) -> Path:
    """The folder of a small pipeline of one family."""
    from exporters.quiet import quiet

    with quiet():
        make_pipeline(name).save_pretrained(folder)
    return folder
