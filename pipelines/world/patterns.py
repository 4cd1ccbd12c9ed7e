"""Patterns inside objects: furrows, crowns, vine rows, stalls with cars, ribs of roofs, waves.

Everything is a function of position, so the same field has the same furrows in every picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.world.appearance import textures_of
from pipelines.world.covers import COVER_NAMES, COVERS, TEXTURES
from pipelines.world.ground import Ground
from pipelines.world.noise import Floats, fractal, lattice, value_noise

Ints = NDArray[np.int64]
Rows = NDArray[np.int32]
_CANOPY_M = 512  # the canopy repeats at this distance


@dataclass(frozen=True)
class _Pixels:
    """P pixels of one texture: table rows, place, and noise of three lengths."""

    ground: Ground
    row: Rows
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    fine: Floats  # about 3 m
    mid: Floats  # 9 m
    coarse: Floats  # 40 m

    def local(self) -> tuple[Floats, Floats]:
        """Place along and across each pixel's object, metres; exact to about a decimetre."""
        angle = self.ground.angle[self.row]
        cos, sin = np.cos(angle), np.sin(angle)
        x = (self.x - self.ground.x[0]).astype(np.float32) + np.float32(self.ground.x[0] % 100_000)
        y = (self.y - self.ground.y[0]).astype(np.float32) + np.float32(self.ground.y[0] % 100_000)
        return x * cos + y * sin, y * cos - x * sin

    def pick(self, kind: str, chance: Floats) -> Rows:
        """A table row of a kind for each pixel, by `chance` in [0, 1]."""
        first, count = self.ground.kinds[kind]
        return (first + np.clip((chance * count).astype(np.int32), 0, count - 1)).astype(np.int32)


_Drawn = tuple[Rows, Floats]


def fill_rows(ground: Ground, rows: slice) -> tuple[Rows, Floats]:
    """Table rows [h, W] with what patterns put in, and brightness [h, W], of some raster rows."""
    index = ground.index[rows].copy()
    x, y = ground.x, ground.y[rows]
    texture = textures_of(ground.cover)[index].ravel()
    patchy = np.array([COVERS[n].patchy for n in COVER_NAMES], dtype=np.float32)[ground.cover]
    bright = 1 + patchy[index] * (1.5 * fractal(x, y, (310.0, 110.0), 901))
    flat_index, flat_bright = index.ravel(), bright.ravel()
    fine = value_noise(x, y, max(2.4, ground.gsd_m), 902).ravel()
    mid = value_noise(x, y, 9.0, 903).ravel()
    coarse = value_noise(x, y, 40.0, 904).ravel()
    w = len(x)
    for k, name in enumerate(TEXTURES):
        draw = _PATTERNS.get(name)
        here = np.flatnonzero(texture == k) if draw else np.empty(0, np.int64)
        if draw is None or not len(here):
            continue
        r, c = np.divmod(here, w)
        pixels = _Pixels(ground, flat_index[here], x[c], y[r], fine[here], mid[here], coarse[here])
        flat_index[here], gain = draw(pixels)
        flat_bright[here] *= gain
    if ground.shade is not None:
        bright *= ground.shade[rows] * np.float32(1 / 128)
    return index, bright


def _cell(u: Floats | NDArray[np.float64], size: float) -> Ints:
    return np.floor(u / size).astype(np.int64)


def _grass(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.08 * p.fine + 0.07 * p.mid + 0.05 * p.coarse


def _rows(p: _Pixels) -> _Drawn:
    _, v = p.local()
    track = np.abs(np.mod(v, np.float32(27)) - np.float32(13.5)) < 0.9
    bed = lattice(np.zeros(1, dtype=np.int64), _cell(v, 13.5), 5) - np.float32(0.5)
    furrow = np.sin(v * np.float32(2 * np.pi / 4.6))
    gain = 1 + 0.035 * furrow + 0.06 * bed + 0.03 * p.mid + 0.04 * p.coarse
    return p.row, gain * np.where(track, np.float32(0.87), np.float32(1))


def _mown(p: _Pixels) -> _Drawn:
    _, v = p.local()
    return p.row, 1 + 0.06 * np.sign(np.sin(v * np.float32(np.pi / 7))) + 0.03 * p.fine


@lru_cache(maxsize=2)
def _canopy_tile(step_m: float) -> Floats:
    """Lit crowns on a periodic square: a bump per tree of a jittered lattice, dark between."""
    n, cell = round(_CANOPY_M / step_m), 8.0
    grid = (np.arange(n) + 0.5) * step_m
    xx, yy = np.meshgrid(grid, grid)
    cells = int(_CANOPY_M / cell)
    i, j = np.floor(xx / cell).astype(np.int64), np.floor(yy / cell).astype(np.int64)
    best = np.full(xx.shape, -1.0, dtype=np.float32)
    light = np.zeros(xx.shape, dtype=np.float32)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            a, b = (i + di) % cells, (j + dj) % cells
            r = 3.4 + 2.6 * lattice(a, b, 73)
            dx = (xx - (i + di + 0.15 + 0.7 * lattice(a, b, 71)) * cell) / r
            dy = (yy - (j + dj + 0.15 + 0.7 * lattice(a, b, 72)) * cell) / r
            crown = 1 - dx * dx - dy * dy + 0.5 * lattice(a, b, 74)
            higher = crown > best
            best = np.where(higher, crown, best)
            tone = 0.8 + 0.4 * lattice(a, b, 75)
            light = np.where(higher, tone * (1 + 0.30 * (0.5 * dx - 0.85 * dy)), light)
    return np.asarray(light * np.clip(0.6 + 0.55 * best, 0.32, 1.08), dtype=np.float32)


def _canopy(p: _Pixels) -> _Drawn:
    step = 1.0 if p.ground.gsd_m <= 1.5 else 2.0
    tile = _canopy_tile(step)
    c = np.mod(np.floor(p.x / step).astype(np.int64), tile.shape[1])
    r = np.mod(np.floor(p.y / step).astype(np.int64), tile.shape[0])
    return p.row, tile[r, c] * (1 + 0.1 * p.coarse)


def _shrub(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.16 * p.fine + 0.18 * p.mid + 0.1 * p.coarse


def _orchard(p: _Pixels) -> _Drawn:
    u, v = p.local()
    i, j = _cell(u, 6), _cell(v, 7)
    du, dv = u - (i + 0.5).astype(np.float32) * 6, v - (j + 0.5).astype(np.float32) * 7
    size = 1.7 + 1.1 * lattice(i, j, 12)
    there = (du * du + dv * dv < size * size) & (lattice(i, j, 13) > 0.05)
    tree = p.pick("tree", lattice(i, j, 14) * np.float32(0.45))
    lit = 1 + 0.22 * (0.5 * du - 0.85 * dv) / size
    return np.where(there, tree, p.row), np.where(there, lit, 1 + 0.06 * p.mid)


def _vineyard(p: _Pixels) -> _Drawn:
    u, v = p.local()
    if p.ground.gsd_m > 1.6:  # rows finer than pixels would beat with them: draw by chance
        v = v + 3.2 * lattice(_cell(p.x, 1), _cell(p.y, 1), 11)
    gap = lattice(_cell(u, 1.5), _cell(v, 3.2), 16) < 0.06
    vine = (np.mod(v, np.float32(3.2)) < 1.35) & ~gap
    return np.where(
        vine, p.pick("vine", lattice(_cell(u, 30), _cell(v, 3.2), 17)), p.row
    ), 1 + 0.06 * p.mid


def _garden(p: _Pixels) -> _Drawn:
    u, v = p.local()
    plot = lattice(_cell(u, 17), _cell(v, 23), 19) - np.float32(0.5)
    fence = (np.mod(u, np.float32(17)) < 1.0) & (plot > 0.1) & (p.mid > -0.2)
    shrub = (0.65 * p.fine + 0.6 * p.mid > 0.55) | fence
    paved = 0.7 * p.mid + 0.3 * p.fine - plot > 0.62
    fill = np.where(paved, p.pick("paving", plot + np.float32(0.5)), p.row)
    fill = np.where(shrub, p.pick("vine", plot + np.float32(0.5)), fill)
    return fill, 1 + 0.22 * plot + 0.08 * p.fine


def _plots(p: _Pixels) -> _Drawn:
    u, v = p.local()
    i, j = _cell(u, 6.5), _cell(v, 14)
    tone = lattice(i, j, 24)
    path = (np.mod(u, np.float32(6.5)) < 0.9) | (np.mod(v, np.float32(14)) < 1.2)
    fill = np.where(tone > 0.7, p.pick("soil", lattice(i, j, 25)), p.row)
    return np.where(path, p.pick("paving", tone), fill), 0.8 + 0.45 * lattice(i, j, 26)


def _graves(p: _Pixels) -> _Drawn:
    u, v = p.local()
    stone = (np.mod(u, np.float32(2.6)) < 1.4) & (np.mod(v, np.float32(4.2)) < 2.4)
    tone = lattice(_cell(u, 2.6), _cell(v, 4.2), 27)
    fill = np.where(stone & (tone > 0.2), p.pick("paving", tone), p.row)
    return fill, np.where(stone, 0.85 + 0.4 * tone, 1 + 0.08 * p.fine)


def _parking(p: _Pixels) -> _Drawn:
    u, v = p.local()
    lane, place = np.mod(v, np.float32(16.5)), np.mod(u, np.float32(2.6))
    stall = (lane < 5.2) | (lane > 11.3)
    i, j = _cell(u, 2.6), _cell(v, 16.5) * 2 + (lane > 5.2)
    along = np.where(lane < 5.2, lane, lane - np.float32(11.3))
    parked = lattice(i, j, 29) < 0.4 + 0.3 * p.coarse
    car = stall & parked & (place < 1.9) & (along > 0.4) & (along < 4.8)
    line = stall & ~car & (place > 2.2)
    fill = np.where(car, p.pick("car", lattice(i, j, 30)), p.row)
    return fill, np.where(line, np.float32(1.3), 1 + 0.05 * p.mid)


def _paved(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.045 * p.fine + 0.05 * p.coarse


def _rough(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.12 * p.fine + 0.13 * p.mid + 0.08 * p.coarse


def _sandy(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.04 * p.fine + 0.05 * p.coarse


def _tiled(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.06 * p.fine


def _ribbed(p: _Pixels) -> _Drawn:
    u, _ = p.local()
    light = lattice(_cell(u, 6), np.zeros(1, dtype=np.int64), 43) > 0.86
    rib = 1 + 0.05 * np.sin(u * np.float32(2 * np.pi / 3))
    return p.row, rib + np.where(
        light & (np.mod(u, np.float32(6)) < 1.2), np.float32(0.25), np.float32(0)
    )


def _flat_roof(p: _Pixels) -> _Drawn:
    u, v = p.local()
    unit = lattice(_cell(u, 3.5), _cell(v, 3.5), 44)
    plant = np.where(
        unit > 0.93, np.float32(1.35), np.where(unit < 0.04, np.float32(0.6), np.float32(1))
    )
    return p.row, plant * (1 + 0.05 * p.mid)


def _sleepers(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.1 * p.fine


def _water(p: _Pixels) -> _Drawn:
    return p.row, 1 + 0.03 * p.mid + 0.03 * p.coarse


def _solar(p: _Pixels) -> _Drawn:
    u, _ = p.local()
    return p.row, np.where(np.mod(u, np.float32(8)) < 0.8, np.float32(1.8), np.float32(1))


_PATTERNS: dict[str, Callable[[_Pixels], _Drawn]] = {
    "grass": _grass, "rows": _rows, "mown": _mown, "canopy": _canopy, "shrub": _shrub,
    "orchard": _orchard,
    "vineyard": _vineyard, "garden": _garden, "plots": _plots, "graves": _graves,
    "parking": _parking,
    "paved": _paved, "rough": _rough, "sandy": _sandy, "tiles": _tiled, "ribbed": _ribbed,
    "flat_roof": _flat_roof, "sleepers": _sleepers, "sea": _water, "lake": _water, "solar": _solar,
}  # fmt: skip
