"""The parity gate around passes: what is compared when, with which prompts. `deploy.parity` does the comparing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deploy.build.against_diffusers import AgainstDiffusers, upstream_of
from deploy.core.pass_cache import Cache, versions_of
from deploy.core.isolation import ABOVE_BYTES, call_isolated, from_request, to_request
from deploy.core.observers import measured
from deploy.parity.reference.answers import Reference, total_bytes
from deploy.core.budgets import PRUNED, budget_for
from deploy.parity.components import ComponentReport, Figures, check_components
from deploy.parity.effort import Effort, choose
from deploy.parity.verdict import Verification, component_json, enforce
from deploy.core.progress import Listener
from deploy.parity.options import ParityOptions, gallery_for, options_for
from deploy.parity.pipelines import PipelineReport, check_pipeline
from deploy.parity.provable_graphs import computes_in_16_bits, provable
from deploy.parity.upstream.levels import Level, merged
from deploy.parity.upstream.levels import enforce as enforce_levels
from deploy.report.page import Picture
from deploy.core.spec import BuildSpec
from runtimes.bundle.folder import Bundle
from runtimes.errors import ParityError
from runtimes.system.compute_identity import runtime_identity
from runtimes.bundle.manifest import digest_of, from_json, to_json


class Gate:
    """Compares bundles of one build with its source and stops the build at the first pass that breaks the budget.

    Attributes:
        seconds: spent on comparing, apart from the passes' own time.
        peak_rss_bytes: the highest resident memory of a process that compared.
        pictures: drawn by reference and bundle, for the report.
    """

    def __init__(self, spec: BuildSpec, source_id: str, cache: Cache) -> None:
        self.seconds, self.peak_rss_bytes = 0.0, 0
        self.pictures: list[Picture] = []
        self._spec, self._cache, self._source_id = spec, cache, source_id
        # A network that was made another on purpose is judged by the budget for that, once; a budget so wide would hide
        # what the passes around it break.
        self._budget_of_change = budget_for(PRUNED if spec.prunes else spec.precision, spec.budget)
        within = budget_for(spec.precision, spec.budget).component_relative_l2
        self._budget = replace(self._budget_of_change, component_relative_l2=within)
        self._effort = Effort("full", options_for(source_id, spec.prompts))
        self._reference: Reference | None = None
        self._network: Reference | None = None  # what components are compared with
        self._figures: dict[str, Figures] = {}
        self._executed: Bundle | None = None
        self._unverified: dict[str, str] = {}
        self._diffusers: AgainstDiffusers | None = None
        self._levels: Mapping[str, Level] = {}

    def start(self, source: Bundle) -> None:
        """Take the loaded source model as the reference of everything that follows; choose how much is compared."""
        if self._spec.verify == "no":
            return
        self._reference = self._network = Reference(source, cache=self._cache.root)
        self._effort = choose(self._spec.verify, options_for(self._source_id, self._spec.prompts),
                              source.manifest.components, source.manifest.pipeline)
        self._diffusers = AgainstDiffusers(upstream_of(self._spec), source, self._cache)

    def check_source(self, pass_name: str, listener: Listener) -> None:
        """Compare the finished source with what diffusers makes of the same files, before anything is made from it.

        Args:
            pass_name: the last pass that changed the source.
            listener: told what happens.

        Raises:
            ParityError: naming the level, what differs, both values and the likely cause.
        """
        if self._diffusers is None:
            return
        listener.working("comparing weights and feeds with diffusers")
        with self._timed():
            self._levels = self._diffusers.source_levels()
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._diffusers.peak_rss_bytes)
        enforce_levels(self._levels, f"pass {pass_name}")

    @property
    def may_wait(self) -> bool:
        """Whether a pass need not be compared if a later one is: a call of these networks takes minutes."""
        return self._effort.options.small

    def rebase(self, bundle: Bundle) -> None:
        """Compare components with these from now on; pictures stay the source's."""
        if self._reference is None:
            return
        self._network = Reference(bundle, cache=self._cache.root)
        self._figures = {}

    def after_pass(self, pass_name: str, written: Iterable[str], bundle: Bundle, listener: Listener, *,
                   changes_network: bool = False) -> Bundle:
        """Compare the components that a pass wrote; gives the bundle back with their figures in its manifest.

        Args:
            pass_name: in messages.
            written: names of the components.
            bundle: what the pass left.
            listener: told what happens.
            changes_network: whether the pass meant to leave another network.

        Raises:
            ParityError: naming the pass, component, shape and worst output.
        """
        if self._network is None:
            return bundle
        components = dict(bundle.manifest.components)
        self._unverified = {}
        budget = self._budget_of_change if changes_network else self._budget
        with self._timed():
            for name in written:
                listener.working(f"{pass_name}: comparing {name} with PyTorch")
                report = self._check(self._network, bundle, name)
                enforce(report, budget, pass_name)
                self._unverified.update(report.unverified)
                self._figures.update(report.figures)
                # What cannot be executed here (an engine without its GPU) keeps the figures of the graph it was
                # made from, and `unverified` says so.
                if name in self._figures:
                    parity = component_json(self._figures[name], budget)
                    components[name] = replace(components[name], parity=parity)
                if name in report.figures and components[name].details.get("executed") is False:
                    details = {k: v for k, v in components[name].details.items() if k != "not_executed"}
                    components[name] = replace(components[name], details={**details, "executed": True})
        bundle = replace(bundle, manifest=replace(bundle.manifest, components=components))
        if not self._unverified:
            self._executed = bundle
        return bundle

    def check_pipeline(self, listener: Listener) -> Mapping[str, Any] | None:
        """Compare whole images of the last bundle that runs here; the result is the manifest's parity.

        Raises:
            ParityError: naming what is to blame.
        """
        if self._reference is None or self._executed is None or self._diffusers is None:
            return None
        report = PipelineReport({})
        components = ComponentReport(self._figures, {})
        with self._timed(), provable(self._executed, self._executed.manifest.components,
                                     self._cache.root / "work") as bundle:
            if self._effort.level != "components":
                listener.working("comparing images with PyTorch's")
                report = check_pipeline(self._reference, bundle, self._budget, self._effort.options,
                                        components=components, gallery=gallery_for(self._source_id))
                self._enforce(Verification(components, report, self._budget, self._effort, self._levels))
            listener.working("comparing images with diffusers'")
            if (feeds := self._diffusers.feeds_of(bundle)) is not None:
                self._levels = merged(self._levels, "feeds", feeds)
            images = self._diffusers.images(bundle, self._effort, self._budget.image_psnr_db)
            self._levels = merged(self._levels, "images", images)
            self._enforce(Verification(components, report, self._budget, self._effort, self._levels))
        self.pictures = [Picture(p.prompt, p.scheduler, p.reference, p.candidate, p.psnr_db, p.ssim)
                         for p in report.pairs]
        figures = ComponentReport(self._figures, self._unverified)
        return Verification(figures, report, self._budget, self._effort, self._levels).to_json()

    def _enforce(self, judged: Verification) -> None:
        """Stop at a broken budget of whole images, with all figures in the error."""
        try:
            enforce(judged.pipeline, self._budget, "package")
            enforce_levels(judged.upstream, "pass package")
        except ParityError as error:
            error.figures = judged.to_json()
            raise

    def _check(self, reference: Reference, bundle: Bundle, name: str) -> ComponentReport:
        """Figures of one component, from the cache when the same bytes were compared before."""
        component = bundle.component(name)
        key = {"kind": "component parity", "source": reference.identity, "component": component.sha256,
               "inputs": to_json(component.inputs), "axes": to_json(component.axes),
               "emulated": computes_in_16_bits(component),
               "facts": to_json(bundle.manifest.pipeline), "options": digest_of(to_json(self._effort.options)),
               "format": component.format,
               "runtime": runtime_identity(self._effort.options.session.device, component.format),
               "libraries": versions_of(("torch",))}
        if (known := self._cache.find_fact(key)) is not None:
            shapes = tuple(tuple(s) for s in known.pop("shapes"))
            figures = Figures(**{**known, "shapes": shapes, "worst_shape": tuple(known["worst_shape"])})
            return ComponentReport({name: figures}, {})
        with provable(bundle, [name], self._cache.root / "work") as proof:
            report = self._compare(reference, proof, name)
        figures_found = report.figures.get(name)
        if figures_found is not None and figures_found.compare(self._budget.component_relative_l2):
            self._cache.store_fact(key, asdict(figures_found))
        return report

    def _compare(self, reference: Reference, bundle: Bundle, name: str) -> ComponentReport:
        """Here or, if the network is large, in a process of its own, whose memory is given back."""
        network = {name: reference.bundle.manifest.components.get(name, bundle.component(name))}
        if total_bytes(network) <= ABOVE_BYTES:
            return check_components(reference, bundle, self._effort.options, [name])
        request = {"source": to_request(reference.bundle), "candidate": to_request(bundle), "name": name,
                   "options": to_json(self._effort.options), "cache": str(self._cache.root.resolve())}
        found, peak = call_isolated("deploy.build.gate:compare_request", request, f"comparing {name}")
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak)
        report: ComponentReport = from_json(ComponentReport, found, name)
        return report

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with measured() as spent:
            yield
        self.seconds += spent.seconds
        self.peak_rss_bytes = max(self.peak_rss_bytes, spent.peak_rss_bytes)


def compare_request(request: Mapping[str, Any]) -> Any:
    """What a child process does for a `Gate`: one component against the reference, whose answers are kept on disk."""
    options: ParityOptions = from_json(ParityOptions, request["options"], "options")
    reference = Reference(from_request(request["source"]), cache=Path(request["cache"]))
    return to_json(check_components(reference, from_request(request["candidate"]), options, [request["name"]]))
