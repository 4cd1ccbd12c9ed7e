"""Arithmetic of ragged arrays: runs of equal keys, and positions within runs."""

import numpy as np
from numpy.typing import NDArray


def run_starts(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """First position of each run of equal values in `key` [n], ascending."""
    return np.flatnonzero(np.r_[True, key[1:] != key[:-1]][: len(key)])


def ranks(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions within their own run, for runs of `counts` [n] elements: [2, 3] -> 0 1 0 1 2."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
