"""The map of shards: one SVG whose colours the page switches between views.

Every shard is drawn once and carries its class in every view. Where there are many, those that lie
together are drawn as one, so that the page stays small.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from flows.report.layers import Layer
from flows.report.projection import Floats, Projection, project_for, to_plane

CELLS = 12_000
"""Shapes that are drawn at most."""
_TITLES = 1500
"""Up to so many shapes say what they are when pointed at."""
WIDTH = 1000.0
_SMALLEST = 5.0
"""Side of the mark of a shard that is too small to be seen."""
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0)


@dataclass(frozen=True)
class Label:
    """Text beside the map; `at`: per cent of its width or height."""

    at: float
    text: str


@dataclass(frozen=True)
class ShardMap:
    """What the page needs to show the map."""

    svg: Markup
    height: float
    """Of the view box, whose width is `WIDTH`."""
    meridians: list[Label]
    parallels: list[Label]
    scale: Label | None
    """Length of the scale bar in per cent of the width, and what it stands for."""
    shapes: int
    shards: int
    """Per shape, at most; 1: every shape is a shard (of all its dates)."""
    marks: int
    """Shapes drawn larger than they are."""


def draw_map(lonlat: Floats, layers: Sequence[Layer], titles: Sequence[str]) -> ShardMap:
    """Draw shards with corners [N, 4, 2] in degrees, those of one place as one shape.

    titles: of each shard. Raises GeoLinkError if no place is known.
    """
    known = np.flatnonzero(np.isfinite(lonlat).all(axis=(1, 2)))
    projection = project_for(lonlat[known].reshape(-1, 2))
    plane = to_plane(projection, lonlat[known])
    if projection.world:
        plane = _uncut(plane)
    frame = _Frame.around(plane)
    xy = frame.to_page(plane)
    group = _groups(xy)
    outline, marks = _outlines(xy, group)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    paint = [_merged(layer.value[known][order], starts, layer.first_wins) for layer in layers]
    members = [m.tolist() for m in np.split(known[order], starts[1:])]
    parts = [_graticule_svg(frame, projection)]
    for n, path in enumerate(outline):
        css = " ".join(f"{_letter(v)}{p[n]}" for v, p in enumerate(paint) if p[n] >= 0)
        title = _title([titles[m] for m in members[n]]) if len(outline) <= _TITLES else Markup("")
        parts.append(Markup('<path class="{}" d="{}">{}</path>').format(css, path, title))
    svg = Markup(
        '<svg viewBox="0 0 {:g} {:g}"{} role="img" aria-label="Map of the dataset\'s shards">'
        "{}</svg>"
    ).format(
        WIDTH,
        frame.height,
        Markup(' class="many"') if len(outline) > _TITLES else "",
        Markup("").join(parts),
    )
    meridians, parallels = _labels(frame, projection)
    most = max((len(m) for m in members), default=1)
    return ShardMap(
        svg, frame.height, meridians, parallels, _scale(frame, projection), len(outline),
        most if len(outline) < len(known) else 1, marks,
    )  # fmt: skip


def css(layers: Sequence[Layer]) -> Markup:
    """Rules that paint the map and show the legend of the view that is chosen."""
    rules = []
    for n, layer in enumerate(layers):
        on = f"#view{n}:checked~.map"
        rules.append(f"{on} .legend{n}{{display:flex}}")
        rules.append(f'#view{n}:checked~.views label[for="view{n}"]{{{_CHOSEN}}}')
        rules.append(f'#view{n}:focus-visible~.views label[for="view{n}"]{{{_FOCUS}}}')
        rules += [
            f"{on} .{_letter(n)}{c}{{fill:var(--{paint})}}"
            for c, (paint, _) in enumerate(layer.legend)
        ]
    return Markup("\n").join(Markup(rule) for rule in rules)


_CHOSEN = "background:var(--ink);color:var(--paper);border-color:var(--ink)"
_FOCUS = "outline:2px solid var(--accent);outline-offset:2px"


def _letter(view: int) -> str:
    return chr(ord("a") + view)


@dataclass(frozen=True)
class _Frame:
    """From the plane's metres to the page's units."""

    west: float
    north: float
    metres: float
    """Of one unit."""
    height: float

    @classmethod
    def around(cls, plane: Floats) -> "_Frame":
        low, high = plane.min(axis=(0, 1)), plane.max(axis=(0, 1))
        span = np.maximum(high - low, 1.0) * 1.06
        middle = (low + high) / 2
        # Not flatter than 3:1, nor taller than wide.
        width = max(float(span[0]), float(span[1]))
        tall = max(float(span[1]), width / 3)
        metres = width / WIDTH
        return cls(middle[0] - width / 2, middle[1] + tall / 2, metres, round(tall / metres, 1))

    def to_page(self, plane: Floats) -> Floats:
        x = (plane[..., 0] - self.west) / self.metres
        y = (self.north - plane[..., 1]) / self.metres
        return np.stack([x, y], axis=-1)


def _uncut(plane: Floats) -> Floats:
    """Shapes that the world's map cuts in two become points on the side of their first corner."""
    cut = np.ptp(plane[..., 0], axis=1) > 10_000_000
    plane[cut] = plane[cut][:, :1]
    return plane


def _groups(xy: Floats) -> NDArray[np.int64]:
    """[N] group of each shard: those of one place, or of one square of a lattice, make a shape."""
    middle = xy.mean(axis=1)
    _, same = np.unique(np.round(middle, 2), axis=0, return_inverse=True)
    side = 2.0
    while same.max(initial=0) >= CELLS:
        _, same = np.unique(np.floor(middle / side), axis=0, return_inverse=True)
        side *= 1.25
    return np.asarray(same.reshape(-1), np.int64)


def _outlines(xy: Floats, group: NDArray[np.int64]) -> tuple[list[str], int]:
    """SVG path of each group, and how many are drawn larger than they are."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    shape = xy[order[starts]].copy()
    middle = xy.mean(axis=1)[order]
    spread = np.maximum.reduceat(middle, starts) - np.minimum.reduceat(middle, starts)
    low = np.minimum.reduceat(xy.min(axis=1)[order], starts)
    high = np.maximum.reduceat(xy.max(axis=1)[order], starts)
    (a, b), (c, d) = low.T, high.T
    box = np.stack([a, d, c, d, c, b, a, b], axis=-1).reshape(-1, 4, 2)
    apart = spread.max(axis=1) > 0.05
    shape[apart] = box[apart]
    small = np.ptp(shape, axis=1).max(axis=1) < _SMALLEST
    middle, half = shape.mean(axis=1), _SMALLEST / 2
    square = np.array([(-half, half), (half, half), (half, -half), (-half, -half)])
    shape[small] = middle[small, None] + square
    return [_path(corner) for corner in np.round(shape, 1)], int(small.sum())


def _path(corner: Floats) -> str:
    steps = np.round(np.diff(corner, axis=0), 1) + 0.0
    (x, y), rest = corner[0], "".join(f"l{dx:g} {dy:g}" for dx, dy in steps)
    return f"M{x:g} {y:g}{rest}z"


def _merged(
    value: NDArray[np.int64], starts: NDArray[np.int64], first_wins: bool
) -> NDArray[np.int64]:
    """Class of each shape: the commonest of its shards, or the first where that one counts."""
    if len(starts) == len(value):
        return value
    classes = int(value.max(initial=-1)) + 1
    if first_wins:
        ranked = np.minimum.reduceat(np.where(value < 0, classes, value), starts)
        return np.where(ranked == classes, -1, ranked)
    shape = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(value))))
    count = np.zeros((len(starts), classes + 1), np.int64)
    np.add.at(count, (shape, value + 1), 1)
    return np.asarray(count.argmax(axis=1) - 1, np.int64)


def _title(lines: list[str]) -> Markup:
    shown = [*lines[:6], f"and {len(lines) - 6:,} more"] if len(lines) > 7 else lines
    return Markup("<title>{}</title>").format("\n".join(shown))


def _lines(
    frame: _Frame, projection: Projection
) -> Iterator[tuple[str, float, float, Floats, bool]]:
    """Meridians and parallels: kind, degrees, step of degrees, points on the page, zone border."""
    edge = np.linspace(0, 1, 41)
    x0, x1 = frame.west, frame.west + WIDTH * frame.metres
    y1, y0 = frame.north, frame.north - frame.height * frame.metres
    border = np.concatenate(
        [np.stack([x0 + edge * (x1 - x0), np.full(41, y)], axis=-1) for y in (y0, y1)]
        + [np.stack([np.full(41, x), y0 + edge * (y1 - y0)], axis=-1) for x in (x0, x1)]
    )
    if projection.world:
        lon, lat = np.array([-180.0, 180.0]) + projection.middle_lon, np.array([-90.0, 90.0])
    else:
        lon, lat = projection.forward.transform(border[:, 0], border[:, 1], direction="INVERSE")
        lon = (lon - projection.middle_lon + 180) % 360 - 180 + projection.middle_lon
    for kind, values, across in (("lon", lon, lat), ("lat", lat, lon)):
        low, high = float(values.min()), float(values.max())
        step = next((s for s in _STEPS if (high - low) / s <= 5), 60.0)
        along = np.linspace(across.min(), across.max(), 61)
        for k in range(math.ceil(low / step), math.floor(high / step) + 1):
            degrees = k * step
            if kind == "lat" and abs(degrees) > 89:
                continue
            fixed = np.full(61, degrees)
            pair = (fixed, along) if kind == "lon" else (along, fixed)
            page = frame.to_page(to_plane(projection, np.stack(pair, axis=-1)))
            yield kind, degrees, step, page, kind == "lon" and degrees % 6 == 0
        if kind == "lon" and step < 6 and not projection.world:
            for border_lon in range(math.ceil(low / 6) * 6, math.floor(high) + 1, 6):
                if border_lon % step:
                    pair = (np.full(61, float(border_lon)), along)
                    page = frame.to_page(to_plane(projection, np.stack(pair, axis=-1)))
                    yield kind, float(border_lon), 1.0, page, True


def _graticule_svg(frame: _Frame, projection: Projection) -> Markup:
    parts = []
    for _, _, _, page, zone in _lines(frame, projection):
        page = page[np.isfinite(page).all(axis=1)]
        near = (np.abs(page - [WIDTH / 2, frame.height / 2]) < 3 * WIDTH).all(axis=1)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in page[near])
        parts.append(
            Markup('<polyline class="{}" points="{}"/>').format("zone" if zone else "line", points)
        )
    return Markup("").join(parts)


def _labels(frame: _Frame, projection: Projection) -> tuple[list[Label], list[Label]]:
    """Where meridians meet the lower edge and parallels the left one, as per cent."""
    meridians: list[Label] = []
    parallels: list[Label] = []
    for kind, degrees, step, page, _ in _lines(frame, projection):
        axis, target, extent = (1, frame.height, WIDTH) if kind == "lon" else (0, 0.0, frame.height)
        across, along = page[:, axis], page[:, 1 - axis]
        order = np.argsort(across)
        if not across[order[0]] <= target <= across[order[-1]]:
            continue
        at = 100 * float(np.interp(target, across[order], along[order])) / extent
        if 3 <= at <= 97:
            (meridians if kind == "lon" else parallels).append(
                Label(at, _degrees(kind, degrees, step))
            )
    return sorted(meridians, key=lambda m: m.at), sorted(parallels, key=lambda p: p.at)


def _degrees(kind: str, degrees: float, step: float) -> str:
    if kind == "lon":
        degrees = (degrees + 180) % 360 - 180
    side = ("E" if degrees > 0 else "W") if kind == "lon" else ("N" if degrees > 0 else "S")
    places = next(n for n in range(4) if round(step, n) == step)
    return f"{abs(degrees):.{places}f}°{side if degrees and abs(degrees) != 180 else ''}"


def _scale(frame: _Frame, projection: Projection) -> Label | None:
    """A round length of at most a quarter of the width; none on a map of the world."""
    if projection.radius_deg > 20:
        return None
    most = WIDTH * frame.metres / 4
    power = 10.0 ** math.floor(math.log10(most))
    metres = max(m * power for m in (1, 2, 5) if m * power <= most)
    text = f"{metres / 1000:,g} km" if metres >= 1000 else f"{metres:g} m"
    return Label(100 * metres / (WIDTH * frame.metres), text)
