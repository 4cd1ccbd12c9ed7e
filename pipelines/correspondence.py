"""Cross-modal correspondence: which patches of the image an object covers, and how much of them.

Exact, without geometry operations, for a whole shard at once. Every segment of every ring and line
is split at the patch borders. A line's share of a patch is the length of its pieces there. For a
polygon, a piece going down in y covers the part of its patch to the right of it and the whole of
the patches further right in its row; a piece going up takes as much away. Sums per patch,
cumulated along the row, are the covered areas: the accumulation by which font rasterisers find the
coverage of pixels (the signed-area buffers of FreeType's and font-rs' rasterisers).
"""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.ragged import ranks, run_starts
from pipelines.segments import (
    Segments,
    check_kinds,
    chip_relative,
    line_segments,
    polygon_segments,
)
from schemas.layout import Kind

_NEGLIGIBLE = 1e-12
"""Shares below are rounding: no share."""

Index = NDArray[np.int64]
Floats = NDArray[np.float64]
Shares = tuple[Index, Index, Floats]


def build_correspondence(
    geometry: NDArray[np.object_],
    kind: NDArray[np.uint8],
    chip: Index,
    bounds_utm: Floats,
    patches: int,
) -> dict[str, NDArray[np.generic]]:
    """Patches of every object with their shares in bytes: see `patch_shares`.

    Returns `patch_offset` int64 [M + 1], `patch` uint16 [P] and `patch_weight` uint8 [P]: share
    x 255, rounded, at least 1.
    """
    offset, patch, share = patch_shares(geometry, kind, chip, bounds_utm, patches)
    return {
        "patch_offset": offset,
        "patch": patch.astype(np.uint16),
        "patch_weight": np.maximum(np.rint(share * 255), 1).astype(np.uint8),
    }


def patch_shares(
    geometry: NDArray[np.object_],
    kind: NDArray[np.uint8],
    chip: Index,
    bounds_utm: Floats,
    patches: int,
) -> tuple[Index, Index, Floats]:
    """Patches that every object meets, with exact shares.

    Parameters: `geometry` [M] clipped to their chips, metres in the chip's UTM zone; `kind` [M];
    `chip` [M] rows of `bounds_utm` [N, 4]; `patches` along one side of a chip, at most 256.

    Returns offset int64 [M + 1], patch int64 [P] (row-major, y down, ascending within an object)
    and share float64 [P] in (0, 1]: of the patch's area for polygons, of the object's length for
    lines, 1 for the patch of a point. What lies on a border between patches (a point, a stretch of
    a line) belongs to the patch to the right or below; on the chip's far edge, to the last.
    Shares below 1e-12 are dropped as rounding.

    Raises ValueError where an object reaches out of its chip or is not a single part of its kind.
    """
    check_kinds(geometry, kind)
    parts = []
    for code, shares in (
        (Kind.POINT, _point_shares),
        (Kind.LINE, _line_shares),
        (Kind.POLYGON, _polygon_shares),
    ):
        member = np.flatnonzero(kind == code)
        if len(member):
            owner, patch, share = shares(geometry[member], chip[member], bounds_utm, patches)
            parts.append((member[owner], patch, share))
    if not parts:
        return np.zeros(len(geometry) + 1, np.int64), np.empty(0, np.int64), np.empty(0)
    owner, patch, share = (np.concatenate(column) for column in zip(*parts, strict=True))
    kept = np.flatnonzero(share > _NEGLIGIBLE)
    kept = kept[np.argsort(owner[kept] * patches**2 + patch[kept])]
    offset = np.searchsorted(owner[kept], np.arange(len(geometry) + 1)).astype(np.int64)
    return offset, patch[kept], np.minimum(share[kept], 1.0)


def _point_shares(
    points: NDArray[np.object_], chip: Index, bounds_utm: Floats, patches: int
) -> Shares:
    xy = chip_relative(shapely.get_coordinates(points), chip, bounds_utm, patches)
    column, row = np.minimum(xy.astype(np.int64), patches - 1).T
    return np.arange(len(points)), row * patches + column, np.ones(len(points))


def _line_shares(
    lines: NDArray[np.object_], chip: Index, bounds_utm: Floats, patches: int
) -> Shares:
    pieces = _split_at_patches(line_segments(lines, chip, bounds_utm, patches))
    column, row = np.minimum((pieces.start + pieces.end) / 2, patches - 1).astype(np.int64).T
    x_min, y_min, x_max, y_max = bounds_utm[chip[pieces.owner]].T
    dx, dy = (pieces.end - pieces.start).T
    length = np.hypot(dx * (x_max - x_min), dy * (y_max - y_min))
    share = length / np.bincount(pieces.owner, length)[pieces.owner]

    key = pieces.owner * patches**2 + row * patches + column
    order = np.argsort(key, kind="stable")
    start = run_starts(key[order])
    owner, patch = np.divmod(key[order][start], patches**2)
    return owner, patch, np.add.reduceat(share[order], start)


def _polygon_shares(
    polygons: NDArray[np.object_], chip: Index, bounds_utm: Floats, patches: int
) -> Shares:
    pieces = _split_at_patches(polygon_segments(polygons, chip, bounds_utm, patches))
    middle = (pieces.start + pieces.end) / 2
    column, row = np.minimum(middle, patches - 1).astype(np.int64).T

    # One buffer holds every polygon's box of patches, each row with one more cell at its end for
    # what spills out of the last patch.
    first = run_starts(pieces.owner)
    left, top = np.minimum.reduceat(column, first), np.minimum.reduceat(row, first)
    width = np.maximum.reduceat(column, first) - left + 2
    height = np.maximum.reduceat(row, first) - top + 1
    row_width = np.repeat(width, height)
    row_start = np.cumsum(row_width) - row_width
    row_of = np.cumsum(height) - height - top
    cell = row_start[row_of[pieces.owner] + row] + column - left[pieces.owner]

    down = pieces.end[:, 1] - pieces.start[:, 1]
    beyond = down * (middle[:, 0] - column)
    cells = int(row_width.sum())
    change = np.bincount(cell, down - beyond, cells) + np.bincount(cell + 1, beyond, cells)
    total = np.cumsum(change)
    share = total - np.repeat(total[row_start] - change[row_start], row_width)

    owner = np.repeat(np.repeat(np.arange(len(polygons)), height), row_width)
    rank = ranks(row_width)
    patch_row = np.repeat(ranks(height) + np.repeat(top, height), row_width)
    inside = rank < width[owner] - 1
    return owner[inside], (patch_row * patches + left[owner] + rank)[inside], share[inside]


def _split_at_patches(segments: Segments) -> Segments:
    """The segments in pieces that each lie in one patch, in patch coordinates."""
    return _split(_split(segments, axis=0), axis=1)


def _split(segments: Segments, axis: int) -> Segments:
    """The segments split where their coordinate on `axis` is a whole number."""
    a, b = segments.start[:, axis], segments.end[:, axis]
    lowest = np.floor(np.minimum(a, b)) + 1
    cuts = np.maximum(np.ceil(np.maximum(a, b)) - lowest, 0).astype(np.int64)
    of = np.repeat(np.arange(len(a)), cuts + 1)
    rank = ranks(cuts + 1)

    # A piece begins at the segment's start or at its own cut, and ends where the next begins.
    start = segments.start[of]
    later = np.flatnonzero(rank)
    s, k = of[later], rank[later]
    cut = np.where(b[s] > a[s], lowest[s] + k - 1, lowest[s] + cuts[s] - k)
    other = 1 - axis
    slope = (segments.end[s, other] - segments.start[s, other]) / (b[s] - a[s])
    start[later, axis] = cut
    start[later, other] += (cut - a[s]) * slope
    end = segments.end[of]
    end[later - 1] = start[later]
    return Segments(start, end, segments.owner[of])
