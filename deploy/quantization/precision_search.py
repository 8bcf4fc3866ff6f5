"""Searches for `--precision auto`: generated images decide which layers of the U-Net may be integers."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.choice.layer_sensitivity import fewest
from calibration.recipes.candidates import Candidate, Candidates
from calibration.recipes.one_graph import Quantized, Settings, quantize_by_recipe
from calibration.trajectory.recorder import Recording
from deploy.core.budgets import Budget
from deploy.core.call_times import quotient, seconds_in_turns, usual_feeds
from deploy.core.pass_cache import Cache
from deploy.parity.comparison_options import gallery_for, options_for
from deploy.parity.reference.answers import Reference
from deploy.parity.whole_pipelines import check_pipeline
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle, link_or_copy, records_below, sha256_of
from runtimes.bundle.manifest import to_json
from runtimes.errors import ParityError, UnavailableError
from runtimes.pipeline.bundle_sessions import BundleSessions, open_session
from runtimes.system.cache_root import cache_home
from runtimes.system.compute_identity import runtime_identity
from runtimes.system.device import CPU
from runtimes.system.progress import listener

TIMED_CALLS = 9
ANYTHING = Budget(1e9, 1e9, 0.0, 0.0, 100.0)  # nothing is to blame while searching: the caller judges
VERSION = 3  # of what a trial generates and counts


@dataclass(frozen=True)
class Trial:
    """One candidate U-Net as it generates.

    Attributes:
        name: "hybrid", or the number of promotions.
        bytes: of its file.
        trajectory_relative_l2, psnr_db, ssim: of the worst image; retrieval: share found again, or None.
        holds: whether it is within the budget.
        time_ratio: of one call to the float32 graph's, for ONNX Runtime; another runtime compiles the graph anew.
    """

    name: str
    bytes: int
    trajectory_relative_l2: float
    psnr_db: float
    ssim: float
    retrieval: float | None
    holds: bool
    time_ratio: float | None = None

    def __str__(self) -> str:
        found = "" if self.retrieval is None else f", retrieval {self.retrieval:.1%}"
        took = "" if self.time_ratio is None else f"{self.time_ratio:.2f}x the time, "
        return (f"{self.name}: {self.bytes / 1e6:.1f} MB, {took}relative L2 {self.trajectory_relative_l2:.3g}, "
                f"PSNR {self.psnr_db:.1f} dB, SSIM {self.ssim:.3f}{found}")


class Trials:
    """Samples with candidates of one component and with the float32 graphs, which the gate has compared with PyTorch.

    What was generated is known again by content: a search that was interrupted goes on.

    Args:
        source: the float32 bundle.
        low: component -> file that stands in for it in every trial: what else will be quantized.
        budget: of the build.
        prompts: of the build; the model's own when empty.
    """

    def __init__(self, source: Bundle, low: Mapping[str, Path], budget: Budget, prompts: tuple[str, ...]) -> None:
        self._source, self._low, self._budget = source, low, budget
        self._denoiser = source.manifest.pipeline.denoiser.component
        self._options = options_for(source.manifest.source.id, prompts)
        self._gallery = gallery_for(source.manifest.source.id)
        self._reference = Reference(source, opener=lambda bundle, _: BundleSessions(bundle, SessionOptions()))
        self._cache = Cache(cache_home())
        self._identity = {"trial": VERSION, "reference": self._reference.identity,
                          "low": {n: sha256_of(file) for n, file in sorted(low.items())}, "budget": asdict(budget),
                          "options": to_json(self._options), "runtime": runtime_identity(CPU, "onnx")}
        self.done: list[Trial] = []

    def generate(self, name: str, graph: Path) -> Trial:
        """Generate everything that the gate will generate, and compare."""
        listener().working(f"quantize: trying {name}")
        key = {**self._identity, "denoiser": {part.name: sha256_of(part) for part in parts_of(graph)}}
        if (known := self._cache.find_fact(key)) is None:
            known = asdict(self._generated(name, graph))
            self._cache.store_fact(key, known)
        self.done.append(trial := Trial(**{**known, "name": name}))
        listener().finished(f"quantize: {trial}, {'within' if trial.holds else 'outside'} the budget")
        return trial

    def _generated(self, name: str, graph: Path) -> Trial:
        with candidate_bundle(self._source, {**self._low, self._denoiser: graph}) as bundle:
            report = check_pipeline(self._reference, bundle, ANYTHING, self._options, gallery=self._gallery)
            took = self._time_ratio(bundle)
        if report.unverified:
            raise UnavailableError(f"a trial cannot be compared here: {report.unverified}", where="search",
                                   fix="build with --precision int8, whose recipe needs no trials")
        comparisons = report.comparisons(self._budget)
        worst = {"trajectory_relative_l2": 1e9, "image_psnr_db": 0.0, "image_ssim": 0.0}  # of one that fails
        figures = worst | {c.metric: c.measured for c in comparisons if math.isfinite(c.measured)}
        retrieval = None if report.retrieval is None else report.retrieval[1]
        size = sum(part.stat().st_size for part in parts_of(graph))
        return Trial(name, size, figures["trajectory_relative_l2"], figures["image_psnr_db"],
                     figures["image_ssim"], retrieval, all(comparisons), took)

    def _time_ratio(self, bundle: Bundle) -> float | None:
        if bundle.manifest.target != "onnxruntime":
            return None
        sessions = {name: open_session(b, self._denoiser, SessionOptions())
                    for name, b in (("trial", bundle), ("float32", self._source))}
        seconds = seconds_in_turns(sessions, usual_feeds(self._source.component(self._denoiser)), TIMED_CALLS)
        return round(quotient(seconds["trial"], seconds["float32"]), 3)

    def front(self) -> list[dict[str, Any]]:
        """Trials that no other beats at both bytes and PSNR, smallest first, as JSON."""
        best = [t for t in self.done if not any(
            o.bytes <= t.bytes and o.psnr_db >= t.psnr_db and (o.bytes, o.psnr_db) != (t.bytes, t.psnr_db)
            for o in self.done)]
        return [asdict(t) for t in sorted(best, key=lambda t: t.bytes)]

    def refuse(self) -> None:
        """The budget cannot be met.

        Raises:
            ParityError: with the best that was found.
        """
        best = max(self.done, key=lambda t: (t.psnr_db, -t.trajectory_relative_l2))
        raise ParityError(f"no assignment of precisions keeps the budget; the best found is {best}", where="search",
                          fix="loosen the budget, or use --precision fp16")


def parts_of(graph: Path) -> list[Path]:
    """A graph's file, and its weights' where those lie beside it."""
    return sorted(graph.parent.glob(f"{graph.name}*"))


@contextmanager
def candidate_bundle(source: Bundle, files: Mapping[str, Path]) -> Iterator[Bundle]:
    """The bundle with some components' graphs replaced; of links, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ldm-trial-", dir=source.path.parent) as scratch:
        folder, components = Path(scratch), dict(source.manifest.components)
        unchanged = [c for name, c in components.items() if name not in files]
        for name in [*source.manifest.files, *(file for c in unchanged for file in c.files)]:
            link_or_copy(source.path / name, folder / name)
        for name, file in files.items():
            for part in parts_of(file):
                link_or_copy(part, folder / "components" / name / part.name)
            components[name] = replace(components[name], precision="int8", file=f"components/{name}/{file.name}",
                                       files=records_below(folder / "components" / name, folder))
        yield Bundle(folder, replace(source.manifest, components=components))


def search(trials: Trials, hybrid: Path, build: Callable[[int], Path], steps: int) -> tuple[Path, str]:
    """The smallest U-Net within the budget: the fewest promotions that keep it, or hybrid where that is smaller.

    Args:
        trials: judges.
        hybrid: U-Net of the hybrid recipe.
        build: number of promotions -> U-Net.
        steps: number of promotions there are.

    Returns:
        the U-Net's file, and the name of the trial that it won.

    Raises:
        ParityError: the budget cannot be met; names the best found.
    """
    files: dict[str, Path] = {"hybrid": hybrid}
    trials.generate("hybrid", hybrid)

    def holds(count: int) -> bool:
        name = f"{count} promotions"
        files[name] = build(count)
        return trials.generate(name, files[name]).holds

    fewest(steps, holds)
    # As good as hybrid where hybrid holds: a few bytes are not worth images that are not found again.
    fair = [t for t in trials.done if t.holds]
    if not fair:
        trials.refuse()
    reference = next((t for t in fair if t.name == "hybrid"), None)
    if reference is not None:
        fair = [t for t in fair if (t.retrieval or 0) >= (reference.retrieval or 0)]
    best = min(fair, key=lambda t: (t.bytes, -t.psnr_db))
    return files[best.name], best.name


def search_denoiser(source: Bundle, destination: Path, config: Mapping[str, Any], recording: Recording) -> Quantized:
    """Find the cheapest assignment of precisions to the denoising network's layers that keeps the image-level budget.

    Which layers go back to float32 first is predicted (`calibration.recipes.candidates`), and halving finds how many
    must. Each trial generates what the gate will generate, with the other components quantized as well.

    Args:
        source: float32 graphs of the whole pipeline.
        destination: the graph to write.
        config: that the pass `quantize` planned.
        recording: of the pipeline.

    Raises:
        ParityError: the budget cannot be met; names the best found.
    """
    settings, goal = Settings.from_config(config), config["search"]
    with tempfile.TemporaryDirectory(prefix="ldm-search-") as scratch:
        denoiser = source.manifest.pipeline.denoiser.component
        candidates = Candidates(source.file(source.component(denoiser).file), settings, denoiser, recording,
                                Path(scratch))
        low = _quantize_others(source, Path(scratch), config["recipes"], settings, recording)
        trials = Trials(source, low, Budget(**goal["budget"]), tuple(goal["prompts"]))
        made: dict[Path, Candidate] = {}

        def written(candidate: Candidate) -> Path:
            made[candidate.file] = candidate
            return candidate.file

        best, _ = search(trials, written(candidates.hybrid()), lambda count: written(candidates.promoted(count)),
                         candidates.most_promotions)
        for part in best.parent.iterdir():
            shutil.copy(part, destination.parent / part.name)
        found = candidates.described(made[best], len(trials.done))
    return replace(found, layers={**found.layers, "front": trials.front()})


def _quantize_others(source: Bundle, folder: Path, recipes: Mapping[str, str], settings: Settings,
                     recording: Recording) -> dict[str, Path]:
    """Whatever else generates, quantized by its recipe, component -> graph."""
    low, roles = {}, source.manifest.pipeline
    for name in roles.generates_with:
        if name != roles.denoiser.component:
            low[name] = folder / name / "model.onnx"
            low[name].parent.mkdir()
            quantize_by_recipe(source.file(source.component(name).file), low[name], recipes[name], settings, name,
                               roles.role(name), recording)
    return low
