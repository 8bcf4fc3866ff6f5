"""`python -m tests.peers.unet_at_size`: a U-Net of Stable Diffusion 1.5's size on every CPU runtime, one run.

Random weights in the published configuration, 512 x 512 pixels, both guidance branches in one call. Each contestant is
timed in turns with one yardstick, our float32 bundle on ONNX Runtime, in processes of their own: two networks of this
size are in memory at a time. Outputs are compared with eager PyTorch's. The model and the bundles are made the first
time (about 20 GB below `~/.cache/ldm-deploy/at-size`) and used again; `--forget` removes them. `--engines` builds
TensorRT engines instead, without a GPU, and prints their bytes, seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.bench.contest import spread
from deploy.bench.worker_client import Worker, WorkerError
from deploy.building.run_build import run_build
from deploy.cli.bench_table import shown
from deploy.core.pass_cache import COMPONENT_FILE
from deploy.core.spec import BuildSpec, covering, parse_shapes
from deploy.parity.metrics import relative_l2
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle, committed
from runtimes.system.cache_root import cache_home
from tests.deploy.real_size import write_model
from tests.peers.prepare import exported_unet
from tests.peers.results import new_report, save, show

FOLDER = cache_home() / "at-size"
# Calibration samples at the most common size: small here, since ranges of random weights tell nothing anyway.
SHAPES = "batch=1:1:1,height=64:64:512,width=64:64:512"
YARDSTICK = "ONNX Runtime fp32"
BUNDLES = {
    YARDSTICK: ("onnxruntime", "fp32"), "ONNX Runtime INT8": ("onnxruntime", "int8"),
    "OpenVINO fp32": ("openvino", "fp32"), "OpenVINO INT8": ("openvino", "int8"),
}
log = Console(stderr=True, markup=False, emoji=False)


def main() -> int:
    """Make what is missing, time every contestant against the yardstick, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.unet_at_size", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16, help="recorded calls that the INT8 ranges come from")
    parser.add_argument("--only", type=lambda text: text.split(","), help="contestants, or precisions, comma-separated")
    parser.add_argument("--engines", action="store_true", help="build engines of each precision instead")
    parser.add_argument("--forget", action="store_true", help="remove the model and the bundles, and stop")
    options = parser.parse_args()
    if options.forget:
        shutil.rmtree(FOLDER, ignore_errors=True)
        return 0
    if options.engines:
        show_engines(options)
        return 0
    commands = contestants(options)
    report = new_report(pixels=options.pixels)
    with committed_feeds(options.pixels) as feeds:
        for name, command in commands.items():
            if options.only and name not in options.only:
                continue
            log.print(f"timing {name}", style="dim")
            try:
                report["rows"][name] = paired(name, command, commands[YARDSTICK], feeds, options)
            except WorkerError as error:
                report["unavailable"][name] = str(error)
        report["relative_l2"] = errors(feeds.parent)
    show(report, table_of(report), save(report, "unet_at_size"), 140)
    return 0


def contestants(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command of its process; the model and the bundles are made where they are missing."""
    model = written_model()
    log.print("exporting the U-Net", style="dim")
    graph = exported_unet(BuildSpec(**spec_of(model)), FOLDER / "exported", FOLDER / "cache")
    commands = {name: ["bundle", str(built(model, *kind, options.samples).path)] for name, kind in BUNDLES.items()
                if not options.only or name in (*options.only, YARDSTICK)}
    commands |= {"bare ONNX Runtime": ["bare-onnxruntime", str(graph)], "bare OpenVINO": ["bare-openvino", str(graph)],
                 "PyTorch eager": ["eager", str(model / "unet")], "torch.compile": ["compile", str(model / "unet")]}
    worker = [sys.executable, "-W", "ignore", "-m", "tests.peers.worker_unet"]
    return {name: [*worker, *command, str(options.threads)] for name, command in commands.items()}


def written_model() -> Path:
    """The diffusers folder."""
    model = FOLDER / "model"
    if not model.is_dir():
        log.print("writing the model, 4.3 GB", style="dim")
        with committed(model) as partial:
            write_model("sd15", partial)
    return model


def built(model: Path, target: str, precision: str, samples: int) -> Bundle:
    """A bundle, not compared with PyTorch: that is tests/deploy/test_real_size.py's part."""
    log.print(f"building {target} {precision}", style="dim")
    spec = BuildSpec(**{**spec_of(model), "target": target, "precision": precision,
                        **({"calibration_samples": samples} if precision == "int8" else {})},
                     verify="no")
    return run_build(spec, FOLDER / f"{target}-{precision}", cache_root=FOLDER / "cache").bundle


def show_engines(options: argparse.Namespace) -> None:
    """Build an engine of the U-Net in each precision and print what it is and cost."""
    model, first = written_model(), 0
    for record in (FOLDER / "cache" / "passes").glob(f"*/{COMPONENT_FILE}"):
        if json.loads(record.read_text())["format"] == "tensorrt":
            shutil.rmtree(record.parent)  # what building costs is measured while building
    table = Table(title="TensorRT engines of SD 1.5's U-Net, no GPU")
    for title in ("", "MB", "x fp32", "seconds", "peak GB", "capabilities"):
        table.add_column(title, justify="right" if title else "left")
    for precision in options.only or ("fp32", "fp16", "int8"):
        shutil.rmtree(FOLDER / f"tensorrt-rtx-{precision}", ignore_errors=True)
        bundle = built(model, "tensorrt-rtx", precision, options.samples)
        cost = next(p for p in bundle.manifest.measured["passes"] if p["name"] == "engine")["components"]["unet"]
        first = first or cost["bytes"]
        table.add_row(precision, f"{cost['bytes'] / 1e6:.0f}", f"{cost['bytes'] / first:.2f}", f"{cost['seconds']:.0f}",
                      f"{cost['peak_rss_bytes'] / 1e9:.1f}",
                      " ".join(bundle.component("unet").details_as(EngineDetails).compute_capabilities))
        shutil.rmtree(bundle.path)
    Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False).print(table)


def spec_of(model: Path) -> dict[str, Any]:
    """What every build has in common."""
    return {"model": str(model), "shapes": covering(parse_shapes([SHAPES]))}


@contextmanager
def committed_feeds(pixels: int) -> Iterator[Path]:
    """Inputs of one call with both guidance branches, (2, 4, H, W), in a folder that goes afterwards."""
    random, side, width = np.random.default_rng(0), pixels // 8, 768
    folder = FOLDER / "calls"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        np.savez(folder / "feeds.npz", sample=random.standard_normal((2, 4, side, side), np.float32),
                 timestep=np.full(2, 500, np.float32),
                 encoder_hidden_states=random.standard_normal((2, 77, width), np.float32))
        yield folder / "feeds.npz"
    finally:
        shutil.rmtree(folder)


def paired(name: str, command: list[str], yardstick: list[str], feeds: Path, options: argparse.Namespace,
           ) -> dict[str, Any]:
    """Seconds of one call and its quotient by the yardstick's, in turns; the first round does not count.

    Raises:
        WorkerError: one of the two did not run.
    """
    base = Worker(YARDSTICK, yardstick, options.threads)
    try:
        other = Worker(name, command, options.threads) if name != YARDSTICK else base
        rounds, peak = [], 0
        for number in range(options.rounds + 1):
            ours = base.ask("once", feeds=str(feeds))["seconds"]
            reply = other.ask("once", feeds=str(feeds), save="" if number else str(feeds.parent / f"{name}.npy"))
            rounds.append((reply["seconds"], reply["seconds"] / ours))
            peak = reply["peak_rss_bytes"]
        if other is not base:
            other.close()
    finally:
        base.close()
    seconds, ratios = (spread(values) for values in zip(*rounds[1:], strict=True))
    return {"seconds": seconds, "ratio": ratios, "load_seconds": other.ready["prepare_seconds"], "peak_rss_bytes": peak}


def errors(folder: Path) -> dict[str, float]:
    """Name -> relative L2 of its output against eager PyTorch's, where that ran."""
    outputs = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    truth = outputs.get("PyTorch eager")
    if truth is None:
        return {}
    return {name: relative_l2(truth, output) for name, output in outputs.items()}


def table_of(report: Mapping[str, Any]) -> Table:
    """A line for each contestant."""
    table = Table(title=f"U-Net of SD 1.5's size, {report['pixels']} px, both guidance branches")
    for title in ("", "one call, s", f"x {YARDSTICK}", "x eager", "load, s", "peak GB", "relative L2"):
        table.add_column(title, justify="right" if title else "left")
    eager = report["rows"].get("PyTorch eager", {}).get("ratio", {}).get("median")
    for name, row in report["rows"].items():
        error = report["relative_l2"].get(name)
        ratio = row["ratio"]
        table.add_row(name, shown(row["seconds"], 2), shown(ratio, 2),
                      f"{ratio['median'] / eager:.2f}" if eager else "", f"{row['load_seconds']:.1f}",
                      f"{row['peak_rss_bytes'] / 1e9:.2f}",
                      f"{error:.1e}" if error is not None else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
