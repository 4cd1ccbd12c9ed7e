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

    An item's word about itself goes first (`earthsearch:boa_offset_applied`), then the offsets of
    its assets (`raster:bands`, or `bands` and `raster:offset` of STAC 1.1), then its baseline.
    """
    if sensor.radiometry == "none":
        return Offset(0, f"{sensor.name} has no radiometric offset")
    baseline = processing_baseline(item)
    if baseline is None:
        return Offset(None, "no processing baseline, so the radiometric offset is unknown")
    name = f"baseline {baseline // 100:02d}.{baseline % 100:02d}"
    if baseline < 400:
        return Offset(0, f"{name} has no offset")
    applied = item["properties"].get("earthsearch:boa_offset_applied")
    if applied is True:
        return Offset(0, f"{name}, offset already applied (earthsearch:boa_offset_applied)")
    stated = {dn for asset in assets for dn in asset_offsets(asset)}
    if applied is None and stated == {0}:
        return Offset(0, f"{name}, offset already applied (assets state offset 0)")
    if len(stated) > 1:
        return Offset(None, f"{name}, but its assets state different offsets {sorted(stated)}")
    dn = stated.pop() if stated and stated != {0} else -1000
    return Offset(dn, f"{name} stores DN {-dn:+d}")


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
