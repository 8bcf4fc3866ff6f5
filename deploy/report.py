"""The report page of a bundle: one self-contained HTML file, the pictures beside it, and the figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.manifest import Manifest, to_json

if TYPE_CHECKING:
    import numpy as np

TEMPLATES = Path(__file__).parent / "templates"
AMPLIFICATION = 10  # differences of a good bundle are below one grey level: shown as they are, they are black


@dataclass(frozen=True)
class Picture:
    """One prompt drawn by the reference and by the bundle, both (H, W, 3) uint8."""

    prompt: str
    scheduler: str
    reference: np.ndarray[Any, Any]
    candidate: np.ndarray[Any, Any]
    psnr_db: float
    ssim: float


def write_report(folder: Path, manifest: Manifest, pictures: Sequence[Picture]) -> None:
    """Write report.html, metrics.json and images/ below `folder`."""
    import jinja2

    (folder / "images").mkdir(parents=True)
    rows = []
    for i, picture in enumerate(pictures):
        row: dict[str, Any] = {"prompt": picture.prompt, "scheduler": picture.scheduler, "psnr_db": picture.psnr_db}
        for kind, pixels in (("reference", picture.reference), ("bundle", picture.candidate),
                             ("difference", amplified_difference(picture.reference, picture.candidate))):
            png = to_png(pixels)
            (folder / "images" / f"{i:02d}-{kind}.png").write_bytes(png)
            row[kind] = "data:image/png;base64," + base64.b64encode(png).decode()
        rows.append(row)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters["mb"] = lambda size: f"{size / 1e6:.1f} MB"
    parity = manifest.parity or {}
    command, spec = reproduction(manifest)
    page = environment.get_template("report.html.j2").render(
        manifest=manifest, parity=parity, pictures=rows, amplification=AMPLIFICATION,
        unverified=grouped(parity.get("unverified", [])), passes=pass_rows(manifest),
        drift=drift_path(parity.get("trajectory", {}).get("relative_l2", [])),
        total_bytes=sum(c.bytes for c in manifest.components.values()),
        command=command, spec=spec,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    figures = {"digest": manifest.digest, "parity": to_json(manifest.parity), "measured": to_json(manifest.measured),
               "components": {n: {"bytes": c.bytes, "parameters": c.parameters, "parity": to_json(c.parity),
                                  "details": to_json(c.details)} for n, c in manifest.components.items()}}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def reproduction(manifest: Manifest) -> tuple[str, str]:
    """The command that makes this bundle again, and its build spec as YAML where that says more than the command."""
    import yaml

    from deploy.spec import REFERENCE, BuildSpec

    usual = BuildSpec.model_validate({"target": manifest.target, "precision": manifest.precision}).resolved()
    changed = {name: value for name, value in manifest.spec.items() if usual.get(name) != value}
    model = "" if manifest.source.id == REFERENCE else f"{manifest.source.id} "
    command = f"python -m deploy build {model}--target {manifest.target} --precision {manifest.precision}"
    return (f"{command} --spec build.yaml", yaml.safe_dump(changed, sort_keys=True)) if changed else (command, "")


def grouped(reasons: Sequence[str]) -> list[str]:
    """`a: why` and `b: why` as `a, b: why`."""
    names: dict[str, list[str]] = {}
    for reason in reasons:
        name, _, why = reason.partition(": ")
        names.setdefault(why, []).append(name)
    return [f"{', '.join(who)}: {why}" for why, who in names.items()]


def pass_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """What each pass cost and left, in order; bars are relative to the largest size."""
    costs = manifest.measured.get("passes", [])
    largest = max((c["bytes_out"] for c in costs), default=1)
    return [{**c, "share": 100 * c["bytes_out"] / largest} for c in costs]


def drift_path(values: Sequence[float]) -> dict[str, Any] | None:
    """Points of the drift curve on a logarithmic scale, for an inline SVG of 600x160."""
    import math

    if len(values) < 2:
        return None
    logs = [math.log10(max(v, 1e-12)) for v in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high += high == low
    points = [(20 + 560 * i / (len(logs) - 1), 140 - 120 * (v - low) / (high - low)) for i, v in enumerate(logs)]
    return {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points), "low": low, "high": high,
            "dots": [{"x": x, "y": y, "step": i + 1, "value": f"{values[i]:.2e}"} for i, (x, y) in enumerate(points)]}


def amplified_difference(reference: np.ndarray[Any, Any], candidate: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """|reference - candidate| times AMPLIFICATION, (H, W, 3) uint8."""
    import numpy as np

    difference = np.abs(reference.astype(np.int32) - candidate.astype(np.int32))
    amplified: np.ndarray[Any, Any] = np.minimum(difference * AMPLIFICATION, 255).astype(np.uint8)
    return amplified


def to_png(pixels: np.ndarray[Any, Any]) -> bytes:
    """(H, W, 3) uint8 as PNG bytes."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
