"""Features of a world: what stands on the ground, and what OpenStreetMap says about it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

Tags = dict[str, str]


@dataclass(frozen=True)
class Features:
    """N things of a region, in one UTM zone.

    `geometry` [N] shapely points, lines, polygons (x, y) = (easting, northing) in metres.
    `truth` [N] tags of what is really there; empty: nothing is there (any more).
    `mapped` [N] tags that OpenStreetMap has; empty: not mapped.
    """

    geometry: NDArray[np.object_]
    truth: list[Tags]
    mapped: list[Tags]

    def __len__(self) -> int:
        return len(self.geometry)

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Features":
        """The features at `index` (integers, or a mask)."""
        rows = np.flatnonzero(index) if index.dtype == bool else index
        return Features(
            self.geometry[rows],
            [self.truth[i] for i in rows],
            [self.mapped[i] for i in rows],
        )


def features(
    geometry: NDArray[np.object_] | Sequence[shapely.Geometry],
    truth: Sequence[Tags] | Tags,
    mapped: Sequence[Tags] | None = None,
) -> Features:
    """Features from geometries and tags; one dict of tags serves all, and OSM knows all of it."""
    array = np.empty(len(geometry), dtype=object)
    array[:] = geometry
    tags = [dict(truth) for _ in array] if isinstance(truth, dict) else list(truth)
    known = [dict(t) for t in tags] if mapped is None else list(mapped)
    if not len(array) == len(tags) == len(known):
        raise ValueError("geometry, truth and mapped differ in length")
    return Features(array, tags, known)


def concat(parts: Sequence[Features]) -> Features:
    """All features of `parts`, in order."""
    return Features(
        np.concatenate([p.geometry for p in parts]),
        [t for p in parts for t in p.truth],
        [t for p in parts for t in p.mapped],
    )


def parts_of(
    geometry: NDArray[np.object_], dimension: int
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Single parts of one dimension (0 point, 1 line, 2 polygon), and the row each came from."""
    parts, rows = shapely.get_parts(geometry, return_index=True)
    nested = shapely.get_type_id(parts) >= 4
    if nested.any():  # collections can hold multipolygons
        inner, inner_rows = shapely.get_parts(parts, return_index=True)
        parts, rows = inner, rows[inner_rows]
    keep = (shapely.get_dimensions(parts) == dimension) & ~shapely.is_empty(parts)
    return parts[keep], rows[keep]
