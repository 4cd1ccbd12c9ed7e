"""A region becomes shards: which blocks of the grid, and which of their chips."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import Geod
from shapely.geometry.base import BaseGeometry

from pipelines.buffer import keep_apart
from pipelines.places import region_geometry, region_points
from pipelines.ragged import ranks
from schemas.config import Splits
from schemas.errors import GeoLinkError
from schemas.grid import (
    Block,
    Bounds,
    Grid,
    block_bounds,
    block_chips,
    blocks_in,
    to_lonlat,
    to_utm,
)
from schemas.sources import Region
from schemas.splits import Split

_GEOD = Geod(ellps="WGS84")
_M_PER_DEGREE = 110_500.0
"""Shortest degree of latitude, rounded down."""
_UTM_SCALE = 1.02
"""More than the scale of UTM up to three degrees outside its zone."""
_MAX_RADIUS_M = 500_000.0
"""Farther from its zone, UTM is no longer near to true."""
_SEARCH_DEG = 1.0
"""Side of a box of the scene search that is not split: about a satellite scene's."""
_SEARCH_FILL = 0.25
"""A search box is split while blocks fill a smaller share of it than this."""

_Lonlat = NDArray[np.float64]


@dataclass(frozen=True)
class BlockPlan:
    """One block of the region."""

    block: Block
    chips: NDArray[np.bool_]
    """[shard_side**2] in raster order: the chip belongs to the region and to this zone."""
    split: Split
    near_other_split: int
    """Chips left out because another split is nearer than the buffer."""


def plan_blocks(
    region: Region, grid: Grid, splits: Splits
) -> tuple[list[BlockPlan], dict[str, list[str]]]:
    """Every block with at least one chip whose centre lies in the region, in order of block.

    Then findings, by code, each with what it is about: points near no chip. A chip lies in a region
    of points if its centre is at most the radius from one of them, along the ellipsoid.

    Raises GeoLinkError if the region reaches outside UTM or holds no chip centre.
    """
    found: dict[str, list[str]] = {}
    if region.points is not None:
        assert region.radius_m is not None
        points = region_points(region)
        inside, reached = _blocks_near(points, region.radius_m, grid)
        if not reached.all():
            found["point_without_chip"] = [f"({x:.8g}, {y:.8g})" for x, y in points[~reached]]
    else:
        inside = _blocks_within(region_geometry(region), grid)
    plans: list[BlockPlan] = []
    for block, mask in sorted(inside.items()):
        chips = block_chips(grid, block)
        split, far = keep_apart(grid, splits, block, chips, mask)
        plans.append(BlockPlan(block, far, split, int((mask & ~far).sum())))
    if not plans:
        what = (
            f"no centre of a chip of {grid.chip_m:g} m lies within {region.radius_m:g} m of a point"
            if region.points is not None
            else f"the region {_shown(region_geometry(region))} holds no centre of a chip of "
            f"{grid.chip_m:g} m"
        )
        raise GeoLinkError(f"{what}; make it larger or the chips smaller")
    return plans, found


def _shown(geometry: BaseGeometry) -> tuple[float, ...]:
    return tuple(round(v, 5) for v in geometry.bounds)


def _blocks_within(region: BaseGeometry, grid: Grid) -> dict[Block, NDArray[np.bool_]]:
    """Blocks of a polygon, and which of their chips have their centre in it."""
    shapely.prepare(region)
    found = {}
    # A part at a time: the box around all of them can be mostly empty.
    boxes = shapely.bounds(shapely.get_parts(region))
    for block in {block for box in boxes.tolist() for block in blocks_in(grid, tuple(box))}:
        chips = block_chips(grid, block)
        lon, lat = chips.center_lonlat[:, 0], chips.center_lonlat[:, 1]
        inside = np.zeros(len(lon), bool)
        for turn in (-360.0, 0.0, 360.0):
            inside |= shapely.contains_xy(region, lon + turn, lat)
        mask = chips.owned & inside
        if mask.any():
            found[block] = mask
    return found


def _blocks_near(
    lonlat: _Lonlat, radius_m: float, grid: Grid
) -> tuple[dict[Block, NDArray[np.bool_]], NDArray[np.bool_]]:
    """Blocks around points [P], with which of their chips have their centre within the radius; and
    which points [P] have such a chip.
    """
    if radius_m > _MAX_RADIUS_M:
        raise GeoLinkError(
            f"radius_m {radius_m:g} is more than {_MAX_RADIUS_M:g}; give so large a region as "
            "polygons"
        )
    found, reached = {}, np.zeros(len(lonlat), bool)
    for block, points in _candidates(lonlat, radius_m, grid).items():
        chips = block_chips(grid, block)
        mask = np.zeros(len(chips.owned), bool)
        owned = np.flatnonzero(chips.owned)
        for some in np.array_split(points, 1 + len(points) * len(owned) // 1_000_000):
            lon, lat = np.repeat(chips.center_lonlat[owned], len(some), axis=0).T
            x, y = np.tile(lonlat[some], (len(owned), 1)).T
            distance = _GEOD.inv(lon, lat, x, y)[2].reshape(len(owned), len(some))
            near = distance <= radius_m
            mask[owned] |= near.any(axis=1)
            reached[some] |= near.any(axis=0)
        if mask.any():
            found[block] = mask
    return found, reached


def _candidates(lonlat: _Lonlat, radius_m: float, grid: Grid) -> dict[Block, NDArray[np.int64]]:
    """Blocks that may hold a chip within the radius of a point, and the points that reach it."""
    zone, north = _zones(lonlat[:, 0]), lonlat[:, 1] >= 0
    dlat = radius_m / _M_PER_DEGREE
    highest = np.minimum(np.abs(lonlat[:, 1]) + dlat, 89.0)
    dlon = np.minimum(dlat / np.cos(np.radians(highest)), 180.0)
    found: dict[Block, list[NDArray[np.int64]]] = {}
    for turn in range(-30, 30):
        # The neighbour zones that the disc reaches, on both hemispheres.
        near = (zone - 1 + turn) % 60 + 1
        centre = near * 6.0 - 183.0
        gap = np.abs((lonlat[:, 0] - centre + 180.0) % 360.0 - 180.0)
        reached = (gap <= 3.0 + dlon) if turn else np.ones(len(zone), bool)
        for base, side in ((32600, True), (32700, False)):
            here = reached & ((north == side) | (np.abs(lonlat[:, 1]) <= dlat))
            for z in np.unique(near[here]).tolist():
                points = np.flatnonzero(here & (near == z))
                for block, at in _reached(grid, base + z, lonlat, points, radius_m):
                    found.setdefault(block, []).append(at)
    return {block: np.concatenate(parts) for block, parts in found.items()}


def _zones(lon: NDArray[np.float64]) -> NDArray[np.int64]:
    zones: NDArray[np.int64] = (((lon + 180.0) % 360.0) // 6.0).astype(np.int64) + 1
    return zones


def _reached(
    grid: Grid, epsg: int, lonlat: _Lonlat, points: NDArray[np.int64], radius_m: float
) -> list[tuple[Block, NDArray[np.int64]]]:
    """Blocks of one zone whose square comes near the points `points`, each with those points."""
    x, y = to_utm(epsg).transform(*lonlat[points].T)
    reach, side = radius_m * _UTM_SCALE + grid.chip_m, grid.shard_m
    first = np.floor((np.stack([x, y], axis=1) - reach) / side).astype(np.int64)
    last = np.floor((np.stack([x, y], axis=1) + reach) / side).astype(np.int64)
    columns, rows = (last - first + 1).T
    pair = np.repeat(np.arange(len(points)), columns * rows)
    dy, dx = np.divmod(ranks(columns * rows), columns[pair])
    blocks, of = np.unique(first[pair] + np.stack([dx, dy], axis=1), axis=0, return_inverse=True)
    order = np.argsort(of, kind="stable")
    ends = np.searchsorted(of[order], np.arange(1, len(blocks)))
    return [
        (Block(epsg, col, row), points[pair[at]])
        for (col, row), at in zip(blocks.tolist(), np.split(order, ends), strict=True)
        if col >= 0 and row >= 0
    ]


def search_boxes(grid: Grid, plans: list[BlockPlan]) -> list[Bounds]:
    """Boxes of degrees in which to look for scenes, ordered: no wider than need be.

    One box where blocks fill a good part of it; scattered blocks get several, split where the gap
    between them is widest. A box across the antimeridian has east > 180.
    """
    todo = [_unrolled(np.array([_block_lonlat(grid, p.block) for p in plans]))]
    found: list[Bounds] = []
    while todo:
        boxes = todo.pop()
        west, south = boxes[:, :2].min(axis=0).tolist()
        east, north = boxes[:, 2:].max(axis=0).tolist()
        filled = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
        small = max(east - west, north - south) <= _SEARCH_DEG
        first = None if small else _first_part(boxes)
        if first is None or filled >= _SEARCH_FILL * (east - west) * (north - south):
            turn = np.floor((west + 180.0) / 360.0) * 360.0
            found.append((west - turn, south, east - turn, north))
        else:
            todo += [boxes[first], boxes[~first]]
    return sorted(found)


def _block_lonlat(grid: Grid, block: Block) -> Bounds:
    """Bounds of a block in degrees; east > 180 where it crosses the antimeridian."""
    west, south, east, north = to_lonlat(block.epsg).transform_bounds(
        *block_bounds(grid, block), densify_pts=21
    )
    return (west, south, east + 360.0 if east < west else east, north)


def _unrolled(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes turned so that the widest empty arc of longitudes lies outside of them all."""
    order = np.argsort(boxes[:, 0], kind="stable")
    west, reach = boxes[order, 0], np.maximum.accumulate(boxes[order, 2])
    gaps = np.r_[west[0] + 360.0 - reach[-1], west[1:] - reach[:-1]]
    start = west[gaps.argmax()]
    turn = np.where(boxes[:, 0] < start, 360.0, 0.0)
    turned: NDArray[np.float64] = boxes + np.stack([turn, 0 * turn, turn, 0 * turn], axis=1)
    return turned


def _first_part(boxes: NDArray[np.float64]) -> NDArray[np.bool_] | None:
    """Which boxes lie before the widest gap along either axis, or else the middle of the longer."""
    best, part = 0.0, None
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        order = np.argsort(low, kind="stable")
        gaps = low[order][1:] - np.maximum.accumulate(high[order])[:-1]
        if len(gaps) and gaps.max() > best:
            best = float(gaps.max())
            part = low < low[order][gaps.argmax() + 1]
    if part is None:
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        axis = int(np.argmax(np.ptp(centre, axis=0)))
        part = centre[:, axis] < (centre[:, axis].min() + centre[:, axis].max()) / 2
    return part if part.any() and not part.all() else None
