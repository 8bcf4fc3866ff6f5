"""`python -m tests.peers.compression`: the U-Net of the reference model in every precision, ours and others', one run.

Every row replaces the U-Net alone, so that what is lost is the U-Net's. Accuracy is against the float32 graph; latency
is the quotient of one call by float32's in the same runtime, from interleaved rounds. NNCF and OpenVINO are measured
where they are installed. `--ablation` prints what each choice of the hybrid recipe buys instead. Recoveries train the
first time, for as long as a build says, and come from the build cache afterwards; `--recover 0` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration.integers.ranges import Scheme
from calibration.recipes.one_graph import Settings, quantize_graph
from calibration.targets_and_recipes import SCHEMES
from calibration.trajectory.recorder import Recording
from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec
from deploy.quantization.calibration_data import plan_calibration, record_calibration
from runtimes.bundle.folder import Bundle
from runtimes.errors import UnavailableError
from tests.peers.prepare import derived
from tests.peers.replaced import BASE, Graphs, Judge, add_latencies, measuring_options, table_of
from tests.peers.results import new_report, save, show

RATIOS = (0.15, 0.3, 0.5)
log = Console(stderr=True, markup=False, emoji=False)


@dataclass
class Context:
    """What the rows are made from: the float32 bundle, the plainly exported U-Net, the recording, a scratch folder."""

    bundle: Bundle
    plain: Path
    recording: Recording
    folder: Path
    options: argparse.Namespace
    unets: dict[str, Graphs] = field(default_factory=dict)
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


Make = Callable[[Context, str], Graphs]


def main() -> int:
    """Make every row, generate with it, time it, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.compression", description=__doc__.partition("\n")[0])
    parser.add_argument("--ablation", action="store_true")
    measuring_options(parser)
    parser.add_argument("--recover", type=int, default=1600, help="steps of distillation after pruning")
    parser.add_argument("--only", type=lambda text: text.split(","), help="rows, comma-separated")
    options = parser.parse_args()
    rows = ABLATION if options.ablation else ROWS
    rows = {name: make for name, make in rows.items() if not options.only or name in (*options.only, BASE)}
    report = new_report()
    with tempfile.TemporaryDirectory(prefix="ldm-compression-") as scratch:
        context = prepare(options, Path(scratch))
        for name, make in rows.items():
            log.print(f"making {name}", style="dim")
            try:
                context.unets[name] = make(context, name)
            except Exception as error:
                report["unavailable"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        judge = Judge(context.bundle, "unet", context.recording, options)
        for name, graphs in context.unets.items():
            log.print(f"generating with {name}", style="dim")
            report["rows"][name] = judge.row(graphs["onnxruntime"], context.macs_shares.get(name, 1))
        add_latencies(report["rows"], context.unets, next(context.recording.calls("unet")), options, {"bf16": "bf16"})
    file = save(report, "ablation" if options.ablation else "compression")
    table = table_of("U-Net of the reference model", report)
    print(json.dumps(report, indent=2)) if options.json else show(report, table, file, 160)
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
            settings = Settings(scheme, estimator, tuple(methods))
            recording = context.recording if recipe in ("hybrid", "static") else None
            made[runtime] = context.file(row, runtime)
            quantize_graph(graph, made[runtime], recipe, settings, "unet", recording)
        return made

    return make


def full(context: Context, row: str) -> Graphs:
    """Float32."""
    return {"onnxruntime": context.optimized, "openvino": context.plain}


def half(precision: str) -> Make:
    """16 bits as they are built for CPUs: stored, not computed in; OpenVINO computes in bfloat16 where the CPU can."""

    def make(context: Context, row: str) -> Graphs:
        from exporters.precision.sixteen_bits import convert_precision

        made = {}
        for runtime, graph in full(context, row).items():
            made[runtime] = context.file(row, runtime)
            convert_precision(graph, made[runtime], precision, mode="storage")
        return made

    return make


def searched(context: Context, row: str) -> Graphs:
    """`--precision auto`."""
    bundle = run_build(BuildSpec(precision="auto", calibration_samples=context.options.samples, verify="no"),
                       context.folder / "auto-bundle").bundle
    return {"onnxruntime": bundle.file(bundle.component("unet").file)}


def calibrated(context: Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """How many calls ranges are found from, in a build that finds any."""
    return {"calibration_samples": context.options.samples} if options.get("precision") == "int8" else {}



def pruned(ratio: float, *, recovered: bool = False, **more: Any) -> Make:
    """`--prune`, built for both runtimes; with `--recover` and a precision where they are asked for."""

    def make(context: Context, row: str) -> Graphs:
        steps = context.options.recover if recovered else 0
        if recovered and not steps:
            raise UnavailableError("left out by --recover 0")
        made = {}
        for runtime in ("onnxruntime", "openvino"):
            spec = BuildSpec(**{"target": runtime, "prune": ratio, "recover": steps, "verify": "no",
                                **calibrated(context, more), **more})
            folder = context.file(row, runtime).parent / "bundle"
            component = (bundle := run_build(spec, folder).bundle).component("unet")
            made[runtime] = bundle.file(component.file)
            context.macs_shares[row] = (component.graph.macs or 0) / (context.bundle.component("unet").graph.macs or 1)
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
    "fp16": half("fp16"),
    "bf16": half("bf16"),
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


if __name__ == "__main__":
    sys.exit(main())
