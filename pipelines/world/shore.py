"""Shallow water: the sea is brighter near its shore."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, zoom

from pipelines.world.covers import COVER_ID
from pipelines.world.ground import Ground
from pipelines.world.materials import SPECTRA, spectrum
from pipelines.world.noise import Floats, fractal

_COARSE_M = 10.0
_REACH_M = 70.0


@dataclass(frozen=True)
class Shallows:
    """Weight [H, W] of shallow water, and what it adds to the reflectance of deep water."""

    weight: Floats | None
    difference: Floats

    def add(self, rows: slice, band: int) -> Floats | np.float32:
        """Reflectance [h, W] to add in one band, on rows of the raster."""
        if self.weight is None:
            return np.float32(0)
        return self.weight[rows] * self.difference[band]


def shallows(ground: Ground) -> Shallows:
    """How shallow the sea is everywhere on the ground."""
    difference = spectrum("sea_shallow") - spectrum("sea")
    assert len(difference) == len(SPECTRA["sea"])
    sea = ground.cover[ground.index] == COVER_ID["sea"]
    if not sea.any():
        return Shallows(None, difference)
    k = max(1, round(_COARSE_M / ground.gsd_m))
    coarse = sea[::k, ::k]
    away = distance_transform_edt(coarse).astype(np.float32) * (k * ground.gsd_m)
    near = np.exp(-away / _REACH_M) * (
        1.0 + 0.8 * fractal(ground.x[::k], ground.y[::k], (420.0, 130.0, 45.0), 77)
    )
    near = np.clip(near, 0, 1).astype(np.float32)
    full: NDArray[np.float32] = (
        np.repeat(np.repeat(near, k, axis=0), k, axis=1) if k == 1 else zoom(near, k, order=1)
    )
    full = full[: sea.shape[0], : sea.shape[1]]
    if full.shape != sea.shape:
        full = np.pad(
            full,
            [(0, sea.shape[0] - full.shape[0]), (0, sea.shape[1] - full.shape[1])],
            mode="edge",
        )
    return Shallows(full * sea, difference)
