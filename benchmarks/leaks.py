"""How long measuring the distances between splits takes as chips grow; prints JSON.

Chips of a square region at 10 m, splits by blocks of 20 km, a buffer of 1 km. The baseline is one
STRtree over the same boxes asked once for all pairs that meet.
"""

import json
import time

import numpy as np
import shapely

from pipelines.leaks import SplitCheck, _boxes, _Chips, _near_pairs
from schemas.grid import to_lonlat

SIDE_M = 640.0
BLOCK_CHIPS = 32
BUFFER_M = 1000.0


def chips(side: int) -> _Chips:
    """A square of side x side chips, each block of them in a split drawn by a seed."""
    n = side * side
    row, col = np.divmod(np.arange(n), side)
    low = np.column_stack([300_000 + col * SIDE_M, 5_000_000 + row * SIDE_M])
    blocks = -(-side // BLOCK_CHIPS)
    split = np.random.default_rng(0).choice(3, (blocks, blocks), p=(0.8, 0.1, 0.1))
    lon, lat = to_lonlat(32632).transform(*(low + SIDE_M / 2).T)
    return _Chips(
        split[row // BLOCK_CHIPS, col // BLOCK_CHIPS].astype(np.int8),
        np.zeros((n, 2), np.uint64), np.full(n, 32632, np.int32),
        np.column_stack([low, low + SIDE_M]), np.column_stack([lon, lat]), np.ones(n, bool),
        np.zeros(n, np.int64), np.zeros(n, np.int64), np.arange(n),
    )  # fmt: skip


def measure(side: int) -> dict[str, float]:
    """Seconds of the check and of the baseline."""
    made = chips(side)
    started = time.perf_counter()
    result = SplitCheck("", 1, None, BUFFER_M, "leak", {})
    near, _ = _near_pairs(made, BUFFER_M, result)
    middle = time.perf_counter()
    boxes = _boxes(made, BUFFER_M)
    met = shapely.STRtree(boxes).query(boxes).shape[1]
    return {
        "chips": side * side, "near_pairs": len(near), "seconds": middle - started,
        "chips_per_s": side * side / (middle - started), "baseline_pairs": met,
        "baseline_seconds": time.perf_counter() - middle,
    }  # fmt: skip


if __name__ == "__main__":
    measure(50)
    print(json.dumps([measure(side) for side in (100, 300, 600)], indent=2))
