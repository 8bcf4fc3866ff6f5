"""The candidate as a whole against the reference as a whole: trajectory, pictures, retrieval, and what is to blame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deploy.core.budgets import Budget
from deploy.parity.blame import SCHEDULE_TOLERANCE, different_facts, different_keys, different_tokens, schedule_error
from deploy.parity.components import SOURCE_FORMAT, ComponentReport, open_candidate
from deploy.parity.image_level import Pair, latent_errors, pairs
from deploy.parity.metrics import Comparison, worst
from deploy.parity.options import ParityOptions
from deploy.parity.reference.answers import Reference, total_bytes
from deploy.parity.reference.planned_shapes import plan_runs
from deploy.parity.reference.session_pool import SessionPool
from deploy.parity.reference.trajectories import Drawing, DrawRequest, assemble_pipeline, draw
from deploy.reference_models.retrieval import Gallery
from runtimes.backends.session import FORMATS
from runtimes.bundle.folder import Bundle
from runtimes.errors import DeployError, UnavailableError
from runtimes.pipeline.bundle_sessions import needed
from runtimes.pipeline.loading import scheduler_config


@dataclass(frozen=True)
class PipelineReport:
    """What differs between the drawings of reference and candidate.

    Attributes:
        drift: scheduler -> relative L2 of the latents after each step, of the worst picture.
        pairs: every prompt by every scheduler, drawn by both.
        retrieval: share of prompts found again, 0 to 1, of reference and candidate; None if it was not asked for.
        schedule_error: relative L2 between the noise schedules, or None where it may differ.
        culprit: component to blame for a broken budget, "scheduler" and "tokenizer" among them; empty if none is.
        why: what is known about the culprit.
        problem: why the candidate could not draw, which counts as broken.
        unverified: why nothing could be drawn here; then nothing was compared.
    """

    drift: Mapping[str, tuple[float, ...]]
    pairs: tuple[Pair, ...] = ()
    retrieval: tuple[float, float] | None = None
    schedule_error: float | None = None
    culprit: str = ""
    why: str = ""
    problem: str = ""
    unverified: str = ""

    @property
    def trajectory(self) -> tuple[float, ...]:
        """relative L2 after each step, of the worst picture of the worst scheduler."""
        return tuple(worst(list(at_step)) for at_step in zip(*self.drift.values(), strict=True))

    def says_nothing(self, budget: Budget) -> str:
        """Why the retrieval figure proves nothing, if so: a reference that finds too little has nothing to lose."""
        if self.retrieval is None or 100 * self.retrieval[0] > budget.retrieval_points:
            return ""
        return (f"the reference itself draws only {self.retrieval[0]:.1%} of the prompts recognizably, "
                "so no bundle could lose enough to break the budget")

    def comparisons(self, budget: Budget) -> list[Comparison]:
        """Every figure against the budget, in the order in which an error would spread."""
        found = []
        if self.schedule_error is not None:
            found.append(Comparison("noise schedule relative_l2", self.schedule_error, SCHEDULE_TOLERANCE))
        if self.problem:
            found.append(Comparison("trajectory_relative_l2", math.nan, budget.trajectory_relative_l2))
        if self.drift:
            found.append(Comparison("trajectory_relative_l2", self.trajectory[-1], budget.trajectory_relative_l2))
        if self.pairs:
            found += [
                Comparison("image_psnr_db", worst([p.psnr_db for p in self.pairs], larger_is_better=True),
                           budget.image_psnr_db, larger_is_better=True),
                Comparison("image_ssim", worst([p.ssim for p in self.pairs], larger_is_better=True),
                           budget.image_ssim, larger_is_better=True),
            ]
        if self.retrieval is not None and not self.says_nothing(budget):
            lost = 100 * (self.retrieval[0] - self.retrieval[1])
            found.append(Comparison("retrieval_points", lost, budget.retrieval_points))
        return found


def check_pipeline(
    reference: Reference, candidate: Bundle, budget: Budget, options: ParityOptions, *,
    components: ComponentReport | None = None, gallery: Gallery | None = None,
) -> PipelineReport:
    """Draw every prompt with every scheduler by both and compare; find out what is to blame if the budget breaks.

    Args:
        reference: the source model.
        candidate: any bundle made from it.
        budget: decides whether something is to blame at all.
        options: what is drawn.
        components: figures of the component level, which help to find what is to blame.
        gallery: for retrieval, together with `options.retrieval_prompts`.

    Raises:
        InputError: prompts, schedulers or sizes that the reference refuses too.
    """
    for name in needed(candidate.manifest.pipeline):
        kind = candidate.component(name).format
        if kind not in FORMATS and kind != SOURCE_FORMAT:
            return PipelineReport({}, unverified=f"nothing here runs the format {kind!r} of {name}")
    run = plan_runs(candidate.manifest.components, candidate.manifest.pipeline)[0]
    sized = replace(options, height=options.height or run.height, width=options.width or run.width)
    return _Check(reference, candidate, budget, sized, components, gallery).run()


class _Check:
    """One comparison of pipelines; holds what its parts share."""

    def __init__(
        self, reference: Reference, candidate: Bundle, budget: Budget, options: ParityOptions,
        components: ComponentReport | None, gallery: Gallery | None,
    ) -> None:
        self.reference, self.candidate, self.budget, self.options = reference, candidate, budget, options
        self.components, self.gallery = components, gallery
        networks = candidate.manifest.components
        self.small = total_bytes(networks) <= options.keep_bytes
        self.pool = SessionPool(networks, lambda name: open_candidate(candidate, name, options.session),
                                len(networks) if self.small else 1)
        self.configs = scheduler_config(reference.bundle), scheduler_config(candidate)

    def run(self) -> PipelineReport:
        options = self.options
        error = None if options.allow_scheduler_change else schedule_error(*self.configs)
        report = PipelineReport({}, schedule_error=error)
        try:
            drift: dict[str, tuple[float, ...]] = {}
            drawn: list[Pair] = []
            for scheduler in options.schedulers:
                request = self._request(scheduler)
                expected, found = self.reference.draw(request), self._draw(request)
                drift[scheduler] = _worst_by_step(expected, found)
                drawn += pairs(request, expected, found)
            report = replace(report, drift=drift, pairs=tuple(drawn))
            report = replace(report, retrieval=self._retrieval())
        except _CannotDraw as failure:
            report = replace(report, culprit=failure.where, problem=str(failure))
        except UnavailableError as error_here:
            return PipelineReport({}, unverified=str(error_here))
        finally:
            self.pool.close()
        if all(report.comparisons(self.budget)):
            return report
        culprit, why = self._blame(report)
        return replace(report, culprit=culprit, why=why)

    def _request(self, scheduler: str) -> DrawRequest:
        o = self.options
        return DrawRequest(o.prompts, scheduler, o.steps, o.guidance_scale, o.seed, o.height, o.width,
                           images_at_once=8 if self.small else 1)

    def _draw(self, request: DrawRequest, scheduler: Mapping[str, Any] | None = None) -> Drawing:
        """Draw with the candidate; what it refuses after the reference drew it is broken parity, not a crash."""
        try:
            pipeline = assemble_pipeline(self.pool.sessions, self.candidate, scheduler)
            return draw(pipeline, request)
        except UnavailableError:
            raise
        except DeployError as error:
            where = next((name for name in self.candidate.manifest.components if name in error.where), "pipeline")
            raise _CannotDraw(where, f"it cannot draw what the reference draws: {error.what}") from error

    def _retrieval(self) -> tuple[float, float] | None:
        prompts = self.options.retrieval_prompts
        if self.gallery is None or not prompts:
            return None
        request = replace(self._request(self.options.retrieval_scheduler), prompts=prompts, keep_latents=False)
        expected, found = self.reference.draw(request), self._draw(request)
        return self.gallery.score(expected.images, prompts), self.gallery.score(found.images, prompts)

    def _blame(self, report: PipelineReport) -> tuple[str, str]:
        """The scheduler, tokenizer or facts if they differ and matter, else the component that is furthest off."""
        keys = different_keys(*self.configs)
        if report.schedule_error is not None and not report.schedule_error <= SCHEDULE_TOLERANCE:
            return "scheduler", "its config differs from the source's in " + "; ".join(keys)
        if facts := different_facts(self.reference.bundle, self.candidate):
            return "pipeline", "its facts differ from the source's in " + "; ".join(facts)
        if tokens := different_tokens(self.reference.bundle, self.candidate, self.options.prompts):
            return "tokenizer", f"it turns {tokens[0]!r} into other ids"
        if keys and self._source_scheduler_repairs():
            return "scheduler", "the same networks pass with the source's config, which differs in " + "; ".join(keys)
        if report.problem:
            return report.culprit, ""
        drifted = bool(report.drift) and not report.trajectory[-1] <= self.budget.trajectory_relative_l2
        figures = self.components.figures if self.components is not None else {}
        suspects = {n: f for n, f in figures.items() if n != "vae_encoder" and (n != "vae_decoder" or not drifted)}
        if not drifted and "vae_decoder" in self.candidate.manifest.components:
            return "vae_decoder", "the latents are within their budget, the pictures are not"
        if not suspects:
            return "unet", "the latents drift, and nothing but the networks differs"
        name = max(suspects, key=lambda n: suspects[n].severity)
        return name, f"its error of {suspects[name].relative_l2:.3g} a call is the largest, and the sampler adds it up"

    def _source_scheduler_repairs(self) -> bool:
        """Whether the candidate's networks stay within the trajectory budget under the source's scheduler."""
        try:
            for scheduler in self.options.schedulers:
                request = self._request(scheduler)
                found = self._draw(request, self.configs[0])
                last = _worst_by_step(self.reference.draw(request), found)[-1]
                if not last <= self.budget.trajectory_relative_l2:
                    return False
            return True
        except DeployError:
            return False
        finally:
            self.pool.close()


class _CannotDraw(DeployError):
    """The candidate refused what the reference drew."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(what, where=where)


def _worst_by_step(expected: Drawing, found: Drawing) -> tuple[float, ...]:
    return tuple(worst(list(row)) for row in latent_errors(expected, found).tolist())
