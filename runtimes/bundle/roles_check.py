"""Compares roles with the components that they name."""

from __future__ import annotations

from collections.abc import Mapping

from runtimes.bundle.roles import Described, Roles
from runtimes.errors import InputError


def check_roles(roles: Roles, components: Mapping[str, Described]) -> None:
    """Refuse roles that name an input or output which their component does not have.

    Args:
        roles: of a pipeline.
        components: of it, as far as they are there: one that is missing is refused by whoever opens it.

    Raises:
        InputError: names the component and what it lacks.
    """
    denoiser, condition = roles.denoiser, roles.conditioner
    fed = [denoiser.timestep, condition.context, condition.pooled, *condition.numbers]
    before = [entry for entry in denoiser.beforehand.values() if entry.component in components]
    for entry in before:  # what they take, the others need not take as well
        fed = [name for name in fed if name not in {spec.name for spec in components[entry.component].inputs}]
    values = [name for entry in before for name in entry.features]
    wanted: list[tuple[str, list[str], list[str]]] = [
        (denoiser.component, [denoiser.sample, *fed, *values], [denoiser.output])]
    wanted += [(entry.component, [], list(entry.features)) for entry in before]
    if (shallow := denoiser.shallow) is not None:
        wanted += [(denoiser.component, [], list(shallow.features)),
                   (shallow.component, [denoiser.sample, *fed, *shallow.features], [denoiser.output])]
    wanted += [(half.component, [half.input], [half.output]) for half in (roles.codec.encoder, roles.codec.decoder)]
    wanted += [(e.component, [e.ids], [e.hidden, e.pooled]) for e in condition.encoders]
    for name, inputs, outputs in wanted:
        if name not in components:
            continue
        for what, names, specs in (("input", inputs, components[name].inputs),
                                   ("output", outputs, components[name].outputs)):
            if missing := sorted({n for n in names if n} - {spec.name for spec in specs}):
                raise InputError(f"{name} has no {what} {', '.join(missing)}, which its role names")
