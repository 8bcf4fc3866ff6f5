"""`python -m exporters.measure.hoisted` says what hoisting takes out of the step graph of denoisers, and what it buys.

Parameters, bytes and operators by when they are computed, of the reference model, and of Stable Diffusion 1.5 and XL by
their published configs: those are traced with weights that are never touched, and take little memory. Of the reference
model also the time of a step and of the denoiser's part of an image in ONNX Runtime, with and without, as ratios of
calls that took turns in one run, and the largest difference of what they predict. Two bundles are compared by images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from exporters.families import ComponentSpec
from exporters.hoisting.apart import Hoisting, analyse, content_of, labelled, write_entry, write_steps
from exporters.hoisting.classes import Inputs
from exporters.hoisting.cut import CPU, GPU, MOST_STEPS, Speeds
from exporters.hoisting.split import leave_entry, leave_steps
from exporters.onnx.optimize_graph import optimize_onnx
from exporters.onnx.trace import save_model, traced
from exporters.quiet import quiet
from exporters.source.networks import load_module, torch_component
from runtimes.bundle.roles import PER_PROMPT, ROWS, Role
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec, example_feeds

Feeds = dict[str, np.ndarray[Any, Any]]
WEIGHTS = Path(__file__).parents[2] / "deploy" / "reference_models" / "weights"
STEPS = 25
# Published configs, as far as they differ from diffusers' defaults.
CONFIGS: Mapping[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
        "cross_attention_dim": 2048, "sample_size": 128, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}
TOKENS = {"sd15": 77, "sdxl": 77}


@dataclass(frozen=True)
class Denoiser:
    """A graph and what its inputs say."""

    name: str
    model: ir.Model
    inputs: Inputs
    axes: Mapping[str, Axis]
    spec: ComponentSpec


def denoiser_of(name: str, module: torch.nn.Module, tokens: int) -> Denoiser:
    """Trace a U-Net.

    Args:
        name: "reference", "sd15" or "sdxl".
        module: with weights or without.
        tokens: of a prompt.
    """
    config: Any = module.config
    side = config.sample_size
    axes = {"batch": Axis("images, doubled under guidance", ShapeRange(1, 2, 16)),
            "height": Axis("latent rows", ShapeRange(8, side, 4 * side), 8),
            "width": Axis("latent columns", ShapeRange(8, side, 4 * side), 8),
            "sequence": Axis("tokens", ShapeRange(1, tokens, 8 * tokens))}
    sample = TensorSpec("sample", "float32", ("batch", config.in_channels, "height", "width"))
    inputs = [sample, TensorSpec("timestep", "float32", ("batch",)),
              TensorSpec("context", "float32", ("batch", "sequence", config.cross_attention_dim))]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs += [TensorSpec("pooled", "float32", ("batch", pooled)), TensorSpec("sizes", "float32", ("batch", 6))]
    output = TensorSpec("out", "float32", ("batch", config.out_channels, "height", "width"))
    spec = ComponentSpec(name, name, tuple(inputs), (output,), axes)
    known = Inputs("batch", "timestep", frozenset({"context", "pooled"}), frozenset({"sizes"}))
    return Denoiser(name, traced(torch_component(Role.DENOISER, module), spec), known, axes, spec)


def untouched(name: str) -> torch.nn.Module:
    """A U-Net of a published config whose weights have addresses and no memory."""
    from diffusers import UNet2DConditionModel

    with quiet(), torch.device("meta"):
        module = UNet2DConditionModel(**CONFIGS[name])
    empty: torch.nn.Module = module.to_empty(device="cpu").eval().requires_grad_(False)
    return empty


def describe(denoiser: Denoiser, speeds: Speeds, target: str) -> str:
    """What leaves, as lines of a table in Markdown."""
    load: Callable[[], ir.Model] = denoiser.model.clone
    began = time.perf_counter()
    hoisting = analyse(load, denoiser.inputs, denoiser.axes, speeds)
    seconds = time.perf_counter() - began
    whole, steps = content_of(denoiser.model), load()
    leave_steps(steps, hoisting.values, labelled(steps))
    left = content_of(steps)
    lines = [f"| {denoiser.name}, {target} | whole graph | {whole.nodes:,} | {whole.parameters:,} | "
             f"{whole.bytes / 1e6:,.1f} | |",
             f"| | left for every step | {left.nodes:,} | {left.parameters:,} | {left.bytes / 1e6:,.1f} | "
             f"{len(hoisting.values)} inputs more |"]
    for kind in hoisting.takes:
        entry = load()
        leave_entry(entry, hoisting.of(kind), "batch", ROWS)
        own, stored = content_of(entry), stored_bytes(hoisting, denoiser, str(kind))
        of = "a prompt" if kind == PER_PROMPT else f"a row of {MOST_STEPS} steps"
        lines.append(f"| | {kind} | {own.nodes:,} | {own.parameters:,} | {own.bytes / 1e6:,.1f} | "
                     f"{stored / 1e6:.2f} MB for {of} |")
    gone, share = whole.parameters - left.parameters, 1 - left.parameters / whole.parameters
    lines.append(f"| | out of the step graph | {whole.nodes - left.nodes:,} | {gone:,} ({share:.1%}) | "
                 f"{(whole.bytes - left.bytes) / 1e6:,.1f} | analysed in {seconds:.1f} s |")
    return "\n".join(lines) + "\n"


def stored_bytes(hoisting: Hoisting, denoiser: Denoiser, kind: str) -> int:
    """Bytes of what an entry gives for one prompt, or for one row at all steps of a long schedule."""
    sizes = {name: axis.range.opt for name, axis in denoiser.axes.items()} | {"batch": 1}
    count = sum(int(np.prod(value.spec.resolve(sizes))) for value in hoisting.values if value.kind == kind)
    return 4 * count * (1 if kind == PER_PROMPT else MOST_STEPS)


def compare(denoiser: Denoiser, folder: Path, rounds: int) -> str:
    """Time of a step and of all of an image's steps without and with hoisting, and the largest difference.

    Args:
        denoiser: with its weights.
        folder: receives graphs.
        rounds: of images that are timed, in turns.
    """
    hoisting = analyse(denoiser.model.clone, denoiser.inputs, denoiser.axes, CPU)
    save_model(denoiser.model, folder / "exported.onnx")
    write_steps(folder / "exported.onnx", folder / "left.onnx", hoisting.values)
    for graph, to in (("exported", "whole"), ("left", "steps")):
        optimize_onnx(folder / f"{graph}.onnx", folder / f"{to}.onnx", Role.DENOISER, "onnxruntime")
    for kind in hoisting.takes:
        write_entry(folder / "exported.onnx", folder / f"raw-{kind}.onnx", hoisting.of(kind), "batch", ROWS)
        optimize_onnx(folder / f"raw-{kind}.onnx", folder / f"{kind}.onnx", Role.BEFOREHAND, "onnxruntime")
    sizes = {name: axis.range.opt for name, axis in denoiser.axes.items()}
    image = _Image(folder, hoisting, example_feeds(denoiser.spec.inputs, sizes))
    worst, largest = image.difference()
    seconds: dict[str, list[tuple[float, float]]] = {"whole": [], "steps": []}
    for _ in range(rounds):
        for name, taken in seconds.items():
            taken.append(image.timed(name))
    before, after = np.array(seconds["whole"]), np.array(seconds["steps"])
    ratios = [statistics.median(after[:, i] / before[:, i]) for i in (0, 1)]
    return (f"{denoiser.name}: a step {1e3 * np.median(before[:, 0]):.2f} ms whole, {1e3 * np.median(after[:, 0]):.2f} "
            f"ms hoisted, {ratios[0]:.3f} of the time; {STEPS} steps of an image {ratios[1]:.3f} of the time with what "
            f"runs before them (medians of {rounds} turns); largest difference {worst:.1e} of values up to "
            f"{largest:.1f}\n")


class _Image:
    """The denoiser's calls for one image, from one graph or from several."""

    def __init__(self, folder: Path, hoisting: Hoisting, feeds: Feeds) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        names = ["whole", "steps", *map(str, hoisting.takes)]
        self._sessions = {n: onnxruntime.InferenceSession(str(folder / f"{n}.onnx"), options) for n in names}
        self._takes = {name: [value.name for value in s.get_inputs()] for name, s in self._sessions.items()}
        self._hoisting, self._feeds = hoisting, feeds
        self._times = np.linspace(999, 1, STEPS).astype(np.float32)

    def _run(self, name: str, feeds: Mapping[str, Any]) -> Feeds:
        session = self._sessions[name]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {n: feeds[n] for n in self._takes[name]}), strict=True))

    def _before(self) -> list[Feeds]:
        """What is fed at each step, of what runs once."""
        rows, tables, fixed = len(self._feeds["sample"]), list[Feeds](), Feeds()
        for kind in self._hoisting.takes:
            if kind == PER_PROMPT:
                fixed |= self._run(kind, self._feeds)
                continue
            wide = {name: np.repeat(array, STEPS, axis=0) for name, array in self._feeds.items() if name != "sample"}
            wide["timestep"] = np.tile(self._times, rows)
            found = self._run(kind, {**wide, "sample": self._feeds["sample"]})
            tables.append({n: a.reshape(rows, STEPS, *a.shape[1:]) for n, a in found.items()})
        return [fixed | {n: np.ascontiguousarray(a[:, i]) for table in tables for n, a in table.items()}
                for i in range(STEPS)]

    def timed(self, name: str) -> tuple[float, float]:
        """Median seconds of a step, and seconds of all steps with what comes before them."""
        began, steps = time.perf_counter(), list[float]()
        values = self._before() if name == "steps" else [Feeds()] * STEPS
        rows = len(self._feeds["sample"])
        for at, fed in zip(self._times, values, strict=True):
            start = time.perf_counter()
            self._run(name, {**self._feeds, **fed, "timestep": np.full(rows, at, np.float32)})
            steps.append(time.perf_counter() - start)
        return statistics.median(steps), time.perf_counter() - began

    def difference(self) -> tuple[float, float]:
        """The largest difference of the two predictions at any step, and the largest prediction."""
        rows, worst, largest = len(self._feeds["sample"]), 0.0, 0.0
        for at, fed in zip(self._times, self._before(), strict=True):
            feeds = {**self._feeds, **fed, "timestep": np.full(rows, at, np.float32)}
            [whole], [left] = (self._run(name, feeds).values() for name in ("whole", "steps"))
            worst, largest = max(worst, float(np.abs(whole - left).max())), max(largest, float(np.abs(whole).max()))
        return worst, largest


def compare_bundles(without: Path, hoisted: Path, rounds: int) -> str:
    """Whole images of two bundles of one model: seconds in turns, and the largest difference of a pixel."""
    import runtimes

    pipelines = [runtimes.load(folder) for folder in (without, hoisted)]
    fields: dict[str, Any] = {"steps": STEPS, "seed": 0, "output": "numpy"}
    prompt = "a red apple" if pipelines[0].roles.encoders else ""
    images = [pipeline(prompt, **fields) for pipeline in pipelines]
    seconds: list[list[float]] = [[], []]
    for i in range(rounds):
        for pipeline, taken in zip(pipelines, seconds, strict=True):
            began = time.perf_counter()
            pipeline(f"{prompt} {i}", **fields)  # a prompt that no cache holds
            taken.append(time.perf_counter() - began)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    return (f"bundles: an image of {STEPS} steps {statistics.median(seconds[0]):.3f} s without, "
            f"{statistics.median(seconds[1]):.3f} s hoisted, {ratio:.3f} of the time (median of {rounds} turns); "
            f"largest difference of a pixel {np.abs(images[0] - images[1]).max():.1e}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace, analyse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m exporters.measure.hoisted", description=__doc__)
    parser.add_argument("--only", action="append", choices=("reference", *CONFIGS), help="of these alone")
    parser.add_argument("--rounds", type=int, default=21, help="timed images of each, in turns; 0 times nothing")
    parser.add_argument("--bundles", nargs=2, type=Path, metavar=("WITHOUT", "HOISTED"),
                        help="two bundles of one model, built with --no-hoist and with --hoist, to compare instead")
    options = parser.parse_args(arguments)
    if options.bundles:
        without, hoisted = options.bundles
        sys.stdout.write(compare_bundles(without, hoisted, options.rounds or 1))
        return
    sys.stdout.write("| denoiser | part | operators | parameters | MB | |\n|---|---|---|---|---|---|\n")
    timed = ""
    for name in options.only or ("reference", *CONFIGS):
        module = load_module(WEIGHTS / "unet", "diffusers", "UNet2DConditionModel") if name == "reference" else (
            untouched(name))
        with quiet():
            denoiser = denoiser_of(name, module, TOKENS.get(name, 16))
        for speeds, target in ((CPU, "CPU"), (GPU, "GPU")):
            sys.stdout.write(describe(denoiser, speeds, target))
            sys.stdout.flush()
        if name == "reference" and options.rounds:
            with tempfile.TemporaryDirectory() as folder:
                timed = compare(denoiser, Path(folder), options.rounds)
    sys.stdout.write(f"\n{timed}")


if __name__ == "__main__":
    main()
