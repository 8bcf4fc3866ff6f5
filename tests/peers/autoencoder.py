"""`python -m tests.peers.autoencoder`: the reference model's VAE decoder with fewer channels, untrained and recovered.

Every row replaces the decoder alone. Accuracy is against the float32 graph; latency is the quotient of one call by
float32's in the same runtime, from interleaved rounds. The encoder's error is that of its moments on recorded images.
Recoveries train the first time and come from the build cache afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration.trajectory.inner_tensors import compare
from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec
from deploy.quantization.calibration_data import plan_calibration, record_calibration
from runtimes.bundle.folder import Bundle
from tests.peers.replaced import BASE, Judge, add_latencies, measuring_options, table_of
from tests.peers.results import new_report, save, show

DECODER, ENCODER = "vae_decoder", "vae_encoder"
RUNTIMES = ("onnxruntime", "openvino")
log = Console(stderr=True, markup=False, emoji=False)


def main() -> int:
    """Build every row for both runtimes, generate with it, time it, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.autoencoder", description=__doc__.partition("\n")[0])
    measuring_options(parser)
    parser.add_argument("--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[0.25])
    parser.add_argument("--recover", type=int, default=300, help="steps of distillation for each half")
    options = parser.parse_args()
    report = new_report(recover=options.recover)
    with tempfile.TemporaryDirectory(prefix="ldm-autoencoder-") as scratch:
        rows = {BASE: built(Path(scratch) / BASE)}
        for ratio in options.ratios:
            for steps in (0, options.recover):
                name = f"{ratio:.0%} fewer" + (", recovered" if steps else "")
                rows[name] = built(Path(scratch) / name.replace(" ", "-"), prune_vae=ratio, recover=steps)
        whole = rows[BASE]["onnxruntime"]
        spec = BuildSpec(precision="int8", calibration_samples=options.samples)
        recording = record_calibration(whole, plan_calibration(whole.manifest, spec))
        judge, calls = Judge(whole, DECODER, recording, options), recording.spread(ENCODER, 16)
        for name, bundles in rows.items():
            log.print(f"generating with {name}", style="dim")
            share = macs(bundles["onnxruntime"]) / macs(whole)
            original, narrow = (b.file(b.component(ENCODER).file) for b in (whole, bundles["onnxruntime"]))
            report["rows"][name] = judge.row(graph(bundles["onnxruntime"]), share) | {
                "encoder_relative_l2": compare(original, narrow, lambda: calls)}
        networks = {name: {runtime: graph(bundle) for runtime, bundle in bundles.items()}
                    for name, bundles in rows.items()}
        add_latencies(report["rows"], networks, next(recording.calls(DECODER)), options)
    file = save(report, "autoencoder")
    table = table_of("VAE decoder of the reference model", report, {"encoder L2": "encoder_relative_l2"})
    print(json.dumps(report, indent=2)) if options.json else show(report, table, file, 170)
    return 0


def built(folder: Path, **pruning: Any) -> dict[str, Bundle]:
    """Runtime -> bundle, not compared with PyTorch: what is generated says what the pruning did."""
    log.print(f"building {folder.name}", style="dim")
    return {runtime: run_build(BuildSpec(**{"target": runtime, "verify": "no", **pruning}), folder / runtime).bundle
            for runtime in RUNTIMES}


def graph(bundle: Bundle) -> Path:
    """The decoder's file."""
    return bundle.file(bundle.component(DECODER).file)


def macs(bundle: Bundle) -> int:
    """Multiply-accumulates of the decoder at the smallest size, counted by the export."""
    return bundle.component(DECODER).graph.macs or 0


if __name__ == "__main__":
    sys.exit(main())
