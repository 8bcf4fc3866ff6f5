"""`python -m tests.peers.compression`: the U-Net of the reference model in every precision, ours and others', one run.

Every row replaces the U-Net alone, so that what is lost is the U-Net's. Accuracy is against the float32 graph; latency
is the quotient of one call by float32's in the same runtime, from interleaved rounds. NNCF and OpenVINO are measured
where they are installed. `--ablation` prints what each choice of the hybrid recipe buys instead. Recoveries train the
first time, 25 minutes each on two idle cores, and come from the build cache afterwards; `--recover 0` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from calibration.layers import find_layers
from calibration.observe import compare, plain_session, probed
from calibration.ranges import Scheme
from calibration.recorder import Recording
from deploy.builder import run_build
from deploy.doctor import machine
from deploy.gate import gallery_for, options_for
from deploy.parity.answers import Reference
from deploy.parity.pipelines import check_pipeline
from deploy.passes.quantize import SCHEMES
from deploy.quantization import plan_calibration, quantize_component, record_calibration
from deploy.reference_model import subject_names
from deploy.search import ANYTHING, candidate_bundle
from deploy.spec import BuildSpec
from runtimes.bundle import Bundle
from runtimes.errors import UnavailableError
from runtimes.loading import BundleSessions
from runtimes.session import SessionOptions
from tests.peers.prepare import ROOT, derived

RESULTS = ROOT / "build" / "peers"
BASE = "fp32"
RATIOS = (0.15, 0.3, 0.5)
log = Console(stderr=True)


@dataclass
class Context:
    """What the rows are made from: the float32 bundle, the plainly exported U-Net, the recording, a scratch folder."""

    bundle: Bundle
    plain: Path
    recording: Recording
    folder: Path
    options: argparse.Namespace
    unets: dict[str, dict[str, Path]] = field(default_factory=dict)
    macs_shares: dict[str, float] = field(default_factory=dict)  # of rows whose network is another

    @property
    def optimized(self) -> Path:
        """The float32 U-Net that ONNX Runtime gets."""
        return self.bundle.file(self.bundle.component("unet").file)

    def file(self, row: str, runtime: str) -> Path:
        """Where a row's graph goes."""
        path = self.folder / row.replace(" ", "-").replace("/", "-") / runtime / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


Graphs = dict[str, Path]
Make = Callable[[Context, str], Graphs]


def main() -> int:
    """Make every row, draw with it, time it, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.compression", description=__doc__.partition("\n")[0])
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--retrieval", type=int, default=120, help="prompts that are drawn and found again")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--recover", type=int, default=3200, help="steps of distillation after pruning")
    parser.add_argument("--only", type=lambda text: text.split(","), help="rows, comma-separated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = ABLATION if options.ablation else ROWS
    rows = {name: make for name, make in rows.items() if not options.only or name in (*options.only, BASE)}
    report: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "rows": {}, "unavailable": {}}
    with tempfile.TemporaryDirectory(prefix="ldm-compression-") as scratch:
        context = prepare(options, Path(scratch))
        for name, make in rows.items():
            log.print(f"making {name}", style="dim")
            try:
                context.unets[name] = make(context, name)
            except Exception as error:
                report["unavailable"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        judge = Judge(context)
        for name, graphs in context.unets.items():
            log.print(f"drawing with {name}", style="dim")
            report["rows"][name] = judge.row(name, graphs)
        for runtime in ("onnxruntime", "openvino"):
            for name, ratio in latencies(context, runtime).items():
                report["rows"][name][f"{runtime}_seconds_ratio"] = ratio
    report["load_after"] = os.getloadavg()[0]
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / ("ablation.json" if options.ablation else "compression.json")
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2)) if options.json else show(report, file)
    return 0


def prepare(options: argparse.Namespace, scratch: Path) -> Context:
    """The float32 bundle, built where the cache lacks it, and the recording."""
    bundle = run_build(BuildSpec(verify="no"), scratch / "fp32").bundle
    spec = BuildSpec(precision="int8", calibration_samples=options.samples)
    recording = record_calibration(bundle, plan_calibration(bundle.manifest, spec))
    return Context(bundle, derived("unet"), recording, scratch / "rows", options)


def ours(recipe: str, estimator: str = "mse", methods: tuple[str, ...] = (), outputs: bool = True) -> Make:
    """A recipe of `--precision int8`, for both runtimes."""

    def make(context: Context, row: str) -> Graphs:
        made = {}
        for runtime, graph in (("onnxruntime", context.optimized), ("openvino", context.plain)):
            if runtime == "openvino" and (recipe == "dynamic" or context.options.ablation):
                continue
            scheme = Scheme(**{**SCHEMES[runtime], **({} if outputs else {"quantize_outputs": False})})
            config = {"keep": [], "estimator": estimator, "methods": list(methods)}
            recording = context.recording if recipe in ("hybrid", "static") else None
            made[runtime] = context.file(row, runtime)
            quantize_component(graph, made[runtime], recipe, config, scheme, "unet", recording)
        return made

    return make


def full(context: Context, row: str) -> Graphs:
    """Float32."""
    return {"onnxruntime": context.optimized, "openvino": context.plain}


def half(context: Context, row: str) -> Graphs:
    """Float16 as it is built for CPUs: stored, not computed in."""
    from exporters.onnx_precision import convert_precision

    made = {}
    for runtime, graph in full(context, row).items():
        made[runtime] = context.file(row, runtime)
        convert_precision(graph, made[runtime], "fp16", mode="storage")
    return made


def searched(context: Context, row: str) -> Graphs:
    """`--precision auto`."""
    bundle = run_build(BuildSpec(precision="auto", calibration_samples=context.options.samples, verify="no"),
                       context.folder / "auto-bundle").bundle
    return {"onnxruntime": bundle.file(bundle.component("unet").file)}


def pruned(ratio: float, *, recovered: bool = False, **more: Any) -> Make:
    """`--prune`, built for both runtimes; with `--recover` and a precision where they are asked for."""

    def make(context: Context, row: str) -> Graphs:
        steps = context.options.recover if recovered else 0
        if recovered and not steps:
            raise UnavailableError("left out by --recover 0")
        made = {}
        for runtime in ("onnxruntime", "openvino"):
            spec = BuildSpec(**{"target": runtime, "prune": ratio, "recover": steps, "verify": "no",
                                "calibration_samples": context.options.samples, **more})
            folder = context.file(row, runtime).parent / "bundle"
            component = (bundle := run_build(spec, folder).bundle).component("unet")
            made[runtime] = bundle.file(component.file)
            context.macs_shares[row] = component.details["macs"] / context.bundle.component("unet").details["macs"]
        return made

    return make


def nncf_default(context: Context, row: str) -> Graphs:
    """NNCF's post-training quantization as `nncf.quantize` does it unasked; it cannot read our fused operators."""
    import nncf
    import onnx

    calls = list(context.recording.calls("unet"))
    model = nncf.quantize(onnx.load(context.plain), nncf.Dataset(calls), subset_size=len(calls))
    file = context.file(row, "both")
    onnx.save(model, file)
    return {"onnxruntime": file, "openvino": file}


def ort_static(context: Context, row: str) -> Graphs:
    """ONNX Runtime's static quantizer with its defaults, on the operators with weights: on all of them it fails."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls = context.recording.calls("unet")

        def get_next(self) -> Any:
            return next(self.calls, None)

    file = context.file(row, "both")
    quantize_static(str(context.plain), str(file), Reader(), op_types_to_quantize=["Conv", "MatMul", "Gemm"])
    return {"onnxruntime": file, "openvino": file}


ROWS: dict[str, Make] = {
    BASE: full,
    "fp16": half,
    "weight-only": ours("weight-only"),
    "dynamic": ours("dynamic"),
    "static": ours("static"),
    "hybrid": ours("hybrid"),
    "auto": searched,
    **{f"prune {ratio:.0%}": pruned(ratio) for ratio in RATIOS},
    **{f"prune {ratio:.0%} recovered": pruned(ratio, recovered=True) for ratio in RATIOS},
    "prune 30% recovered + hybrid": pruned(0.3, recovered=True, precision="int8"),
    "NNCF default PTQ": nncf_default,
    "ORT default static PTQ": ort_static,
}
ABLATION: dict[str, Make] = {
    BASE: full,
    "hybrid": ours("hybrid"),
    "minmax": ours("hybrid", "minmax"),
    "percentile": ours("hybrid", "percentile"),
    "entropy": ours("hybrid", "entropy"),
    "outputs not quantized": ours("hybrid", outputs=False),
    "split-skips": ours("hybrid", methods=("split-skips",)),
    "smoothquant": ours("hybrid", methods=("smoothquant",)),
    "bias-correction": ours("hybrid", methods=("bias-correction",)),
    "all three": ours("hybrid", methods=("split-skips", "smoothquant", "bias-correction")),
}


class Judge:
    """Accuracy of a U-Net, by what it draws."""

    def __init__(self, context: Context) -> None:
        names = subject_names()
        count = context.options.retrieval
        prompts = tuple(names[i * len(names) // count] for i in range(count))
        self.context = context
        self.options = replace(options_for("reference", ()), retrieval_prompts=prompts,
                               session=SessionOptions(threads=context.options.threads))
        self.gallery = gallery_for("reference")
        self.reference = Reference(
            context.bundle, opener=lambda b, _: BundleSessions(b, SessionOptions(threads=context.options.threads)))
        self.macs = macs(context.optimized, next(context.recording.calls("unet")))

    def row(self, name: str, graphs: Graphs) -> dict[str, Any]:
        """Size and accuracy of one row."""
        graph = graphs["onnxruntime"]
        with candidate_bundle(self.context.bundle, {"unet": graph}) as bundle:
            report = check_pipeline(self.reference, bundle, ANYTHING, self.options, gallery=self.gallery)
        figures = {c.metric: c.measured for c in report.comparisons(ANYTHING)}
        calls = self.context.recording.spread("unet", 16)
        return {
            "bytes": graph.stat().st_size, "bytes_ratio": graph.stat().st_size / self.context.optimized.stat().st_size,
            "macs": self.macs * self.context.macs_shares.get(name, 1),
            "one_call_relative_l2": compare(self.context.optimized, graph, lambda: calls),
            "final_latent_relative_l2": figures.get("trajectory_relative_l2"),
            "psnr_db": figures.get("image_psnr_db"),
            "psnr_db_mean": statistics.fmean(p.psnr_db for p in report.pairs), "ssim": figures.get("image_ssim"),
            "retrieval": report.retrieval[1] if report.retrieval else None,
        }


def macs(graph: Path, feeds: dict[str, Any]) -> int:
    """Multiply-accumulates of the layers with weights for one recorded call."""
    layers = find_layers(ir.load(graph))
    initializers = ir.load(graph).graph.initializers
    with probed(graph, [layer.result for layer in layers]) as run:
        shapes = {name: values.shape for name, values in run(feeds).items()}
    total = 0
    for layer in layers:
        width = initializers[layer.weight].const_value.shape[layer.axis]
        total += int(np.prod(shapes[layer.result])) * layer.parameters // int(width)
    return total


def latencies(context: Context, runtime: str) -> dict[str, dict[str, float]]:
    """Quotient of one call by float32's: row -> median, min, max over interleaved rounds."""
    if runtime == "openvino" and util.find_spec("openvino") is None:
        return {}
    feeds = next(context.recording.calls("unet"))
    callers = {}
    for name, graphs in context.unets.items():
        if runtime in graphs:
            callers[name] = caller(graphs[runtime], runtime, context.options.threads, feeds)
    rounds: dict[str, list[float]] = {name: [] for name in callers}
    for _ in range(context.options.rounds + 1):
        for name, call in callers.items():
            began = time.perf_counter()
            for _ in range(4):
                call()
            rounds[name].append((time.perf_counter() - began) / 4)
    ratios = {name: [a / b for a, b in zip(seconds[1:], rounds[BASE][1:], strict=True)]
              for name, seconds in rounds.items()}
    return {name: {"median": statistics.median(r), "min": min(r), "max": max(r),
                   "seconds": statistics.median(rounds[name][1:])} for name, r in ratios.items()}


def caller(graph: Path, runtime: str, threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    """A function that runs the graph once."""
    if runtime == "onnxruntime":
        session = plain_session(graph, threads)
        return lambda: session.run(None, feeds)
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(graph), "CPU", hints).create_infer_request()
    return lambda: request.infer(feeds)


def show(report: dict[str, Any], file: Path) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    host = report["machine"]
    console.print(f"{host['processor']}, {host['cores']} cores; load {report['load_before']:.1f} before, "
                  f"{report['load_after']:.1f} after")
    table = Table(title="U-Net of the reference model")
    titles = ("", "MB", "× bytes", "MMACs", "× ORT", "× OpenVINO", "one call L2", "final latents L2", "PSNR worst",
              "mean", "SSIM", "retrieval")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for name, row in report["rows"].items():
        ort, openvino = (row.get(f"{r}_seconds_ratio") for r in ("onnxruntime", "openvino"))
        table.add_row(
            name, f"{row['bytes'] / 1e6:.1f}", f"{row['bytes_ratio']:.3f}", f"{row['macs'] / 1e6:.0f}",
            f"{ort['median']:.2f}" if ort else "", f"{openvino['median']:.2f}" if openvino else "",
            f"{row['one_call_relative_l2']:.4f}", f"{row['final_latent_relative_l2']:.4f}", f"{row['psnr_db']:.1f}",
            f"{row['psnr_db_mean']:.1f}", f"{row['ssim']:.3f}", f"{row['retrieval']:.1%}")
    console.print(table)
    for name, why in report["unavailable"].items():
        console.print(f"{name}: {why}", markup=False)
    console.print(f"written to {file}")


if __name__ == "__main__":
    sys.exit(main())
