"""A region becomes shards: which blocks of the grid, and which of their chips."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from schemas.config import Region, Splits
from schemas.errors import GeoLinkError
from schemas.grid import Block, Bounds, Grid, block_chips, blocks_in
from schemas.splits import Split, split_of


@dataclass(frozen=True)
class BlockPlan:
    """One block of the region."""

    block: Block
    chips: NDArray[np.bool_]
    """[shard_side**2] in raster order: the chip belongs to the region and to this zone."""
    split: Split
    near_other_split: int
    """Chips left out because another split is nearer than the buffer."""


def region_geometry(region: Region) -> BaseGeometry:
    """The region as a polygon in degrees (lon, lat); longitudes beyond 180 cross the antimeridian.

    Raises GeoLinkError: a file that is missing or not GeoJSON, no polygon in it, no area.
    """
    if region.bbox is not None:
        return shapely.box(*region.bbox)
    if region.file is not None:
        text = _read(region.file)
        where = str(region.file)
    else:
        text, where = json.dumps(region.geojson), "region.geojson"
    try:
        geometry = shapely.from_geojson(text)
    except shapely.GEOSException as error:
        raise GeoLinkError(f"{where} is not valid GeoJSON: {error}") from error
    parts = shapely.get_parts(shapely.get_parts(geometry))
    polygons = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    region_area = shapely.union_all(shapely.make_valid(polygons))
    if region_area.area == 0:
        raise GeoLinkError(f"{where} holds no polygon with an area; give the region as polygons")
    return region_area


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GeoLinkError(f"cannot read region {path}: {error}") from error


def plan_blocks(region: BaseGeometry, grid: Grid, splits: Splits) -> list[BlockPlan]:
    """Every block with at least one chip whose centre lies in the region, in order of block.

    Raises GeoLinkError if the region reaches outside UTM or holds no chip centre.
    """
    west, south, east, north = (float(v) for v in region.bounds)
    bounds: Bounds = (west, south, east, north)
    shapely.prepare(region)
    plans: list[BlockPlan] = []
    for block in sorted(set(blocks_in(grid, bounds))):
        chips = block_chips(grid, block)
        lon, lat = chips.center_lonlat[:, 0], chips.center_lonlat[:, 1]
        inside = np.zeros(len(lon), bool)
        for turn in (-360.0, 0.0, 360.0):
            inside |= shapely.contains_xy(region, lon + turn, lat)
        mask = chips.owned & inside
        if not mask.any():
            continue
        split, far = _split(grid, splits, block, chips.bounds_utm)
        plans.append(BlockPlan(block, mask & far, split, int((mask & ~far).sum())))
    if not plans:
        raise GeoLinkError(
            f"the region {tuple(round(v, 5) for v in bounds)} holds no centre of a chip of "
            f"{grid.chip_m:g} m; make it larger or the chips smaller"
        )
    return plans


def _split(
    grid: Grid, splits: Splits, block: Block, bounds_utm: NDArray[np.float64]
) -> tuple[Split, NDArray[np.bool_]]:
    """The block's split, and which of its chips are at least the buffer away from another one."""
    half = grid.shard_m / 2
    x, y = block.col * grid.shard_m + half, block.row * grid.shard_m + half
    split = split_of(splits, grid, block.epsg, x, y)
    far = np.ones(len(bounds_utm), bool)
    if splits.buffer_m == 0:
        return split, far
    reach = int(np.ceil(splits.buffer_m / grid.shard_m))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            cx, cy = x + dx * grid.shard_m, y + dy * grid.shard_m
            if split_of(splits, grid, block.epsg, cx, cy) == split:
                continue
            gap_x = np.maximum(cx - half - bounds_utm[:, 2], bounds_utm[:, 0] - cx - half)
            gap_y = np.maximum(cy - half - bounds_utm[:, 3], bounds_utm[:, 1] - cy - half)
            far &= np.maximum(gap_x, gap_y) >= splits.buffer_m
    return split, far
