"""Do splits share anything? Pixels, OSM objects, scenes: proven over every chip, or told by name.

Chips of different splits (or of a dataset and another one) may not overlap nor be nearer than the
buffer, also where they are of different UTM zones. No OSM object may have parts in chips of both.
Objects longer than the buffer, rivers and borders say, can cross it: `crossing` tells whether those
count as leaks too, or are only counted where all their parts on either side are farther apart.

Distances are exact where both chips are of one zone and lie on its grid. Else one chip is projected
into the zone of the other with points along its edges, which bend by less than a hundredth of a
millimetre over a chip of 2 km. Chips of imported pairs stand upright on true north.

Work and memory grow with chips and objects (n log n): trees and sorted ids, no pair of shards.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.footprints import edge_points
from pipelines.ragged import ranks
from pipelines.threads import side_by_side
from schemas.chips import printed_id
from schemas.dataset import Snapshot, SnapshotRow, read_arrays, read_snapshot
from schemas.grid import to_lonlat, to_utm
from schemas.layout import OsmType
from schemas.splits import SPLITS
from schemas.storage import Location

_CHUNK = 65_536
_TOUCH_M = 1e-3
"""Chips that overlap by less than a millimetre touch."""
_SHOWN = 20

Crossing = Literal["leak", "count"]


class Leak(NamedTuple):
    """Something that two splits share."""

    kind: Literal["pixels", "buffer", "object"]
    what: str
    """A sentence that names the chips."""


@dataclass
class SplitCheck:
    """What was checked, and what was found."""

    dataset: Location
    snapshot: int
    against: tuple[Location, int] | None
    buffer_m: float
    crossing: Crossing
    chips: dict[str, int]
    """By split, or by dataset where it is checked against another."""
    objects: int = 0
    """Distinct OSM objects."""
    objects_without_id: int = 0
    """Parts of objects whose OSM id is unknown: they cannot be compared."""
    pairs: int = 0
    """Pairs of chips of different splits that were measured."""
    found: Counter[str] = field(default_factory=Counter)
    """pixels: pairs of chips that overlap. buffer: pairs nearer than the buffer, of these scene:
    of the same scene. object: OSM objects shared. crossing: OSM objects with parts on either side,
    all farther apart than the buffer, that do not count as shared."""
    leaks: list[Leak] = field(default_factory=list)
    """The first of each kind."""

    @property
    def passed(self) -> bool:
        """Whether nothing is shared."""
        return not self.leaks


class _Chips(NamedTuple):
    """All chips, of one dataset or of two; N chips."""

    side: NDArray[np.int8]
    """[N] split, or dataset: what may not share."""
    chip_id: NDArray[np.uint64]
    """[N, 2]."""
    epsg: NDArray[np.int32]
    bounds: NDArray[np.float64]
    """[N, 4] metres of the chip's zone."""
    lonlat: NDArray[np.float64]
    """[N, 2] degrees of the centre."""
    aligned: NDArray[np.bool_]
    """[N] stands on the zone's grid; else on true north."""
    scene: NDArray[np.int64]
    """[N] number of its main scene over all shards; -1: none."""
    shard: NDArray[np.int64]
    """[N] index of its shard."""
    row: NDArray[np.int64]
    """[N] place in its shard."""


Progress = Callable[[int, int], None]


def check_splits(
    dataset: Location,
    snapshot: int | None = None,
    *,
    against: tuple[Location, int | None] | None = None,
    buffer_m: float | None = None,
    crossing: Crossing = "leak",
    progress: Progress | None = None,
) -> SplitCheck:
    """Check that the splits of a snapshot (none: the latest) share nothing.

    against: instead, that it shares nothing with a snapshot of another dataset.
    buffer_m: none means the one that the dataset was built with, and 0 against another dataset.

    Raises GeoLinkError: no such snapshot, or a damaged shard.
    """
    ours = read_snapshot(dataset, snapshot)
    shards = [(dataset, r, ours, 0 if against else SPLITS.index(r.split)) for r in _held(ours)]
    sides, other = list[str](SPLITS), None
    if against is not None:
        theirs = read_snapshot(*against)
        other = (against[0], theirs.number)
        sides = [f"{dataset} {ours.number}", f"{against[0]} {theirs.number}"]
        shards += [(against[0], r, theirs, 1) for r in _held(theirs)]
    if buffer_m is None:
        buffer_m = 0.0 if against else ours.info.splits.buffer_m
    result = SplitCheck(dataset, ours.number, other, buffer_m, crossing, {})
    chips, ids = _read(shards, result, progress)
    counts = np.bincount(chips.side, minlength=len(sides)).tolist()
    result.chips = dict(zip(sides, counts, strict=True))
    near, gap = _near_pairs(chips, buffer_m, result)
    _tell_pairs(chips, sides, near, gap, result)
    _tell_objects(chips, sides, shards, ids, near, result)
    return result


def _held(snapshot: Snapshot) -> list[SnapshotRow]:
    return [row for row in snapshot.rows if row.chips]


_Shard = tuple[Location, SnapshotRow, Snapshot, int]
"""Dataset, row, snapshot and side."""
_Ids = list[NDArray[np.int64]]


def _read(
    shards: list[_Shard], result: SplitCheck, progress: Progress | None
) -> tuple[_Chips, _Ids]:
    """Chips of all shards, and the distinct OSM ids [I] of each, ascending."""
    names = ("chip_id", "epsg", "bounds", "center_lonlat", "scene", "object_osm")
    numbers: dict[str, int] = {}
    parts: list[_Chips] = []
    ids: _Ids = []
    reading = side_by_side(lambda shard: read_arrays(shard[0], shard[1].path, names)[0], shards)
    for n, ((_, row, snapshot, side), a) in enumerate(zip(shards, reading, strict=True)):
        scenes = [numbers.setdefault(scene, len(numbers)) for scene in row.scenes]
        chips = len(a["epsg"])
        parts.append(
            _Chips(
                np.full(chips, side, np.int8), a["chip_id"], a["epsg"], a["bounds"],
                a["center_lonlat"], np.full(chips, snapshot.info.aligned),
                np.array([*scenes, -1], np.int64)[a["scene"]], np.full(chips, n),
                np.arange(chips),
            )
        )  # fmt: skip
        known = a["object_osm"] >> 2 != 0
        result.objects_without_id += int((~known).sum())
        ids.append(np.unique(a["object_osm"][known]))
        if progress:
            progress(n + 1, len(shards))
    return _Chips(*(np.concatenate(columns) for columns in zip(*parts))), ids


def _near_pairs(
    chips: _Chips, buffer_m: float, result: SplitCheck
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs [P, 2] of chips of different sides no farther apart than the buffer, and their gaps
    [P] in metres, below 0 where they overlap.
    """
    boxes = _boxes(chips, buffer_m)
    tree = shapely.STRtree(boxes)
    found = [np.zeros((0, 2), np.int64)]
    for turn in (0.0, -360.0, 360.0):
        # Across the antimeridian: a box beyond 180 degrees meets those on the other side.
        west, _, east, _ = shapely.bounds(boxes).T
        asked = np.flatnonzero({0.0: west < 999, -360.0: east > 180, 360.0: west < -180}[turn])
        for start in range(0, len(asked), _CHUNK):
            some = asked[start : start + _CHUNK]
            moved = shapely.transform(boxes[some], lambda xy, t=turn: xy + np.array([t, 0.0]))
            a, b = tree.query(moved)
            a = some[a]
            other = chips.side[a] != chips.side[b]
            found.append(np.sort(np.column_stack([a[other], b[other]]), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    result.pairs = len(pairs)
    chunks = (pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK))
    gap = np.concatenate([np.zeros(0), *(_gaps(chips, *chunk.T) for chunk in chunks)])
    near = gap <= buffer_m + _TOUCH_M
    return pairs[near], gap[near]


def _boxes(chips: _Chips, buffer_m: float) -> NDArray[np.object_]:
    """Boxes of degrees [N] that are sure to meet where two chips are within the buffer."""
    sides = np.maximum(*(chips.bounds[:, 2:] - chips.bounds[:, :2]).T)
    # A square turned by the few degrees between grid and true north is a little wider.
    reach = 0.55 * sides + buffer_m / 2 + 1.0
    lon, lat = chips.lonlat.T
    dlat = reach / 110_500.0
    dlon = reach / (111_300.0 * np.cos(np.radians(np.minimum(np.abs(lat) + dlat, 89.9))))
    boxes: NDArray[np.object_] = shapely.box(lon - dlon, lat - dlat, lon + dlon, lat + dlat)
    return boxes


def _gaps(chips: _Chips, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gaps of pairs of chips in metres; below 0 where they overlap."""
    p, q = chips.bounds[a], chips.bounds[b]
    d = np.maximum(q[:, :2] - p[:, 2:], p[:, :2] - q[:, 2:])
    gap: NDArray[np.float64] = np.hypot(*np.maximum(d, 0.0).T)
    gap = np.where((d <= 0).all(axis=1), d.max(axis=1), gap)
    same = (chips.epsg[a] == chips.epsg[b]) & chips.aligned[a] & chips.aligned[b]
    for epsg in np.unique(chips.epsg[a[~same]]).tolist():
        at = np.flatnonzero(~same & (chips.epsg[a] == epsg))
        one, two = (shapely.polygons(_outlines(chips, side[at], epsg)) for side in (a, b))
        overlap = shapely.area(shapely.intersection(one, two)) / np.sqrt(shapely.area(one))
        gap[at] = np.where(overlap > 0, -overlap, shapely.distance(one, two))
    return gap


def _outlines(chips: _Chips, at: NDArray[np.int64], epsg: int) -> NDArray[np.float64]:
    """Outlines [K, 4 * points, 2] of chips in metres of a zone."""
    bounds = chips.bounds[at]
    xy = edge_points(bounds)
    for zone in np.unique(chips.epsg[at]).tolist():
        own = np.flatnonzero(chips.aligned[at] & (chips.epsg[at] == zone))
        if zone != epsg and len(own):
            lon, lat = to_lonlat(zone).transform(*xy[own].reshape(-1, 2).T)
            xy[own] = np.column_stack(to_utm(epsg).transform(lon, lat)).reshape(xy[own].shape)
    own = np.flatnonzero(~chips.aligned[at])
    if len(own):
        centre = chips.lonlat[at[own], None]
        offset = xy[own] - (bounds[own, None, :2] + bounds[own, None, 2:]) / 2
        lonlat = centre + offset / _metres_per_degree(centre[..., 1])
        xy[own] = np.column_stack(to_utm(epsg).transform(*lonlat.reshape(-1, 2).T)).reshape(
            lonlat.shape
        )
    return xy


def _metres_per_degree(lat: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., 2] metres of a degree of longitude and of latitude on WGS 84 at latitudes [...]."""
    a, e2 = 6378137.0, 0.0066943799901413165
    sin, cos = np.sin(np.radians(lat)), np.cos(np.radians(lat))
    w = np.sqrt(1 - e2 * sin**2)
    metres: NDArray[np.float64] = np.stack([a / w * cos, a * (1 - e2) / w**3], axis=-1)
    per_degree: NDArray[np.float64] = np.radians(metres)
    return per_degree


def _tell_pairs(
    chips: _Chips,
    sides: list[str],
    near: NDArray[np.int64],
    gap: NDArray[np.float64],
    result: SplitCheck,
) -> None:
    overlap = gap < -_TOUCH_M
    close = ~overlap & (gap < result.buffer_m - _TOUCH_M)
    scene = chips.scene[near]
    same = (overlap | close) & (scene[:, 0] == scene[:, 1]) & (scene[:, 0] >= 0)
    result.found.update(pixels=int(overlap.sum()), buffer=int(close.sum()), scene=int(same.sum()))
    for n in np.flatnonzero(overlap)[:_SHOWN]:
        a, b = (_named(chips, sides, i) for i in near[n])
        result.leaks.append(Leak("pixels", f"{a} and {b} overlap"))
    for n in np.flatnonzero(close)[:_SHOWN]:
        a, b = (_named(chips, sides, i) for i in near[n])
        what = ", of the same scene" if same[n] else ""
        result.leaks.append(
            Leak("buffer", f"{a} and {b} are {max(gap[n], 0.0):,.1f} m apart{what}")
        )


def _named(chips: _Chips, sides: list[str], chip: int) -> str:
    return f"chip {printed_id(chips.chip_id[chip])} ({sides[chips.side[chip]]})"


def _tell_objects(
    chips: _Chips,
    sides: list[str],
    shards: list[_Shard],
    ids: _Ids,
    near: NDArray[np.int64],
    result: SplitCheck,
) -> None:
    of_side = [
        np.unique(np.concatenate([_NO_IDS, *(i for i, s in zip(ids, shards) if s[3] == side)]))
        for side in range(len(sides))
    ]
    every, count = np.unique(np.concatenate(of_side), return_counts=True)
    result.objects = len(every)
    shared = every[count > 1]
    if not len(shared):
        result.found.update(object=0, crossing=0)
        return
    chip, osm = _occurrences(chips, shards, ids, shared)
    pair, near_ids = _in_near_pairs(chip, osm, near)
    counted = shared if result.crossing == "leak" else np.unique(near_ids)
    result.found.update(object=len(counted), crossing=len(shared) - len(counted))
    for i in counted[:_SHOWN].tolist():
        at = np.flatnonzero(near_ids == i)
        if len(at):
            a, b = near[pair[at[0]]].tolist()
        else:
            there = chip[osm == i]
            a = there[0]
            b = there[chips.side[there] != chips.side[a]][0]
        name = f"{OsmType(i & 3).name.lower()} {i >> 2}"
        what = f"OSM {name} is in {_named(chips, sides, a)} and {_named(chips, sides, b)}"
        result.leaks.append(Leak("object", what))


_NO_IDS = np.zeros(0, np.int64)


def _occurrences(
    chips: _Chips, shards: list[_Shard], ids: _Ids, shared: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where shared objects are: chips [K] and ids [K], each pair once, by chip."""
    first = np.searchsorted(chips.shard, np.arange(len(shards)))
    todo = [n for n in range(len(shards)) if np.isin(ids[n], shared, assume_unique=True).any()]
    names = ("object_offset", "object_osm")
    reading = side_by_side(lambda n: read_arrays(shards[n][0], shards[n][1].path, names)[0], todo)
    found = [np.zeros((0, 2), np.int64)]
    for n, a in zip(todo, reading, strict=True):
        offset, osm = a["object_offset"], a["object_osm"]
        chip = first[n] + np.repeat(np.arange(len(offset) - 1), np.diff(offset))
        at = np.isin(osm, shared)
        found.append(np.unique(np.column_stack([chip[at], osm[at]]), axis=0))
    rows = np.concatenate(found)
    return rows[:, 0], rows[:, 1]


def _in_near_pairs(
    chip: NDArray[np.int64], osm: NDArray[np.int64], near: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs and ids of objects that both chips of a near pair have; `chip` ascends."""
    sides = []
    number, code = np.unique(osm, return_inverse=True)
    for end in (0, 1):
        start = np.searchsorted(chip, near[:, end])
        length = np.searchsorted(chip, near[:, end], side="right") - start
        at = np.repeat(start, length) + ranks(length)
        sides.append(np.repeat(np.arange(len(near)), length) * len(number) + code[at])
    both = np.intersect1d(sides[0], sides[1], assume_unique=True)
    return both // len(number), number[both % len(number)]
