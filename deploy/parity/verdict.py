"""Holds figures against a budget, names what broke it in one clear error, and writes the JSON of `verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deploy.core.budgets import Budget
from deploy.parity.comparison_effort import Effort
from deploy.parity.components import ComponentReport, Figures, check_components
from deploy.parity.metrics import Comparison, worst
from deploy.parity.reference.answers import Reference
from deploy.parity.upstream.levels import LEVELS, Level
from deploy.parity.upstream.levels import enforce as enforce_levels
from deploy.parity.whole_pipelines import PipelineReport, check_pipeline
from deploy.reference_models.retrieval import Gallery
from runtimes.bundle.folder import Bundle
from runtimes.errors import ParityError

__all__ = ["Verification", "check_components", "check_pipeline", "component_json", "enforce", "verify"]


def enforce(report: ComponentReport | PipelineReport, budget: Budget, pass_name: str) -> None:
    """Stop at a broken budget. What could not be executed here is not broken; it stays in the report's `unverified`.

    Args:
        report: of either level.
        budget: what is allowed.
        pass_name: the pass after which the report was made, or "verify".

    Raises:
        ParityError: names the pass, the component, the shape and the worst output, the figure against the budget, and
            the tolerance that would have passed.
    """
    if isinstance(report, ComponentReport):
        _enforce_components(report, budget, pass_name)
    else:
        _enforce_pipeline(report, budget, pass_name)


def _enforce_components(report: ComponentReport, budget: Budget, pass_name: str) -> None:
    broken = report.worst(budget.component_relative_l2)
    if broken is None:
        return
    name, figures = broken
    comparison = figures.compare(budget.component_relative_l2)
    place = f"{figures.worst_output} at shape {list(figures.worst_shape)}"
    if figures.problem:
        raise ParityError(f"{place}: {figures.problem}", where=_where(pass_name, name),
                          fix="the source model runs it; this component was transformed wrongly")
    if figures.nonfinite:
        raise ParityError(f"{place}: {figures.nonfinite} values are NaN or infinite; no tolerance passes",
                          where=_where(pass_name, name), fix="build this component in a higher precision")
    raise ParityError(f"{place}: {comparison}", where=_where(pass_name, name),
                      fix=_loosen("component_relative_l2", comparison))


def _enforce_pipeline(report: PipelineReport, budget: Budget, pass_name: str) -> None:
    broken = next((c for c in report.comparisons(budget) if not c), None)
    if broken is None:
        return
    where = _where(pass_name, report.culprit or "pipeline")
    why = f"; {report.why}" if report.why else ""
    if report.problem:
        raise ParityError(f"{report.problem}{why}", where=where, fix="the source model generates it")
    if broken.metric.startswith("noise schedule"):
        raise ParityError(f"{broken}{why}", where=where, fix="restore scheduler/scheduler_config.json of the source")
    raise ParityError(f"{broken}{why}", where=where, fix=_loosen(broken.metric, broken))


def _where(pass_name: str, name: str) -> str:
    return f"{pass_name}, {name}" if pass_name == "verify" else f"pass {pass_name}, {name}"


def _loosen(key: str, comparison: Comparison) -> str:
    passing = comparison.would_pass
    loosen = "" if passing is None else f"set the budget {key}={passing:.3g}, or "
    return f"{loosen}choose a higher precision"


@dataclass(frozen=True)
class Verification:
    """All levels of one bundle against one budget, and how much was compared.

    Attributes:
        components, pipeline: against our own loop over PyTorch's networks.
        upstream: weights, feeds and images against diffusers' own pipeline, by name.
    """

    components: ComponentReport
    pipeline: PipelineReport
    budget: Budget
    effort: Effort
    upstream: Mapping[str, Level] = field(default_factory=dict)

    @property
    def unverified(self) -> list[str]:
        """What could not be executed here and why, one sentence each."""
        found = [f"{name}: {why}" for name, why in self.components.unverified.items()]
        levels = (("pipeline", self.pipeline.unverified), ("retrieval", self.pipeline.says_nothing(self.budget)))
        for level, why in levels:
            found += [f"{level}: {why}"] if why else []
        return found

    @property
    def broken(self) -> bool:
        """Whether a figure is outside the budget, or something is not what diffusers does."""
        beyond = self.components.worst(self.budget.component_relative_l2) is not None
        other = any(level.different for level in self.upstream.values())
        return beyond or other or not all(self.pipeline.comparisons(self.budget))

    @property
    def ok(self) -> bool:
        """Everything was executed and is within the budget."""
        return not self.broken and not self.unverified

    def enforce(self, pass_name: str = "verify") -> None:
        """See `enforce`; what differs from diffusers first, then components, whose error says more than an image's.

        Raises:
            ParityError: a budget is broken.
        """
        enforce_levels(self.upstream, pass_name)
        enforce(self.components, self.budget, pass_name)
        enforce(self.pipeline, self.budget, pass_name)

    def to_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints and the manifest keeps; figures that are not finite are null."""
        pipeline = self.pipeline
        return {
            "ok": self.ok,
            "components": {
                name: component_json(figures, self.budget) for name, figures in self.components.figures.items()
            },
            "trajectory": {
                "relative_l2": _numbers(pipeline.trajectory),
                "by_scheduler": {name: _numbers(drift) for name, drift in pipeline.drift.items()},
            },
            "images": _images(pipeline),
            "retrieval": None if pipeline.retrieval is None else dict(
                zip(("reference", "bundle"), pipeline.retrieval, strict=True)),
            "scheduler": {"relative_l2": _number(pipeline.schedule_error)},
            "unverified": self.unverified,
            "compared": self.effort.to_json(),
            "budget": asdict(self.budget),
            "broken": [str(c) for c in pipeline.comparisons(self.budget) if not c],
            "culprit": pipeline.culprit or None,
            "upstream": {name: self.upstream[name].to_json() for name in LEVELS if name in self.upstream},
        }


def component_json(figures: Figures, budget: Budget) -> dict[str, Any]:
    """Figures of one component as `Component.parity` keeps them."""
    found = {
        "max_abs": _number(figures.max_abs),
        "relative_l2": _number(figures.relative_l2),
        "cosine": _number(figures.cosine),
        "nonfinite": figures.nonfinite,
        "shapes": [list(shape) for shape in figures.shapes],
        "worst_output": figures.worst_output,
        "worst_shape": list(figures.worst_shape),
        "budget": budget.component_relative_l2,
        "ok": bool(figures.compare(budget.component_relative_l2)),
    }
    return {**found, "problem": figures.problem} if figures.problem else found


def verify(
    reference: Reference, candidate: Bundle, budget: Budget, effort: Effort, gallery: Gallery | None = None
) -> Verification:
    """Compare a bundle with its source model, at every level unless the effort is "components".

    Raises:
        InputError: prompts, schedulers or sizes that the reference refuses too.
    """
    options = effort.options
    components = check_components(reference, candidate, options)
    pipeline = PipelineReport({})
    if effort.level != "components":
        pipeline = check_pipeline(reference, candidate, budget, options, components=components, gallery=gallery)
    return Verification(components, pipeline, budget, effort)


def _images(pipeline: PipelineReport) -> dict[str, Any]:
    psnr, similarity = [p.psnr_db for p in pipeline.pairs], [p.ssim for p in pipeline.pairs]
    return {
        "psnr_db": _number(worst(psnr, larger_is_better=True)),
        "psnr_db_mean": _number(_mean(psnr)),
        "ssim": _number(worst(similarity, larger_is_better=True)),
        "ssim_mean": _number(_mean(similarity)),
        "count": len(pipeline.pairs),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(v) for v in values]
