"""Runs a build: lays out the passes, runs or reuses each component, gates the result, commits one folder."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.building.batch_invariance import measure_batches
from deploy.building.gate import Gate
from deploy.core.isolation import is_large, run_isolated
from deploy.core.pass_cache import Cache, assemble, key_of, versions_of
from deploy.core.pass_costs import measured
from deploy.core.plan import Pass, PlannedPass, Step, Unavailable, load_passes, plan_all, structure
from deploy.core.spec import LOCAL_FILES, BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.passes import PASSES
from runtimes.bundle.folder import (
    Bundle,
    check_output,
    committed,
    link_or_copy,
    records_below,
    translated_disk_errors,
    write_manifest,
)
from runtimes.bundle.manifest import Component, Manifest, digest_of, to_json
from runtimes.errors import BundleError, DeployError, ParityError
from runtimes.system.cache_root import cache_home, rooted
from runtimes.system.cache_store import WORK, asked_limit_bytes, keep_within_limit, scratch
from runtimes.system.progress import listener


@dataclass(frozen=True)
class Outcome:
    """What a build made; `up_to_date` if the output already was this very build."""

    bundle: Bundle
    up_to_date: bool


def default_output(spec: BuildSpec, origin: Bundle) -> Path:
    """`build/<model>-<target>-<precision>`."""
    return Path("build") / f"{Path(origin.manifest.source.id).name}-{spec.target}-{spec.precision}"


def build_decided(spec: BuildSpec, output: Path | None = None, *, found: Mapping[str, Any] | None = None) -> Outcome:
    """Build a bundle of a spec that leaves nothing to choose; `deploy.building.run_build.run_build` makes it one.

    Args:
        spec, output: as of `run_build`.
        found: what choosing the spec measured, for the manifest's `measured`.

    Raises:
        InputError: bad model, spec or output (nothing is written).
        ParityError: a pass broke the accuracy budget; the message names pass, component and shape.
        UnavailableError: this machine lacks something.
    """
    listener().working("reading the model")
    origin = open_origin(spec)
    target = output or default_output(spec, origin)
    check_output(target)
    planned = plan_all(load_passes(PASSES), origin.manifest, spec)
    for entry in planned:
        if isinstance(entry.planned, Unavailable):
            entry.planned.raise_error()
    key = build_key(spec, origin, planned)
    if (done := find_finished(target, key)) is not None:
        return Outcome(done, up_to_date=True)
    cache = Cache(cache_home())
    with translated_disk_errors(cache.root), rooted(cache.root):
        cache.drop_leftovers()
        with workspace(cache.root) as work:
            result, gate = run_passes(spec, origin, planned, cache, work)
            parity = gate.check_pipeline()
            manifest = replace(result.manifest, parity=parity, tools=tool_versions([p.instance for p in planned]),
                               measured={**result.manifest.measured, **(found or {})})
            if spec.verify != "no":
                listener().working("comparing rows alone and in company")
                rows = measure_batches(replace(result, manifest=manifest), cache)
                manifest = replace(manifest, measured={**manifest.measured, "batch": rows})
            bundle = _commit(spec, replace(result, manifest=manifest), gate, key, target)
    return Outcome(bundle, up_to_date=False)


def build_key(spec: BuildSpec, origin: Bundle, planned: list[PlannedPass]) -> str:
    """Identifies a build: source bytes, spec, passes, versions of every library they use."""
    steps = [to_json(p.planned.record) for p in planned if isinstance(p.planned, Step)]
    return digest_of({"source": origin.manifest.digest, "spec": spec.resolved(), "passes": steps,
                      "tools": tool_versions([p.instance for p in planned])})


def tool_versions(passes: list[Pass]) -> dict[str, str]:
    """Versions that the manifest records."""
    names = sorted({library for p in passes for library in p.libraries} | {"ldm-deploy", "numpy", "onnxruntime"})
    return {"python": platform.python_version(), **versions_of(tuple(names))}


def find_finished(target: Path, key: str) -> Bundle | None:
    """The bundle at `target` if it is intact and comes from the same build."""
    try:
        bundle = Bundle.open(target)
    except BundleError:
        return None
    return bundle if bundle.manifest.measured.get("build_key") == key else None


@contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """A folder for the bundles between passes; links only, removed at the end.

    While it is there, what this process takes from the cache stays in it; then the cache is brought within its limit.
    """
    asked_limit_bytes()  # a limit that cannot be read is said before any work
    try:
        with scratch(root / WORK) as folder:
            yield folder
    finally:
        with rooted(root):
            keep_within_limit()


def run_passes(spec: BuildSpec, origin: Bundle, planned: list[PlannedPass], cache: Cache, work: Path,
               ) -> tuple[Bundle, Gate]:
    """Run what was planned, each pass gated; gives the last bundle, which lies in `work`.

    Raises:
        ParityError: a pass broke the accuracy budget.
    """
    bundle, costs = origin, []
    waiting: list[_Done] = []
    gate = Gate(spec, origin.manifest.source.id, cache)
    of_source = [n for n, p in enumerate(planned) if p.instance.defines_source and isinstance(p.planned, Step)]
    for number, entry in enumerate(planned):
        step = entry.planned
        if not isinstance(step, Step):
            continue
        before = bundle
        folder = work / f"{number:02d}-{step.pass_name}"
        bundle, cost = _run_pass(entry.instance, step, before, folder, cache)
        costs.append(cost)
        measurements = {**origin.manifest.measured, "passes": list(costs)}
        bundle = replace(bundle, manifest=replace(bundle.manifest, measured=measurements))
        if entry.instance.verify and not step.provisional:
            done = _Done(entry.instance, step, before, bundle)
            if gate.may_wait and _is_rewritten(done, planned[number + 1 :]):
                waiting.append(done)
            else:
                bundle = _compare(gate, done, waiting)
                waiting = []
                cost["relative_l2"] = {name: parity["relative_l2"] for name in step.reads
                                       if (parity := bundle.component(name).parity) is not None}
            if entry.instance.changes_network:
                gate.rebase(bundle)
        elif entry.instance.defines_source:
            gate.start(bundle)
            if number == of_source[-1]:
                gate.check_source(step.pass_name)
        listener().finished(f"{step.pass_name}: {step.summary} ({cost['seconds']:.1f} s"
                          f"{', from the cache' if cost['reused'] == len(step.reads) else ''})")
    return bundle, gate


@dataclass(frozen=True)
class _Done:
    """A pass that ran."""

    instance: Pass
    step: Step
    before: Bundle
    after: Bundle


def _is_rewritten(done: _Done, later: list[PlannedPass]) -> bool:
    """Whether the next verified pass writes all of it again, as graphs of the same network that run here."""
    steps = ((entry.instance, entry.planned) for entry in later if isinstance(entry.planned, Step))
    instance, step = next(((i, s) for i, s in steps if i.verify and not s.provisional), (None, None))
    if instance is None or step is None or instance.changes_network or done.instance.changes_network:
        return False
    return set(done.step.reads) <= set(step.reads) and all(
        step.after.components[name].format == done.after.component(name).format for name in done.step.reads)


def _compare(gate: Gate, done: _Done, waiting: list[_Done]) -> Bundle:
    """The result of a pass with its figures; a broken budget is blamed on the first of the passes that breaks it.

    Raises:
        ParityError: naming the pass.
    """
    try:
        return gate.after_pass(done.step.pass_name, done.step.reads, done.after,
                               changes_network=done.instance.changes_network)
    except ParityError as error:
        for earlier in waiting:
            _compare(gate, earlier, [])
        _add_explanation(error, done.instance, done.step, done.before, done.after)
        raise


def _add_explanation(error: ParityError, instance: Pass, step: Step, before: Bundle, after: Bundle) -> None:
    """Let the pass say which layers a broken budget comes from; the error names the component last."""
    name = error.where.rpartition(", ")[2]
    if name in step.reads and (why := instance.explain(step, name, before, after)):
        error.what = f"{error.what}; {why}"


def load_source(origin: Bundle, spec: BuildSpec, cache: Cache, work: Path) -> Bundle:
    """The source model as the bundle that parity is measured against: loaded, with its adapters.

    Raises:
        InputError: its weights do not fit or are not finite, or an adapter does not fit it.
    """
    passes = [instance for instance in load_passes(PASSES) if instance.defines_source]
    bundle = origin
    for entry in plan_all(passes, origin.manifest, spec):
        if isinstance(entry.planned, Step):
            folder = work / f"source-{entry.planned.pass_name}"
            bundle = _run_pass(entry.instance, entry.planned, bundle, folder, cache)[0]
    return bundle


def _run_pass(instance: Pass, step: Step, before: Bundle, folder: Path, cache: Cache,
              ) -> tuple[Bundle, dict[str, Any]]:
    """Run or reuse each component of one pass and lay the resulting bundle out as links."""
    folder.mkdir()
    seconds, peak, reused = 0.0, 0, 0
    parts: dict[str, tuple[Component, Path]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for name in step.reads:
        listener().working(f"{step.pass_name}: {name}")
        key = key_of(instance, step, name, before)
        with measured() as spent:
            found = cache.find(key)
            reused += found is not None
            elsewhere: list[int] = []
            parts[name] = found or cache.store(key, partial(_run_component, instance, step, name, before, elsewhere))
        seconds += spent.seconds
        used = max([spent.peak_rss_bytes, *elsewhere])
        peak = max(peak, used)
        if found is None:
            costs[name] = {"seconds": round(spent.seconds, 3), "bytes": parts[name][0].bytes, "peak_rss_bytes": used}
            cache.store_fact({"cost of": key}, costs[name])
        elif (once := cache.find_fact({"cost of": key})) is not None:
            costs[name] = once
    carried = {n: (c, before.path) for n, c in before.manifest.components.items()
               if n not in step.reads and n in step.after.components}
    assemble(folder, {**carried, **parts})
    components = {n: c for n, (c, _) in {**carried, **parts}.items()}
    files = instance.write_files(step, before, folder)
    manifest = replace(step.after, components=dict(sorted(components.items())), files=files)
    _check_prediction(step, manifest)
    write_manifest(folder, manifest)
    cost: dict[str, Any] = {"name": step.pass_name, "seconds": round(seconds, 3), "peak_rss_bytes": peak,
                            "reused": reused, "bytes_in": size_of(before.manifest), "bytes_out": size_of(manifest),
                            "components": costs}
    if reused and len(costs) == len(step.reads):
        cost["seconds_without_cache"] = round(sum(c["seconds"] for c in costs.values()), 3)
    result = Bundle(folder, manifest)
    if gain := instance.measure(step, before, result):
        cost["gain"] = gain
    return result, cost


def _run_component(instance: Pass, step: Step, name: str, before: Bundle, elsewhere: list[int],
                   out: Path) -> Component:
    """One component, in this process or, if it is large, in another, whose peak memory is added to `elsewhere`."""
    try:
        if is_large(step, name, before):
            result = run_isolated(instance, step, name, before, out)
            component = result.component
            elsewhere.append(result.peak_rss_bytes)
        else:
            component = instance.run(step, name, before, out)
    except DeployError as error:
        error.where = error.where or f"pass {step.pass_name}, {name}"
        raise
    known = before.manifest.components.get(name)
    if known is not None and component.parameters == step.after.components[name].parameters:
        # The plan was made before pruning said how many weights are left.
        component = replace(component, parameters=known.parameters)
    for file in out.rglob("*"):
        # Links to the user's own weights share their mode; only what we wrote is sealed.
        if file.is_file() and file.stat().st_nlink == 1:
            file.chmod(0o444)
    return component


def size_of(manifest: Manifest) -> int:
    """Bytes of all networks; files that two components share count once."""
    return sum({name: r.bytes for c in manifest.components.values() for name, r in c.files.items()}.values())


def _check_prediction(step: Step, manifest: Manifest) -> None:
    predicted, found = structure(step.after), structure(manifest)
    for name in sorted(set(predicted) | set(found)):
        if predicted.get(name) != found.get(name):
            raise DeployError(f"the pass left {found.get(name)}, its plan said {predicted.get(name)}",
                              where=f"pass {step.pass_name}, {name}", fix="this is a bug of ldm-deploy: report it")


def _commit(spec: BuildSpec, result: Bundle, gate: Gate, key: str, target: Path) -> Bundle:
    """Write the final folder: links to the components, tokenizers, scheduler, report, manifest."""
    from deploy.report.page import write_report

    listener().working("writing the bundle")
    manifest = result.manifest
    measurements = {
        **manifest.measured,
        "build_key": key,
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "source_path": str(Path(spec.model).resolve()) if Path(spec.model).exists() else spec.model,
        "adapters": {name: to_json(getattr(spec, name)) for name in LOCAL_FILES if getattr(spec, name)},
        "gate_seconds": round(gate.seconds, 3),
        "gate_peak_rss_bytes": gate.peak_rss_bytes,
    }
    manifest = replace(manifest, verified=manifest.parity is not None, measured=measurements)
    with committed(target) as folder:
        for name in manifest.all_files():
            link_or_copy(result.path / name, folder / name)
        if spec.verify != "no":
            write_report(folder / "report", manifest, gate.images)
            report = records_below(folder / "report", folder)
            manifest = replace(manifest, measured={**measurements, "files": to_json(report)})
        write_manifest(folder, manifest)
    return Bundle(target, manifest)
