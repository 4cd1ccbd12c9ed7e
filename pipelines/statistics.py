"""Spatial statistics of every chip on its patch lattice, in bulk.

Neighbours are the queen's (eight around, fewer at the border), weights are row-standardised: a
patch's lag is the mean of its neighbours. With deviations z from the mean and lags Wz:

- Moran's I = sum(z * Wz) / sum(z * z)  (Moran 1950; Cliff and Ord 1981);
- Lee's L = sum(Wz * Wb) / sqrt(sum(z * z) * sum(b * b))  (Lee 2001, eq. 18, for weights whose rows
  sum to 1), between a class's share z and the brightness b.

A constant field has no spatial pattern: where z or b is constant the statistic is 0.
"""

import numpy as np
from numpy.typing import NDArray

_CHIPS_AT_ONCE = 8


def patch_brightness(
    image: NDArray[np.uint8] | NDArray[np.uint16], patch: int, nodata: int = 0
) -> NDArray[np.float32]:
    """Brightness of each patch: mean over bands of the band's mean over the patch.

    Parameters: `image` uint8 or uint16 [N, band, y, x]; `patch` pixels along a patch; values equal
    to `nodata` do not count. A patch in which a band has no value takes the mean of the chip's
    other patches, which leaves it out of the statistics; 0 where the chip has none at all.

    Returns float32 [N, y / patch, x / patch] in digital numbers.
    """
    chips, _, height, width = image.shape
    brightness = np.empty((chips, height // patch, width // patch), np.float32)
    for i in range(0, chips, _CHIPS_AT_ONCE):
        part = image[i : i + _CHIPS_AT_ONCE]
        missing = part == nodata
        total = _patch_sums(part, patch)
        pixels = np.full_like(total, patch * patch)
        if missing.any():
            absent = _patch_sums(missing.view(np.uint8), patch)
            total, pixels = total - nodata * absent, pixels - absent
        seen = (pixels > 0).all(axis=1)
        mean = (total / np.maximum(pixels, 1)).mean(axis=1)
        chip_mean = (mean * seen).sum(axis=(1, 2)) / np.maximum(seen.sum(axis=(1, 2)), 1)
        brightness[i : i + len(part)] = np.where(seen, mean, chip_mean[:, None, None])
    return brightness


def _patch_sums(image: NDArray[np.unsignedinteger], patch: int) -> NDArray[np.int64]:
    """Sum over each patch; [..., y, x] -> [..., y / patch, x / patch]."""
    *head, height, width = image.shape
    rows = image.reshape(*head, height // patch, patch, width).sum(axis=-2, dtype=np.uint32)
    squares = rows.reshape(*head, height // patch, width // patch, patch)
    sums: NDArray[np.int64] = squares.sum(axis=-1, dtype=np.int64)
    return sums


def statistics(
    patch_fraction: NDArray[np.float32], brightness: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Moran's I of each class's share, and Lee's L between it and the brightness.

    Parameters: `patch_fraction` float32 [N, py, px, class]; `brightness` float32 [N, py, px] as of
    `patch_brightness`; at least 2 patches each way.

    Returns Moran's I and Lee's L, each float32 [N, class]; 0 where a field is constant, never NaN.
    """
    chips, _, _, classes = patch_fraction.shape
    moran, lee = np.zeros((2, chips, classes), np.float32)
    for i in range(0, chips, _CHIPS_AT_ONCE):
        part = slice(i, i + _CHIPS_AT_ONCE)
        share, bright = _deviations(patch_fraction[part]), _deviations(brightness[part, ..., None])
        lag, bright_lag = _lags(share), _lags(bright)
        spread = (share * share).sum(axis=(1, 2))
        both = np.sqrt(spread * (bright * bright).sum(axis=(1, 2)))
        np.divide((share * lag).sum(axis=(1, 2)), spread, out=moran[part], where=spread > 0)
        np.divide((lag * bright_lag).sum(axis=(1, 2)), both, out=lee[part], where=both > 0)
    return moran, lee


def _deviations(field: NDArray[np.float32]) -> NDArray[np.float64]:
    """Deviations from the mean over a lattice [N, py, px, class]; exactly 0 of a constant one."""
    away = field.astype(np.float64) - field[:, :1, :1]
    away -= away.mean(axis=(1, 2), keepdims=True)
    return away


def _lags(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each patch's neighbours; [N, py, px, class]."""
    total = np.zeros_like(z)
    total[:, :, 1:] += z[:, :, :-1]
    total[:, :, :-1] += z[:, :, 1:]
    across = z + total
    total[:, 1:] += across[:, :-1]
    total[:, :-1] += across[:, 1:]
    _, height, width, _ = z.shape
    reach_y, reach_x = np.full(height, 3), np.full(width, 3)
    reach_y[[0, -1]], reach_x[[0, -1]] = 2, 2
    total /= (np.outer(reach_y, reach_x) - 1)[:, :, None]
    return total
