"""Curves over steps as inline SVG, in the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

_WIDTH, _HEIGHT = 360.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 10.0, 24.0
_POINTS = 300
"""Longer curves are drawn by the least and the most of as many stretches."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart; points that are not finite are left out."""

    name: str
    steps: ArrayLike
    values: ArrayLike


def draw_curves(curves: Sequence[Curve], *, percent: bool = False, dots: bool = False) -> Markup:
    """Curves over the same axes; markers at the points if `dots`. Empty if there is no point."""
    points = [_finite(curve) for curve in curves]
    every = np.concatenate([np.zeros((0, 2)), *points])
    if not len(every):
        return Markup("")
    (x0, low), (x1, high) = every.min(0), every.max(0)
    x1 = max(x1, x0 + 1)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    tall, wide = _HEIGHT - _TOP - _BOTTOM, _WIDTH - _LEFT - _RIGHT

    def place(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        x = _LEFT + wide * (xy[:, 0] - x0) / (x1 - x0)
        return np.stack([x, _HEIGHT - _BOTTOM - tall * (xy[:, 1] - low) / (high - low)], 1)

    parts = []
    for value in ticks:
        y = float(place(np.array([[x0, value]]))[0, 1])
        text = f"{100 * value:g} %" if percent else f"{value:g}"
        parts.append(
            Markup(
                '<line class="grid" x1="{0:g}" x2="{1:g}" y1="{2:.1f}" y2="{2:.1f}"/>'
                '<text x="{3:g}" y="{4:.1f}" text-anchor="end">{5}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, _LEFT - 5, y + 4, text)
        )
    for x, side in ((x0, "start"), (x1, "end")):
        at = _LEFT + wide * (x - x0) / (x1 - x0)
        parts.append(
            Markup('<text x="{:.1f}" y="{:g}" text-anchor="{}">{:,.0f}</text>').format(
                at, _HEIGHT - 7, side, x
            )
        )
    for n, (curve, xy) in enumerate(zip(curves, points, strict=True)):
        if not len(xy):
            continue
        placed = place(_thinned(xy))
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed.tolist())
        last = f"{100 * xy[-1, 1]:.1f} %" if percent else f"{xy[-1, 1]:.4g}"
        title = f"{curve.name}: {last} at step {xy[-1, 0]:,.0f}"
        parts.append(
            Markup('<polyline class="c{}" points="{}"><title>{}</title></polyline>').format(
                n, line, title
            )
        )
        if dots or len(xy) == 1:
            parts += [
                Markup('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(n, x, y)
                for x, y in placed.tolist()
            ]
    names = ", ".join(curve.name for curve in curves)
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>'
    ).format(_WIDTH, _HEIGHT, f"{names} over steps", Markup("").join(parts))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most so many round numbers that span low to high, or a little more."""
    span = high - low if high > low else max(abs(high), 1.0)
    if low == high == 0:
        high = 1.0
    elif high <= low:
        low, high = low - span / 2, high + span / 2
    power = 10.0 ** np.floor(np.log10(span / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * power
        first, last = np.floor(low / step), np.ceil(high / step)
        if last - first < most:
            break
    return [float(f"{n * step:.12g}") for n in range(int(first), int(last) + 1)]


def _finite(curve: Curve) -> NDArray[np.float64]:
    xy = np.stack(
        [np.asarray(curve.steps, np.float64), np.asarray(curve.values, np.float64)], 1
    ).reshape(-1, 2)
    return xy[np.isfinite(xy).all(1)]


def _thinned(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """No more than `2 * _POINTS` points, peaks kept."""
    if len(xy) <= 2 * _POINTS:
        return xy
    kept = []
    for part in np.array_split(np.arange(len(xy)), _POINTS):
        kept += sorted({part[xy[part, 1].argmin()], part[xy[part, 1].argmax()]})
    return xy[kept]
