"""`python -m tests.peers.latency`: text to image, ours against its peers side by side; and where our time goes.

Every contestant is a process that idles while another one generates, so rounds interleave (A B C D A B C D ...) and a
machine that slows down slows all of them. A round has one prompt and one initial noise for all; no prompt comes twice,
so that nobody's cache of prompts helps. A contestant whose image is not eager's is reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.bench.contest import spread
from deploy.bench.worker_client import Worker
from deploy.cli.bench_table import shown
from deploy.core.doctor import machine
from runtimes.errors import UnavailableError
from tests.peers.contestants import BARE_ORT, COMPILED, CONTESTANTS, EAGER, OPTIMUM, OURS, start
from tests.peers.prepare import MODEL, OPTIMUM_PINS, ROOT, model_digest

RESULTS = ROOT / "build" / "peers" / "latency.json"
GUIDANCE = 7.5
SAME_IMAGE_DB = 40.0  # what float32 rounding leaves between two correct implementations is far above
SETTLE_SECONDS = 0.25  # thread pools spin for a while after a run, and would take the next one's cores
UNET_CALLS = 20
log = Console(stderr=True, markup=False, emoji=False)


def main() -> int:
    """Measure, print, write the results file."""
    options = _arguments()
    names = [name for name, (short, _) in CONTESTANTS.items() if short in options.only or name == EAGER]
    report: dict[str, Any] = {
        "machine": machine(), "threads": options.threads, "steps": options.steps, "rounds": options.rounds,
        "guidance": GUIDANCE, "model_sha256": model_digest(), "versions": _versions(),
        "load_before": os.getloadavg()[0], "contestants": {}, "unavailable": {}, "wrong": {},
    }
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="ldm-peers-") as scratch:
        try:
            for name in names:
                _start(name, options, workers, report)
            if EAGER not in workers:
                log.print(f"no reference: {report['unavailable'][EAGER]}", style="red")
                return 1
            _warm_up(workers, options, Path(scratch), report)
            _rounds(workers, options, Path(scratch), report)
            _one_unet_call(workers, options, Path(scratch), report)
        finally:
            for worker in workers.values():
                worker.close()
    report["load_after"] = os.getloadavg()[0]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if OURS in report["contestants"] or "ours" not in options.only else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.latency", description=__doc__.partition("\n")[0])
    shorts = [short for short, _ in CONTESTANTS.values()]
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), default=shorts,
                        help=f"comma-separated, of {', '.join(shorts)}; eager always runs: ratios are against it")
    parser.add_argument("--bundle", type=Path, help="ours, instead of what `run_build(BuildSpec())` makes or finds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.only) - set(shorts):
        parser.error(f"unknown contestant {', '.join(sorted(unknown))}")
    if options.rounds < 1 or options.steps < 1 or options.threads < 1:
        parser.error("--rounds, --steps and --threads are at least 1")
    return options


def _start(name: str, options: argparse.Namespace, workers: dict[str, Worker], report: dict[str, Any]) -> None:
    log.print(f"starting {name}", style="dim")
    try:
        workers[name] = start(name, options.threads, options.bundle)
    except UnavailableError as error:
        _drop(name, error, workers, report)


def _drop(name: str, error: Exception, workers: dict[str, Worker], report: dict[str, Any]) -> None:
    report["unavailable"][name] = str(error)
    log.print(f"{name} is unavailable: {error}", style="red", markup=False)
    if (worker := workers.pop(name, None)) is not None:
        worker.close()


def _warm_up(workers: dict[str, Worker], options: argparse.Namespace, scratch: Path, report: dict[str, Any]) -> None:
    """One image each, compared with eager's: compilation and first allocations happen here."""
    request = _request(0, options, scratch)
    reference = None
    for name in sorted(workers, key=lambda n: n != EAGER):
        log.print(f"warming up {name}", style="dim")
        try:
            seconds = _generate(workers[name], request, scratch)["seconds"]
        except UnavailableError as error:
            _drop(name, error, workers, report)
            continue
        image = np.load(scratch / "image.npy")
        reference = image if reference is None else reference
        psnr = _psnr(reference, image)
        if psnr < SAME_IMAGE_DB:
            report["wrong"][name] = f"its image is {psnr:.1f} dB from eager's, below {SAME_IMAGE_DB:.0f} dB"
            workers.pop(name).close()
            continue
        report["contestants"][name] = {"first_image_seconds": seconds, "start_seconds": workers[name].start_seconds,
                                       "psnr_db": None if name == EAGER else psnr, "rounds": []}
        _generate(workers[name], request, scratch)
    report["contestants"] = {n: report["contestants"][n] for n in workers}


def _rounds(workers: dict[str, Worker], options: argparse.Namespace, scratch: Path, report: dict[str, Any]) -> None:
    entries = report["contestants"]
    profiles = []
    for number in range(1, options.rounds + 1):
        request = _request(number, options, scratch)
        images = {}
        for name in list(workers):
            reply = _generate(workers[name], request, scratch)
            entries[name]["rounds"].append(reply["seconds"])
            entries[name]["peak_rss_bytes"] = reply["peak_rss_bytes"]
            images[name] = np.load(scratch / "image.npy")
            if name == OURS:
                profiles.append(reply["profile"])
        for name, image in images.items():
            if name != EAGER:
                entries[name]["psnr_db"] = min(entries[name]["psnr_db"], _psnr(images[EAGER], image))
        log.print(f"round {number} of {options.rounds}: "
                  + ", ".join(f"{n} {e['rounds'][-1]:.3f} s" for n, e in entries.items()), style="dim")
    for name, entry in entries.items():
        samples = entry["rounds"]
        entry["seconds"] = spread(samples)
        entry["times_faster_than_eager"] = spread(_quotients(entries[EAGER]["rounds"], samples))
        if name != OURS and OURS in entries:
            entry["ours_is_times_faster"] = spread(_quotients(samples, entries[OURS]["rounds"]))
    if profiles:
        total = sum(p["total"] for p in profiles)
        parts = {c: sum(p["components"][c] for p in profiles) for c in profiles[0]["components"]}
        parts["python"] = sum(p["python"] for p in profiles)
        report["where_our_time_goes"] = {
            part: {"seconds_per_image": seconds / len(profiles), "share": seconds / total}
            for part, seconds in parts.items()}


def _one_unet_call(workers: dict[str, Worker], options: argparse.Namespace, scratch: Path,
                   report: dict[str, Any]) -> None:
    """One call with guidance's batch of two, interleaved like the images."""
    config = json.loads((MODEL / "unet" / "config.json").read_text())
    tokens = json.loads((MODEL / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    random = np.random.default_rng(0)
    size = config["sample_size"]
    np.savez(scratch / "feeds.npz", timestep=np.full(2, 481, np.float32),
             sample=random.standard_normal((2, config["in_channels"], size, size), np.float32),
             encoder_hidden_states=random.standard_normal((2, tokens, config["cross_attention_dim"]), np.float32))
    if OURS in workers:
        _start(BARE_ORT, options, workers, report)
    calls: dict[str, list[float]] = {}
    for _ in range(3):
        for name in [n for n in (EAGER, COMPILED, BARE_ORT, OURS) if n in workers]:
            time.sleep(SETTLE_SECONDS)
            try:
                reply = workers[name].ask("component", name="unet", feeds=str(scratch / "feeds.npz"), times=UNET_CALLS)
            except UnavailableError as error:
                _drop(f"{name}, one U-Net call", error, {}, report)
                continue
            calls.setdefault(name, []).extend(reply["all"])
    report["unet_call"] = {name: spread(seconds) for name, seconds in calls.items()}


def _request(number: int, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    prompts = (MODEL.parent / "demo_prompts.txt").read_text().split("\n")
    prompts = [p for p in prompts if p.strip()]
    config = json.loads((MODEL / "unet" / "config.json").read_text())
    shape = (1, config["in_channels"], config["sample_size"], config["sample_size"])
    np.save(scratch / "latents.npy", np.random.default_rng(number).standard_normal(shape, np.float32))
    again = number // len(prompts)  # past the list, the same subjects under other prompts
    return {"prompts": [prompts[number % len(prompts)] + (f" {again}" if again else "")],
            "latents": str(scratch / "latents.npy"), "steps": options.steps, "guidance": GUIDANCE}


def _generate(worker: Worker, request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    time.sleep(SETTLE_SECONDS)
    return worker.ask("generate", save=str(scratch / "image.npy"), **request)


def _psnr(reference: Any, image: Any) -> float:
    """Decibels between (H, W, 3) uint8 images; 99 when equal, below zero for another shape."""
    if reference.shape != image.shape:
        return -1.0
    mse = float(np.mean((reference.astype(np.float64) - image) ** 2))
    return 99.0 if mse == 0 else float(10 * np.log10(255**2 / mse))


def _quotients(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def _versions() -> dict[str, Any]:
    ours = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "onnxruntime", "numpy")}
    return {"project": ours, OPTIMUM: list(OPTIMUM_PINS)}


def _print(report: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    host = report["machine"]
    console.print(f"{host['processor']}, {host['cores']} cores, {report['threads']} threads each, Python "
                  f"{host['python']}; load {report['load_before']:.1f} before, {report['load_after']:.1f} after")
    table = Table(title=f"One image, {report['steps']} steps, guidance {GUIDANCE}: medians of {report['rounds']} "
                        "interleaved rounds (min–max)")
    for title in ("", "seconds", "× eager", "ours is ×", "PSNR to eager", "first image", "peak RSS"):
        table.add_column(title, justify="left" if not title else "right")
    for name, e in report["contestants"].items():
        table.add_row(name, shown(e["seconds"], 3), shown(e["times_faster_than_eager"], 2),
                      shown(e["ours_is_times_faster"], 2) if "ours_is_times_faster" in e else "",
                      "" if e["psnr_db"] is None else f"{e['psnr_db']:.1f} dB", f"{e['first_image_seconds']:.1f} s",
                      f"{e['peak_rss_bytes'] / 2**20:.0f} MiB")
    for name in (*report["wrong"], *report["unavailable"]):
        table.add_row(name, "wrong" if name in report["wrong"] else "unavailable", style="red")
    console.print(table)
    for name, reason in {**report["wrong"], **report["unavailable"]}.items():
        console.print(f"{name}: {reason}", markup=False)
    if parts := report.get("where_our_time_goes"):
        table = Table("part", "ms per image", "share", title="Where our time goes")
        for part, e in sorted(parts.items(), key=lambda item: -item[1]["share"]):
            table.add_row(part, f"{e['seconds_per_image'] * 1000:.1f}", f"{e['share']:.1%}")
        console.print(table)
    table = Table("", "ms (min–max)", title="One U-Net call, batch 2")
    for name, e in report["unet_call"].items():
        table.add_row(name, shown({k: v * 1000 for k, v in e.items()}, 1))
    console.print(table)
    console.print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
