"""Compares, component by component, every output that the family declares; one network is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deploy.parity.comparison_options import ParityOptions
from deploy.parity.metrics import Comparison, TensorErrors, tensor_errors, worst
from deploy.parity.reference.answers import Reference
from deploy.parity.reference.planned_shapes import plan_runs
from deploy.parity.reference.sample_feeds import Feeds, NoRealInputsError, Sample, cast
from runtimes.backends.session import FORMATS, Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.errors import DeployError, UnavailableError
from runtimes.pipeline.bundle_sessions import open_session
from runtimes.system.progress import listener

SOURCE_FORMAT = "safetensors"


@dataclass(frozen=True)
class Figures:
    """How far one component is from its reference, over all shapes, calls and outputs.

    Attributes:
        max_abs, relative_l2: the largest; NaN if there is one.
        cosine: the smallest.
        nonfinite: NaN and infinite values of all outputs together.
        shapes: of the first input, one per compared shape.
        worst_output, worst_shape: where relative_l2 is largest, or what could not be run.
        problem: why it could not be compared at `worst_shape`, which counts as broken.
    """

    max_abs: float
    relative_l2: float
    cosine: float
    nonfinite: int
    shapes: tuple[tuple[int, ...], ...]
    worst_output: str
    worst_shape: tuple[int, ...]
    problem: str = ""

    def compare(self, tolerance: float) -> Comparison:
        """Against a budget: fails for anything not finite and for anything that could not be run."""
        return Comparison("relative_l2", math.nan if math.isinf(self.severity) else self.relative_l2, tolerance)

    @property
    def severity(self) -> float:
        """relative_l2 for ranking: infinite for anything not finite and for anything that could not be run."""
        broken = self.problem or self.nonfinite or not math.isfinite(self.max_abs)
        return math.inf if broken else self.relative_l2


@dataclass(frozen=True)
class ComponentReport:
    """Figures by component, and what could not be executed here, by component, with why."""

    figures: Mapping[str, Figures]
    unverified: Mapping[str, str]

    def worst(self, tolerance: float) -> tuple[str, Figures] | None:
        """The component that is furthest beyond the tolerance, if any is beyond it."""
        broken = [(name, f) for name, f in self.figures.items() if not f.compare(tolerance)]
        return max(broken, key=lambda entry: entry[1].severity) if broken else None


def check_components(
    reference: Reference, candidate: Bundle, options: ParityOptions, names: Iterable[str] | None = None
) -> ComponentReport:
    """Compare components of the candidate with the reference at three shapes or more, as their axes allow.

    Args:
        reference: the source model.
        candidate: any bundle made from it, of any format that runs here.
        options: how inputs are recorded, and where the candidate runs.
        names: only these components (a pass that leaves the others alone); all by default.

    Raises:
        InputError: the candidate's components have no sizes in common, or it lacks one of `names`.
    """
    components = candidate.manifest.components
    runs = plan_runs(components, candidate.manifest.pipeline, small=options.small, possible=reference.possible())
    figures: dict[str, Figures] = {}
    unverified: dict[str, str] = {}
    for name in components if names is None else names:
        component = candidate.component(name)
        if component.format not in FORMATS and component.format != SOURCE_FORMAT:
            unverified[name] = f"nothing here runs the format {component.format!r}"
            continue
        try:
            samples = reference.samples(name, component, runs, options)
        except (NoRealInputsError, UnavailableError) as error:
            unverified[name] = str(error)
            continue
        try:
            session = open_candidate(candidate, name, options.session)
            try:
                figures[name] = _compare(session, samples)
            finally:
                session.close()
                del session  # before the next network is loaded
        except UnavailableError as error:
            unverified[name] = str(error)
        except DeployError as error:
            shape = samples[0][0].shape_of(component)
            figures[name] = _broken(component.inputs[0].name, shape, f"it cannot be loaded: {error}", ())
    return ComponentReport(figures, unverified)


def open_candidate(bundle: Bundle, name: str, options: SessionOptions) -> Session:
    """A component of any bundle: with its runtime, or with PyTorch while it is still in the source format.

    Raises:
        BundleError: the runtime cannot load it.
        UnavailableError: the runtime or the device is missing here.
    """
    if bundle.component(name).format == SOURCE_FORMAT:
        from deploy.parity.reference.torch_sessions import TorchSession

        return TorchSession(bundle, name)
    return open_session(bundle, name, options)


class _Unusable(Exception):
    """A call that gave nothing to compare: `tensor` is the input or output that is to blame."""

    def __init__(self, tensor: str, problem: str) -> None:
        super().__init__(problem)
        self.tensor = tensor


def _compare(session: Session, samples: Sequence[Sequence[Sample]]) -> Figures:
    component = session.component
    errors: list[tuple[TensorErrors, str, tuple[int, ...]]] = []
    refused: list[tuple[_Unusable, Sample]] = []
    worked: list[Sample] = []
    shapes = tuple(at_shape[0].shape_of(component) for at_shape in samples)
    every = [sample for at_shape in samples for sample in at_shape]
    for number, sample in enumerate(every, 1):
        try:
            outputs = _outputs(session, sample)
        except _Unusable as error:
            refused.append((error, sample))
            continue
        worked.append(sample)
        shape = sample.shape_of(component)
        listener().advanced(number, len(every), "calls compared")
        errors += [(tensor_errors(expected, outputs[n]), n, shape) for n, expected in sample.outputs.items()]
    if refused:
        problem, sample = refused[0]
        axes = _suspects(component, sample, worked)
        of = f" (axis {', '.join(axes)})" if axes else ""
        return _broken(problem.tensor, sample.shape_of(component), f"{problem}{of}", shapes)
    worst_errors, output, shape = max(
        errors, key=lambda e: math.inf if math.isnan(e[0].relative_l2) else e[0].relative_l2
    )
    return Figures(
        max_abs=worst([e.max_abs for e, _, _ in errors]),
        relative_l2=worst_errors.relative_l2,
        cosine=worst([e.cosine for e, _, _ in errors], larger_is_better=True),
        nonfinite=sum(e.nonfinite for e, _, _ in errors),
        shapes=shapes, worst_output=output, worst_shape=shape,
    )


def _outputs(session: Session, sample: Sample) -> Feeds:
    """Run the candidate; whatever it raises at a shape that its manifest promises is broken parity, not a crash."""
    component = session.component
    try:
        outputs = session.run(cast(sample.feeds, component))
    except UnavailableError:
        raise
    except MemoryError as error:
        raise UnavailableError("not enough memory to run it", where=session.name) from error
    except Exception as error:
        text = error.what if isinstance(error, DeployError) else f"{type(error).__name__}: {error}"
        raise _Unusable(component.inputs[0].name, f"it cannot run: {text}") from error
    specs = {spec.name: spec for spec in component.outputs}
    for name, expected in sample.outputs.items():
        if name not in outputs:
            raise _Unusable(name, f"it gives {', '.join(outputs)}, not {name}")
        if (found := outputs[name].shape) != expected.shape:
            axes = [str(axis) for axis, a, b in zip(specs[name].shape, found, expected.shape, strict=False) if a != b]
            raise _Unusable(name, f"{name} has shape {list(found)}, expected {list(expected.shape)}"
                            + (f" (axis {', '.join(axes)})" if len(found) == expected.ndim else ""))
    return outputs


def _suspects(component: Component, refused: Sample, worked: Sequence[Sample]) -> list[str]:
    """Axes whose size at the refused call no call that worked had."""
    def sizes(sample: Sample) -> dict[str, int]:
        return {str(axis): size for spec in component.inputs
                for axis, size in zip(spec.shape, sample.feeds[spec.name].shape, strict=True)}

    seen = [sizes(sample) for sample in worked]
    return [a for a, size in sizes(refused).items() if seen and all(other[a] != size for other in seen)]


def _broken(tensor: str, shape: tuple[int, ...], problem: str, shapes: tuple[tuple[int, ...], ...]) -> Figures:
    return Figures(math.nan, math.nan, math.nan, 0, shapes or (shape,), tensor, shape, problem)
