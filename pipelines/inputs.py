"""Steps 1 and 2 of a shard: its pixels and its features, from a block of the grid or from pairs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.imagery import cut_chips, load_block
from pipelines.labels import rasterise
from pipelines.objects import Features, load_features
from pipelines.pairs import PairShard, read_pairs
from pipelines.plan import BlockSource, ShardTask, margin_m
from schemas.dataset import DatasetInfo
from schemas.grid import block_bounds, block_chips, pack_chips


@dataclass(frozen=True)
class Inputs:
    """What a shard is made from; N chips are kept out of a lattice of squares."""

    arrays: dict[str, NDArray[Any]]
    """Shard arrays of pixels and identity: image, valid, chip_id, epsg, bounds, ..."""
    features: Features
    frame: NDArray[np.int64] | None
    """Chip of each feature where chips are not on one grid (pairs)."""
    raster: NDArray[np.uint8]
    """Class raster at twice the resolution, of the whole lattice, y down."""
    lattice: tuple[int, int]
    """Squares of the raster along y and x."""
    kept: NDArray[np.int64]
    """[N] positions of the chips in the lattice, raster order."""
    scenes: list[str]
    radiometry: dict[str, str]
    """By scene: which offset was applied to its DN, and why."""
    counts: dict[str, int]


def read_inputs(task: ShardTask) -> Inputs:
    """Read pixels and features of a shard."""
    if isinstance(task.source, PairShard):
        return _read_pairs(task.source, task.info)
    return _read_block(task.source, task.info)


def _read_block(source: BlockSource, info: DatasetInfo) -> Inputs:
    grid, block = info.grid, source.block
    bounds = block_bounds(grid, block)
    pixels = load_block(
        source.scenes, info.sensor, block.epsg, bounds, grid.gsd_m, source.resampling
    )
    cut = cut_chips(pixels, grid.shard_side, grid.size)
    enough = cut.valid >= source.min_valid
    kept = np.flatnonzero(source.chips & enough)
    chips = block_chips(grid, block)
    arrays = {
        "image": cut.image[kept],
        "valid": cut.valid[kept],
        "time": cut.time[kept],
        "scene": cut.scene[kept],
        "chip_id": pack_chips(block.epsg, grid, chips.cols[kept], chips.rows[kept]),
        "epsg": np.full(len(kept), block.epsg, np.int32),
        "bounds": chips.bounds_utm[kept],
        "center_lonlat": chips.center_lonlat[kept],
    }
    margin = margin_m(info)
    wide = (bounds[0] - margin, bounds[1] - margin, bounds[2] + margin, bounds[3] + margin)
    features = load_features(source.parquet, block.epsg, wide, info.taxonomy)
    shape = 2 * grid.size * grid.shard_side
    raster = rasterise(features.geometry, features.osm_class, features.width_m, bounds, shape)
    dropped = int((source.chips & ~enough).sum())
    counts = {**pixels.counts, "chip_below_min_valid": dropped}
    side = grid.shard_side
    return Inputs(
        arrays, features, None, raster, (side, side), kept, pixels.scenes, pixels.radiometry, counts
    )


def _read_pairs(source: PairShard, info: DatasetInfo) -> Inputs:
    pairs = read_pairs(source, info)
    side = 2 * info.grid.size
    frames = [
        rasterise(
            pairs.features.geometry[rows], pairs.features.osm_class[rows],
            pairs.features.width_m[rows], tuple(bounds), side,
        )
        for rows, bounds in zip(pairs.rows_of_pair(), pairs.arrays["bounds"], strict=True)
    ]  # fmt: skip
    raster = np.concatenate([np.zeros((0, side), np.uint8), *frames])
    n = len(frames)
    return Inputs(
        pairs.arrays, pairs.features, pairs.frame, raster, (n, 1), np.arange(n), pairs.scenes,
        {}, pairs.counts,
    )  # fmt: skip
