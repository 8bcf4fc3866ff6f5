"""`python -m tests.peers.text_encoder`: text encoders in float32, 8 and 4 bits: bytes, time, error, and images.

Two of them: the reference model's, and one of Stable Diffusion 1.5's published configuration (CLIP ViT-L) with random
weights, whose hidden states say how errors add up and not what is generated. Time is the quotient of one call with both
guidance branches by float32's in the same runtime, from interleaved rounds. Images are the reference model's with
the text encoder alone replaced. `--engines` builds TensorRT engines of the second instead, without a GPU, and prints
their bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.bench.contest import spread
from deploy.building.run_build import run_build
from deploy.core.spec import REFERENCE, BuildSpec
from deploy.parity.comparison_options import gallery_for, options_for
from deploy.parity.metrics import relative_l2
from deploy.parity.reference.answers import Reference
from deploy.parity.whole_pipelines import check_pipeline
from deploy.quantization.precision_search import ANYTHING, candidate_bundle
from deploy.reference_models import subject_names
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle, committed
from runtimes.pipeline.bundle_sessions import BundleSessions, open_session
from runtimes.system.cache_root import cache_home
from tests.deploy.real_size import write_model
from tests.peers.results import new_report, save, show

NAME, BASE, ROWS = "text_encoder", "fp32", {"fp32": 0, "int8": 8, "int4": 4}
RUNTIMES = ("onnxruntime", "openvino")
TURN_SECONDS = 0.1
WORDS = 2048  # the smaller vocabulary
CLIP = "CLIP ViT-L, random"
log = Console(stderr=True, markup=False, emoji=False)


def main() -> int:
    """Build every row for both runtimes, compare, time, generate, print the table, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.text_encoder", description=__doc__.partition("\n")[0])
    parser.add_argument("--retrieval", type=int, default=120, help="prompts that are generated and found again")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--engines", action="store_true", help="build CLIP ViT-L's engines instead, for SM89")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = new_report()
    if options.engines:
        return show_engines(report)
    with tempfile.TemporaryDirectory(prefix="ldm-text-encoder-") as scratch:
        for title, model in ((REFERENCE, REFERENCE), (CLIP, str(clip_model()))):
            bundles = built(model, Path(scratch) / title.replace(" ", "-"))
            rows: dict[str, dict[str, Any]] = {name: {} for name in ROWS}
            for runtime in RUNTIMES:
                measure(bundles[runtime], runtime, options, rows)
            if model == REFERENCE:
                generate(bundles["onnxruntime"], options, rows)
            report["rows"][title] = rows
    file = save(report, "text_encoder")
    print(json.dumps(report, indent=2)) if options.json else show(report, table_of(report), file, 150)
    return 0


def clip_model() -> Path:
    """SD 1.5's text encoder beside small networks, written the first time: 0.5 GB below the cache."""
    model = cache_home() / "at-size" / "text"
    if not model.is_dir():
        log.print("writing CLIP ViT-L", style="dim")
        with committed(model) as partial:
            write_model("sd15-text", partial)
    return model


def show_engines(report: dict[str, Any]) -> int:
    """Build CLIP ViT-L for SM89 with its weights in 16, 8 and 4 bits and print what the engines weigh."""
    table = Table(title="TensorRT engines of CLIP ViT-L, SM89, no GPU")
    for title in ("", "MB", "× fp16"):
        table.add_column(title, justify="right" if title else "left")
    with tempfile.TemporaryDirectory(prefix="ldm-text-encoder-") as scratch:
        for row, bits in {"fp16": 0, "int8": 8, "int4": 4}.items():
            log.print(f"building an engine, {row}", style="dim")
            spec = BuildSpec(**{"model": str(clip_model()), "target": "tensorrt-rtx", "verify": "no",
                                "engine": {"capabilities": ["SM89"]}, **integers(bits)})
            report["rows"][row] = run_build(spec, Path(scratch) / row).bundle.component(NAME).bytes
    for row, size in report["rows"].items():
        table.add_row(row, f"{size / 1e6:.1f}", f"{size / report['rows']['fp16']:.2f}")
    show(report, table, save(report, "text_encoder_engines"), 100)
    return 0


def integers(bits: int) -> dict[str, Any]:
    """Options of a build with the text encoder's weights in so many bits; 0 leaves them as they are."""
    return {"precision": "int8", "quantization": "weight-only", "text_encoder_bits": bits} if bits else {}


def built(model: str, folder: Path) -> dict[str, dict[str, Bundle]]:
    """Runtime -> row -> bundle; the other networks are stored in 8 bits where this one is in integers."""
    bundles: dict[str, dict[str, Bundle]] = {runtime: {} for runtime in RUNTIMES}
    for runtime in RUNTIMES:
        for row, bits in ROWS.items():
            log.print(f"building {model} {row} for {runtime}", style="dim")
            spec = BuildSpec(**{"model": model, "target": runtime, "verify": "no", **integers(bits)})
            bundles[runtime][row] = run_build(spec, folder / f"{runtime}-{row}").bundle
    return bundles


def measure(bundles: Mapping[str, Bundle], runtime: str, options: argparse.Namespace, rows: dict[str, dict[str, Any]],
            ) -> None:
    """Bytes, error and quotient of time of each row; sessions take turns, the first round does not count."""
    sessions: dict[str, Session] = {
        name: open_session(bundle, NAME, SessionOptions(threads=options.threads)) for name, bundle in bundles.items()}
    base = bundles[BASE].component(NAME)
    sizes = {axis: a.range.opt for axis, a in base.axes.items()}
    shape = base.inputs[0].resolve(sizes)
    feeds = {base.inputs[0].name: np.random.default_rng(0).integers(0, WORDS, shape)}
    output = base.outputs[0].name
    truth = sessions[BASE].run(feeds)[output]
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.rounds + 1):
        for name, session in sessions.items():
            seconds[name].append(seconds_of_a_call(partial(session.run, feeds)))
    for name, session in sessions.items():
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds[BASE][1:], strict=True)]
        size = bundles[name].component(NAME).bytes
        rows[name][runtime] = {
            "bytes": size, "bytes_ratio": size / base.bytes, "seconds": statistics.median(seconds[name][1:]),
            "seconds_ratio": spread(ratios), "relative_l2": relative_l2(truth, session.run(feeds)[output])}


def seconds_of_a_call(call: Callable[[], Any]) -> float:
    """Mean over a turn of at least TURN_SECONDS, behind one call that does not count: until the threads of the session
    before sleep, they keep a small call from its cores.
    """
    call()
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < TURN_SECONDS:
        call()
        count += 1
    return elapsed / count


def generate(bundles: Mapping[str, Bundle], options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """What the reference model generates from each row's hidden states, every other network in float32."""
    names, count = subject_names(), options.retrieval
    session = SessionOptions(threads=options.threads)
    asked = replace(options_for(REFERENCE, ()), session=session,
                    retrieval_prompts=tuple(names[i * len(names) // count] for i in range(count)))
    whole = bundles[BASE]
    reference = Reference(whole, opener=lambda b, _: BundleSessions(b, session))
    for name, bundle in bundles.items():
        log.print(f"generating with {name}", style="dim")
        graph = bundle.file(bundle.component(NAME).file)
        with candidate_bundle(whole, {NAME: graph}) as candidate:
            found = check_pipeline(reference, candidate, ANYTHING, asked, gallery=gallery_for(REFERENCE))
        figures = {c.metric: c.measured for c in found.comparisons(ANYTHING)}
        rows[name] |= {"psnr_db": figures.get("image_psnr_db"), "ssim": figures.get("image_ssim"),
                       "psnr_db_mean": statistics.fmean(p.psnr_db for p in found.pairs),
                       "retrieval": found.retrieval[1] if found.retrieval else None}


def table_of(report: Mapping[str, Any]) -> Table:
    """A line for each text encoder and precision."""
    table = Table(title="Text encoders, weights in fewer bits")
    for title in ("", "", "MB", "× bytes", "× ORT", "× OpenVINO", "hidden states L2", "PSNR worst", "mean", "SSIM",
                  "retrieval"):
        table.add_column(title, justify="right" if title else "left")
    for model, rows in report["rows"].items():
        for name, row in rows.items():
            ort, openvino = row["onnxruntime"], row["openvino"]
            images = [f"{row['psnr_db']:.1f}", f"{row['psnr_db_mean']:.1f}", f"{row['ssim']:.3f}",
                        f"{row['retrieval']:.1%}"] if "psnr_db" in row else []
            table.add_row(model, name, f"{ort['bytes'] / 1e6:.2f}", f"{ort['bytes_ratio']:.3f}",
                          *(f"{r['seconds_ratio']['median']:.2f}" for r in (ort, openvino)),
                          f"{ort['relative_l2']:.4f}", *images)
    return table


if __name__ == "__main__":
    sys.exit(main())
