"""Clouds and their shadows over a scene, and the scene classification that tells of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.world.noise import Floats, fractal

# Sentinel-2 L2A scene classification values.
NO_DATA, DARK, SHADOW, VEGETATION, BARE, WATER, UNCLASSIFIED, MEDIUM, HIGH, CIRRUS = (
    0,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
)
CLOUD_BASE_M = 850.0
# Reflectance of thick cloud in the twelve bands.
CLOUD = np.array(
    [0.62, 0.61, 0.60, 0.61, 0.62, 0.63, 0.64, 0.65, 0.65, 0.5, 0.42, 0.34], dtype=np.float32
)
# Light that still reaches the ground under a cloud.
_DIFFUSE = np.array(
    [0.52, 0.50, 0.46, 0.42, 0.41, 0.4, 0.39, 0.38, 0.38, 0.38, 0.35, 0.34], dtype=np.float32
)


@dataclass(frozen=True)
class Sky:
    """Over a 10 m raster [H, W]: `thick` opacity of clouds, `tops` their brightness about 1,
    `shade` depth of their shadows."""

    thick: Floats
    tops: Floats
    shade: Floats


def make_sky(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    cover: float,
    sun: tuple[float, float],
    seed: int,
) -> Sky:
    """Clouds over a fraction `cover` of the raster of pixel centres x [W], y [H] (metres).

    `sun`: azimuth and elevation in degrees; shadows fall away from it.
    """
    size = (x[-1] - x[0]) / 4.5
    lengths = tuple(max(size * f, 40.0) for f in (1.0, 0.42, 0.17, 0.07, 0.03))
    heap = fractal(x, y, lengths, seed)
    edge = float(np.quantile(heap, 1 - cover)) if cover > 0 else 9.0
    above = (heap - edge) / float(heap.std())
    puffs = fractal(x, y, tuple(max(size * f, 30.0) for f in (0.11, 0.05, 0.022)), seed + 1)
    thick = np.clip((above + 0.35 * puffs + 0.1) * 2.6, 0, 1) ** 1.5
    thick = gaussian_filter(thick.astype(np.float32), 1.0)
    tops = np.float32(0.78) + np.float32(0.3) * puffs + np.float32(0.16) * np.clip(above, 0, 1.5)
    gsd = float(x[1] - x[0])
    reach = CLOUD_BASE_M / np.tan(np.deg2rad(sun[1])) / gsd * min(1.0, size / 2000)
    azimuth = np.deg2rad(sun[0])
    down, right = round(reach * np.cos(azimuth)), round(-reach * np.sin(azimuth))
    # Rows run south: the sun stands in the south, so shadows fall up the picture.
    r = np.clip(np.arange(len(y)) - down, 0, len(y) - 1)
    c = np.clip(np.arange(len(x)) - right, 0, len(x) - 1)
    shade = thick[r][:, c]
    return Sky(thick, tops, gaussian_filter(shade, 1.5))


def under(sky: Sky, reflectance: Floats, band: int) -> Floats:
    """What is seen of one band [H, W] through and beneath the clouds."""
    lit = reflectance * (1 - 0.9 * sky.shade * (1 - _DIFFUSE[band]))
    return np.asarray(lit * (1 - sky.thick) + CLOUD[band] * sky.tops * sky.thick, dtype=np.float32)


def classify(
    sky: Sky, red: Floats, nir: Floats, swir: Floats, data: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Scene classification [h, w] at 20 m of clear-sky bands [H, W] at 10 m and the sky."""

    def coarse(a: Floats) -> Floats:
        return np.asarray(
            a.reshape(a.shape[0] // 2, 2, a.shape[1] // 2, 2).mean(axis=(1, 3)), dtype=np.float32
        )

    red, nir, swir, thick, shade = (coarse(a) for a in (red, nir, swir, sky.thick, sky.shade))
    green = (nir - red) / np.maximum(nir + red, 1e-3)
    out = np.full(red.shape, BARE, dtype=np.uint8)
    out[(green > -0.05) & (green < 0.12) & (nir < 0.09)] = UNCLASSIFIED
    out[green > 0.35] = VEGETATION
    out[(nir < 0.06) & (swir < 0.05)] = WATER
    out[(nir < 0.045) & (swir >= 0.05)] = DARK
    out[shade > 0.3] = SHADOW
    out[thick > 0.06] = CIRRUS
    out[thick > 0.2] = MEDIUM
    out[thick > 0.6] = HIGH
    out[coarse(data.astype(np.float32)) < 1] = NO_DATA
    return out
