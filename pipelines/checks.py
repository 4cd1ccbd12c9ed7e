"""What is odd about the chips of a shard, from the shard alone: flags that readers filter by.

Each detector takes whole arrays and answers with a flag a chip. Limits are set so that the embedded
world, where nothing is planted, has next to none.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.dataset import DatasetInfo
from schemas.findings import CHIP_FLAGS, SURE, set_flags

Flags = NDArray[np.bool_]

SHIFTED_PX = 1.5
"""A shift is surely beyond a pixel if the estimate is beyond it by its own error, half a pixel."""
_MASKED = 0.1
_CONSTANT = 0.2
_FEW_CHIPS = 8
"""Fewer chips than this tell nothing about what is usual."""
_OUTLIER = 4.0
"""Robust standard deviations of the log of the number of objects."""
_TIMES = 4.0
"""And so many times more, or less, than the median chip."""
_SEAM = 0.5
"""Jump along a seam, in standard deviations of differences between neighbouring pixels."""
_CLASS_SHARE = 0.05
_WATER_AT_LEAST, _WATER_AT_MOST = -0.1, 0.1
"""NDWI of water is above, that of forest below (McFeeters 1996)."""
_EVERY = 4
"""Detectors of areas look at every fourth pixel."""


def check_chips(
    arrays: Mapping[str, NDArray[Any]], shift: NDArray[np.float32], seam: Flags, info: DatasetInfo
) -> tuple[NDArray[np.uint32], dict[str, int]]:
    """The array `finding` of a shard, and its counts by code.

    arrays: image, valid, label_pixel, object_offset. shift: [N, 3] pixels and confidence. seam:
    [N] of `seams`.
    """
    image, nodata = arrays["image"], info.sensor.nodata
    empty = _empty_share(image, nodata)
    objects = np.diff(arrays["object_offset"])
    dense, sparse = _outliers(objects)
    flags = {
        "chip_shifted": is_shifted(shift),
        "chip_cloudy": 1 - arrays["valid"] - empty > _MASKED,
        "chip_nodata": empty > _MASKED,
        "chip_seam": seam,
        "chip_constant": _constant_share(image, nodata) > _CONSTANT,
        "chip_osm_dense": dense,
        "chip_osm_sparse": sparse,
        "chip_osm_empty": objects == 0,
        "chip_class_disagrees": _class_disagrees(image, arrays["label_pixel"], info),
    }
    assert flags.keys() == set(CHIP_FLAGS)
    return set_flags(flags, len(image)), {code: int(flag.sum()) for code, flag in flags.items()}


def is_shifted(shift: NDArray[np.float32]) -> Flags:
    """[N]: whether image and map are surely shifted by more than a pixel; `shift` as estimated."""
    away = np.hypot(shift[:, 0], shift[:, 1])
    return np.asarray((shift[:, 2] >= SURE) & (away > SHIFTED_PX))


def _empty_share(image: NDArray[Any], nodata: int) -> NDArray[np.float64]:
    """Share of pixels without data [N]: of all bands in 8 bits, where 0 is black too, else any."""
    missing = image == nodata
    together = missing.all(axis=1) if image.dtype == np.uint8 else missing.any(axis=1)
    share: NDArray[np.float64] = together.mean(axis=(1, 2))
    return share


def _constant_share(image: NDArray[Any], nodata: int) -> NDArray[np.float64]:
    """Share of the commonest value among pixels that equal their neighbours in all bands [N].

    Sensors have noise: what is constant over an area was filled in.
    """
    last = image.shape[2] - 1
    here, left, above = (
        image[:, :, y:last:_EVERY, x:last:_EVERY] for y, x in ((1, 1), (1, 0), (0, 1))
    )
    count = min(here.shape[2], above.shape[2]), min(here.shape[3], left.shape[3])
    here, left, above = (v[:, :, : count[0], : count[1]] for v in (here, left, above))
    flat = ((here == left) & (here == above)).all(axis=1) & (here != nodata).any(axis=1)
    share: NDArray[np.float64] = flat.mean(axis=(1, 2))
    for n in np.flatnonzero(share > _CONSTANT):
        values = here[n][:, flat[n]]
        most = np.unique(values, axis=1, return_counts=True)[1].max()
        share[n] *= most / values.shape[1]
    return share


def _outliers(objects: NDArray[np.int64]) -> tuple[Flags, Flags]:
    """Chips with far more, and with far fewer objects (but some) than the shard's other chips."""
    some = objects > 0
    if np.count_nonzero(some) < _FEW_CHIPS:
        return np.zeros(len(objects), bool), np.zeros(len(objects), bool)
    log = np.log(np.maximum(objects, 1))
    middle = np.median(log[some])
    spread = 1.4826 * np.median(np.abs(log[some] - middle))
    far = max(_OUTLIER * float(spread), float(np.log(_TIMES)))
    return some & (log - middle > far), some & (middle - log > far)


def seams(
    image: NDArray[Any], scene: NDArray[np.int16], side: int, size: int, nodata: int
) -> Flags:
    """Whether brightness jumps along the border of two scenes, by chip of a block [side * side].

    image: [band, y, x] of the block. scene: [y, x] scene of each pixel, -1 none. The jump is the
    mean difference across the border, always from the scene that comes first; the eye sees it if
    it exceeds what neighbouring pixels differ by anyhow.
    """
    if scene.min() == scene.max():
        return np.zeros(side * side, bool)
    total, weight, usual, pairs = (np.zeros(side * side) for _ in range(4))
    chip = np.arange(side).repeat(size)
    for axis in (0, 1):
        first, second = (scene[:-1], scene[1:]) if axis == 0 else (scene[:, :-1], scene[:, 1:])
        y, x = np.nonzero(first != second)
        # Pairs within a chip only: those across its border belong to no chip.
        inside = (x if axis else y) % size != size - 1
        inside &= (first[y, x] >= 0) & (second[y, x] >= 0)
        y, x = y[inside], x[inside]
        jump = _difference(image, y, x, axis, nodata)
        direction = np.sign(scene[y + (axis == 0), x + (axis == 1)].astype(np.int64) - scene[y, x])
        place = chip[y] * side + chip[x]
        total += np.bincount(place, direction * jump, minlength=side * side)
        weight += np.bincount(place, np.isfinite(jump) * 1.0, minlength=side * side)
    if not weight.any():
        return np.zeros(side * side, bool)
    grid = np.arange(0, side * size - 1, _EVERY)
    y, x = (v.ravel() for v in np.meshgrid(grid, grid, indexing="ij"))
    same = scene[y, x] == scene[y, x + 1]
    y, x = y[same], x[same]
    place = chip[y] * side + chip[x]
    usual += np.bincount(place, _difference(image, y, x, 1, nodata) ** 2, minlength=side * side)
    pairs += np.bincount(place, minlength=side * side)
    ordinary = np.sqrt(usual / np.maximum(pairs, 1))
    mean = np.abs(total) / np.maximum(weight, 1)
    return np.asarray((weight >= size / 2) & (mean > _SEAM * np.maximum(ordinary, 1e-6)))


def _difference(
    image: NDArray[Any], y: NDArray[np.int64], x: NDArray[np.int64], axis: int, nodata: int
) -> NDArray[np.float64]:
    """Mean brightness of the pixel below (or right) minus that of (y, x); 0 beside no data."""
    a = image[:, y, x].astype(np.float64)
    b = image[:, y + (axis == 0), x + (axis == 1)].astype(np.float64)
    known = (a != nodata).any(axis=0) & (b != nodata).any(axis=0)
    return np.where(known, (b - a).mean(axis=0), 0.0)


def _class_disagrees(image: NDArray[Any], label: NDArray[np.uint8], info: DatasetInfo) -> Flags:
    """Whether most of the chip's water has no look of water, or most of its forest has.

    By the normalised difference of green and near infrared, so only with sensors that have both;
    pixels beside another class do not count.
    """
    disagrees = np.zeros(len(image), bool)
    names = [b.name for b in info.sensor.bands]
    if not {"green", "nir"} <= set(names):
        return disagrees
    scale, offset = info.sensor.scale, info.sensor.offset
    every = (slice(None), slice(1, -1, 2), slice(1, -1, 2))
    dn = (image[:, names.index(b)][every].astype(np.float32) for b in ("green", "nir"))
    green, nir = (np.maximum(v * np.float32(scale) + np.float32(offset), 1e-4) for v in dn)
    index = (green - nir) / (green + nir)
    known = image[:, names.index("nir")][every] != info.sensor.nodata
    seen = label[every]
    # Pixels on a border, or of a narrow river, are mixed.
    inner = np.ones(seen.shape, bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        beside = label[:, rows::2, columns::2]
        inner &= seen == beside[:, : seen.shape[1], : seen.shape[2]]
    known &= inner
    for name, wrong in (("water", index < _WATER_AT_LEAST), ("forest", index > _WATER_AT_MOST)):
        if name not in info.taxonomy.names:
            continue
        there = known & (seen == info.taxonomy.names.index(name) + 1)
        share = there.mean(axis=(1, 2))
        mostly = (there & wrong).sum(axis=(1, 2)) > 0.5 * there.sum(axis=(1, 2))
        disagrees |= (share > _CLASS_SHARE) & mostly
    return disagrees
