"""Loads the user's folder, with adapters and autoencoder, by diffusers itself, as its documentation says.

Imports torch and diffusers; import it inside the function that needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import transformers
from safetensors.torch import load_file

from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.recorded_networks import Network
from exporters.adapters.lora_differences import DIFFERENCES, differences
from exporters.adapters.textual_inversion import encoder_widths, read_embedding
from exporters.families.open_source import open_source
from exporters.quiet import quiet
from exporters.source.diffusers_pipeline import upstream_pipeline
from exporters.source.model_folder import Source, read_json
from runtimes.adapters.lora_inputs import own_file
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import TextEncoder
from runtimes.codec.safety_checker import SAFETY_CHECKER
from runtimes.errors import DeployError

VAES = ("vae", "vqvae")


class CannotLoadError(Exception):
    """diffusers does not load or run what it was asked to; its own words."""


@contextmanager
def upstream_errors() -> Iterator[None]:
    """Turn whatever diffusers, transformers or PEFT raise into one kind of error; silence logs and warnings."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CannotLoadError:
        raise
    except DeployError as error:
        raise CannotLoadError(error.what) from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CannotLoadError(f"{type(error).__name__}: {first:.300}") from error


def source_of(upstream: Upstream) -> Source:
    """The folder as we read it.

    Raises:
        InputError: it cannot be read.
    """
    return open_source(upstream.folder, upstream.variant)


def load_pipeline(upstream: Upstream, mode: str, parts: Mapping[str, Any], read: Collection[str] = (),
                  dtype: Any = None) -> Any:
    """diffusers' pipeline for a mode: scheduler and tokenizers as it reads them, networks as given.

    Args:
        upstream: the model.
        mode: text, image or mask.
        parts: networks by name; the others have no weights.
        read: networks that diffusers loads itself, in `dtype`, with its own choice of files.
        dtype: of PyTorch.

    Raises:
        CannotLoadError: it refuses.
    """
    given, source = dict(parts), source_of(upstream)
    with upstream_errors():
        name = next((n for n in VAES if n in source.components), "")
        if upstream.vae is not None and name in read:
            kind = getattr(diffusers, read_json(upstream.vae / "config.json")["_class_name"])
            given[name] = kind.from_pretrained(str(upstream.vae), torch_dtype=dtype, use_safetensors=True)
        read = [part for part in read if part not in given]
        return upstream_pipeline(source, mode, read=read, torch_dtype=dtype, variant=upstream.variant, **given)


def load_safety_checker(upstream: Upstream, dtype: Any) -> Any:
    """The network that judges images, as diffusers loads it.

    Raises:
        CannotLoadError: it refuses.
    """
    with upstream_errors():
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return StableDiffusionSafetyChecker.from_pretrained(
            str(upstream.folder / SAFETY_CHECKER), torch_dtype=dtype, use_safetensors=True, local_files_only=True)


def load_loras(upstream: Upstream, pipe: Any) -> None:
    """All LoRAs at their scales, not fused.

    Raises:
        CannotLoadError: diffusers or PEFT refuses one.
    """
    names = [f"lora{number}" for number in range(len(upstream.loras))]
    with upstream_errors():
        for name, (file, _) in zip(names, upstream.loras, strict=True):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, [scale for _, scale in upstream.loras])


def loader_faults(upstream: Upstream) -> list[str]:
    """What diffusers is known to read otherwise than a LoRA file says; ours is what the file says."""
    return [f"{DIFFERENCES[name]}; ours is what the file says"
            for name in sorted({name for file, _ in upstream.loras for name in differences(file)})]


def load_words(upstream: Upstream, source: Bundle, pipe: Any, reader: TextEncoder, encoder: Any) -> None:
    """All embeddings into one text encoder and its tokenizer.

    Args:
        upstream: the model.
        source: the same as a bundle.
        pipe: has the tokenizer.
        reader: the text encoder's role.
        encoder: the network that gets them, or one with a table of the same size.

    Raises:
        CannotLoadError: diffusers refuses one.
    """
    tokenizer, name, widths = getattr(pipe, reader.tokenizer), reader.adapter, encoder_widths(source.manifest)
    with upstream_errors():
        for file, token in upstream.embeddings:
            embedding = read_embedding(file, token, widths)
            if name in embedding.keys:
                vectors = load_file(file)[embedding.keys[name]]
                pipe.load_textual_inversion({embedding.token: vectors}, token=embedding.token,
                                            text_encoder=encoder, tokenizer=tokenizer)


def check_noise(pipe: Any) -> None:
    """Refuse a sampler whose noise no generator decides: two runs of diffusers itself differ.

    Raises:
        CannotLoadError: scheduling_dpmsolver_sde.py samples from torchsde's Brownian tree, seeded by the global state.
    """
    if type(pipe.scheduler).__name__ == "DPMSolverSDEScheduler":
        raise CannotLoadError("the noise of diffusers' DPMSolverSDEScheduler follows from no generator")


def part_of(component: Component) -> str:
    """A component's name in model_index.json."""
    return component.details.source_component


def network_of(bundle: Bundle, name: str) -> Network:
    """Where a source bundle has a component."""
    component = bundle.component(name)
    beside = bundle.file(own_file(name)) if component.details.lora else None
    return Network(bundle.file(component.file).parent, component.details_as(SourceDetails).library,
                   component.class_name, bundle.manifest.pipeline.adapter(name), beside)


def small_encoder(encoder: Any) -> Any:
    """A text encoder of one narrow layer with a real table of the same size.

    Embeddings can be loaded into its tokenizer without the large network."""
    config = encoder.config
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=1))
