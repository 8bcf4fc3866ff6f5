"""`python -m tests.peers.pruning`: the reference model's U-Net pruned, with and without recovery, one run.

Every row is a build of its own with `--prune` alone changed, so that what is lost is pruning's. Accuracy is against the
float32 graph; latency is the quotient of one call by the unpruned one's, interleaved (tests.peers.compression).
The recoveries train the first time (`--recover 0` leaves them out) and come from the build cache afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.builder import run_build
from deploy.doctor import machine
from deploy.spec import BuildSpec
from tests.peers.compression import BASE, RESULTS, Judge, latencies, log, prepare, show


def main() -> int:
    """Build every row, draw with it, time it, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.pruning", description=__doc__.partition("\n")[0])
    parser.add_argument("--ratios", type=lambda text: [float(r) for r in text.split(",")], default=[0.15, 0.3, 0.5])
    parser.add_argument("--recover", type=int, default=8000, help="steps of distillation")
    parser.add_argument("--method", default="taylor", help="importance of a channel: taylor, l1, l2")
    parser.add_argument("--widths", default="uniform", help="uniform or sensitivity")
    parser.add_argument("--retrieval", type=int, default=120, help="prompts that are drawn and found again")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="recorded calls")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0], "rows": {}, "unavailable": {}}
    with tempfile.TemporaryDirectory(prefix="ldm-pruning-") as scratch:
        context = prepare(options, Path(scratch))
        context.unets[BASE] = {"onnxruntime": context.optimized}
        macs = {BASE: context.bundle.component("unet").details["macs"]}
        for name, spec in rows(options).items():
            log.print(f"building {name}", style="dim")
            bundle = run_build(spec, Path(scratch) / name.replace(" ", "-")).bundle
            context.unets[name] = {"onnxruntime": bundle.file(bundle.component("unet").file)}
            macs[name] = bundle.component("unet").details["macs"]
        judge = Judge(context)
        for name, graphs in context.unets.items():
            log.print(f"drawing with {name}", style="dim")
            report["rows"][name] = {**judge.row(graphs), "macs": macs[name], "macs_ratio": macs[BASE] / macs[name]}
        for name, ratio in latencies(context, "onnxruntime").items():
            report["rows"][name]["onnxruntime_seconds_ratio"] = ratio
    report["load_after"] = os.getloadavg()[0]
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "pruning.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2)) if options.json else show(report, file)
    return 0


def rows(options: argparse.Namespace) -> dict[str, BuildSpec]:
    """A build for every ratio, without recovery and with it; the gate would stop most of the first kind."""
    specs = {}
    for ratio in options.ratios:
        pruned = {"prune": ratio, "prune_method": options.method, "prune_widths": options.widths, "verify": "no"}
        specs[f"prune {ratio:.0%}"] = BuildSpec(**pruned)
        if options.recover:
            specs[f"prune {ratio:.0%} recovered"] = BuildSpec(**pruned, recover=options.recover)
    return specs


if __name__ == "__main__":
    sys.exit(main())
