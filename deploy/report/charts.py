"""Plots what `sections` hands it as inline SVG: lines over steps, points of a Pareto front. Computes no figure.

Without a plotting library, which is megabytes in the page or in the set-up: these are two kinds of plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 14, 46
COLOURS = 6  # custom properties --c0 to --c5 of the page: readable on white and on black


@dataclass(frozen=True)
class Point:
    """One value.

    Attributes:
        x, y: position in the axes' units.
        tip: text that is shown under the pointer.
        strong: whether its mark is filled; that of a point that others beat is hollow.
    """

    x: float
    y: float
    tip: str
    strong: bool = True


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axis:
    """A label, whether the scale is logarithmic, for values above 0, and the most that a value can be."""

    label: str
    log: bool = False
    most: float = math.inf


def chart(series: Sequence[Series], x: Axis, y: Axis, *, joined: bool = True) -> str:
    """An SVG; empty if there is nothing to plot. Values that are not finite are left out.

    Args:
        series: at most as many colours as there are; more begin again.
        x, y: the axes.
        joined: whether lines go from point to point.
    """
    shown = [Series(s.name, tuple(p for p in s.points if _plottable(p, x, y))) for s in series]
    points = [p for s in shown for p in s.points]
    if not points:
        return ""
    across, down = _Scale([p.x for p in points], x), _Scale([p.y for p in points], y)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y.label)} over {escape(x.label)}">']
    for value, text in across.ticks():
        at = _across(across, value)
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                     f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    for value, text in down.ticks():
        at = _down(down, value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}'
                 f'</text><text x="15" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" transform="rotate(-90 15 '
                 f'{(TOP + HEIGHT - BOTTOM) / 2})">{escape(y.label)}</text>')
    for number, one in enumerate(shown):
        parts.append(_generated(one, f"var(--c{number % COLOURS})", across, down, joined))
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """Names beside their colours, for more than one."""
    if len(series) < 2:
        return ""
    items = (f'<span><i style="background:var(--c{i % COLOURS})"></i>{escape(s.name)}</span>'
             for i, s in enumerate(series))
    return f'<div class="legend">{"".join(items)}</div>'


def _generated(series: Series, colour: str, across: _Scale, down: _Scale, joined: bool) -> str:
    places = [(_across(across, p.x), _down(down, p.y), p) for p in series.points]
    line = ""
    if joined and len(places) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)
        line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    dots = (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{3.5 if joined else 6}" stroke="{colour}" stroke-width="2" '
            f'fill="{colour if p.strong else "transparent"}" data-tip="{escape(p.tip)}"><title>{escape(p.tip)}</title>'
            "</circle>" for a, b, p in places)
    return line + "".join(dots)


def _plottable(point: Point, x: Axis, y: Axis) -> bool:
    return (math.isfinite(point.x) and math.isfinite(point.y)
            and (point.x > 0 or not x.log) and (point.y > 0 or not y.log))


class _Scale:
    """Values to 0..1, with room at both ends."""

    def __init__(self, values: Sequence[float], axis: Axis) -> None:
        log = self._log = axis.log
        self._most = axis.most
        found = [math.log10(v) if log else v for v in values]
        low, high = min(found), max(found)
        if log:
            low, high = math.floor(low), math.ceil(high)
            high += high == low
        else:
            margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            low, high = low - margin, min(high + margin, self._most + margin / 4)  # room for half a dot
        self._low, self._high = low, high

    def __call__(self, value: float) -> float:
        return ((math.log10(value) if self._log else value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values with their text: decades, or multiples of 1, 2 or 5 times a power of ten."""
        if self._log:
            stride = max(1, round((self._high - self._low) / 5))
            return [(10.0**n, f"1e{n}") for n in range(int(self._low), int(self._high) + 1, stride)]
        rough = (self._high - self._low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        first = math.ceil(self._low / step)
        last = math.floor(min(self._high, self._most) / step)
        return [(n * step, f"{n * step:.4g}") for n in range(first, last + 1)]


def _across(scale: _Scale, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * scale(value)


def _down(scale: _Scale, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale(value)
