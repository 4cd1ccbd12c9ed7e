"""Radiometric offset of a scene: what has to be added to its digital numbers, and why.

ESA's Sentinel-2 products of processing baseline 04.00 and later (from 25 January 2022, and older
ones reprocessed) store DN + 1000, so that dark pixels need not be clipped at zero. Some catalogs
take it off again. It must be taken off once, never twice.
Source: Sentinel-2 Products Specification Document, field BOA_ADD_OFFSET.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.sensor import Sensor

_BASELINE_KEYS = (
    "s2:processing_baseline", "sentinel2:processing_baseline", "sentinel:processing_baseline",
    "processing:version",
)  # fmt: skip
_PRODUCT_KEYS = ("s2:product_uri", "sentinel:product_id", "s2:product_id", "title")


class Offset(NamedTuple):
    """What is added to a scene's digital numbers at load."""

    dn: int | None
    """Digital numbers; None: it cannot be told."""
    reason: str


def item_offset(
    sensor: Sensor, item: Mapping[str, Any], assets: Iterable[Mapping[str, Any]]
) -> Offset:
    """Offset of a STAC item; `assets` are the ones the sensor's bands are read from.

    A collection that is harmonised by name has none. Else an item's word about itself goes first
    (`boa_offset_applied` of Earth Search), then the offsets of its assets (`raster:bands`, or
    `bands` and `raster:offset` of STAC 1.1), then its baseline.
    """
    if sensor.radiometry != "sentinel-2":
        return Offset(0, f"{sensor.name} has no radiometric offset")
    collection = str(item.get("collection") or "")
    if re.search("harmoni[sz]ed", collection, re.IGNORECASE):
        return Offset(0, f"collection {collection} is harmonised")
    baseline = processing_baseline(item)
    if baseline is not None and baseline < 400:
        return Offset(0, f"{_shown(baseline)} has no offset")
    name = _shown(baseline)
    applied = _applied(item["properties"])
    if applied is True:
        return Offset(0, f"{name}, offset already applied (boa_offset_applied)")
    stated = {dn for asset in assets for dn in asset_offsets(asset)}
    if len(stated) > 1:
        return Offset(None, f"{name}, but its assets state different offsets {sorted(stated)}")
    if stated == {0} and (applied is None or baseline is None):
        return Offset(0, f"{name}, offset already applied (assets state offset 0)")
    if baseline is None and not stated:
        return Offset(None, f"{name} and no offset stated, so the radiometric offset is unknown")
    dn = stated.pop() if stated and stated != {0} else -1000
    return Offset(dn, f"{name} stores DN {-dn:+d}")


def _shown(baseline: int | None) -> str:
    if baseline is None:
        return "no processing baseline"
    return f"baseline {baseline // 100:02d}.{baseline % 100:02d}"


def _applied(properties: Mapping[str, Any]) -> bool | None:
    """What Earth Search (v1, v0) says of the offset; None: nothing."""
    for key in ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied"):
        if isinstance(properties.get(key), bool):
            return bool(properties[key])
    return None


def processing_baseline(item: Mapping[str, Any]) -> int | None:
    """Processing baseline of a Sentinel-2 item times 100 (04.00 is 400), None where unknown."""
    properties = item["properties"]
    for key in _BASELINE_KEYS:
        match = re.fullmatch(r"N?(\d\d)\.?(\d\d)", str(properties.get(key, "")))
        if match:
            return int(match[1] + match[2])
    for text in (*(str(properties.get(key, "")) for key in _PRODUCT_KEYS), str(item.get("id", ""))):
        match = re.search(r"_N(\d{4})_", text)
        if match:
            return int(match[1])
    return None


def asset_offsets(asset: Mapping[str, Any]) -> list[int]:
    """Offsets in digital numbers that an asset states for its bands; empty if it states none."""
    bands = asset.get("raster:bands") or asset.get("bands") or [{}]
    offsets = []
    for band in bands:
        offset = band.get("raster:offset", band.get("offset", asset.get("raster:offset")))
        scale = band.get("raster:scale", band.get("scale", asset.get("raster:scale", 1e-4)))
        if offset is not None and scale:
            offsets.append(round(offset / scale))
    return offsets


def apply_offset(image: NDArray[Any], dn: int, nodata: int) -> None:
    """Add `dn` to an unsigned integer image in place; pixels without data stay as they are.

    Results are kept within the type and off `nodata` (with nodata 0: clipped at 1).
    """
    if dn == 0:
        return
    limits = np.iinfo(image.dtype)
    low = nodata + 1 if nodata == limits.min else limits.min
    high = nodata - 1 if nodata == limits.max else limits.max
    for band in image:
        empty = band == nodata
        # Clipped before it is added, so that nothing can wrap around.
        np.clip(band, max(low - dn, limits.min), min(high - dn, limits.max), out=band)
        if dn < 0:
            band -= image.dtype.type(-dn)
        else:
            band += image.dtype.type(dn)
        band[empty] = nodata


_DARK_SHARE = 0.02
_AT_OFFSET_DN = (950, 1400)
_BELOW_OFFSET_DN = 700
_FEWEST_PIXELS = 400


def offset_contradiction(
    image: NDArray[Any], clear: NDArray[np.bool_], dn: int, nodata: int
) -> str | None:
    """Finding of a Sentinel-2 scene whose dark pixels contradict its offset `dn`, if they do.

    image: [band, y, x] as delivered; clear: [y, x]. Dark things (water, shade; plants in visible
    light) have a reflectance of up to 0.04, and over-correction leaves few pixels below -0.03. So
    where DN carry +1000, the darkest pixels of two bands lie little above 1000 and none below;
    where they do not, dark pixels lie in the low hundreds. `scene_double_offset`: 2 % of the pixels
    of two bands lie below 700, though 1000 is to be taken off. `scene_no_offset`: nothing is to be
    taken off, though no band goes below 950 and three begin at up to 1400 (three, because blue is
    so dark in a desert, and short-wave infrared in snow). Places with nothing dark are never named.
    """
    step = max(1, round((clear.size / 60_000) ** 0.5))
    sampled = image[:, ::step, ::step]
    seen = clear[::step, ::step] & (sampled != nodata).all(axis=0)
    if np.count_nonzero(seen) < _FEWEST_PIXELS:
        return None
    pixels = sampled[:, seen]
    if dn < 0:
        dark = np.count_nonzero(pixels < _BELOW_OFFSET_DN, axis=1) >= _DARK_SHARE * pixels.shape[1]
        return "scene_double_offset" if np.count_nonzero(dark) >= min(2, len(pixels)) else None
    rank = pixels.shape[1] // 200
    darkest = np.sort(np.partition(pixels, rank, axis=1)[:, rank])
    low, high = _AT_OFFSET_DN
    if darkest[0] >= low and darkest[min(3, len(darkest)) - 1] <= high:
        return "scene_no_offset"
    return None


_CONSTANT_SHARE = 0.05


def image_findings(
    sensor: Sensor, offset: int, image: NDArray[Any], clouded: NDArray[np.bool_] | None
) -> list[str]:
    """What an image [band, y, x] as delivered says against its metadata: codes of findings."""
    filled = (image != sensor.nodata).any(axis=0)
    found = []
    if sensor.radiometry == "sentinel-2":
        clear = filled if clouded is None else filled & ~clouded
        found.append(offset_contradiction(image, clear, offset, sensor.nodata))
    if _is_constant(image, filled):
        found.append("scene_nodata_wrong")
    return [code for code in found if code]


def _is_constant(image: NDArray[Any], filled: NDArray[np.bool_]) -> bool:
    """Whether a twentieth of an image's data has one and the same value in every band."""
    step = max(1, round((filled.size / 60_000) ** 0.5))
    pixels = image[:, ::step, ::step][:, filled[::step, ::step]]
    if pixels.shape[1] < _FEWEST_PIXELS:
        return False
    values, counts = np.unique(pixels[0], return_counts=True)
    if counts.max() < _CONSTANT_SHARE * pixels.shape[1]:
        return False
    same = pixels[:, pixels[0] == values[counts.argmax()]]
    constant = (same == same[:, :1]).all(axis=0)
    return bool(np.count_nonzero(constant) >= _CONSTANT_SHARE * pixels.shape[1])


def to_decibels(
    power: NDArray[Any], missing: NDArray[np.bool_] | None, sensor: Sensor
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Linear power as a sensor's stored numbers (not yet rounded); nothing has no decibels.

    Source: DN = (10 log10(power) - offset) / scale.
    """
    none = ~(power > 0)
    if missing is not None:
        none |= missing
    decibels = 10.0 * np.log10(np.where(none, 1.0, power))
    return ((decibels - sensor.offset) / sensor.scale).astype(np.float32), none
