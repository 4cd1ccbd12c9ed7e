"""Noise that is a function of position: the same place looks the same in every picture of it."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def mix(h: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A 32-bit integer hash (multiply and xor-shift, avalanching)."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def _cells(i: NDArray[np.int64]) -> NDArray[np.uint32]:
    return (i & 0xFFFFFFFF).astype(np.uint32)


def lattice(ix: NDArray[np.int64], iy: NDArray[np.int64], salt: int) -> Floats:
    """Uniform [0, 1) values of integer cells; `ix`, `iy` broadcast."""
    seed = mix(np.array([salt & 0xFFFFFFFF], dtype=np.uint32))[0]
    h = mix(_cells(iy) ^ seed)
    h = mix(h ^ _cells(ix) * np.uint32(0x9E3779B1))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def uniform(xy: NDArray[np.float64], salt: int) -> Floats:
    """Uniform [0, 1) values of positions [N, 2] in metres, to the decimetre."""
    cell = np.round(xy * 10).astype(np.int64)
    return lattice(cell[:, 0], cell[:, 1], salt)


def value_noise(
    x: NDArray[np.float64], y: NDArray[np.float64], length_m: float, salt: int
) -> Floats:
    """Smooth noise in [-1, 1] of one wavelength on a grid: x [W], y [H] in metres -> [H, W]."""
    u, v = x / length_m, y / length_m
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    columns = np.arange(i.min(), i.max() + 2)
    rows = np.arange(j.min(), j.max() + 2)
    values = lattice(columns[None, :], rows[:, None], salt) * np.float32(2) - np.float32(1)
    tx, ty = _smooth(u - i), _smooth(v - j)
    k, m = i - columns[0], j - rows[0]
    wide = values[:, k]
    wide += (values[:, k + 1] - wide) * tx
    out = wide[m]
    out += (wide[m + 1] - out) * ty[:, None]
    return np.asarray(out, dtype=np.float32)


def value_noise_at(xy: NDArray[np.float64], length_m: float, salt: int) -> Floats:
    """The same noise at positions [N, 2]."""
    u, v = xy[:, 0] / length_m, xy[:, 1] / length_m
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    tx, ty = _smooth(u - i), _smooth(v - j)
    low = lattice(i, j, salt) * (1 - tx) + lattice(i + 1, j, salt) * tx
    high = lattice(i, j + 1, salt) * (1 - tx) + lattice(i + 1, j + 1, salt) * tx
    return np.asarray((low * (1 - ty) + high * ty) * 2 - 1, dtype=np.float32)


def fractal(
    x: NDArray[np.float64], y: NDArray[np.float64], lengths_m: tuple[float, ...], salt: int
) -> Floats:
    """Sum of octaves, the first strongest, in about [-1, 1]: x [W], y [H] -> [H, W]."""
    weights = np.array([0.6**k for k in range(len(lengths_m))], dtype=np.float32)
    weights /= weights.sum()
    out = np.zeros((len(y), len(x)), dtype=np.float32)
    for k, (length, weight) in enumerate(zip(lengths_m, weights, strict=True)):
        out += value_noise(x, y, length, salt + 7919 * k) * weight
    return out


def fractal_at(xy: NDArray[np.float64], lengths_m: tuple[float, ...], salt: int) -> Floats:
    """The same sum of octaves at positions [N, 2]."""
    weights = np.array([0.6**k for k in range(len(lengths_m))], dtype=np.float32)
    weights /= weights.sum()
    out = np.zeros(len(xy), dtype=np.float32)
    for k, (length, weight) in enumerate(zip(lengths_m, weights, strict=True)):
        out += value_noise_at(xy, length, salt + 7919 * k) * weight
    return out


def _smooth(t: NDArray[np.float64]) -> Floats:
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)
