"""Objects: features of a shard clipped to its chips."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.features import (
    HUGE_VERTICES,
    Features,
    Geometries,
    Ints,
    dimensions_of,
    split_parts,
)
from pipelines.ragged import ranks
from schemas.config import ObjectOptions
from schemas.layout import Kind

SLIVER_M2 = 1e-6
"""Clipped polygons smaller than this (a square millimetre) are noise of the arithmetic."""
SLIVER_M = 1e-3
"""Clipped lines shorter than this (a millimetre) are noise of the arithmetic."""

_MANY_VERTICES = 256


@dataclass(frozen=True)
class Objects:
    """Features clipped to chips, by (chip, kind, OSM id, part, place); M objects."""

    geometry: Geometries
    """[M] in metres, inside its chip."""
    chip: Ints
    """[M] position of the chip."""
    source: Ints
    """[M] row of `Features`."""
    kind: NDArray[np.uint8]
    osm_class: NDArray[np.uint8]
    osm: Ints
    size: NDArray[np.float32]
    """[M] m2 of polygons, m of lines, 0 of points."""
    chips: int
    counts: dict[str, int]
    """Objects left out, by reason."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The objects' shard arrays."""
        return {
            "object_offset": np.searchsorted(self.chip, np.arange(self.chips + 1)).astype(np.int64),
            "object_kind": self.kind,
            "object_class": self.osm_class,
            "object_osm": self.osm,
            "object_size": self.size,
        }


def clip(
    features: Features,
    bounds_utm: NDArray[np.float64],
    options: ObjectOptions,
    *,
    frame: Ints | None = None,
) -> Objects:
    """Cut features to chips, all chips of a shard at once.

    A feature inside a chip is left as it is; one that crosses its border is intersected with the
    chip's closed square and split into parts. (Overlay splits a line where it crosses itself, so a
    self-crossing line that leaves its chip becomes several objects.) A point belongs to the chip
    with x_min <= x < x_max and y_min < y <= y_max: the top-left border is the chip's own. With
    `frame` a chip has no neighbours, and all four borders are its own.

    Left out and counted: pieces of lower dimension than the feature, where it only touches the chip
    (`touch_only`); pieces below a millimetre (`object_sliver`); objects below the minimum sizes
    (`object_below_minimum`); what exceeds the cap per chip (`object_over_cap`), which keeps the
    largest by extent: length of a line, square root of a polygon's area.

    bounds_utm: [N, 4] metres. frame: [F] the only chip each feature may belong to; -1: to none.
    """
    counts: Counter[str] = Counter()
    chip, source = _candidates(features, bounds_utm, frame)
    geometry, chip, source = _cut(features, bounds_utm, chip, source, counts)
    kind = features.kind[source]
    measure = np.where(kind == Kind.POLYGON, shapely.area(geometry), shapely.length(geometry))
    least = np.array([-1.0, SLIVER_M, SLIVER_M2])[kind]
    width, height = (bounds_utm[:, 2:] - bounds_utm[:, :2]).T
    whole = np.where(kind == Kind.POLYGON, (width * height)[chip], 2 * (width + height)[chip])
    fraction = np.array([-1.0, options.min_line_fraction, options.min_polygon_fraction])[kind]
    sliver = measure < least
    small = ~sliver & (measure < fraction * whole)
    counts["object_sliver"] += int(sliver.sum())
    counts["object_below_minimum"] += int(small.sum())

    box = shapely.bounds(geometry)
    order = np.lexsort([*box.T[::-1], features.part[source], features.osm[source], kind, chip])
    order = order[~(sliver | small)[order]]
    if options.max_per_chip is not None:
        extent = np.where(kind == Kind.POLYGON, np.sqrt(measure), measure)
        order, over = _largest(order, chip, extent, options.max_per_chip)
        counts["object_over_cap"] += over
    source = source[order]
    return Objects(
        geometry=geometry[order],
        chip=chip[order],
        source=source,
        kind=kind[order],
        osm_class=features.osm_class[source],
        osm=features.osm[source],
        size=measure[order].astype(np.float32),
        chips=len(bounds_utm),
        counts={k: n for k, n in counts.items() if n},
    )


def _candidates(
    features: Features, bounds_utm: NDArray[np.float64], frame: Ints | None
) -> tuple[Ints, Ints]:
    """Pairs (chip, feature) whose bounding boxes meet; points by the half-open rule."""
    if frame is not None:
        source = np.flatnonzero(frame >= 0)
        chip = frame[source]
    else:
        chip, source = shapely.STRtree(features.geometry).query(shapely.box(*bounds_utm.T))
    box, square = shapely.bounds(features.geometry)[source], bounds_utm[chip]
    x, y = box[:, 0], box[:, 1]
    owned = (square[:, 0] <= x) & (x < square[:, 2]) & (square[:, 1] < y) & (y <= square[:, 3])
    meets = (box[:, :2] <= square[:, 2:]).all(axis=1) & (box[:, 2:] >= square[:, :2]).all(axis=1)
    halves = (features.kind[source] == Kind.POINT) & (frame is None)
    keep = np.where(halves, owned, meets)
    return chip[keep], source[keep]


def _cut(
    features: Features,
    bounds_utm: NDArray[np.float64],
    chip: Ints,
    source: Ints,
    counts: Counter[str],
) -> tuple[Geometries, Ints, Ints]:
    """Intersect the pairs that cross a border; geometry, chip and source of every piece."""
    geometry = features.geometry[source]
    box, square = shapely.bounds(geometry), bounds_utm[chip]
    inside = (box[:, :2] >= square[:, :2]).all(axis=1) & (box[:, 2:] <= square[:, 2:]).all(axis=1)
    crossing = np.flatnonzero(~inside)
    squares = shapely.box(*bounds_utm.T)[chip[crossing]]
    # A coast or a forest has its border in few of the chips that its bounding box meets; an index
    # of its segments finds the others (outside it, or wholly covered) at once.
    many = shapely.get_num_coordinates(geometry[crossing]) > _MANY_VERTICES
    shapely.prepare(geometry[crossing[many]])
    meets = np.ones(len(crossing), bool)
    meets[many] = shapely.intersects(geometry[crossing[many]], squares[many])
    covered = np.zeros(len(crossing), bool)
    covered[many] = shapely.contains_properly(geometry[crossing[many]], squares[many])
    cut = np.where(covered, squares, shapely.Point())
    edge = meets & ~covered
    whole = _near(features.geometry, source[crossing[edge]], bounds_utm)
    cut[edge] = shapely.intersection(whole, squares[edge])
    parts, of = _joined(*split_parts(cut))
    of = crossing[of]
    kept = dimensions_of(parts) == features.kind[source[of]]
    counts["touch_only"] += len(np.setdiff1d(of[~kept], of[kept]))
    pair = np.r_[np.flatnonzero(inside), of[kept]]
    return np.r_[geometry[inside], parts[kept]], chip[pair], source[pair]


def _near(geometry: Geometries, source: Ints, bounds_utm: NDArray[np.float64]) -> Geometries:
    """Features `source` [K] (rows of `geometry`), of huge areas only what is near the chips.

    A cut looks at every vertex: a lake is first cut to the shard and a chip around it.
    """
    whole = geometry[source]
    huge = (shapely.get_num_coordinates(whole) > HUGE_VERTICES) & (
        dimensions_of(whole) == Kind.POLYGON
    )
    rows = np.unique(source[huge])
    if len(rows):
        low, high = bounds_utm[:, :2].min(axis=0), bounds_utm[:, 2:].max(axis=0)
        margin = bounds_utm[0, 2] - bounds_utm[0, 0]
        around = shapely.box(*(low - margin), *(high + margin))
        near = shapely.intersection(geometry[rows], around)
        # A mere touch out there beside it makes a collection, which cannot be cut again.
        near = np.where(shapely.get_type_id(near) == 7, geometry[rows], near)
        at = np.flatnonzero(np.isin(source, rows))
        whole[at] = near[np.searchsorted(rows, source[at])]
    return whole


def _joined(parts: Geometries, of: Ints) -> tuple[Geometries, Ints]:
    """Parts of cut features, with lines joined again where overlay cut them without need.

    It also cuts a line where it touches the border from inside. Only lines that go on in the same
    direction are joined: direction says the way of traffic or of a river.
    """
    line = dimensions_of(parts) == Kind.LINE
    count = np.bincount(of[line], minlength=int(of.max(initial=-1)) + 1)
    several = line & (count[of] > 1)
    if not several.any():
        return parts, of
    owner, position = np.unique(of[several], return_inverse=True)
    merged = shapely.line_merge(
        shapely.multilinestrings(parts[several], indices=position), directed=True
    )
    joined, at = shapely.get_parts(merged, return_index=True)
    return np.r_[parts[~several], joined], np.r_[of[~several], owner[at]]


def _largest(order: Ints, chip: Ints, extent: NDArray[np.float64], most: int) -> tuple[Ints, int]:
    """The part of `order` that holds the `most` largest of each chip, and how many it leaves."""
    by_size = np.lexsort([-extent[order], chip[order]])
    per_chip = np.bincount(chip[order], minlength=1).astype(np.int64)
    kept = np.zeros(len(order), bool)
    kept[by_size] = ranks(per_chip) < most
    return order[kept], int((~kept).sum())
