"""Reads a finished bundle's folder for the report page, and makes its charts with their axis labels; nothing is run."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.layer_list import LAYERS_FILE
from deploy.report.charts import Axis, Point, Series, chart, legend
from runtimes.bundle.folder import read_object
from runtimes.bundle.manifest import Manifest
from runtimes.errors import BundleError

IMAGE_BYTES = 3_200_000  # of all images of a page: with them it stays below 5 MB
SHOWN_RANGES, SHOWN_LAYERS = 6, 12
PRECISIONS = {"w8a8": "8-bit weights and activations", "w8": "8-bit weights", "w4": "4-bit weights",
              "dynamic": "8 bits, ranges at run time", "float": "not quantized"}


@dataclass(frozen=True)
class Section:
    """One bundle of the page.

    Attributes:
        name: unique among the page's bundles.
        path: its folder.
        manifest: of the bundle.
        metrics: its report/metrics.json; empty if the bundle has no report.
        seconds: for one image, median of `bench`, or None.
    """

    name: str
    path: Path
    manifest: Manifest
    metrics: Mapping[str, Any]
    seconds: float | None = None

    @property
    def parity(self) -> Mapping[str, Any]:
        """The manifest's parity figures, or nothing."""
        return self.manifest.parity or {}

    @property
    def size(self) -> int:
        """Bytes of all networks; files that two components share count once."""
        return sum({n: r.bytes for c in self.manifest.components.values() for n, r in c.files.items()}.values())


Measure = Callable[[Section], float | None]


def read_metrics(folder: Path) -> dict[str, Any]:
    """report/metrics.json of a bundle, or nothing where the report is missing.

    Raises:
        BundleError: it is there and cannot be read.
    """
    file = folder / "report" / "metrics.json"
    return read_object(file) if file.is_file() else {}


def pass_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """What each pass cost and left, in order; bars are relative to the largest size.

    `worst` is the largest relative L2 of a component against PyTorch after the pass, None where the gate did not run.
    Of a pass that was taken from the cache, seconds and memory are those of its own time where they are known.
    """
    costs = manifest.measured.get("passes", [])
    largest = max((c["bytes_out"] for c in costs), default=1) or 1
    rows = []
    for cost in costs:
        errors = cost.get("relative_l2", {})
        worst = max(errors, key=lambda name: errors[name], default=None)
        known = "seconds_without_cache" in cost
        rows.append({**cost, "seconds": cost["seconds_without_cache"] if known else cost["seconds"],
                     "peak_rss_bytes": max((c["peak_rss_bytes"] for c in cost["components"].values()), default=0)
                     if known else cost["peak_rss_bytes"], "known": known, "share": 100 * cost["bytes_out"] / largest,
                     "worst": None if worst is None else {"component": worst, "relative_l2": errors[worst]}})
    return rows


def image_rows(section: Section, budget: int) -> tuple[list[dict[str, Any]], int]:
    """The images that fit into `budget` bytes as data URIs, the worst PSNR first, and how many there are.

    Returns:
        rows in their own order with the URIs `reference` and `bundle`, and what metrics.json says of each.
    """
    files = sorted((section.path / "report" / "images").glob("*-reference.png"))
    stated = section.metrics.get("pictures", [])
    rows = []
    for number, file in enumerate(files):
        about = stated[number] if number < len(stated) else {}
        rows.append({"prompt": "", "scheduler": "", "psnr_db": None, **about, "number": number, "file": file})
    chosen: list[dict[str, Any]] = []
    largest = budget // 4
    for row in sorted(rows, key=lambda r: float("inf") if r["psnr_db"] is None else r["psnr_db"]):
        pair = _data_uris(row.pop("file"), largest)
        spent = sum(map(len, pair))
        if spent > budget:
            continue
        budget -= spent
        chosen.append({**row, "reference": pair[0], "bundle": pair[1]})
    return sorted(chosen, key=lambda r: r["number"]), len(files)


def _data_uris(reference: Path, limit: int) -> tuple[str, str]:
    """An image of the reference and the bundle's; both halved until they take at most `limit` bytes together."""
    from PIL import Image

    files = reference, reference.with_name(reference.name.replace("-reference", "-bundle"))
    try:
        contents = [file.read_bytes() for file in files]
        while sum(map(len, contents)) * 4 / 3 > limit:
            halved = []
            for content in contents:
                with Image.open(io.BytesIO(content)) as image:
                    if min(image.size) < 16:
                        return _uri(contents[0]), _uri(contents[1])
                    stream = io.BytesIO()
                    image.reduce(2).save(stream, format="PNG")
                    halved.append(stream.getvalue())
            contents = halved
    except OSError as error:
        raise BundleError(f"cannot read an image: {error}", where=str(reference), fix="build the bundle again"
                          ) from error
    return _uri(contents[0]), _uri(contents[1])


def _uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def drift_chart(parity: Mapping[str, Any]) -> str:
    """Relative L2 of the latents after each step, a line for each scheduler, logarithmic; empty below two steps."""
    trajectory = parity.get("trajectory", {})
    by_scheduler = trajectory.get("by_scheduler") or {"worst": trajectory.get("relative_l2", [])}
    series = [Series(name, tuple(Point(i + 1, max(value, 1e-12), f"{name}, step {i + 1}: {value:.2e}")
                                 for i, value in enumerate(values)))
              for name, values in by_scheduler.items() if len(values) > 1]
    return legend(series) + chart(series, Axis("step"), Axis("relative L2", log=True))


def layer_maps(section: Section) -> list[dict[str, Any]]:
    """For each quantized component: its layers with their precision, the costliest of them, and how ranges move."""
    found = []
    for name, component in sorted(section.manifest.components.items()):
        summary = component.graph.quantization
        if summary is None:
            continue
        file = section.path / "components" / name / LAYERS_FILE
        content = read_object(file) if file.is_file() else {}
        precisions = content.get("precision_map", {})
        errors = content.get("errors", {})
        found.append({
            "name": name, "recipe": summary.recipe, "counts": summary.layers,
            "layers": [{"name": layer, "precision": precision, "tip": _layer_tip(layer, precision, errors.get(layer))}
                       for layer, precision in precisions.items()],
            "costly": _costly(errors, precisions), "ranges": range_chart(content.get("drift", {})),
        })
    return found


def conversions(manifest: Manifest) -> list[dict[str, Any]]:
    """For each component that computes in 16 bits: how many operators were converted, and why others were not.

    Where weights are only stored in 16 bits, no operator was.
    """
    rows = []
    for name, component in sorted(manifest.components.items()):
        found = component.graph.conversion
        if found is None or not found.converted:
            continue
        left = {reason: sum(types.values()) for reason, types in found.float32.items()}
        rows.append({"name": name, "converted": sum(found.converted.values()), "kept": sum(left.values()),
                     "reasons": ", ".join(f"{reason} {count}" for reason, count in sorted(left.items()))})
    return rows


def _layer_tip(layer: str, precision: str, errors: Mapping[str, float] | None) -> str:
    text = f"{layer}: {PRECISIONS.get(precision, precision)}"
    if errors:
        text += "; alone in " + ", ".join(f"{p} it is predicted to cost {e:.1e}" for p, e in errors.items())
    return text


def _costly(errors: Mapping[str, Mapping[str, float]], precisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The layers whose 8 bits cost the output most, each measured alone, as bars relative to the worst."""
    worst = sorted(((max(e.values(), default=0.0), layer) for layer, e in errors.items()), reverse=True)[:SHOWN_LAYERS]
    return [{"layer": layer, "error": error, "precision": precisions.get(layer, ""),
             "share": 100 * error / (worst[0][0] or 1)} for error, layer in worst]


def range_chart(drift: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """How far the activations of a tensor reach along the schedule, for the tensors that move most.

    Args:
        drift: tensor -> [stratum of the timesteps, low, high]; stratum 0 is nearest to the clean image.
    """
    reach = {name: [(row[0], max(abs(row[1]), abs(row[2]))) for row in rows] for name, rows in drift.items()}
    moving = {name: max(r for _, r in rows) / min(r for _, r in rows) for name, rows in reach.items()
              if len(rows) > 1 and min(r for _, r in rows) > 0}
    names = sorted(moving, key=lambda name: -moving[name])[:SHOWN_RANGES]
    series = [Series(f"{name} ×{moving[name]:.1f}",
                     tuple(Point(stratum, value, f"{name}, tenth {int(stratum) + 1} of the schedule: ±{value:.3g}")
                           for stratum, value in reach[name])) for name in names]
    return legend(series) + chart(series, Axis("timesteps, clean to noise, in tenths"), Axis("largest |activation|",
                                                                                            log=True))


def pareto_charts(sections: Sequence[Section]) -> list[dict[str, str]]:
    """Size, and seconds where `bench` measured them, against accuracy; empty for a single bundle."""
    if len(sections) < 2:
        return []
    accuracies: list[tuple[Axis, Measure]] = [
        (Axis("worst PSNR, dB"), lambda s: s.parity.get("images", {}).get("psnr_db")),
        (Axis("prompt retrieval, %", most=100),
         lambda s: 100 * s.parity["retrieval"]["bundle"] if s.parity.get("retrieval") else None)]
    costs: list[tuple[str, Measure]] = [("size, MB", lambda s: s.size / 1e6),
                                        ("seconds an image", lambda s: s.seconds)]
    found = []
    for cost_label, cost in costs:
        for axis, accuracy in accuracies:
            label = axis.label
            known = [(s, cost(s), accuracy(s)) for s in sections]
            values = [(s, c, a) for s, c, a in known if c is not None and a is not None]
            if len(values) < 2:
                continue
            best = front([(c, a) for _, c, a in values])
            series = [Series(s.name, (Point(c, a, f"{s.name}: {c:.4g} {cost_label.partition(', ')[2] or 's'}, "
                                                  f"{a:.4g} {label.rpartition(', ')[2]}", i in best),))
                      for i, (s, c, a) in enumerate(values)]
            found.append({"title": f"{label} over {cost_label}", "svg": legend(series) + chart(
                series, Axis(cost_label), axis, joined=False)})
    return found


def front(values: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the (cost, accuracy) pairs that no other beats in one without losing in the other."""
    return {i for i, (cost, accuracy) in enumerate(values)
            if not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in values)}
