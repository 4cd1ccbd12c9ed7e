"""Train, validation and test by place alone, never by build order."""

import math
from typing import Literal

import xxhash

from schemas.config import Splits
from schemas.grid import Grid

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def split_of(splits: Splits, grid: Grid, epsg: int, x: float, y: float) -> Split:
    """The split of a place given in UTM metres: a seeded hash of the block of shards it is in."""
    block_m = max(1, round(splits.block_km * 1000.0 / grid.shard_m)) * grid.shard_m
    place = f"{splits.seed}/{epsg}/{math.floor(x / block_m)}/{math.floor(y / block_m)}"
    u = xxhash.xxh3_64_intdigest(place.encode()) / 2**64
    if u < splits.train:
        return "train"
    return "val" if u < splits.train + splits.val else "test"
