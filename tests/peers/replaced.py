"""One network of a float32 bundle replaced by others: bytes, multiply-accumulates, time, and what each generates."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

from calibration.graphs.layers import find_layers
from calibration.trajectory.inner_tensors import compare, plain_session, probed
from calibration.trajectory.recorder import Recording
from deploy.bench.contest import spread
from deploy.parity.comparison_options import gallery_for, options_for
from deploy.parity.reference.answers import Reference
from deploy.parity.whole_pipelines import check_pipeline
from deploy.quantization.precision_search import ANYTHING, candidate_bundle
from deploy.reference_models import subject_names
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.pipeline.bundle_sessions import BundleSessions

BASE = "fp32"  # the row that others are divided by
Graphs = dict[str, Path]  # runtime -> graph


def measuring_options(parser: argparse.ArgumentParser) -> None:
    """What every such comparison can be asked."""
    parser.add_argument("--retrieval", type=int, default=120, help="prompts that are generated and found again")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="recorded calls")
    parser.add_argument("--json", action="store_true")


class Judge:
    """Size and accuracy of networks that take one component's place.

    Args:
        bundle: in float32, of the reference model; generates the rest.
        component: that is replaced.
        recording: of the component's calls.
        options: of the command line.
    """

    def __init__(self, bundle: Bundle, component: str, recording: Recording, options: argparse.Namespace) -> None:
        names, count = subject_names(), options.retrieval
        prompts = tuple(names[i * len(names) // count] for i in range(count))
        session = SessionOptions(threads=options.threads)
        self._bundle, self._component, self._recording = bundle, component, recording
        self._original = bundle.file(bundle.component(component).file)
        self._options = replace(options_for("reference", ()), retrieval_prompts=prompts, session=session)
        self._gallery = gallery_for("reference")
        self._reference = Reference(bundle, opener=lambda b, _: BundleSessions(b, session))
        self._macs = macs(self._original, next(recording.calls(component)))

    def row(self, graph: Path, macs_share: float = 1.0) -> dict[str, Any]:
        """One row; the graph is ONNX Runtime's, the share that of the original's multiply-accumulates."""
        with candidate_bundle(self._bundle, {self._component: graph}) as bundle:
            report = check_pipeline(self._reference, bundle, ANYTHING, self._options, gallery=self._gallery)
        figures = {c.metric: c.measured for c in report.comparisons(ANYTHING)}
        calls, size = self._recording.spread(self._component, 16), graph.stat().st_size
        return {
            "bytes": size, "bytes_ratio": size / self._original.stat().st_size, "macs": self._macs * macs_share,
            "one_call_relative_l2": compare(self._original, graph, lambda: calls),
            "final_latent_relative_l2": figures.get("trajectory_relative_l2"),
            "psnr_db": figures.get("image_psnr_db"),
            "psnr_db_mean": statistics.fmean(p.psnr_db for p in report.pairs), "ssim": figures.get("image_ssim"),
            "retrieval": report.retrieval[1] if report.retrieval else None,
        }


def macs(graph: Path, feeds: dict[str, Any]) -> int:
    """Multiply-accumulates of the layers with weights for one recorded call."""
    layers = find_layers(ir.load(graph))
    weights = {name: value.const_value for name, value in ir.load(graph).graph.initializers.items()}
    with probed(graph, [layer.result for layer in layers]) as run:
        shapes = {name: values.shape for name, values in run(feeds).items()}
    total = 0
    for layer in layers:
        weight = weights[layer.weight]
        assert weight is not None
        total += int(np.prod(shapes[layer.result])) * layer.parameters // weight.shape.numpy()[layer.axis]
    return total


def add_latencies(rows: dict[str, Any], networks: Mapping[str, Graphs], feeds: dict[str, Any],
                  options: argparse.Namespace, hints: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add what one call takes in each runtime: its quotient by float32's, median, min, max over interleaved rounds.

    `hints` are row -> what OpenVINO computes in where it is not float32.
    """
    for runtime in ("onnxruntime", "openvino"):
        if util.find_spec(runtime) is None:
            continue
        callers = {name: caller(graphs[runtime], runtime, options.threads, feeds, hints.get(name, "f32"))
                   for name, graphs in networks.items() if runtime in graphs}
        rounds: dict[str, list[float]] = {name: [] for name in callers}
        for _ in range(options.rounds + 1):
            for name, call in callers.items():
                began = time.perf_counter()
                for _ in range(4):
                    call()
                rounds[name].append((time.perf_counter() - began) / 4)
        for name, seconds in rounds.items():
            ratios = [a / b for a, b in zip(seconds[1:], rounds[BASE][1:], strict=True)]
            rows[name][f"{runtime}_seconds_ratio"] = {**spread(ratios), "seconds": statistics.median(seconds[1:])}


def caller(graph: Path, runtime: str, threads: int, feeds: dict[str, Any], hint: str) -> Callable[[], Any]:
    """A function that runs the graph once."""
    if runtime == "onnxruntime":
        session = plain_session(graph, threads)
        return lambda: session.run(None, feeds)
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    request = openvino.Core().compile_model(str(graph), "CPU", hints).create_infer_request()
    return lambda: request.infer(feeds)


def table_of(caption: str, report: Mapping[str, Any], errors: Mapping[str, str] = MappingProxyType({})) -> Table:
    """A line for each row; `errors` are more columns, title -> key."""
    table = Table(title=caption)
    titles = ("", "MB", "× bytes", "MMACs", "× ORT", "× OpenVINO", "one call L2", "final latents L2", "PSNR worst",
              "mean", "SSIM", "retrieval")
    for title in (*titles, *errors):
        table.add_column(title, justify="right" if title else "left")
    for name, row in report["rows"].items():
        ort, openvino = (row.get(f"{r}_seconds_ratio") for r in ("onnxruntime", "openvino"))
        table.add_row(
            name, f"{row['bytes'] / 1e6:.1f}", f"{row['bytes_ratio']:.3f}", f"{row['macs'] / 1e6:.0f}",
            f"{ort['median']:.2f}" if ort else "", f"{openvino['median']:.2f}" if openvino else "",
            f"{row['one_call_relative_l2']:.4f}", f"{row['final_latent_relative_l2']:.4f}", f"{row['psnr_db']:.1f}",
            f"{row['psnr_db_mean']:.1f}", f"{row['ssim']:.3f}", f"{row['retrieval']:.1%}",
            *(f"{row[key]:.4f}" for key in errors.values()))
    return table
