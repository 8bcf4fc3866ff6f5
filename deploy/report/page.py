"""The report page: one self-contained HTML file about one bundle or several, and what a build leaves in a bundle."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.bundle.manifest import Manifest, to_json
from runtimes.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import numpy as np

    from deploy.report.sections import Section

TEMPLATES = Path(__file__).parents[1] / "templates"
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
    """Write report.html, metrics.json and images/ below `folder`, which is the bundle's own `report`."""
    from deploy.report.sections import Section

    (folder / "images").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        for kind, pixels in (("reference", picture.reference), ("bundle", picture.candidate),
                             ("difference", amplified_difference(picture.reference, picture.candidate))):
            (folder / "images" / f"{i:02d}-{kind}.png").write_bytes(to_png(pixels))
    metrics = {"digest": manifest.digest, "parity": to_json(manifest.parity), "measured": to_json(manifest.measured),
               "pictures": [{"prompt": p.prompt, "scheduler": p.scheduler, "psnr_db": p.psnr_db, "ssim": p.ssim}
                            for p in pictures],
               "components": {n: {"bytes": c.bytes, "parameters": c.parameters, "parity": to_json(c.parity),
                                  "details": to_json(c.details)} for n, c in manifest.components.items()}}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    name = f"{manifest.source.id}, {manifest.target}, {manifest.precision}"
    section = Section(name, folder.parent, manifest, metrics)
    (folder / "report.html").write_text(render([section]), encoding="utf-8")


def report_bundles(paths: Sequence[Path], output: Path, bench: Path | None = None) -> list[str]:
    """Write one page about finished bundles; it is there whole or not at all.

    Args:
        paths: folders that `build` wrote.
        output: HTML file.
        bench: what `bench --json` printed; gives the bundles' seconds, by the folders' names.

    Returns:
        what the page cannot show, one sentence each.

    Raises:
        BundleError: a folder is no bundle, or its report cannot be read.
        InputError: `bench` is not what `bench --json` prints, or the page cannot be written.
        UnavailableError: jinja2 is not installed.
    """
    from deploy.report.sections import Section, read_metrics
    from runtimes.bundle.folder import Bundle, replacing

    bundles = [Bundle.open(path) for path in paths]
    names = [bundle.path.resolve().name for bundle in bundles]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    seconds = read_bench(bench) if bench else {}
    sections = [Section(name, b.path, b.manifest, read_metrics(b.path), seconds.get(name))
                for name, b in zip(names, bundles, strict=True)]
    page = render(sections)
    if output.is_dir():
        raise InputError("it is a folder", where=str(output), fix="name a file: -o report.html")
    with replacing(output) as partial:
        partial.write_text(page, encoding="utf-8")
    missing = [f"{s.name} has no report folder: it was built with --no-verify" for s in sections if not s.metrics]
    return missing + [f"{bench} has no run named {s.name}" for s in sections if bench and s.seconds is None]


def read_bench(file: Path) -> dict[str, float]:
    """Median seconds of a drawing by name, from what `bench --json` printed.

    Raises:
        InputError: it is something else.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {str(run["name"]): float(run["seconds"]["median"]) for run in report["runs"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"not what `bench --json` prints: {error!r}", where=str(file),
                         fix="python -m deploy bench BUNDLE... --json > bench.json") from error


def render(sections: Sequence[Section]) -> str:
    """The page."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise UnavailableError("jinja2 is not installed", where="report",
                               fix="pip install 'ldm-deploy[build]'") from error
    from deploy.report.sections import PICTURE_BYTES, PRECISIONS, pareto_charts

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mb"] = lambda size: f"{size / 1e6:.1f}\N{NO-BREAK SPACE}MB"
    environment.filters["svg"] = Markup  # deploy.report.charts has escaped what is in it
    return environment.get_template("report.html.j2").render(
        sections=[_laid_out(s, PICTURE_BYTES // len(sections)) for s in sections], pareto=pareto_charts(sections),
        amplification=AMPLIFICATION, words=PRECISIONS)


def _laid_out(section: Section, picture_bytes: int) -> Mapping[str, Any]:
    """What the template shows of one bundle."""
    from deploy.parity.upstream.levels import in_words
    from deploy.report.sections import conversions, drift_chart, layer_maps, pass_rows, picture_rows

    manifest = section.manifest
    command, spec = reproduction(manifest)
    pictures, count = picture_rows(section, picture_bytes)
    parity = {"images": None, "retrieval": None, **section.parity}
    if not (parity["images"] or {}).get("count"):
        parity["images"] = None  # components alone were compared
    return {"name": section.name, "manifest": manifest, "parity": parity, "size": section.size,
            "seconds": section.seconds, "reported": bool(section.metrics), "passes": pass_rows(manifest),
            "unverified": grouped(section.parity.get("unverified", [])), "drift": drift_chart(section.parity),
            "compared": section.parity.get("compared", {}).get("text", ""),
            "diffusers": in_words(section.parity.get("upstream", {})), "layers": layer_maps(section),
            "conversions": conversions(manifest), "pictures": pictures, "picture_count": count, "command": command,
            "spec": spec}


def reproduction(manifest: Manifest) -> tuple[str, str]:
    """The command that makes this bundle again, and its build spec as YAML where that says more than the command."""
    import yaml

    from deploy.core.spec import REFERENCE, BuildSpec

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
