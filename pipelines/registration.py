"""How far the image lies off the map: one estimate a chip, all chips of a shard at once.

Edges of the image (gradient magnitude, bands added after each is brought to its median) are
correlated with outlines of the class raster over all shifts of a few pixels by FFT. Both are
tapered, and whitened by the shard's mean spectrum of edges, which is the matched filter for an
outline among edges that the map does not know (Turin 1960). A correlation is expressed in
standard deviations of what unrelated edges of the same spectra would give; those of a chip and of
its neighbours from the same scene are added up, since a scene is shifted as a whole.

Read as a likelihood over shifts, the surface gives the confidence: the share of probability near
the peak. A lone straight road or a second peak spreads it, an empty map makes it uniform.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Floats = NDArray[np.float32]

_WORKING_PX = 112
"""Chips are worked on at about this many cells a side: larger ones are binned."""
_REACH = 8
"""Largest shift in cells."""
_BLUR = 1.0
"""Standard deviation in cells of the blur of the correlation, against grain and aliasing."""
_NEAR = 1.0
"""Radius in cells of what counts as the peak."""
_TEMPER = 0.35
"""Edges are correlated along their lines: so much of the log likelihood is independent. At this
value stated confidences match the shares that are right (measured on the embedded world)."""
_MANY_OUTLINES = 10_000
"""Cells with outlines from which a shard must show some relation of image and map, ..."""
_LEAST_PEAK = 0.06
"""... which is a peak of so many deviations, times the square root of those cells. On the embedded
world related blocks have at least 0.13, blocks with another place's outlines at most 0.05."""


class Lattice(NamedTuple):
    """Where the N chips of a shard lie, and who their neighbours are."""

    rows: int
    columns: int
    kept: NDArray[np.int64]
    """[N] positions in the lattice, row-major from the north-west."""
    scene: NDArray[np.int16]
    """[N]: chips of one scene share their shift."""
    adjacent: bool
    """Whether squares beside one another in the lattice are so on the ground."""


def reach_px(size: int) -> int:
    """Largest shift, in pixels, that is looked for in chips of `size` pixels a side."""
    cells = _cells(size)
    return min(_REACH, size // cells // 6) * cells


class Registration(NamedTuple):
    """How image and map of a shard lie on one another; N chips."""

    shift: Floats
    """[N, 3]: pixels to the right (east) and pixels **up** (north) from the map to the image's
    content, confidence in [0, 1]. Moving the map by them lays it on the image. In hundredths."""
    unrelated: bool
    """Whether a map with many outlines meets nothing like them in the image, however shifted."""


def register(
    image: NDArray[np.unsignedinteger], raster2x: NDArray[np.uint8], lattice: Lattice, nodata: int
) -> Registration:
    """Estimate by how much the content of each chip lies off the map.

    image: [N, band, y, x]. raster2x: class raster of the whole lattice in half pixels, y down.
    """
    n, _, size, _ = image.shape
    if not n or not raster2x.any() or reach_px(size) < 2:
        return Registration(np.zeros((n, 3), np.float32), False)
    cells = _cells(size)
    reach = reach_px(size) // cells
    edges = image_edges(image, cells, nodata)
    stride = raster2x[cells // 2 :: cells, cells // 2 :: cells]
    outlines = _outlines(stride, lattice, size // cells)
    own = _correlate(edges, outlines, reach)
    surface = _pooled(own, lattice)
    right, down, at_border = _peak(surface, reach)
    confidence = _confidence(surface, right, down, reach)
    confidence[at_border] = 0.0
    # Every second (fourth, ...) half pixel was looked at, a quarter pixel after the middle.
    off = 0.25 if cells % 2 == 0 else 0.0
    shift = np.stack([right * cells - off, off - down * cells, confidence], axis=1)
    return Registration(np.round(shift, 2).astype(np.float32), _unrelated(own, outlines))


def _unrelated(surface: Floats, outlines: Floats) -> bool:
    """Whether even all chips together have no peak, though there are outlines enough for one."""
    cells = np.count_nonzero(outlines)
    together = surface.sum(axis=0) / np.sqrt(len(surface))
    return bool(cells >= _MANY_OUTLINES and together.max() < _LEAST_PEAK * np.sqrt(cells))


def image_edges(image: NDArray[np.unsignedinteger], cells: int, nodata: int) -> Floats:
    """Strength of edges [N, y / cells, x / cells], each band's in [0, 1), added up.

    0 beside pixels without data.
    """
    total = np.zeros((len(image), *(side // cells for side in image.shape[2:])), np.float32)
    filled = np.zeros(total.shape, bool)
    for band in range(image.shape[1]):
        pixels = _binned(image[:, band], cells)
        filled |= pixels > nodata * cells * cells
        magnitude = _gradient(pixels)
        usual = float(np.median(magnitude[:, ::3, ::3]))
        total += magnitude / (magnitude + max(usual, 1e-6))
    if not filled.all():
        total[_beside(~filled)] = 0.0
    return total


def _cells(size: int) -> int:
    """Pixels a side of a cell: the largest divisor of the chip that leaves enough cells."""
    most = max(1, size // _WORKING_PX)
    return next(k for k in range(most, 0, -1) if size % k == 0)


def _binned(pixels: NDArray[Any], cells: int) -> Floats:
    """Sums over squares of cells x cells; [N, y, x] -> [N, y / cells, x / cells]."""
    rows = pixels[:, ::cells].astype(np.float32)
    for i in range(1, cells):
        rows += pixels[:, i::cells]
    total = rows[:, :, ::cells].copy()
    for i in range(1, cells):
        total += rows[:, :, i::cells]
    return total


def _gradient(pixels: Floats) -> Floats:
    """Magnitude by central differences; 0 at the border."""
    magnitude = np.zeros_like(pixels)
    x = pixels[:, 1:-1, 2:] - pixels[:, 1:-1, :-2]
    y = pixels[:, 2:, 1:-1] - pixels[:, :-2, 1:-1]
    x *= x
    y *= y
    x += y
    np.sqrt(x, out=magnitude[:, 1:-1, 1:-1])
    return magnitude


def _beside(flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Flags [N, y, x] and their eight neighbours."""
    wide = flags.copy()
    wide[:, 1:] |= flags[:, :-1]
    wide[:, :-1] |= flags[:, 1:]
    both = wide.copy()
    both[:, :, 1:] |= wide[:, :, :-1]
    both[:, :, :-1] |= wide[:, :, 1:]
    return both


def _outlines(classes: NDArray[np.uint8], lattice: Lattice, side: int) -> Floats:
    """Outlines of classes [N, side, side] from a raster of the lattice, 2 * side a chip."""
    chips = classes.reshape(lattice.rows, 2 * side, lattice.columns, 2 * side)
    chips = chips.transpose(0, 2, 1, 3).reshape(-1, 2 * side, 2 * side)[lattice.kept]
    line = np.zeros(chips.shape, bool)
    # Both sides of a border, so that the line is centred on it.
    differs = chips[:, :, 1:] != chips[:, :, :-1]
    line[:, :, 1:] = differs
    line[:, :, :-1] |= differs
    differs = chips[:, 1:] != chips[:, :-1]
    line[:, 1:] |= differs
    line[:, :-1] |= differs
    return _binned(line, 2)


def _correlate(edges: Floats, outlines: Floats, reach: int) -> Floats:
    """Correlation [N, 2 reach + 1, 2 reach + 1] by shift down and right, in deviations.

    Outlines end `reach` before the border, so that the correlation is not circular.
    """
    side = edges.shape[1]
    image = _spectrum(edges, _taper(side, 0, reach))
    power = np.abs(image) ** 2
    weight = _whitening(power, side)
    template = _spectrum(outlines, _taper(side, reach, reach)).conj()
    template *= weight
    variance = _sum_spectrum(np.abs(template) ** 2 * power, side) / side**4
    correlation = fft.irfft2(template * image, s=(side, side))
    window = np.arange(-reach, reach + 1)
    found = correlation[:, window[:, None], window]
    scale = np.where(variance > 0, 1 / np.sqrt(np.maximum(variance, 1e-30)), 0)
    surface: Floats = found * scale[:, None, None].astype(np.float32)
    return surface


def _taper(side: int, zero: int, rise: int) -> Floats:
    """[side, side]: 0 in a margin, then rising to 1 as a squared sine."""
    inward = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0 - zero
    one = np.sin(np.pi / 2 * np.clip(inward / rise, 0, 1)) ** 2
    return np.outer(one, one).astype(np.float32)


def _spectrum(values: Floats, taper: Floats) -> NDArray[np.complex64]:
    mean = np.tensordot(values, taper, axes=((1, 2), (0, 1))) / taper.sum()
    spectrum: NDArray[np.complex64] = fft.rfft2((values - mean[:, None, None]) * taper)
    return spectrum


def _whitening(power: Floats, side: int) -> Floats:
    """1 / mean spectrum of the chips, by distance from zero frequency, times the blur's."""
    y = np.fft.fftfreq(side)[:, None]
    radius = np.hypot(y, np.fft.rfftfreq(side))
    ring = np.rint(radius * side).astype(np.int64)
    each = power.sum(axis=(1, 2), keepdims=True)
    mean = (power / np.maximum(each, 1e-12)).mean(axis=0, dtype=np.float64)
    by_ring = np.bincount(ring.ravel(), mean.ravel()) / np.bincount(ring.ravel())
    blur = np.exp(-0.5 * (2 * np.pi * radius * _BLUR) ** 2)
    least = max(float(by_ring.max()) * 1e-6, 1e-12)
    weight: Floats = (blur / np.maximum(by_ring[ring], least)).astype(np.float32)
    weight[0, 0] = 0.0
    return weight


def _sum_spectrum(half: Floats, side: int) -> NDArray[np.float64]:
    """Sum over all frequencies of a half spectrum [N, side, side // 2 + 1]."""
    times = np.full(half.shape[2], 2.0)
    times[0] = 1.0
    if side % 2 == 0:
        times[-1] = 1.0
    total: NDArray[np.float64] = half.sum(axis=1, dtype=np.float64) @ times
    return total


def _pooled(surface: Floats, lattice: Lattice) -> Floats:
    """Surfaces of a chip and its neighbours of the same scene added up, in deviations again."""
    if not lattice.adjacent:
        return surface
    row, column = np.divmod(lattice.kept, lattice.columns)
    position = np.full((lattice.rows + 2, lattice.columns + 2), -1, np.int64)
    position[row + 1, column + 1] = np.arange(len(row))
    total = surface.copy()
    count = np.ones(len(surface), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            other = position[row + 1 + down, column + 1 + right]
            take = (other >= 0) & (lattice.scene[other] == lattice.scene)
            if down == right == 0 or not take.any():
                continue
            total[take] += surface[other[take]]
            count += take
    total /= np.sqrt(count)[:, None, None]
    return total


def _peak(surface: Floats, reach: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Place of the highest value [N], right and down in cells, to fractions of a cell.

    The fraction is that of a paraboloid fitted to the nine values around. Also whether the peak
    lies on the border of the surface, where it may be the slope of another one.
    """
    n, side = np.arange(len(surface)), 2 * reach + 1
    y, x = np.divmod(surface.reshape(len(surface), -1).argmax(axis=1), side)
    at_border = (x == 0) | (y == 0) | (x == side - 1) | (y == side - 1)
    x, y = np.clip(x, 1, side - 2), np.clip(y, 1, side - 2)
    step = [(i, j) for j in (-1, 0, 1) for i in (-1, 0, 1)]
    values = np.stack([surface[n, y + j, x + i] for i, j in step], axis=1).astype(np.float64)
    design = np.array([(1, i, j, i * i, i * j, j * j) for i, j in step], np.float64)
    _, b, c, d, e, f = np.linalg.pinv(design) @ values.T
    determinant = 4 * d * f - e * e
    is_peak = (determinant > 1e-9) & (d < 0)
    divisor = np.where(is_peak, determinant, 1.0)
    right = np.where(is_peak, (e * c - 2 * f * b) / divisor, 0.0)
    down = np.where(is_peak, (e * b - 2 * d * c) / divisor, 0.0)
    right, down = x - reach + np.clip(right, -1, 1), y - reach + np.clip(down, -1, 1)
    return right.astype(np.float32), down.astype(np.float32), at_border


def _confidence(surface: Floats, right: Floats, down: Floats, reach: int) -> Floats:
    """Share of probability near the peak [N], all shifts being equally likely beforehand."""
    log = _TEMPER / 2 * np.maximum(surface, 0) ** 2
    likely = np.exp(log - log.max(axis=(1, 2), keepdims=True))
    step = np.arange(-reach, reach + 1)
    away = np.hypot(step[:, None] - down[:, None, None], step - right[:, None, None])
    near = (likely * (away <= _NEAR)).sum(axis=(1, 2))
    return np.asarray(near / likely.sum(axis=(1, 2)), dtype=np.float32)
