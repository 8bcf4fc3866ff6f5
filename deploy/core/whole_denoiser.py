"""Shows a denoiser that was taken apart as the one network that it was: for those who compare it, not for the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from runtimes.backends.batching import RowRunner
from runtimes.backends.session import Arrays, Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import ROWS, Role, Roles
from runtimes.pipeline.bundle_sessions import open_session


def whole_components(components: Mapping[str, Component], roles: Roles) -> dict[str, Component]:
    """The components as the source has them: what runs beforehand is part of the denoiser and of its other entry."""
    return {name: whole_component(name, components, roles) for name in components
            if roles.role(name) is not Role.BEFOREHAND}


def whole_component(name: str, components: Mapping[str, Component], roles: Roles) -> Component:
    """The record of one component, with the inputs that it has in the source, and all files that it needs."""
    step, parts = components[name], [components[part] for part in roles.pieces(name)[1:]]
    if not parts:
        return step
    batch, given = step.inputs[0].shape[0], {spec.name for part in parts for spec in part.outputs}
    known = {spec.name: replace(spec, shape=tuple(batch if d == ROWS else d for d in spec.shape))
             for component in (*parts, step) for spec in component.inputs if spec.name not in given}
    condition, denoiser = roles.conditioner, roles.denoiser
    first = [denoiser.sample, denoiser.timestep, condition.context, condition.pooled, *condition.numbers]
    order = [*(n for n in first if n in known), *(n for n in known if n not in first)]
    axes = {axis: known_axis for part in (*parts, step) for axis, known_axis in part.axes.items() if axis != ROWS}
    files = {file: record for part in (*parts, step) for file, record in part.files.items()}
    return replace(step, inputs=tuple(known[n] for n in order), axes=axes, files=files,
                   parameters=step.parameters + sum(part.parameters for part in parts))


def open_whole(bundle: Bundle, name: str, options: SessionOptions) -> Session:
    """Load one component as the source has it.

    Raises:
        DeployError: as `open_session`.
    """
    roles = bundle.manifest.pipeline
    if len(roles.pieces(name)) == 1:
        return open_session(bundle, name, options)
    opened: list[Session] = []
    try:
        for part in roles.pieces(name):
            opened.append(open_session(bundle, part, options))
    except BaseException:
        for session in opened:
            session.close()
        raise
    return WholeSession(whole_component(name, bundle.manifest.components, roles), opened[0], opened[1:])


def whole_session(sessions: Mapping[str, Session], roles: Roles, name: str) -> Session:
    """A component of open sessions as the source has it."""
    first, *parts = (sessions[part] for part in roles.pieces(name))
    components = {session.name: session.component for session in (first, *parts)}
    return WholeSession(whole_component(name, components, roles), first, parts) if parts else first


class WholeSession(Session):
    """A denoiser's step graph and what runs beforehand, all in each call.

    Args:
        component: what both together take and give.
        steps: the step graph.
        parts: what runs beforehand. Closing closes all.
    """

    def __init__(self, component: Component, steps: Session, parts: list[Session]) -> None:
        super().__init__(steps.name, component)
        self._steps, self._parts = steps, parts

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        values = dict(feeds)
        rows = len(feeds[self.component.inputs[0].name])
        for part in self._parts:
            values |= RowRunner(part, rows).run({spec.name: feeds[spec.name] for spec in part.component.inputs})
        return RowRunner(self._steps, rows).run({s.name: values[s.name] for s in self._steps.component.inputs})

    def _close(self) -> None:
        for session in (self._steps, *self._parts):
            session.close()
