"""Everything that is printed: rich tables and progress on a terminal, plain lines elsewhere.

A string is printed as it is: brackets and colons in it are no markup. What has a style is a `Text`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from deploy.cli import progress_display
from deploy.core.layer_list import LAYERS_FILE
from deploy.parity.upstream.levels import in_words
from deploy.report.page import grouped
from deploy.report.sections import pass_rows
from runtimes.bundle.details import EngineDetails

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploy.building.builder import Outcome
    from deploy.building.verify import Verification
    from deploy.core.plan import PlannedPass
    from deploy.core.spec import BuildSpec
    from deploy.diagnose.checks import Diagnosis
    from runtimes.bundle.folder import Bundle
    from runtimes.bundle.manifest import Component, Manifest
    from runtimes.errors import DeployError
    from runtimes.inputs.quality_presets import Measured
    from runtimes.pipeline.job import Step
    from runtimes.system.progress import Listener

out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def megabytes(size: float) -> str:
    """1 MB = 10^6 bytes."""
    return f"{size / 1e6:.1f} MB"


def print_json(value: Any) -> None:
    """The one object of `--json`, nothing else on standard output."""
    out.print_json(json.dumps(value, ensure_ascii=False)) if out.is_terminal else out.out(
        json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """A line about what is being done, on standard error."""
    err.print(Text(text, "dim"))


def shown_progress() -> AbstractContextManager[Listener]:
    """Within the block, what library code reports is shown on standard error."""
    return progress_display.shown_progress(err)


def show_error(error: DeployError) -> None:
    """One line: what, where, and what to do."""
    place = f"{error.where}: " if error.where else ""
    err.print(Text.assemble(("error:", "bold red"), f" {place}{error.what}",
                            (f" — {error.fix}" if error.fix else "", "dim")))


class StepProgress:
    """Denoising steps as a bar; keeps the latents of the last step, (B, C, H/f, W/f) float32."""

    latents: NDArray[np.float32]

    def __init__(self, steps: int) -> None:
        self._bars = Progress(TextColumn("generating"), BarColumn(30), TextColumn("{task.completed}/{task.total}"),
                              console=err, transient=True, disable=not err.is_terminal)
        self._task = self._bars.add_task("", total=steps)

    def __enter__(self) -> StepProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def on_step(self, step: Step) -> None:
        """Hook for `Pipeline(..., on_step=)`."""
        self.latents = step.latents
        self._bars.update(self._task, completed=step.index + 1, total=step.total)


def show_plan(planned: Sequence[PlannedPass], spec: BuildSpec, output: Path | None) -> None:
    """The whole build before any work."""
    from deploy.core.plan import Skip, Step

    table = Table("pass", "what it will do", "components", title="dry run: nothing is written")
    for entry in planned:
        if isinstance(entry.planned, Step):
            table.add_row(entry.instance.name, entry.planned.summary, ", ".join(entry.planned.reads))
        elif isinstance(entry.planned, Skip):
            table.add_row(entry.instance.name, f"skipped: {entry.planned.reason}", style="dim")
        else:
            table.add_row(entry.instance.name, f"unavailable: {entry.planned.what}", style="red")
    out.print(table)
    out.print(f"target {spec.target}, precision {spec.precision}, verify {spec.verify}, output {output or 'build/…'}")


def show_pruned(components: Mapping[str, Component], folder: Path) -> None:
    """What `prune` made of each network, where they lie."""
    for name, component in components.items():
        pruning, found = component.details.pruning, component.details.recovery
        assert pruning is not None
        before, channels = pruning.parameters_before, pruning.channels
        out.print(f"{name}: {component.parameters / 1e6:.1f} of {before / 1e6:.1f} million weights")
        if channels:
            widths = (" ".join(map(str, level)) for level in (channels.before, channels.remaining))
            out.print("channels per level: " + " -> ".join(widths))
        if found:
            out.print(f"relative L2 of a call {found.relative_l2_before:.3f} -> {found.relative_l2_after:.3f}")
    out.print(f"written: {folder}")


def show_outcome(outcome: Outcome) -> None:
    """What `build` made, where it lies."""
    if outcome.up_to_date:
        out.print(Text.assemble(("up to date", "green"), f" {outcome.bundle.path}"))
    else:
        show_bundle(outcome.bundle)
    for note in outcome.bundle.manifest.measured.get("notes", ()):
        out.print(f"note: {note}", markup=False)
    report = outcome.bundle.path / "report" / "report.html"
    if report.is_file():
        out.print(f"report: {report}")


def _sizes(manifest: Manifest) -> str:
    """The sides that a bundle makes, and the size of each usual aspect ratio."""
    from runtimes.backends.batching import Listed
    from runtimes.inputs.aspect_ratios import BUCKETS, nearest_size, parse_aspect
    from runtimes.inputs.resolved_request import pixel_limits

    roles, parts = manifest.pipeline, {name: Listed(name, c) for name, c in manifest.components.items()}
    height, width = (pixel_limits(roles, parts, name) for name in ("height", "width"))
    sides = " and ".join(f"{name} {span.min} to {span.max} in steps of {multiple}"
                         for name, (span, multiple) in (("height", height), ("width", width)))
    pixels = roles.codec.height * roles.codec.width
    found = {name: nearest_size(parse_aspect(name), pixels, height, width) for name in BUCKETS}
    return f"pixels: {sides}; --aspect {', '.join(f'{name} {w}x{h}' for name, (h, w) in found.items())}"


def show_bundle(bundle: Bundle) -> None:
    """Components, passes, parity."""
    manifest = bundle.manifest
    size = sum(r.bytes for r in manifest.all_files().values())
    out.print(Text.assemble((str(bundle.path), "bold"), f"  {manifest.family} from {manifest.source.id}, target "
                            f"{manifest.target}, {manifest.precision}, {megabytes(size)}"))
    out.print(f"digest {manifest.digest}")
    table = Table("component", "format", "precision", "parameters", "size", "relative L2")
    for name, c in sorted(manifest.components.items()):
        parity = _figure(c.parity["relative_l2"], ".1e") if c.parity else Text("not verified", "bold red")
        table.add_row(name, c.format, c.precision, f"{c.parameters / 1e6:.2f} M", megabytes(c.bytes), parity)
    out.print(table)
    for name, c in sorted(manifest.components.items()):
        if c.graph.not_fp16:
            out.print(f"  {name} stays in {c.precision}: in float16, {c.graph.not_fp16}")
    _show_engines(manifest)
    if {manifest.pipeline.denoiser.component, manifest.pipeline.codec.decoder.component} <= manifest.components.keys():
        out.print(_sizes(manifest))
    for name, c in sorted(manifest.components.items()):
        flow = f"{', '.join(_tensor(t) for t in c.inputs)} -> {', '.join(_tensor(t) for t in c.outputs)}"
        out.print(f"  {name}: {flow}")
    axes = {n: a for c in manifest.components.values() for n, a in c.axes.items()}
    ranges: dict[str, list[str]] = {}
    for name, c in sorted(manifest.components.items()):
        for axis, a in c.axes.items():
            text = f"{a.range.min}:{a.range.opt}:{a.range.max}" + (f" step {a.multiple}" if a.multiple > 1 else "")
            ranges.setdefault(f"{axis} {text} ({axes[axis].meaning})", []).append(name)
    for text, names in ranges.items():
        out.print(f"  axis {text}: {', '.join(names)}")
    costs = {p["name"]: p for p in pass_rows(manifest)}
    for record in manifest.passes:
        cost = costs.get(record.name)
        spent = f"{cost['seconds']:.1f} s, peak {megabytes(cost['peak_rss_bytes'])}" if cost else ""
        out.print(f"  pass {record.name} v{record.version}  {spent}")
        for name, gain in sorted((cost or {}).get("gain", {}).items()):
            seconds = f", {gain['seconds_ratio']:.2f}x the time" if "seconds_ratio" in gain else ""
            out.print(f"    {name}: {gain['verdict']}: {gain['bytes_ratio']:.2f}x the bytes{seconds} on this machine")
    _show_candidates(manifest.measured.get("prune_candidates", []))
    show_search(bundle)
    if not manifest.verified:
        out.print(Text("NOT VERIFIED: built with --no-verify; nothing says that it equals the source", "bold red"))
    elif manifest.parity:
        show_parity(manifest.parity)


def _show_candidates(tried: Sequence[Mapping[str, Any]]) -> None:
    """The shares of channels that were tried."""
    if not tried:
        return
    table = Table("channels removed", "size", "MMACs", "ms a call", "final latents L2", "worst PSNR", "retrieval",
                  "budget", title="U-Nets that were tried; the last one is this bundle's")
    for one in tried:
        table.add_row(f"{one['prune']:.0%}", megabytes(one["bytes"]), f"{one['macs'] / 1e6:.0f}",
                      _figure(one["seconds"] and one["seconds"] * 1e3, ".1f"),
                      _figure(one["trajectory_relative_l2"], ".3f"), _figure(one["psnr_db"], ".1f"),
                      _figure(one["retrieval"], ".1%"),
                      one["broken"] or ("met" if one["psnr_db"] is not None else "not verified"))
    out.print(table)


def show_search(bundle: Bundle) -> None:
    """The Pareto front of `--precision auto`, and what its layers became."""
    denoiser = bundle.manifest.pipeline.denoiser.component
    file = bundle.path / "components" / denoiser / LAYERS_FILE
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "front" not in found:
        return
    summary = bundle.component(denoiser).graph.quantization
    chosen = summary.chosen if summary else ""
    table = Table("trial", "U-Net", "time, x float32", "final latents L2", "worst PSNR", "SSIM", "retrieval", "budget",
                  title="Pareto front of the search")
    for trial in found["front"]:
        name = Text(f"{trial['name']} (chosen)", "bold") if trial["name"] == chosen else trial["name"]
        table.add_row(name, megabytes(trial["bytes"]), _figure(trial.get("time_ratio"), ".2f"),
                      _figure(trial["trajectory_relative_l2"], ".3f"), _figure(trial["psnr_db"], ".1f"),
                      _figure(trial["ssim"], ".3f"), _figure(trial["retrieval"], ".1%"),
                      "met" if trial["holds"] else "broken")
    out.print(table)
    layers: dict[str, list[str]] = {}
    for node, precision in found["precision_map"].items():
        layers.setdefault(precision, []).append(node)
    for precision, nodes in sorted(layers.items()):
        worst = sorted(nodes, key=lambda node: -max(found["errors"].get(node, {}).values(), default=0.0))[:3]
        shown = ", ".join(f"{node} ({max(found['errors'].get(node, {}).values(), default=0.0):.2g})" for node in worst)
        out.print(f"  {len(nodes)} layers {precision}; most error in integers, predicted: {shown}")


def _show_engines(manifest: Manifest) -> None:
    """Builder and GPUs of the engines, once for all that share them, and that nothing here has executed them."""
    engines: dict[tuple[str, ...], list[str]] = {}
    for name, c in sorted(manifest.components.items()):
        if not isinstance(d := c.details, EngineDetails):
            continue
        where = ", ".join(d.compute_capabilities) or d.gpu
        lines = [f"{d.builder} {d.builder_version} for {where}"]
        lines += [f"without {gpu}: {why}" for gpu, why in d.refused_capabilities.items()]
        lines += [] if d.executed else [f"engine not executed here: {d.not_executed}"]
        engines.setdefault(tuple(lines), []).append(name)
        if q := d.quantizers:
            placed = ", ".join(f"{count} of {op}" for op, count in q.inputs.items())
            fused = Text(f"no fusion of {', '.join(q.broken_attentions)}", "red") if q.broken_attentions else (
                "in none of them")
            out.print(Text.assemble(f"  Q/DQ in {name}: inputs {placed}; {q.attentions} attention blocks, ", fused))
    for (first, *more), names in engines.items():
        out.print(f"  engine {', '.join(names)}: {first}")
        for line in more:
            out.print(Text(f"    {line}", "yellow"))


def show_parity(parity: Mapping[str, Any]) -> None:
    """The figures of a verification, in the shape of `verify --json`."""
    if (compared := parity.get("compared")) and compared["level"] != "full":
        out.print(Text(f"  compared: {compared['text']}", "yellow"))
    for level, text, missing in in_words(parity.get("upstream", {})):
        out.print(f"  {level}: {text}")
        if missing:
            out.print(Text(f"  {level} unverified: {missing}", "yellow"))
    images, drift = parity.get("images"), parity.get("trajectory", {}).get("relative_l2")
    if drift:
        first, last = _figure(drift[0], ".1e"), _figure(drift[-1], ".1e")
        out.print(f"  trajectory: relative L2 {first} after the first step, {last} after the last")
    if images and images["count"]:
        psnr, ssim = _figure(images["psnr_db"], ".1f"), _figure(images["ssim"], ".4f")
        out.print(f"  images: PSNR >= {psnr} dB, SSIM >= {ssim} over {images['count']}")
    if retrieval := parity.get("retrieval"):
        out.print(f"  retrieval: {retrieval['bundle']:.1%}, reference {retrieval['reference']:.1%}")
    for reason in grouped(parity.get("unverified", [])):
        out.print(Text(f"  unverified: {reason}", "yellow"))


def show_verification(result: Verification) -> None:
    """What `verify` found."""
    value = result.to_json()
    table = Table("component", "max abs", "relative L2", "cosine", "non-finite", "shapes")
    for name, c in value["components"].items():
        figures = (_figure(c["max_abs"], ".2e"), _figure(c["relative_l2"], ".2e"), _figure(c["cosine"], ".8f"))
        table.add_row(name, *figures, str(c["nonfinite"]),
                      " ".join("x".join(map(str, s)) for s in c["shapes"]))
    out.print(table)
    show_parity(value)
    out.print(Text("ok", "bold green") if result.ok else Text("budget broken", "bold red") if result.broken else
              Text("not everything could be verified here; what could is within the budget", "bold yellow"))


def show_diagnosis(found: Diagnosis) -> None:
    """The four checks: what each found, and what to do."""
    table = Table("check", "", "found", "what to do")
    for check in found.checks:
        mark = Text("ok", "bold green") if check.ok else Text("wrong", "bold red")
        table.add_row(check.name, mark, check.verdict, check.advice)
    out.print(table)
    out.print(Text("every figure: --json", "dim"))


def show_repository(folder: Path, models: Sequence[str]) -> None:
    """Where the model repository is, and what it holds."""
    out.print(f"{folder}: {', '.join(models)}")


def show_findings(findings: Mapping[str, Any]) -> None:
    """What `doctor` found."""
    machine = findings["machine"]
    out.print(f"{machine['processor']}, {machine['cores']} cores, {megabytes(machine['memory_bytes'])} memory, "
              f"{' '.join(machine.get('instructions', []))}")
    for section in ("build", "run"):
        table = Table(section, "", "detail", "what to do")
        for name, f in findings[section].items():
            there = Text("yes", "green") if f["available"] else Text("no", "red")
            table.add_row(name, there, f["detail"], f["fix"])
        out.print(table)
    out.print(f"GPU: {findings['gpu']['detail']}")


def show_cache(found: Mapping[str, Any]) -> None:
    """What lies in the cache, and its limit."""
    table = Table("", "what it is", "entries", "size", "last used")
    for kind, of in found["kinds"].items():
        table.add_row(kind, of["about"], str(of["entries"]), megabytes(of["bytes"]),
                      f"{of['used_seconds_ago'] / 3600:.1f} h ago")
    out.print(table)
    out.print(f"{found['root']}: {megabytes(found['bytes'])}, limit {megabytes(found['limit_bytes'])}"
              f"{'; a build is running, what it uses stays' if found['live'] else ''}")


def show_trimmed(found: Mapping[str, Any]) -> None:
    """What `cache trim` and `cache clear` did."""
    out.print(f"{found['root']}: {megabytes(found['before_bytes'])} before, {megabytes(found['bytes'])} now; removed "
              f"{found['removed']} entries")
    if found["bytes"] > found["limit_bytes"]:
        out.print(Text("more than the limit: the rest is in use by a running build", "yellow"))


def show_generated(files: Sequence[Path], *, count: int, load_seconds: float, generate_seconds: float,
                   peak_rss_bytes: int) -> None:
    """Where the images are and what they cost."""
    names = str(files[0]) if len(files) == 1 else f"{files[0]} … {files[-1]}"
    out.print(f"{names}: {count} image{'s' if count > 1 else ''} in {generate_seconds:.2f} s, "
              f"loaded in {load_seconds:.2f} s, peak memory {megabytes(peak_rss_bytes)}")


def show_tradeoffs(measured: Sequence[Measured], file: Path) -> None:
    """Every setting with its time and accuracy, the front and the presets."""
    from runtimes.inputs import quality_presets as presets

    best = presets.front(measured)
    names = {quality: presets.preset(quality, measured) for quality in presets.QUALITIES}
    table = Table(title="one image; PSNR to 50 steps of the bundle's own sampler; * on the Pareto front",
                  box=box.SIMPLE_HEAD, padding=0)
    for title in ("steps", "sampler", "guided", "cache", "ms", "×", "dB", "found", "preset"):
        table.add_column(title, no_wrap=True)
    slowest = max(m.milliseconds for m in measured)
    for m in sorted(measured, key=lambda m: m.milliseconds):
        chosen = [quality for quality, found in names.items() if found is m]
        first, last = m.setting.guidance_interval
        table.add_row(str(m.setting.steps), m.setting.scheduler or "own", f"{first:g}–{last:g}",
                      str(m.setting.cache_interval), f"{m.milliseconds:.1f}", f"{slowest / m.milliseconds:.2f}",
                      f"{m.psnr_db:.1f}", _figure(m.retrieval, ".1%"), ", ".join(["*"] * (m in best) + chosen))
    out.print(table)
    out.print(f"saved in {file} for generate --quality and --budget-ms")


def _figure(value: float | None, form: str) -> str:
    """A figure, or what stands for one that is not finite or was not computed."""
    return "-" if value is None else format(value, form)


def _tensor(spec: Any) -> str:
    return f"{spec.name}({', '.join(map(str, spec.shape))})"
