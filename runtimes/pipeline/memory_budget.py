"""How much memory a bundle's calls take on this machine: measured in a process of its own, and a model fitted to that.

    peak = base + sum over U-Net and decoder of (c + b * rows * area + q * rows * area^2)

rows of one call, area in latents; q is what attention costs where a backend holds its matrices. The process is
`python -m runtimes.pipeline.memory_budget REQUEST.json`, which leaves what it measured beside the request.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends.batching import row_range
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle, read_object, replacing
from runtimes.bundle.manifest import digest_of
from runtimes.bundle.tensors import example_feeds
from runtimes.errors import BundleError, InputError, UnavailableError
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use
from runtimes.system.child_process import die_with_parent, last_words, run_child
from runtimes.system.process_memory import peak_rss_bytes, reset_peak

VERSION = 1  # raised whenever the same key would mean other figures
MEASURED, MEASURED_FILE = ("unet", "vae_decoder"), "measured.json"
MOST_ROWS = 16
ENOUGH_BYTES, ENOUGH_SECONDS = 32_000_000, 20.0
NOISE_BYTES = 1_000_000
MARGIN = 1.1  # of what is drawn with, above what is loaded: the least error seen in repeated runs is a few percent
PICTURE_BYTES = 2 * 3 * 4  # for each pixel: float32 RGB, once more while it is converted


@dataclass(frozen=True)
class MemoryModel:
    """Peak resident memory of a process that draws.

    Attributes:
        base_bytes: with everything loaded and nothing drawn.
        costs: component -> c, b and q of the formula above, in bytes.
    """

    base_bytes: float
    costs: Mapping[str, Sequence[float]]

    def peak_bytes(self, calls: Sequence[Mapping[str, int]], area: int) -> float:
        """What calls of so many rows of each component, at so many latents a row, take together."""
        return self.base_bytes + MARGIN * sum(
            max(float(np.dot(self.costs[name], _features(count, area))), 0.0)
            for rows in calls for name, count in rows.items())


@dataclass(frozen=True)
class MemoryBudget:
    """How many images share a call, so that the process stays below so many bytes."""

    bytes: int
    model: MemoryModel

    def images_at_once(self, count: int, copies: int, area: int, pixels: int) -> int:
        """The most of `count` images that fit.

        Args:
            count: images of the request.
            copies: U-Net rows for each, 2 under guidance.
            area: latents of one row.
            pixels: of all images together.

        Raises:
            InputError: not even one fits.
        """
        for images in range(count, 0, -1):
            parts = -(-count // images)
            # A backend keeps memory for every shape it has met, and calls may differ by one image.
            needed = PICTURE_BYTES * pixels + self.model.peak_bytes(
                [{"unet": copies * n, "vae_decoder": n} for n in {count // parts, -(-count // parts)}], area)
            if needed <= self.bytes:
                return images
        raise InputError(f"one picture at a time needs about {needed / 1e6:.0f} MB, the budget is "
                         f"{self.bytes / 1e6:.0f} MB", where="memory budget",
                         fix="draw in smaller tiles, a smaller picture, or raise the budget")


def memory_model(bundle: Bundle, options: SessionOptions) -> MemoryModel:
    """The model of a bundle on this machine: kept from an earlier call, or measured now by a few calls elsewhere.

    Raises:
        InputError: another device than the CPU, whose memory is not this process's.
        UnavailableError: the measurement failed.
    """
    if options.device.lower() != "cpu":
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
        if run_child("runtimes.pipeline.memory_budget", request, log):
            raise UnavailableError(f"its memory could not be measured: {last_words(log)}", where=str(bundle.path),
                                   fix="draw without a memory budget")
        model = fit(read_object(request.with_name(MEASURED_FILE)))
    with replacing(file) as partial:
        partial.write_text(json.dumps(asdict(model)), encoding="utf-8")
    return model


def fit(measured: Mapping[str, Any]) -> MemoryModel:
    """Least squares for each component; more rows or latents never cost less.

    Args:
        measured: `base` in bytes, and of each component a list of [rows, area, growth in bytes].
    """
    costs = {}
    for name in MEASURED:
        points = np.array(measured[name], np.float64)
        # The smallest calls fit into what loading has freed: they say nothing of what more costs.
        told = points[points[:, 2] > points[0, 2] + NOISE_BYTES] if len(points) > 1 else points
        told = told if len(told) > 1 else points[-2:]
        costs[name] = _fitted(np.array([_features(rows, area) for rows, area, _ in told]), told[:, 2])
    return MemoryModel(measured["base"], costs)


def measure(sessions: Mapping[str, Session]) -> dict[str, Any]:
    """Growth of the peak by calls of growing size; what `fit` takes. The sessions are loaded and have not run.

    A component's calls grow until what they add to the first stands out, or take too long.
    """
    result: dict[str, Any] = {"base": _peak_now()}
    enough = max(ENOUGH_BYTES, result["base"] / 5)
    for name in MEASURED:
        before, began, result[name] = _peak_now(), time.perf_counter(), []
        for rows, height, width in _ladder(sessions[name]):
            component = sessions[name].component
            sizes = {axis: a.range.opt for axis, a in component.axes.items()}
            sample = component.inputs[0].shape
            sizes |= dict(zip(map(str, (sample[0], *sample[2:])), (rows, height, width), strict=True))
            feeds = example_feeds(component.inputs, sizes)
            reset_peak()
            for _ in range(2):  # ONNX Runtime plans a shape's memory in its first call and takes it in the second
                sessions[name].run(feeds)
            result[name].append([rows, height * width, peak_rss_bytes() - before])
            added = result[name][-1][2] - result[name][0][2]
            if added >= enough or time.perf_counter() - began >= ENOUGH_SECONDS:
                break
    return result


def _peak_now() -> int:
    reset_peak()
    return peak_rss_bytes()


def _features(rows: float, area: float) -> tuple[float, float, float]:
    return 1.0, rows * area, rows * area * area


def _fitted(features: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> list[float]:
    """c, b and q: the best fit whose b and q are not below zero, by both of them, by either, or by c alone."""
    scale = features.max(axis=0)
    best, least = [float(wanted.max()), 0.0, 0.0], float(np.sum((wanted - wanted.max()) ** 2))
    for columns in ((0, 1), (0, 2), (0, 1, 2)):
        chosen = (features / scale)[:, columns]
        found = np.linalg.lstsq(chosen, wanted, rcond=None)[0]
        error = float(np.sum((chosen @ found - wanted) ** 2))
        # q is for growth that a straight line does not explain: its guesses reach far beyond what was measured.
        if len(columns) <= len(wanted) and (found[1:] >= 0).all() and error < least * (0.5 if 2 in columns else 1):
            least, best = error, [0.0, 0.0, 0.0]
            for column, value in zip(columns, found, strict=True):
                best[column] = float(value / scale[column])
    return best


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


def main() -> None:
    """Load the bundle of a request and write what its calls take."""
    from runtimes.pipeline.loading import BundleSessions, needed

    die_with_parent()
    request = Path(sys.argv[1])
    options = read_object(request)
    bundle = Bundle.open(Path(options.pop("bundle")), check_hashes=False)
    options |= {"lora": tuple(options["lora"]), "keep_graphs": True}
    sessions = BundleSessions(bundle, SessionOptions(**options))
    loaded = {name: sessions[name] for name in needed(bundle.manifest.pipeline)}
    for module in ("PIL.Image", "runtimes.pipeline.diffusion"):  # what a process that draws has in memory besides
        importlib.import_module(module)
    for name in bundle.manifest.pipeline.text_encoders:
        component = loaded[name].component
        loaded[name].run(example_feeds(component.inputs, {n: axis.range.opt for n, axis in component.axes.items()}))
    request.with_name(MEASURED_FILE).write_text(json.dumps(measure(loaded)), encoding="utf-8")


if __name__ == "__main__":
    main()
