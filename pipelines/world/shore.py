"""Shallow water: the sea is brighter near its shore."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from pipelines.world.covers import COVER_ID
from pipelines.world.ground import Ground
from pipelines.world.materials import spectrum
from pipelines.world.noise import Floats, fractal

_COARSE_M = 10.0
_REACH_M = 70.0


@dataclass(frozen=True)
class Shallows:
    """Weight of shallow water on a coarse raster, `step` pixels of the ground to each of its."""

    weight: Floats
    step: int
    difference: Floats

    def of(self, rows: slice, index: NDArray[np.int32], ground: Ground) -> Floats | None:
        """Weight [h, W] on rows of the ground, `index` their table rows; None where no sea is."""
        sea = ground.cover[index] == COVER_ID["sea"]
        if not sea.any():
            return None
        w = _between(
            self.weight, np.arange(rows.start, rows.stop), np.arange(index.shape[1]), self.step
        )
        return np.asarray(w * sea, dtype=np.float32)


def shallows(ground: Ground) -> Shallows:
    """How shallow the sea is everywhere on the ground."""
    step = max(1, round(_COARSE_M / ground.gsd_m))
    sea = ground.cover[ground.index[::step, ::step]] == COVER_ID["sea"]
    difference = spectrum("sea_shallow") - spectrum("sea")
    if sea.all() or not sea.any():
        return Shallows(np.zeros(sea.shape, dtype=np.float32), step, difference)
    away = distance_transform_edt(sea).astype(np.float32) * np.float32(step * ground.gsd_m)
    rough = fractal(ground.x[::step], ground.y[::step], (420.0, 130.0, 45.0), 77)
    near = np.exp(away / np.float32(-_REACH_M)) * (1 + np.float32(0.8) * rough)
    return Shallows(np.clip(near, 0, 1), step, difference)


def _between(
    coarse: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64], step: int
) -> Floats:
    """Bilinear values [h, W] of a coarse raster whose pixel k lies on fine pixel k * step."""

    def axis(
        at: NDArray[np.int64], size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        low = np.minimum(at // step, size - 1)
        return (
            low,
            np.minimum(low + 1, size - 1),
            ((at - low * step) / step).clip(0, 1).astype(np.float32),
        )

    r0, r1, tr = axis(rows, coarse.shape[0])
    c0, c1, tc = axis(columns, coarse.shape[1])
    tall = coarse[r0] + (coarse[r1] - coarse[r0]) * tr[:, None]
    return np.asarray(tall[:, c0] + (tall[:, c1] - tall[:, c0]) * tc, dtype=np.float32)
