"""Which chips stand too near to another split: in their own UTM zone, and across its borders.

It depends on place alone. Whether a chip of the other split is in the region, or is ever built,
plays no part, so that a region that grows never changes the chips it had.
"""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.footprints import edge_points
from schemas.config import Splits
from schemas.grid import Block, BlockChips, Grid, owns, to_lonlat, to_utm
from schemas.splits import Split, split_of

_SLACK = 1.002
"""By so much is the buffer widened across zones: a metre on the ground is up to this many of UTM,
as far out as four degrees from the central meridian, and the two zones differ by less."""
_TOUCH_M = 1e-3
"""Chips that overlap by less than a millimetre touch."""


def keep_apart(
    grid: Grid, splits: Splits, block: Block, chips: BlockChips, wanted: NDArray[np.bool_]
) -> tuple[Split, NDArray[np.bool_]]:
    """The block's split, and which of its `wanted` chips [N] are far enough from another one.

    Far enough: at least `splits.buffer_m` from every chip of another split. Where zones meet, their
    chips can overlap; those are too near even with a buffer of 0.
    """
    x, y = (block.col + 0.5) * grid.shard_m, (block.row + 0.5) * grid.shard_m
    split = split_of(splits, grid, block.epsg, x, y)
    far = wanted & _far_in_zone(grid, splits, block, split, chips.bounds_utm)
    at = np.flatnonzero(far)
    if len(at):
        far[at] = _far_across(grid, splits, block, split, chips.bounds_utm[at])
    return split, far


def _far_in_zone(
    grid: Grid, splits: Splits, block: Block, split: Split, bounds_utm: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Chips that are far from the shards of other splits on the zone's grid."""
    far = np.ones(len(bounds_utm), bool)
    half = grid.shard_m / 2
    x, y = block.col * grid.shard_m + half, block.row * grid.shard_m + half
    reach = int(np.ceil(splits.buffer_m / grid.shard_m))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            cx, cy = x + dx * grid.shard_m, y + dy * grid.shard_m
            if split_of(splits, grid, block.epsg, cx, cy) == split:
                continue
            gap_x = np.maximum(cx - half - bounds_utm[:, 2], bounds_utm[:, 0] - cx - half)
            gap_y = np.maximum(cy - half - bounds_utm[:, 3], bounds_utm[:, 1] - cy - half)
            far &= np.maximum(gap_x, gap_y) >= splits.buffer_m
    return far


def _far_across(
    grid: Grid, splits: Splits, block: Block, split: Split, bounds_utm: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Chips [K] that are far from the chips of other splits in the zones around."""
    far = np.ones(len(bounds_utm), bool)
    reach = splits.buffer_m * _SLACK
    low, high = bounds_utm[:, :2].min(axis=0), bounds_utm[:, 2:].max(axis=0)
    margin = reach + grid.chip_m
    around = edge_points(np.concatenate([low - margin, high + margin])[None])[0]
    lon, lat = to_lonlat(block.epsg).transform(*around.T)
    boxes = shapely.box(*(bounds_utm + np.array([1, 1, -1, -1]) * _TOUCH_M).T)
    for epsg in _zones(block.epsg, lon, lat):
        others = _chips_of_others(grid, splits, epsg, split, lon, lat)
        if not len(others):
            continue
        edges = edge_points(others)
        x, y = to_utm(block.epsg).transform(*to_lonlat(epsg).transform(*edges.reshape(-1, 2).T))
        outlines = np.stack([x, y], axis=1).reshape(edges.shape)
        near, _ = shapely.STRtree(shapely.polygons(outlines)).query(
            boxes, predicate="dwithin", distance=reach
        )
        far[near] = False
    return far


def _zones(epsg: int, lon: NDArray[np.float64], lat: NDArray[np.float64]) -> list[int]:
    """Zones, but for the own one, that the box around some places (degrees) reaches into."""
    turned = lon[0] + (lon - lon[0] + 180.0) % 360.0 - 180.0
    first, last = (int((v + 180.0) // 6.0) for v in (turned.min(), turned.max()))
    bases = [b for b, there in ((32600, lat.max() >= 0), (32700, lat.min() < 0)) if there]
    found = {base + zone % 60 + 1 for base in bases for zone in range(first, last + 1)}
    return sorted(found - {epsg})


def _chips_of_others(
    grid: Grid,
    splits: Splits,
    epsg: int,
    split: Split,
    lon: NDArray[np.float64],
    lat: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Bounds [U, 4] of the chips of a zone, near some places, that are not of a split."""
    side = grid.chip_m
    x, y = to_utm(epsg).transform(lon, lat)
    columns, rows = (
        np.arange(max(0, int(v.min() // side)), int(v.max() // side) + 1) for v in (x, y)
    )
    col, row = (a.ravel() for a in np.meshgrid(columns, rows))
    centres = to_lonlat(epsg).transform((col + 0.5) * side, (row + 0.5) * side)
    owned = owns(epsg, np.stack(centres, axis=1))
    col, row = col[owned], row[owned]
    n = grid.shard_side
    shards, of = np.unique(np.stack([col // n, row // n], axis=1), axis=0, return_inverse=True)
    others = [
        split_of(splits, grid, epsg, *((at + 0.5) * grid.shard_m).tolist()) != split
        for at in shards
    ]  # fmt: skip
    kept = np.array(others, bool)[of.reshape(-1)]
    corner = np.stack([col, row], axis=1)[kept] * side
    return np.concatenate([corner, corner + side], axis=1)
