"""Splits are by place: whole blocks of shards, the same in every build."""

from collections import Counter

import numpy as np
import pytest

from schemas.config import Splits
from schemas.grid import Block, Grid, block_bounds, block_chips
from schemas.splits import SPLITS, split_of

GRID = Grid(gsd_m=10, size=64, patch=8, shard_side=4)


def _of(block: Block, splits: Splits) -> str:
    x0, y0, x1, y1 = block_bounds(GRID, block)
    return split_of(splits, GRID, block.epsg, (x0 + x1) / 2, (y0 + y1) / 2)


@pytest.mark.parametrize("block_km", [0.01, 2.56, 20.0])
def test_all_chips_of_a_shard_are_in_one_split(block_km: float) -> None:
    splits = Splits(block_km=block_km, train=0.4, val=0.3, test=0.3)
    for col in range(40):
        block = Block(32632, 200 + col, 1900)
        boxes = block_chips(GRID, block).bounds_utm
        centres = np.stack([boxes[:, [0, 2]].mean(axis=1), boxes[:, [1, 3]].mean(axis=1)], axis=1)
        assert {split_of(splits, GRID, 32632, x, y) for x, y in centres} == {_of(block, splits)}


def test_a_block_of_shards_is_in_one_split() -> None:
    # 10 km are rounded to four shards of 2.56 km.
    splits = Splits(block_km=10.0, train=0.4, val=0.3, test=0.3)
    for col in range(0, 80, 4):
        together = [Block(32632, col + i, 1900 + j) for i in range(4) for j in range(4)]
        assert len({_of(block, splits) for block in together}) == 1
    assert len({_of(Block(32632, col, 1900), splits) for col in range(0, 160, 4)}) == 3


def test_shares_are_those_asked_for() -> None:
    splits = Splits(block_km=2.56, train=0.7, val=0.2, test=0.1)
    places = [Block(32632, col, row) for col in range(60) for row in range(1900, 1960)]
    counts = Counter(_of(block, splits) for block in places)
    shares = [counts[name] / len(places) for name in SPLITS]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_the_seed_and_the_zone_change_the_split_and_nothing_else_does() -> None:
    splits = Splits(block_km=2.56, train=0.4, val=0.3, test=0.3)
    places = [Block(32632, col, 1900) for col in range(60)]

    def drawn(blocks: list[Block], splits: Splits) -> list[str]:
        return [_of(block, splits) for block in blocks]

    once = drawn(places, splits)
    assert drawn(places[::-1], splits)[::-1] == once
    assert drawn(places, splits.model_copy(update={"buffer_m": 500.0})) == once
    assert drawn(places, splits.model_copy(update={"seed": 1})) != once
    assert drawn([b._replace(epsg=32633) for b in places], splits) != once


def test_a_larger_train_share_keeps_what_was_train() -> None:
    small = Splits(block_km=2.56, train=0.5, val=0.25, test=0.25)
    large = Splits(block_km=2.56, train=0.7, val=0.15, test=0.15)
    for block in (Block(32632, col, 1900) for col in range(100)):
        if _of(block, small) == "train":
            assert _of(block, large) == "train"


@pytest.mark.parametrize("only", SPLITS)
def test_everything_may_be_in_one_split(only: str) -> None:
    shares = {name: float(name == only) for name in SPLITS}
    assert {_of(Block(32632, c, 1), Splits(**shares)) for c in range(50)} == {only}


def test_splits_do_not_change_between_releases() -> None:
    drawn = "".join(_of(Block(32632, 8 * c, 1900), Splits())[1] for c in range(40))
    assert drawn == "errraerearrearrrrrreaerrarrrrerrarrrrerr"
