"""Measures how much memory a bundle's calls take on this machine, in a process of its own, and caches it.

The process is `python -m runtimes.pipeline.memory_measurement REQUEST.json`, which leaves what it measured beside the
request.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.backends.batching import row_range
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle, read_object, replacing
from runtimes.bundle.manifest import digest_of
from runtimes.bundle.roles import Roles
from runtimes.bundle.tensors import example_feeds
from runtimes.errors import BundleError, InputError, UnavailableError
from runtimes.pipeline.bundle_sessions import BundleSessions, needed
from runtimes.pipeline.memory_budget import DECODER, DENOISER, MemoryModel, fit
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use
from runtimes.system.child_process import as_child, last_words, run_child
from runtimes.system.device import Device
from runtimes.system.process_memory import peak_rss_bytes, reset_peak

VERSION = 2  # raised whenever the same key would mean other figures
MEASURED_FILE = "measured.json"
MOST_ROWS = 16
ENOUGH_BYTES, ENOUGH_SECONDS = 32_000_000, 20.0


def memory_model(bundle: Bundle, options: SessionOptions) -> MemoryModel:
    """The model of a bundle on this machine: left by an earlier call, or measured now by a few calls elsewhere.

    Raises:
        InputError: another device than the CPU, whose memory is not this process's.
        UnavailableError: the measurement failed.
    """
    if options.device.kind != "cpu":
        raise InputError(f"a memory budget counts this process's memory, not that of {options.device}",
                         where="memory budget", fix="leave it out; where memory runs out, batches become smaller")
    key = digest_of([VERSION, bundle.manifest.digest, asdict(options), os.cpu_count(), platform.platform()])
    file = cache_home() / "memory" / f"{key}.json"
    if use(file):
        with suppress(BundleError):
            return MemoryModel(**read_object(file))
    with tempfile.TemporaryDirectory(prefix="ldm-memory-") as folder:
        request, log = Path(folder) / "request.json", Path(folder) / "log"
        request.write_text(json.dumps({"bundle": str(bundle.path.resolve()), **asdict(options)}), encoding="utf-8")
        if run_child("runtimes.pipeline.memory_measurement", request, log):
            raise UnavailableError(f"its memory could not be measured: {last_words(log)}", where=str(bundle.path),
                                   fix="generate without a memory budget")
        model = fit(read_object(request.with_name(MEASURED_FILE)))
    with replacing(file) as partial:
        partial.write_text(json.dumps(asdict(model)), encoding="utf-8")
    return model


def measure(sessions: Mapping[str, Session], roles: Roles) -> dict[str, Any]:
    """Growth of the peak by calls of growing size; what `fit` takes. The sessions are loaded and have not run.

    A component's calls grow until what they add to the first stands out, or take too long.
    """
    result: dict[str, Any] = {"base": _peak_now()}
    enough = max(ENOUGH_BYTES, result["base"] / 5)
    components = {DENOISER: roles.denoiser.component, DECODER: roles.codec.decoder.component}
    for name, session in ((name, sessions[component]) for name, component in components.items()):
        before, began, result[name] = _peak_now(), time.perf_counter(), []
        for rows, height, width in _ladder(session):
            component = session.component
            sizes = {axis: a.range.opt for axis, a in component.axes.items()}
            sample = component.inputs[0].shape
            sizes |= dict(zip(map(str, (sample[0], *sample[2:])), (rows, height, width), strict=True))
            feeds = example_feeds(component.inputs, sizes)
            reset_peak()
            for _ in range(2):  # ONNX Runtime plans a shape's memory in its first call and takes it in the second
                session.run(feeds)
            result[name].append([rows, height * width, peak_rss_bytes() - before])
            added = result[name][-1][2] - result[name][0][2]
            if added >= enough or time.perf_counter() - began >= ENOUGH_SECONDS:
                break
    return result


def _peak_now() -> int:
    reset_peak()
    return peak_rss_bytes()


def _ladder(session: Session) -> list[tuple[int, int, int]]:
    """Rows, height and width of the calls to measure, each at least half as large again as the one before."""
    shape, axes, rows = session.component.inputs[0].shape, session.component.axes, row_range(session)

    def sides(dimension: int | str) -> tuple[int, ...]:
        if isinstance(dimension, int):
            return dimension, dimension, dimension
        return axes[dimension].range.min, axes[dimension].range.opt, axes[dimension].range.max

    counts = [n for n in range(rows.min, min(rows.max, MOST_ROWS) + 1) if n == rows.min or n & (n - 1) == 0]
    calls = sorted(((n, h, w) for n in counts for h, w in zip(sides(shape[2]), sides(shape[3]), strict=True)),
                   key=math.prod)
    ladder = calls[:1]
    for call in calls:
        if math.prod(call) >= 1.5 * math.prod(ladder[-1]):
            ladder.append(call)
    return ladder


def main(request: Path) -> None:
    """Load the bundle of a request and write what its calls take."""
    options = read_object(request)
    bundle = Bundle.open(Path(options.pop("bundle")), check_hashes=False)
    options |= {"device": Device(**options["device"]), "lora": tuple(options["lora"]), "keep_graphs": True}
    sessions = BundleSessions(bundle, SessionOptions(**options))
    loaded = {name: sessions[name] for name in needed(bundle.manifest.pipeline)}
    for module in ("PIL.Image", "runtimes.pipeline.diffusion"):  # what a process that generates has in memory besides
        importlib.import_module(module)
    for name in bundle.manifest.pipeline.encoders:
        component = loaded[name].component
        loaded[name].run(example_feeds(component.inputs, {n: axis.range.opt for n, axis in component.axes.items()}))
    request.with_name(MEASURED_FILE).write_text(json.dumps(measure(loaded, bundle.manifest.pipeline)), encoding="utf-8")


if __name__ == "__main__":
    with as_child():
        main(Path(sys.argv[1]))
