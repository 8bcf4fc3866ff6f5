"""Loads a bundle from disk as a pipeline that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.adapters.lora_inputs import check_options
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle, read_object
from runtimes.codec.safety_checker import PREPROCESSOR_FILE, Preprocessing
from runtimes.pipeline.batch_facts import BatchFacts
from runtimes.pipeline.bundle_sessions import BundleSessions, needed
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.memory_budget import MemoryBudget
from runtimes.system.device import Device
from runtimes.text.clip_tokenizer import ClipTokenizer


def load(bundle_dir: Path | str | Bundle, device: str | Device = "cpu", threads: int = 0, check_hashes: bool = True, *,
         hint: str = "latency", pin_threads: bool = False, memory_budget: int | None = None,
         lora: Sequence[str] = (), deterministic: bool = False) -> Pipeline:
    """Load a bundle.

    Args:
        bundle_dir: folder that `build` wrote, or an open bundle.
        device: "cpu", or an accelerator that the bundle's backend knows, with its number where there are several:
            "cuda", "cuda:1", "tensorrt:0", "gpu:1"; see `runtimes.system.device`.
        threads: CPU threads inside one operator; 0 uses every core.
        check_hashes: compare every file with its sha256 first, above 64 MB unless it is the file that an earlier load
            compared and nobody wrote to it since; otherwise only presence and size.
        hint: of OpenVINO: "latency" gives one call every core, "throughput" runs several calls at once.
        pin_threads: keep each CPU thread on a core of its own.
        memory_budget: bytes that this process may take while it generates: as many images share a call as fit.
            What calls take is measured once on each machine; see `runtimes.pipeline.memory_budget`. Parts of the
            denoiser that run once a prompt are loaded for that and closed again.
        lora: of a bundle built with `--lora-mode swap`: `FILE[:SCALE]` each instead of its own, or "none" alone.
        deterministic: every bit of an image is the same whichever others share its calls: networks that were measured
            to depend on the number of rows, or not measured, run with one number of rows, the rest being padding.

    Raises:
        InputError: a LoRA that the bundle does not take, or a device that is none of its backend's.
        BundleError: not a bundle, or one that is broken, changed or from another schema.
        UnavailableError: this machine lacks the backend, the device or the memory.
    """
    bundle = bundle_dir if isinstance(bundle_dir, Bundle) else Bundle.open(bundle_dir, check_hashes=check_hashes,
                                                                           trust_notes=True)
    check_options(bundle, lora)
    options = SessionOptions(Device.parse(device), threads, hint, pin_threads, tuple(lora), keep_graphs=True)
    budget = None
    if memory_budget is not None:
        from runtimes.pipeline.memory_measurement import memory_model

        budget = MemoryBudget(memory_budget, memory_model(bundle, options))
    sessions = BundleSessions(bundle, options)
    roles = bundle.manifest.pipeline
    for name in needed(roles, sparing=budget is not None):
        sessions[name]
    preprocessing = load_preprocessing(bundle) if roles.safety_checker else None
    return Pipeline(sessions, roles, scheduler_config(bundle), *load_tokenizers(bundle), preprocessing=preprocessing,
                    memory=budget, release=sessions.release if budget is not None else None,
                    batches=BatchFacts.of(bundle.manifest, options.device, deterministic=deterministic))


def load_tokenizers(bundle: Bundle) -> list[ClipTokenizer]:
    """The tokenizer of each text encoder.

    Raises:
        BundleError: one is missing or cannot be read.
    """
    return [ClipTokenizer.load(bundle.file(f"{reader.tokenizer}/tokenizer.json").parent, reader.tokens)
            for reader in bundle.manifest.pipeline.conditioner.encoders]


def scheduler_config(bundle: Bundle) -> dict[str, Any]:
    """The config of the bundle's scheduler.

    Raises:
        BundleError: missing or not a JSON object.
    """
    return read_object(bundle.file(bundle.manifest.pipeline.process.scheduler))


def load_preprocessing(bundle: Bundle) -> Preprocessing:
    """How the safety checker's images are prepared.

    Raises:
        BundleError: the file is missing or not a JSON object.
        InputError: it is not CLIPImageProcessor's config.
    """
    file = bundle.file(PREPROCESSOR_FILE)
    return Preprocessing.from_config(read_object(file), str(file))
