"""Measures how much pruning the output bears at each level, and chooses the widths expected to hurt least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from deploy.pruning.shrink.widths import Level, Widths, fit_together, make_widths

MAX_CHOICES = 6  # of a level that are tried
TOLERANCE = 0.02  # shapes whose share of removed channels is this near the wanted one compete

Errors = Mapping[int, float]


def scan(levels: Sequence[Level], error_of: Callable[[Widths], float]) -> list[dict[int, float]]:
    """The output's error when one level alone, or all that are equally wide, has each of its smaller widths.

    Args:
        levels: of the network.
        error_of: relative L2 error of the network pruned to a shape, on the teacher's trajectory.

    Returns:
        per level, width -> error; the level's own width has none.
    """
    found: dict[int, dict[int, float]] = {}
    for level in levels:
        if level.width in found:
            continue
        found[level.width] = {level.width: 0.0}
        for width in _thinned(level.choices[:-1]):
            remaining = [width if other.width == level.width else other.width for other in levels]
            if fit_together(levels, remaining):
                found[level.width][width] = error_of(make_widths(levels, remaining))
    return [found[level.width] for level in levels]


def sensitive_widths(levels: Sequence[Level], ratio: float, errors: Sequence[Errors]) -> Widths:
    """The shape with the wanted share of channels removed whose errors, taken as independent, add up to the least.

    Args:
        levels: of the network.
        ratio: share of channels to remove, one that `uniform_widths` accepts.
        errors: from `scan`.
    """
    total = sum(level.width for level in levels)

    def misfit(remaining: Sequence[int]) -> float:
        return abs(1 - sum(remaining) / total - ratio)

    def error(remaining: Sequence[int]) -> float:
        return sum(e[width] ** 2 for e, width in zip(errors, remaining, strict=True))

    shapes = [s for s in itertools.product(*(sorted(e) for e in errors))
              if sum(s) < total and fit_together(levels, s)]
    nearest = min(misfit(s) for s in shapes)
    return make_widths(levels, min((s for s in shapes if misfit(s) <= max(nearest, TOLERANCE)), key=error))


def _thinned(choices: Sequence[int]) -> Sequence[int]:
    """At most `MAX_CHOICES` of them, evenly, the largest always."""
    if len(choices) <= MAX_CHOICES:
        return choices
    return [choices[round((i + 1) * len(choices) / MAX_CHOICES) - 1] for i in range(MAX_CHOICES)]
