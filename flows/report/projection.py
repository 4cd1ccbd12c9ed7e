"""Where shards lie on the page: true areas, over zones and the antimeridian alike."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyproj import Transformer

from schemas.dataset import SnapshotRow
from schemas.errors import GeoLinkError
from schemas.grid import Block, Grid, block_bounds, to_lonlat

Floats = NDArray[np.float64]
_WORLD_DEG = 60.0
"""Farther from its middle a dataset is drawn on a map of the whole world."""


@dataclass(frozen=True)
class Projection:
    """A map plane for some places: x east, y north, metres."""

    forward: Transformer
    """From degrees (lon, lat)."""
    middle_lon: float
    radius_deg: float
    """From the middle to the farthest place."""

    @property
    def world(self) -> bool:
        """Whether it shows the whole Earth, which is cut opposite to its middle."""
        return self.radius_deg > _WORLD_DEG


def block_of_shard(name: str) -> Block | None:
    """The block of a shard id, `-d1` of a further date left out; None: an imported pair's."""
    parts = name.split("-")[:3]
    if len(parts) == 3 and all(p.isdigit() for p in parts):
        return Block(*(int(p) for p in parts))
    return None


def corners(grid: Grid, names: list[str], rows: dict[str, SnapshotRow]) -> Floats:
    """[N, 4, 2] degrees: corners of shards, counter-clockwise; NaN where a place is not known.

    Of the shard's block, or of the box of its chips where they are not on the grid.
    """
    found = np.full((len(names), 4, 2), np.nan)
    by_zone: dict[int, list[tuple[int, Block]]] = {}
    for n, name in enumerate(names):
        block = block_of_shard(name)
        row = rows.get(name)
        if block is not None:
            by_zone.setdefault(block.epsg, []).append((n, block))
        elif row is not None and row.chips:
            west, south, east, north = row.bounds_lonlat
            found[n] = [(west, south), (east, south), (east, north), (west, north)]
    for epsg, members in by_zone.items():
        where = [n for n, _ in members]
        boxes = np.array([block_bounds(grid, block) for _, block in members])
        x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
        lon, lat = to_lonlat(epsg).transform(x.ravel(), y.ravel())
        found[where] = np.stack([lon, lat], axis=-1).reshape(-1, 4, 2)
    return found


def project_for(lonlat: Floats) -> Projection:
    """An equal-area plane about some places [N, 2] in degrees.

    Raises GeoLinkError if no place is known.
    """
    lonlat = lonlat[np.isfinite(lonlat).all(axis=1)]
    if len(lonlat) == 0:
        raise GeoLinkError("no shard of the dataset says where it lies")
    lon, lat = np.radians(lonlat).T
    unit = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    # The middle of the box about all places, so that it does not hang on where most shards are.
    middle = unit.min(axis=0) + unit.max(axis=0)
    norm = float(np.linalg.norm(middle))
    middle = middle / norm if norm > 1e-9 else np.array([1.0, 0.0, 0.0])
    radius = math.degrees(math.acos(float(np.clip((unit @ middle).min(), -1.0, 1.0))))
    lon0, lat0 = math.degrees(math.atan2(middle[1], middle[0])), math.degrees(math.asin(middle[2]))
    if radius > _WORLD_DEG:
        crs = f"+proj=eqearth +lon_0={lon0:.6f} +ellps=WGS84"
    else:
        crs = f"+proj=laea +lat_0={lat0:.6f} +lon_0={lon0:.6f} +ellps=WGS84"
    forward = Transformer.from_crs(4326, crs, always_xy=True)
    return Projection(forward, lon0, radius)


def to_plane(projection: Projection, lonlat: Floats) -> Floats:
    """Degrees [..., 2] to metres on the plane."""
    x, y = projection.forward.transform(lonlat[..., 0], lonlat[..., 1])
    return np.stack([x, y], axis=-1)
