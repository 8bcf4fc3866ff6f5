"""Defines what a pass is, and plans a chain of them: manifest to manifest, without opening a weight."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from runtimes.bundle.folder import Bundle, link_or_copy
from runtimes.bundle.manifest import Component, FileRecord, Manifest, PassRecord
from runtimes.errors import DeployError, InputError, UnavailableError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


@dataclass(frozen=True)
class Step:
    """What one pass will do: printable, hashable into a cache key, made without opening a weight.

    Attributes:
        pass_name, version: of the pass that planned it.
        config: every default resolved, JSON-able.
        reads: component that will be written -> components whose contents decide its bytes.
        after: predicted structure; the next pass plans from it and the build checks it against the result.
        summary: one line for a person.
        files: sha256 -> path of files outside the bundle that are read. Paths enter neither record nor cache key;
            `config` names the hashes.
        provisional: a later pass finishes what this one begins, and the parity gate waits for it.
    """

    pass_name: str
    version: int
    config: Mapping[str, Any]
    reads: Mapping[str, tuple[str, ...]]
    after: Manifest
    summary: str
    files: Mapping[str, str] = field(default_factory=dict)
    provisional: bool = False

    @property
    def record(self) -> PassRecord:
        """The entry of this step in the manifest's list of passes."""
        return PassRecord(self.pass_name, self.version, dict(self.config))

    def recorded(self) -> Step:
        """The step with its own entry at the end of the passes of `after`."""
        return replace(self, after=replace(self.after, passes=(*self.after.passes, self.record)))


@dataclass(frozen=True)
class Skip:
    """The pass would change nothing."""

    reason: str


@dataclass(frozen=True)
class Unavailable:
    """This machine lacks something that the pass needs."""

    what: str
    where: str
    fix: str

    def raise_error(self) -> None:
        """Stop the build."""
        raise UnavailableError(self.what, where=self.where, fix=self.fix)


Planned = Step | Skip | Unavailable


class Pass(ABC):
    """One transformation. Instances keep no state.

    Attributes:
        name: as the manifest records it.
        version: bumped whenever the output changes.
        libraries: distributions whose versions enter the cache key.
        verify: whether the parity gate runs after it (a pass that only moves files needs none).
        defines_source: whether what it leaves is the model that parity is measured against.
        changes_network: whether it means to leave another network, which later passes must then keep.
        reads_pipeline: whether what `run` writes depends on the sampling loop: facts, scheduler and tokenizers.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    libraries: ClassVar[tuple[str, ...]]
    verify: ClassVar[bool]
    defines_source: ClassVar[bool] = False
    changes_network: ClassVar[bool] = False
    reads_pipeline: ClassVar[bool] = False

    @abstractmethod
    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Say what would be done; refuse an order that cannot work with InputError."""

    def settle(self, step: Step, source: Bundle) -> Planned:
        """Make a plan exact that needs to see a graph, right before it runs; later passes are planned again then.

        By default a plan is exact already.
        """
        return step

    @abstractmethod
    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Write component `name` below `out`, at its paths in the bundle, and return its record."""

    def measure(self, step: Step, before: Bundle, after: Bundle) -> dict[str, Any]:
        """What the pass bought on this machine; kept in `measured`, outside the digest."""
        return {}

    def explain(self, step: Step, name: str, before: Bundle, after: Bundle) -> str:
        """Where in a component that breaks the budget its error comes from, if the pass can tell."""
        return ""

    def write_files(self, step: Step, source: Bundle, out: Path) -> dict[str, FileRecord]:
        """Write tokenizers and scheduler into the bundle folder `out`; by default they are carried over as they are."""
        for name in source.manifest.files:
            link_or_copy(source.path / name, out / name)
        return dict(source.manifest.files)


@dataclass(frozen=True)
class PlannedPass:
    """A pass of the build order with what it will do."""

    instance: Pass
    planned: Planned


def load_passes(table: Mapping[str, str]) -> list[Pass]:
    """Instantiate the passes of the table, name -> module:Class, in its order."""
    passes = []
    for path in table.values():
        module, _, attribute = path.partition(":")
        passes.append(getattr(importlib.import_module(module), attribute)())
    return passes


def plan_all(passes: Sequence[Pass], origin: Manifest, spec: BuildSpec) -> list[PlannedPass]:
    """Lay out the whole build.

    Raises:
        DeployError: a pass cannot work on what the passes before it leave; the message names the pass.
    """
    manifest, planned = origin, []
    for instance in passes:
        try:
            step = instance.plan(manifest, spec)
        except DeployError as error:
            error.where = error.where or f"pass {instance.name}"
            raise
        planned.append(PlannedPass(instance, step))
        if isinstance(step, Step):
            manifest = step.after
    return planned


def require_onnx(before: Manifest, pass_name: str, fix: str) -> None:
    """Refuse an order in which a pass over graphs meets something else.

    Raises:
        InputError: naming the first component that is no ONNX graph.
    """
    for name, component in before.components.items():
        if component.format != "onnx":
            raise InputError(f"{name} is {component.format}, expected onnx", where=f"pass {pass_name}", fix=fix)


def structure(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that a plan predicts: formats, precisions, inputs, outputs and axes of the components."""
    return {name: (c.format, c.graph.planned_precision or c.precision, c.inputs, c.outputs, dict(c.axes))
            for name, c in manifest.components.items()}
