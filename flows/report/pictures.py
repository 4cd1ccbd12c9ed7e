"""Chips as the page shows them: the image, and the map's classes drawn over it."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flows.report.layers import SEVERITIES
from geolink.page.base import data_url
from geolink.show import class_colors, rgb
from schemas.dataset import DatasetInfo, SnapshotRow, read_arrays
from schemas.findings import CHIP_FLAGS, FINDINGS
from schemas.grid import chip_name, unpack_chip
from schemas.layout import UNKNOWN_TIME
from schemas.storage import Location

WORST, TYPICAL = 12, 4
_SIDE = 256
"""Pixels along a side of a picture, at most."""
_SMALL = 96
"""Up to so many pixels a picture is stored without loss."""
_WEIGHT = {"error": 10_000, "warning": 100, "note": 1}

ChipOf = tuple[SnapshotRow, int]
"""A shard and the place of a chip in it."""


@dataclass(frozen=True)
class Picture:
    """A chip on the page."""

    image: str
    labels: str
    pixelated: bool
    chip: str
    shard: str
    lonlat: tuple[float, float]
    day: str
    scene: str
    valid: float
    objects: int
    codes: list[str]
    """Findings, gravest first."""
    shift: str


def worst_chips(rows: Iterable[SnapshotRow], count: int = WORST) -> list[ChipOf]:
    """Chips to look at first: some of every finding, the gravest first, from many shards.

    Findings take turns, graver ones and rarer ones first; a finding offers the chip with the
    gravest findings in all, from a shard that was shown least. Depends on the rows alone.
    """
    weight = np.array([_WEIGHT[FINDINGS[code].severity] for code in CHIP_FLAGS])
    bits = np.arange(len(CHIP_FLAGS), dtype=np.uint32)
    best: dict[int, list[tuple[int, str, int]]] = {n: [] for n in range(len(CHIP_FLAGS))}
    by_shard, total = {}, np.zeros(len(CHIP_FLAGS), np.int64)
    rows = list(rows)
    # Many of each shard where there are few shards, the gravest alone where there are many.
    each = max(1, min(count, 100 * count // max(len(rows), 1)))
    for row in rows:
        found = np.array(row.chip_findings, np.uint32)
        has = (found[:, None] >> bits & np.uint32(1)).astype(bool)
        if not has.any():
            continue
        by_shard[row.shard] = row
        total += has.sum(axis=0)
        score = has @ weight
        for code in np.flatnonzero(has.any(axis=0)).tolist():
            chips = np.flatnonzero(has[:, code])
            chips = chips[np.argsort(-score[chips], kind="stable")][:each]
            best[code] += [(-int(score[n]), row.shard, n) for n in chips.tolist()]
    for offers in best.values():
        offers.sort()
    order = sorted(
        (n for n in best if best[n]),
        key=lambda n: (SEVERITIES.index(FINDINGS[CHIP_FLAGS[n]].severity), total[n], n),
    )
    picked: dict[tuple[str, int], None] = {}
    while len(picked) < count and any(best.values()):
        for code in order:
            shown = {shard for shard, _ in picked}
            offers = [o for o in best[code] if (o[1], o[2]) not in picked]
            offer = next((o for o in offers if o[1] not in shown), offers[0] if offers else None)
            best[code] = [o for o in offers if o is not offer]
            if offer is not None and len(picked) < count:
                picked[offer[1], offer[2]] = None
    ranked = sorted(picked, key=lambda p: _rank(by_shard[p[0]].chip_findings[p[1]], *p))
    return [(by_shard[shard], chip) for shard, chip in ranked]


def _rank(bits: int, shard: str, chip: int) -> tuple[int, str, int]:
    return -sum(_WEIGHT[FINDINGS[code].severity] for code in codes_of(bits)), shard, chip


def typical_chips(rows: Iterable[SnapshotRow], count: int = TYPICAL) -> list[ChipOf]:
    """Chips without any finding, from shards full of objects to empty ones, evenly."""
    clean = [row for row in rows if 0 in row.chip_findings]
    clean.sort(key=lambda row: (-row.objects / row.chips, row.shard))
    some = [clean[i * len(clean) // count] for i in range(count)] if len(clean) > count else clean
    return [(row, _middle(row.chip_findings)) for row in some]


def _middle(bits: Sequence[int]) -> int:
    clean = [n for n, found in enumerate(bits) if found == 0]
    return clean[len(clean) // 2]


def codes_of(bits: int) -> list[str]:
    """Findings of a chip, gravest first."""
    codes = [code for n, code in enumerate(CHIP_FLAGS) if bits >> n & 1]
    return sorted(codes, key=lambda code: SEVERITIES.index(FINDINGS[code].severity))


def draw(dataset: Location, chips: Sequence[ChipOf], info: DatasetInfo) -> list[Picture]:
    """Pictures of some chips, a shard in memory at a time.

    Raises GeoLinkError naming a shard that is missing or damaged.
    """
    names = ("image", "label_pixel", "chip_id", "center_lonlat", "time", "scene", "valid",
             "object_offset", "shift")  # fmt: skip
    drawn: dict[int, Picture] = {}
    for shard in dict.fromkeys(row.shard for row, _ in chips):
        wanted = [(i, row, n) for i, (row, n) in enumerate(chips) if row.shard == shard]
        arrays, attributes = read_arrays(dataset, wanted[0][1].path, names)
        for i, row, n in wanted:
            drawn[i] = _picture(arrays, attributes["scenes"], row, n, info)
    return [drawn[i] for i in range(len(chips))]


def _picture(
    arrays: dict[str, NDArray[Any]], scenes: Sequence[str], row: SnapshotRow, n: int,
    info: DatasetInfo,
) -> Picture:  # fmt: skip
    image = rgb(arrays["image"][n], info)
    image[(arrays["image"][n] == info.sensor.nodata).all(axis=0)] = 0.5
    label = arrays["label_pixel"][n]
    over = np.where((label > 0)[..., None], 0.4 * image + 0.6 * class_colors(info)[label], image)
    time, scene = arrays["time"][n], int(arrays["scene"][n])
    lon, lat = arrays["center_lonlat"][n].tolist()
    packed = arrays["chip_id"][n]
    east, north = arrays["shift"][n, :2].tolist()
    code = codes_of(row.chip_findings[n])
    return Picture(
        image=_embed(image), labels=_embed(over), pixelated=len(label) <= _SMALL,
        chip=chip_name(unpack_chip(packed)) if packed[0] else "imported pair", shard=row.shard,
        lonlat=(lon, lat), day=_day(int(time)),
        scene=scenes[scene] if scene >= 0 else "", valid=float(arrays["valid"][n]),
        objects=int(np.diff(arrays["object_offset"])[n]), codes=code,
        shift=f"{np.hypot(east, north):.0f} m off the map" if "chip_shifted" in code else "",
    )  # fmt: skip


def _day(seconds: int) -> str:
    return "" if seconds == UNKNOWN_TIME else str(np.datetime64(seconds, "s").astype("M8[D]"))


def _embed(picture: NDArray[np.float32]) -> str:
    """[y, x, 3] in [0, 1] as a small picture."""
    image = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    if max(image.size) <= _SMALL:
        image.save(buffer, "png", optimize=True)
        return data_url(buffer.getvalue(), "png")
    image.save(buffer, "jpeg", quality=85, subsampling=0)
    return data_url(buffer.getvalue(), "jpeg")
