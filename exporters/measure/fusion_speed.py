"""`python -m exporters.measure.fusion_speed` measures which graph rewrites pay on this CPU.

It prints the table in `exporters.onnx.optimize_graph`.

Time is the CPU time of the calling thread with one thread in the session, variants interleaved call by call, median of
many: unlike wall time, it holds still while other programs run. What it cannot see is the cost of waking threads,
which fewer nodes can only lower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from exporters.families import ComponentSpec
from exporters.onnx.fusions import FUSIONS
from exporters.onnx.optimize_graph import FUSIONS_FOR, optimize_onnx
from exporters.quiet import quiet
from runtimes.bundle.roles import Role

Feeds = dict[str, Any]
_NEEDS = {"self_attention": ("attention",)}  # it starts from MultiHeadAttention
_LEVELS = onnxruntime.GraphOptimizationLevel


@dataclass(frozen=True)
class Variant:
    """A graph to time: its file, and the level at which onnxruntime optimizes it while loading."""

    name: str
    file: Path
    level: Any = _LEVELS.ORT_ENABLE_ALL


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        nodes: in the file, before onnxruntime's own optimization.
        load_seconds: CPU time to create the session.
        run_seconds: CPU time of one call, median.
        relative_l2: first output against the first variant's.
    """

    name: str
    nodes: int
    load_seconds: float
    run_seconds: float
    relative_l2: float


def measure(variants: Sequence[Variant], feeds: Feeds, calls: int) -> list[Measurement]:
    """Time variants of one graph side by side.

    Args:
        variants: the first is the baseline.
        feeds: every input by name.
        calls: of each variant, taking turns.
    """
    sessions, loads = [], []
    for variant in variants:
        seconds = []
        for _ in range(3):
            started = time.process_time()
            session = _session(variant)
            seconds.append(time.process_time() - started)
        sessions.append(session)
        loads.append(statistics.median(seconds))
    outputs = [session.run(None, feeds)[0] for session in sessions]
    runs: list[list[float]] = [[] for _ in sessions]
    for _ in range(calls):
        for session, seconds in zip(sessions, runs, strict=True):
            started = time.thread_time()
            session.run(None, feeds)
            seconds.append(time.thread_time() - started)
    norm = float(np.linalg.norm(outputs[0]))
    return [
        Measurement(v.name, len(onnx.load(v.file, load_external_data=False).graph.node), load, statistics.median(run),
                    float(np.linalg.norm(output - outputs[0])) / norm)
        for v, load, run, output in zip(variants, loads, runs, outputs, strict=True)
    ]


def _session(variant: Variant, save_to: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = variant.level
    options.log_severity_level = 3  # it warns that a saved NCHWc layout suits this CPU only: known, and in the table
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    return onnxruntime.InferenceSession(variant.file, options, providers=["CPUExecutionProvider"])


def variants_of(role: Role, source: Path, folder: Path) -> Iterator[Variant]:
    """The exported graph, each fusion alone, the table's choice, all of them, and what others offer.

    Args:
        source: the exported graph.
        folder: receives the variants' files.
    """
    yield Variant("as exported", source)
    chosen = FUSIONS_FOR["onnxruntime"][role]
    sets = {name: (*_NEEDS.get(name, ()), name) for name in FUSIONS}
    sets |= {"all of these": tuple(FUSIONS), "the table's choice": chosen}
    for name, fusions in sets.items():
        file = folder / f"{name.replace(' ', '_')}.onnx"
        if any(optimize_onnx(source, file, role, "onnxruntime", fusions=fusions).fusions.get(f, 0)
               for f in (fusions if len(fusions) > 2 else fusions[-1:])):
            yield Variant(name, file)
    best = folder / "the_table's_choice.onnx"
    yield Variant("onnxruntime.transformers", _by_onnxruntime_transformers(role, source, folder))
    yield Variant("choice, no NCHWc layout", best, _LEVELS.ORT_ENABLE_EXTENDED)
    for name, level in (("portable", _LEVELS.ORT_ENABLE_EXTENDED), ("for this CPU", _LEVELS.ORT_ENABLE_ALL)):
        saved = folder / f"saved_{name.replace(' ', '_')}.onnx"
        _session(Variant(name, best, level), save_to=saved)
        yield Variant(f"choice, saved {name}", saved, _LEVELS.ORT_ENABLE_ALL if name == "portable"
                      else _LEVELS.ORT_DISABLE_ALL)


def _by_onnxruntime_transformers(role: Role, source: Path, folder: Path) -> Path:
    """The fusions of the `onnxruntime.transformers` package, as far as the CPU has the operators."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    kind = {Role.DENOISER: "unet", Role.TEXT_ENCODER: "clip"}.get(role, "vae")  # what that package calls them
    options = FusionOptions(kind)
    for name in ("group_norm", "skip_group_norm", "nhwc_conv", "bias_splitgelu", "bias_add", "packed_qkv", "packed_kv"):
        setattr(options, f"enable_{name}", False)
    with quiet():
        model = optimizer.optimize_model(str(source), kind, opt_level=0, optimization_options=options)
        model.save_model_to_file(str(folder / "onnxruntime_transformers.onnx"))
    return folder / "onnxruntime_transformers.onnx"


def table(component: str, rows: Sequence[Measurement]) -> str:
    """Markdown: speed relative to the first row."""
    lines = [f"| {component} | nodes | load ms | run ms | speed | relative L2 |", "|---|---|---|---|---|---|"]
    for row in rows:
        speed = rows[0].run_seconds / row.run_seconds
        lines.append(f"| {row.name} | {row.nodes} | {1e3 * row.load_seconds:.0f} | {1e3 * row.run_seconds:.2f} "
                     f"| {speed:.3f} | {row.relative_l2:.0e} |")
    return "\n".join(lines) + "\n"


def reference_feeds(spec: ComponentSpec) -> Feeds:
    """Inputs at the usual sizes of the axes: a guided batch of one image."""
    random, sizes = np.random.default_rng(0), {name: axis.range.opt for name, axis in spec.axes.items()}
    return {t.name: random.integers(0, 99, t.resolve(sizes)) if t.dtype == "int64"
            else random.standard_normal(t.resolve(sizes), dtype=np.float32) for t in spec.inputs}


def export_reference(folder: Path, chosen: Sequence[Role]) -> Iterator[tuple[Role, ComponentSpec, Path]]:
    """Random weights in the reference model's architecture, exported; speed does not depend on their values."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from exporters.families.stable_diffusion import STABLE_DIFFUSION
    from exporters.onnx.trace import export_onnx
    from exporters.source.model_folder import ComponentSource, Source
    from exporters.source.networks import torch_component

    torch.manual_seed(0)
    text, denoiser, vae = STABLE_DIFFUSION.source_components
    make: dict[str, Callable[[], Any]] = {
        denoiser: lambda: UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1, cross_attention_dim=192, attention_head_dim=(1, 2, 3), norm_num_groups=16),
        vae: lambda: AutoencoderKL(
            block_out_channels=(16, 32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=8, norm_num_groups=8),
        text: lambda: CLIPTextModel(CLIPTextConfig(
            vocab_size=2048, hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=6,
            max_position_embeddings=16, projection_dim=192)),
    }
    with quiet():
        modules = {name: build().eval().requires_grad_(False) for name, build in make.items()}
    (folder / "tokenizer").mkdir()
    components = {
        name: ComponentSource(name, "", type(module).__name__, folder,
                              module.config.to_dict() if name == text else dict(module.config), ())
        for name, module in modules.items()
    }
    source = Source(folder, "StableDiffusionPipeline", STABLE_DIFFUSION.name, components,
                    {"tokenizer": folder / "tokenizer"}, "", {})
    roles = STABLE_DIFFUSION.roles(source)
    for name, spec in STABLE_DIFFUSION.components(source, {}).items():
        if (role := roles.role(name)) in (chosen or Role):
            result = export_onnx(torch_component(role, modules[spec.source_component]), spec, folder / name)
            yield role, spec, result.file


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, rewrite, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m exporters.measure.fusion_speed", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="timed calls of each variant")
    parser.add_argument("--role", action="append", choices=tuple(FUSIONS_FOR["onnxruntime"]), type=Role,
                        help="only components of this role; may be given several times")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        for role, spec, file in export_reference(Path(temporary), options.role or ()):
            rows = measure(list(variants_of(role, file, file.parent)), reference_feeds(spec), options.calls)
            sys.stdout.write(table(spec.name, rows) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
