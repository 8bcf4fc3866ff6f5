"""Says whether a row's numbers depend on the rows that share its call: what was measured, and what follows.

Measuring is `deploy.building.batch_invariance`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from runtimes.backends.batching import row_range
from runtimes.backends.session import Session, WrappedSession
from runtimes.bundle.manifest import Component, Manifest, digest_of
from runtimes.bundle.tensors import ShapeRange
from runtimes.system.compute_identity import runtime_identity
from runtimes.system.device import CPU, Device

DYNAMIC = "w8a8-dynamic"  # `calibration.graphs.layers.DYNAMIC`, the precision of layers with such ranges
LEAST_DB = 30.0  # below it, company decides what an image shows: ranges of dynamic INT8 over all rows of a call


@dataclass(frozen=True)
class BatchFact:
    """What company does to the rows of one component.

    Attributes:
        exact: a row has the same bits alone and in a call of any number of rows.
        decibels: else the least ratio of a row's energy to that of its difference.
        fixed: a row has the same bits in any company, as long as the number of rows is the same.
    """

    exact: bool
    decibels: float | None = None
    fixed: bool = True


@dataclass(frozen=True)
class BatchFacts:
    """What is known of the components, and whether it matters to the caller.

    Attributes:
        measured: by component; nothing of those that are missing.
        deterministic: an image must not depend on its company in any bit.
        ranged: components whose activations have ranges found at run time, those of all rows of a call together.
    """

    measured: Mapping[str, BatchFact] = field(default_factory=dict)
    deterministic: bool = False
    ranged: frozenset[str] = frozenset()

    @classmethod
    def of(cls, manifest: Manifest, device: Device = CPU, *, deterministic: bool = False) -> BatchFacts:
        """What the build measured and wrote into the manifest, as far as the same processor and libraries run it here.

        Args:
            manifest: of the bundle.
            device: that its components run on.
            deterministic: see the attribute.
        """
        measured = {name: fact for name, fact in manifest.measured.get("batch", {}).items()
                    if name in manifest.components}
        here = {kind: digest_of(runtime_identity(device, kind))
                for kind in {manifest.components[name].format for name in measured}}
        # What runs before the steps does so for one prompt or schedule at a time: it has no company.
        alone = {entry.component: BatchFact(True) for entry in manifest.pipeline.denoiser.beforehand.values()}
        return cls({name: BatchFact(fact["exact"], fact.get("decibels"), fact["fixed"])
                    for name, fact in measured.items()
                    if fact["runtime"] == here[manifest.components[name].format]} | alone, deterministic,
                   frozenset(name for name, component in manifest.components.items() if _is_ranged(component)))

    def exact(self, component: str) -> bool:
        """Whether it was measured that company changes nothing."""
        return component in self.measured and self.measured[component].exact

    def shares(self, component: str) -> bool:
        """Whether rows of several jobs may share a call."""
        fact = self.measured.get(component)
        if fact is None:
            return component not in self.ranged
        if fact.exact:
            return True
        if self.deterministic:
            return fact.fixed
        return fact.decibels is None or fact.decibels >= LEAST_DB

    def sessions(self, sessions: Mapping[str, Session]) -> Mapping[str, Session]:
        """The sessions, with one number of rows for all calls of those that need it to be deterministic."""
        return _Fixed(sessions, self) if self.deterministic else sessions


def _is_ranged(component: Component) -> bool:
    quantization = component.graph.quantization
    return quantization is not None and quantization.layers.get(DYNAMIC, 0) > 0


class _Fixed(Mapping[str, Session]):
    def __init__(self, sessions: Mapping[str, Session], facts: BatchFacts) -> None:
        self._sessions, self._facts = sessions, facts
        self._made: dict[str, Session] = {}

    def __getitem__(self, name: str) -> Session:
        session = self._sessions[name]
        if self._facts.exact(name) or row_range(session).min == row_range(session).max:
            return session
        if name not in self._made:
            self._made[name] = _FixedRows(session)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


class _FixedRows(WrappedSession):
    """A session that says it takes one number of rows only: calls are cut and padded to it by `RowRunner`."""

    def __init__(self, inner: Session) -> None:
        component, axis = inner.component, inner.component.inputs[0].shape[0]
        assert isinstance(axis, str)
        known = component.axes[axis]
        rows = ShapeRange(known.range.opt, known.range.opt, known.range.opt)
        super().__init__(inner, dataclasses.replace(
            component, axes={**component.axes, axis: dataclasses.replace(known, range=rows)}))
