"""The window of a block that is read: no more than its wanted chips need."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.inputs import window_of
from schemas.grid import Block, Grid, block_bounds, block_chips


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.data())
def test_the_window_is_the_smallest_square_of_the_wanted_chips(n: int, data: st.DataObject) -> None:
    grid = Grid(gsd_m=data.draw(st.sampled_from([0.3, 2.5])), size=32, patch=8, shard_side=n)
    chips = data.draw(hnp.arrays(bool, n * n))
    block = Block(32632, 40, 700)
    at, bounds, side = window_of(grid, block, chips)
    assert len(at) == side**2
    assert set(np.flatnonzero(chips)) <= set(at.tolist())
    squares = block_chips(grid, block).bounds_utm[at]
    box = (*squares[:, :2].min(axis=0), *squares[:, 2:].max(axis=0))
    assert np.allclose(box, bounds, rtol=0, atol=1e-9)
    assert np.allclose(squares[0, [0, 3]], (bounds[0], bounds[3]), rtol=0, atol=1e-9)
    if chips.all() or not chips.any():
        assert (side, bounds) == (n, block_bounds(grid, block))
    else:
        row, column = np.divmod(np.flatnonzero(chips), n)
        assert side == max(np.ptp(row), np.ptp(column)) + 1
