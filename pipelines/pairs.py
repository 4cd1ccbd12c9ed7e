"""Imported image-OSM pairs: folders of an image, its bounds and its vectors become chips.

A pair is a folder `<name>/` with one RGB image, `meta.json` (`bounds_lonlat`: west, south, east,
north of the image; `time`; maybe `split`) and up to three `*_point/_line/_polygon.geojson`
(lon/lat; property `tags`, a mapping, or `label` = `key:value` joined by `;`).

The box of degrees becomes a rectangle in metres around its centre in the centre's UTM zone, as wide
and as high as the box is through its centre. One affine map takes degrees to that rectangle, for
image and vectors alike, so objects stay on their pixels; the price is that the chip's north is true
north, not that of the zone's grid. Nothing is cropped: an image that is not square is resampled to
a square of pixels that are not.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
import xxhash
from numpy.typing import NDArray
from PIL import Image
from pyproj import Geod

from pipelines.features import Features, make_features
from pipelines.osm_convert import any_glob
from schemas.config import Splits
from schemas.dataset import DatasetInfo
from schemas.errors import GeoLinkError
from schemas.grid import Bounds, Grid, to_utm, utm_epsg
from schemas.layout import UNKNOWN_TIME, Kind
from schemas.splits import SPLITS, Split, split_of

_IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
_WGS84 = Geod(ellps="WGS84")

# The longest run without spaces before a colon is the key, which may hold colons of its own.
_LABEL = re.compile(r"(?P<key>\S*[^\s:]):(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class PairShard:
    """Some pairs of one split: the unit of work."""

    name: str
    split: Split
    folder: Path
    pairs: tuple[str, ...]
    """Names of the pairs, by the hash of the name."""
    digests: tuple[str, ...]
    """Of each pair's name and files."""


@dataclass(frozen=True)
class Pairs:
    """Pixels and features of the N pairs of a shard that could be read."""

    arrays: dict[str, NDArray[Any]]
    """image, valid, chip_id, epsg, bounds, center_lonlat, time, scene."""
    features: Features
    """In metres of each pair's own zone, by pair; `osm` is 0."""
    frame: NDArray[np.int64]
    """[F] pair of each feature, ascending."""
    scenes: list[str]
    """Names of the N pairs."""
    counts: dict[str, int]
    """Pairs and features left out, by reason."""

    def rows_of_pair(self) -> list[NDArray[np.int64]]:
        """Rows of the features of each pair."""
        ends = np.searchsorted(self.frame, np.arange(len(self.scenes) + 1)).tolist()
        return [np.arange(a, b) for a, b in pairwise(ends)]


class _Broken(Exception):
    """A pair that is skipped; the message is the code it is counted under."""


class _Place(NamedTuple):
    lonlat: Bounds
    epsg: int
    bounds_utm: Bounds
    time: int
    split: Split | None


def plan_pairs(
    folder: Path, grid: Grid, splits: Splits, per_shard: int = 256
) -> tuple[list[PairShard], dict[str, int]]:
    """Put the pairs of a folder into shards; also counts pairs that are skipped, by reason.

    A pair's split is the one it states, or that of its centre. Pairs of a split that have the same
    first bits of the hash of their names share a shard, with as few bits as keep a shard to
    `per_shard` pairs: adding or removing a pair changes its own shard alone.

    Raises GeoLinkError if there is no such folder, or no pair in it.
    """
    if not folder.is_dir():
        raise GeoLinkError(f"folder of pairs {folder} is missing")
    skipped: Counter[str] = Counter()
    by_split: dict[Split, list[str]] = defaultdict(list)
    digests: dict[str, str] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        try:
            place = _place(path)
            digests[path.name] = _digest(path)
        except _Broken as reason:
            skipped[str(reason)] += 1
            continue
        x0, y0, x1, y1 = place.bounds_utm
        split = place.split or split_of(
            splits, grid, place.epsg, (x0 + x1) / 2, (y0 + y1) / 2
        )  # fmt: skip
        by_split[split].append(path.name)
    if not digests:
        why = ", ".join(f"{k}: {n}" for k, n in sorted(skipped.items())) or "it has no subfolders"
        raise GeoLinkError(
            f"{folder} holds no pair that can be read ({why}); a pair is a folder with an image, "
            "meta.json and *_point/_line/_polygon.geojson"
        )
    shards = [
        PairShard(name, split, folder, names, tuple(digests[n] for n in names))
        for split, members in sorted(by_split.items())
        for name, names in _buckets(f"pairs-{split}-", "", members, per_shard)
    ]
    return shards, dict(skipped)


def _buckets(
    prefix: str, bits: str, names: Sequence[str], per_shard: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Split names by the next bit of their hash until no bucket has more than `per_shard`."""
    if len(names) <= per_shard or len(bits) == 64:
        return [(prefix + (bits or "all"), tuple(sorted(names, key=_name_hash)))]
    halves: dict[str, list[str]] = {"0": [], "1": []}
    for name in names:
        halves[f"{_name_hash(name):064b}"[len(bits)]].append(name)
    return [b for bit, half in halves.items() if half
            for b in _buckets(prefix, bits + bit, half, per_shard)]  # fmt: skip


def _name_hash(name: str) -> int:
    """First 8 bytes, big endian, of BLAKE2b of a pair's name: its chip id."""
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big")


def _digest(path: Path) -> str:
    """Hash of a pair's name and the names and bytes of the files that are read."""
    digest = xxhash.xxh3_128(path.name.encode())
    for file in [path / "meta.json", _image_path(path), *_vector_paths(path).values()]:
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_pairs(shard: PairShard, info: DatasetInfo) -> Pairs:
    """Read the pairs of a shard; a pair with a part that cannot be read is skipped and counted.

    Images are resampled to `info.grid.size` squared, bilinear and antialiased. Tags are filtered by
    `info.drop_keys` and `info.keep_keys`; features left without one are counted.

    Raises GeoLinkError if the sensor is not one of three bands of 8 bits.
    """
    if len(info.sensor.bands) != 3 or info.sensor.dtype != "uint8":
        raise GeoLinkError(
            f"pairs hold RGB images of 8 bits, sensor {info.sensor.name!r} has "
            f"{len(info.sensor.bands)} bands of {info.sensor.dtype}; use sensor aerial-rgb"
        )
    counts: Counter[str] = Counter()
    names: list[str] = []
    images: list[NDArray[np.uint8]] = []
    places: list[_Place] = []
    vectors: list[_Vectors] = []
    for name in shard.pairs:
        path = shard.folder / name
        try:
            place = _place(path)
            image = _read_image(_image_path(path), info.grid.size)
            vector = _read_vectors(path, place, info)
        except _Broken as reason:
            counts[str(reason)] += 1
            continue
        names.append(name)
        images.append(image)
        places.append(place)
        vectors.append(vector)
    for vector in vectors:
        counts["feature_filtered"] += vector.filtered
    features = _features(vectors, info, counts)
    size = info.grid.size
    image = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
    lonlat = np.array([p.lonlat for p in places], np.float64).reshape(-1, 4)
    arrays: dict[str, NDArray[Any]] = {
        "image": image,
        "valid": (image != info.sensor.nodata).any(axis=1).mean(axis=(1, 2)).astype(np.float32),
        "chip_id": np.array([(0, _name_hash(n)) for n in names], np.uint64).reshape(-1, 2),
        "epsg": np.array([p.epsg for p in places], np.int32),
        "bounds": np.array([p.bounds_utm for p in places], np.float64).reshape(-1, 4),
        "center_lonlat": (lonlat[:, :2] + lonlat[:, 2:]) / 2,
        "time": np.array([p.time for p in places], np.int64),
        "scene": np.arange(len(names), dtype=np.int16),
    }
    return Pairs(
        arrays=arrays,
        features=replace(features, osm=np.zeros(len(features.osm), np.int64)),
        frame=features.osm,
        scenes=names,
        counts={k: n for k, n in counts.items() if n},
    )


def _place(path: Path) -> _Place:
    """Where and when a pair is, from its `meta.json`."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        west, south, east, north = (float(v) for v in meta["bounds_lonlat"])
    except OSError:
        raise _Broken("pair_without_meta") from None
    except (ValueError, KeyError, TypeError):
        raise _Broken("pair_damaged_meta") from None
    # NaN fails these comparisons too.
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise _Broken("pair_bad_bounds")
    lon, lat = (west + east) / 2, (south + north) / 2
    try:
        epsg = utm_epsg(lon, lat)
    except GeoLinkError:
        raise _Broken("pair_outside_utm") from None
    _, _, width = _WGS84.inv(west, lat, east, lat)
    _, _, height = _WGS84.inv(lon, south, lon, north)
    x, y = to_utm(epsg).transform(lon, lat)
    bounds = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    split = meta.get("split")
    if split not in (None, *SPLITS):
        raise _Broken("pair_damaged_meta")
    return _Place((west, south, east, north), epsg, bounds, _time(meta), split)


def _time(meta: Mapping[str, Any]) -> int:
    """Seconds since 1970: of [year, month, day, hour, minute], or of the start of a year alone."""
    stated = meta.get("time")
    if stated is None:
        return UNKNOWN_TIME
    parts = [stated] if isinstance(stated, int) else stated
    try:
        when = datetime(*[*parts, 1, 1][: max(3, len(parts))])
        return int(when.replace(tzinfo=UTC).timestamp())
    except (TypeError, ValueError):
        raise _Broken("pair_damaged_meta") from None


def _image_path(path: Path) -> Path:
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGES)
    if len(found) != 1:
        raise _Broken("pair_with_several_images" if found else "pair_without_image")
    return found[0]


def _read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """RGB image, uint8 [3, size, size]."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _Broken("pair_damaged_image") from None
    return np.ascontiguousarray(np.asarray(resized, np.uint8).transpose(2, 0, 1))


class _Vectors(NamedTuple):
    """Tagged features of one pair."""

    geometry: NDArray[np.object_]
    """In metres of the pair's zone."""
    tags: list[list[str]]
    """`key=value` of each."""
    filtered: int
    """Features without any tag that is kept."""


def _vector_paths(path: Path) -> dict[Kind, Path]:
    """The GeoJSON files that are there, by kind."""
    found: dict[Kind, Path] = {}
    for kind in Kind:
        files = sorted(path.glob(f"*_{kind.name.lower()}.geojson"))
        if len(files) > 1:
            raise _Broken("pair_with_several_vectors")
        if files:
            found[kind] = files[0]
    return found


def _read_vectors(path: Path, place: _Place, info: DatasetInfo) -> _Vectors:
    drop = re.compile(any_glob(info.drop_keys))
    keep = re.compile(any_glob(info.keep_keys or ("*",)))
    geometries, tags = [], []
    for file in _vector_paths(path).values():
        try:
            features = json.loads(file.read_text(encoding="utf-8"))["features"]
            labels = [_tags(f["properties"]) for f in features]
            shapes = [f["geometry"] and json.dumps(f["geometry"]) for f in features]
            geometries.append(shapely.from_geojson(np.array(shapes, object)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, shapely.GEOSException):
            raise _Broken("pair_damaged_vectors") from None
        for pairs in labels:
            kept = [k for k in pairs if keep.fullmatch(k) and not drop.fullmatch(k)]
            tags.append(sorted(f"{k}={pairs[k]}" for k in kept))
    geometry = shapely.force_2d(np.concatenate([np.zeros(0, object), *geometries]))
    there = np.array([bool(t) for t in tags], bool) & ~shapely.is_missing(geometry)
    metres = shapely.transform(geometry[there], lambda xy: _to_metres(xy, place))
    return _Vectors(metres, [t for t, ok in zip(tags, there) if ok], int((~there).sum()))


def _tags(properties: Mapping[str, Any]) -> dict[str, str]:
    tags = properties.get("tags")
    if tags is None:
        return _parse_label(properties["label"] or "")
    return {str(key): str(value) for key, value in tags.items()}


def _parse_label(label: str) -> dict[str, str]:
    """Tags of `key:value;key:value`; a part without a colon belongs to the value before it.

    The published labels have the key in place of the value `yes` (`building:building`).
    """
    tags: dict[str, str] = {}
    last = ""
    for part in label.split(";"):
        match = _LABEL.fullmatch(part)
        if match:
            last = match["key"]
            tags[last] = "yes" if match["value"] == last else match["value"]
        elif last:
            tags[last] += ";" + part
    return tags


def _to_metres(lonlat: NDArray[np.float64], place: _Place) -> NDArray[np.float64]:
    west, south, east, north = place.lonlat
    x0, y0, x1, y1 = place.bounds_utm
    scale = np.array([(x1 - x0) / (east - west), (y1 - y0) / (north - south)])
    metres: NDArray[np.float64] = np.array([x0, y0]) + (lonlat - np.array([west, south])) * scale
    return metres


def _features(vectors: Sequence[_Vectors], info: DatasetInfo, counts: Counter[str]) -> Features:
    """Features of all pairs, with the position of the pair in place of the OSM id."""
    of_pair = np.repeat(np.arange(len(vectors)), [len(v.geometry) for v in vectors])
    geometry = np.concatenate([np.zeros(0, object), *(v.geometry for v in vectors)])
    tags = [t for v in vectors for t in v.tags]
    offset = np.cumsum([0, *map(len, tags)])
    finite = np.isfinite(shapely.bounds(geometry)).all(axis=1)
    counts["feature_damaged"] += int((~finite).sum())
    return make_features(
        geometry, of_pair, offset, [text for t in tags for text in t], info.taxonomy,
        np.flatnonzero(finite), Counter(),
    )  # fmt: skip
