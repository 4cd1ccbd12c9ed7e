"""Stored chips held against `independent.py`: what differs, counted by kind.

What must be exact is: which objects, their tags, classes and relations, every pixel, every label.
Tolerances, and why:

- sizes, densities: 1e-6 of the value. They are stored as float32 (6e-8 of the value).
- anchors: 1e-6 of the chip's side. Stored as float32; coordinates of millions of metres resolve a
  nanometre. Where two stretches of a polygon are equally wide within 1e-7 m, either may be chosen;
  between vertices less than 1e-7 m apart, any place in the polygon.
- patch weights: exact, unless share x 255 is within 1e-4 of where rounding turns. A patch may be
  there or not where the object's share of it is below 1e-8, which is a nanometre of a patch's side;
  a line within 1e-8 m of a border between patches may be on either side of it.
- label_region: one unit of float32. moran, lee: 1e-4, as they come from float32 fractions.
"""

import datetime
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.windows import Window

from schemas.dataset import DatasetInfo
from schemas.layout import Kind, Relation
from tests import independent
from tests.independent import Box, Feature, Object

Arrays = Mapping[str, NDArray[Any]]
Ends = tuple[tuple[float, ...], tuple[float, ...]]
Areas = Sequence[tuple[shapely.Geometry, int]]


@dataclass
class Differences:
    """What was compared, and what differed, by kind."""

    compared: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def check(self, kind: str, same: bool, example: object = "") -> None:
        self.compared[kind] += 1
        if not same:
            self.found[kind] += 1
            self.examples.setdefault(kind, _text(example)[:900])


def _text(example: object) -> str:
    if isinstance(example, tuple | list):
        return ", ".join(_text(part) for part in example)
    return example.wkt if isinstance(example, shapely.Geometry) else str(example)


@dataclass(frozen=True)
class Scene:
    """A STAC item, by its file."""

    id: str
    cloud: float
    seconds: int
    offset: int
    assets: dict[str, Path]


@dataclass(frozen=True)
class Place:
    """Everything a dataset is made of."""

    info: DatasetInfo
    region: Box
    """West, south, east, north in degrees."""
    epsg: int
    features: list[Feature]
    bounds: NDArray[np.float64]
    """[features, 4]"""
    areas: Areas
    area_bounds: NDArray[np.float64]
    """[areas, 4]"""
    scenes: list[Scene]

    def near(self, chip: Box) -> "Place":
        """The same with the features and areas whose bounding boxes meet a chip."""
        here, there = _meets(self.bounds, chip), _meets(self.area_bounds, chip)
        return replace(
            self, features=[self.features[n] for n in here], bounds=self.bounds[here],
            areas=[self.areas[n] for n in there], area_bounds=self.area_bounds[there],
        )  # fmt: skip


def _meets(bounds: NDArray[np.float64], chip: Box) -> NDArray[np.int64]:
    x0, y0, x1, y1 = bounds.T
    return np.flatnonzero((x0 <= chip[2]) & (x1 >= chip[0]) & (y0 <= chip[3]) & (y1 >= chip[1]))


def make_place(
    info: DatasetInfo, region: Box, epsg: int, features: list[Feature], catalog: Path
) -> Place:
    areas = independent.drawn(features)
    bounds = np.array([f.geometry.bounds for f in features])
    area_bounds = np.array([g.bounds for g, _ in areas])
    scenes = read_scenes(catalog)
    return Place(info, region, epsg, features, bounds, areas, area_bounds, scenes)


def read_scenes(catalog: Path) -> list[Scene]:
    """The items of a static catalog on disk, least cloudy first."""
    scenes = []
    for path in catalog.parent.rglob("*.json"):
        item = json.loads(path.read_text(encoding="utf-8"))
        if item["type"] != "Feature":
            continue
        time = datetime.datetime.fromisoformat(item["properties"]["datetime"])
        late = float(item["properties"].get("s2:processing_baseline", 0)) >= 4
        applied = item["properties"].get("earthsearch:boa_offset_applied", True)
        assets = {name: path.parent / asset["href"] for name, asset in item["assets"].items()}
        scenes.append(
            Scene(
                item["id"], item["properties"]["eo:cloud_cover"], int(time.timestamp()),
                -1000 if late and not applied else 0, assets,
            )
        )  # fmt: skip
    return sorted(scenes, key=lambda s: (s.cloud, s.seconds))


# -------------------------------------------------------------------------------------- chips


def chips_of(place: Place) -> Iterator[tuple[tuple[int, int], Box]]:
    """Column, row and bounds of every chip whose centre lies in the region."""
    side = place.info.grid.size * place.info.grid.gsd_m
    west, south, east, north = place.region
    there = Transformer.from_crs(4326, place.epsg, always_xy=True)
    back = Transformer.from_crs(place.epsg, 4326, always_xy=True)
    corners = [there.transform(x, y) for x in (west, east) for y in (south, north)]
    (x0, y0), (x1, y1) = np.min(corners, axis=0) - side, np.max(corners, axis=0) + side
    for col in range(int(x0 // side), int(x1 // side) + 1):
        for row in range(int(y0 // side), int(y1 // side) + 1):
            lon, lat = back.transform((col + 0.5) * side, (row + 0.5) * side)
            if west < lon < east and south < lat < north:
                yield (col, row), (col * side, row * side, (col + 1) * side, (row + 1) * side)


def read_window(
    path: Path, index: int, chip: Box, gsd_m: float, nearest: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Pixels of one band in one chip, 0 where there are none; and where rounding is open.

    A file with larger pixels is repeated, or interpolated linearly between the centres of those of
    its pixels that have data, in whole numbers, so that nothing is lost before the one rounding at
    the end. Where the exact value lies halfway between two numbers (`open`) the upper is given.
    """
    size = round((chip[2] - chip[0]) / gsd_m)
    with rasterio.open(path) as file:
        zoom, rest = divmod(file.res[0], gsd_m)
        assert rest == 0
        column, row = (chip[0] - file.bounds.left) / gsd_m, (file.bounds.top - chip[3]) / gsd_m
        assert column == int(column)
        assert row == int(row)
        x, y = int(column) + np.arange(size), int(row) + np.arange(size)
        if zoom == 1:
            window = Window(x[0], y[0], size, size)
            read = file.read(index, window=window, boundless=True, fill_value=0)
            return read.astype(np.int64), np.zeros(read.shape, bool)
        left, top = x[0] // zoom - 1, y[0] // zoom - 1
        window = Window(left, top, x[-1] // zoom - left + 2, y[-1] // zoom - top + 2)
        read = file.read(index, window=window, boundless=True, fill_value=0).astype(np.int64)
    total, weight = np.zeros((2, size, size), np.int64)
    own = read[np.ix_((y // zoom - top).astype(int), (x // zoom - left).astype(int))]
    if nearest:
        return own, np.zeros(own.shape, bool)
    # Distances from the centres of the two pixels to either side, in halves of the fine pixels.
    for y_pixel, y_weight in _linear(y, int(zoom)):
        for x_pixel, x_weight in _linear(x, int(zoom)):
            value = read[np.ix_(y_pixel - int(top), x_pixel - int(left))]
            share = np.outer(y_weight, x_weight) * (value != 0)
            total += share * value
            weight += share
    weight[own == 0] = 0
    there = np.maximum(weight, 1)
    halfway = (2 * total + there) % (2 * there) == 0
    return np.where(weight > 0, (2 * total + there) // (2 * there), 0), halfway & (weight > 0)


def _linear(n: NDArray[np.int64], zoom: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The two coarse pixels about fine pixels `n`, each with its weight out of 2 * zoom."""
    place = 2 * n + 1 - zoom
    before = place // (2 * zoom)
    after_weight = place - before * 2 * zoom
    return [(before, 2 * zoom - after_weight), (before + 1, after_weight)]


@dataclass(frozen=True)
class Pixels:
    """A composite of one chip."""

    image: NDArray[np.int64]
    """[band, y, x]"""
    halfway: NDArray[np.bool_]
    """[band, y, x]: one less is as good."""
    valid: NDArray[np.bool_]
    scene: NDArray[np.int64]
    """[y, x] index into `scenes`; -1: none."""
    scenes: list[Scene]


def scenes_in_order(place: Place, chip: Box) -> list[Scene]:
    """The scenes as they are laid one under another in the shard of a chip.

    By whole percents of the mask's invalid values among those with data in the shard, then of the
    data in it, then by the cloud cover of the whole scene.
    """
    sensor, grid = place.info.sensor, place.info.grid
    if sensor.mask is None:
        return place.scenes
    mask = sensor.mask
    side = grid.size * grid.gsd_m * grid.shard_side
    col, row = chip[0] // side, chip[1] // side
    block = (col * side, row * side, (col + 1) * side, (row + 1) * side)

    def key(s: Scene) -> tuple[int, int]:
        values, _ = read_window(s.assets["scl"], 1, block, grid.gsd_m, nearest=True)
        data = values[values != mask.nodata]
        cloud = np.isin(data, mask.invalid).mean() if data.size else 0.0
        return round(100 * cloud), -round(100 * data.size / values.size)

    return sorted(place.scenes, key=key)


def read_pixels(place: Place, chip: Box) -> Pixels:
    """First valid pixel of the scenes in order; else, not valid, the first that there is."""
    sensor, grid = place.info.sensor, place.info.grid
    shape = (len(sensor.bands), grid.size, grid.size)
    order = scenes_in_order(place, chip)
    image, halfway = np.zeros(shape, np.int64), np.zeros(shape, bool)
    valid, scene = np.zeros(shape[1:], bool), np.full(shape[1:], -1)
    for n, s in enumerate(order):
        read = [
            read_window(
                next(s.assets[key] for key in b.asset.split("|") if key in s.assets),
                b.index, chip, grid.gsd_m, nearest=False,
            )
            for b in sensor.bands
        ]  # fmt: skip
        raw, open_ = np.stack([r for r, _ in read]), np.stack([o for _, o in read])
        shifted = np.where(raw == 0, 0, np.maximum(raw + s.offset, 1))
        some, every = (shifted != 0).any(axis=0), (shifted != 0).all(axis=0)
        good = some if sensor.dtype == "uint8" else every
        if sensor.mask:
            clouds, _ = read_window(s.assets["scl"], 1, chip, grid.gsd_m, nearest=True)
            good &= ~np.isin(clouds, sensor.mask.invalid)
        take = (good & ~valid) | (some & (scene < 0))
        image[:, take], halfway[:, take], scene[take] = shifted[:, take], open_[:, take], n
        valid |= good
    return Pixels(image, halfway, valid, scene, order)


def compare_pixels(place: Place, chip: Box, arrays: Arrays, n: int, d: Differences) -> None:
    p = read_pixels(place, chip)
    off = p.image - arrays["image"][n]
    same = (off == 0) | ((off == 1) & p.halfway)
    d.check("pixels", bool(same.all()), (chip, np.argwhere(~same)[:5].tolist(), off[~same][:5]))
    d.compared["pixels halfway"] += int(p.halfway.sum())
    d.compared["pixels one less"] += int((off == 1).sum())
    d.check("valid", np.float32(p.valid.mean()) == arrays["valid"][n], chip)
    votes = Counter(p.scene[p.scene >= 0].tolist())
    main = max(votes, key=lambda s: (votes[s], -s), default=None)
    time = arrays["time"][n]
    d.check("time", main is not None and time == p.scenes[main].seconds, (chip, time))


# ------------------------------------------------------------------------------------ objects


def compare_objects(
    objects: Sequence[Object], chip: Box, patches: int, arrays: Arrays, n: int, d: Differences
) -> None:
    """Objects of chip `n` with everything that is stored of them but relations."""
    first, last = arrays["object_offset"][n : n + 2]
    d.check("object count", len(objects) == last - first, (chip, len(objects), last - first))
    if len(objects) != last - first:
        return
    texts = _texts(arrays)
    width = chip[2] - chip[0]
    for o, m in zip(objects, range(first, last), strict=True):
        where = (chip, o.feature.osm, o.geometry)
        d.check("object", arrays["object_osm"][m] == o.feature.osm, where)
        d.check("kind", arrays["object_kind"][m] == o.kind, where)
        d.check("class", arrays["object_class"][m] == o.feature.osm_class, where)
        size = arrays["object_size"][m]
        d.check("size", abs(size - o.size) <= 1e-6 * o.size, (*where, size, o.size))
        a, b = arrays["object_tag_offset"][m : m + 2]
        stored = tuple(texts[t] for t in arrays["object_tag"][a:b])
        d.check("tags", stored == o.feature.tags, (*where, stored, o.feature.tags))
        for anchor, choices in zip(
            arrays["object_anchor"][m], independent.anchors(o.geometry), strict=True
        ):
            x, y = chip[0] + width * float(anchor[0]), chip[3] - width * float(anchor[1])
            away = min(
                (max(abs(x - cx), abs(y - cy)) for cx, cy in choices),
                default=o.geometry.distance(shapely.Point(x, y)),
            )
            d.check("anchor", away <= 1e-6 * width, (*where, anchor, choices))
        _compare_coverage(o.geometry, chip, patches, arrays, m, d)


def _texts(arrays: Arrays) -> list[str]:
    data = arrays["tag_text"].tobytes()
    return [data[a:b].decode() for a, b in itertools.pairwise(arrays["tag_text_offset"].tolist())]


def _compare_coverage(
    geometry: shapely.Geometry, chip: Box, patches: int, arrays: Arrays, m: int, d: Differences
) -> None:
    a, b = arrays["patch_offset"][m : m + 2]
    stored = dict(zip(arrays["patch"][a:b].tolist(), arrays["patch_weight"][a:b].tolist()))
    shares = independent.coverage(geometry, chip, patches)
    wrong = _wrong_patches(stored, shares)
    if wrong and geometry.geom_type == "LineString":
        wrong = set.intersection(wrong, *_moved_by_a_hair(geometry, chip, patches, stored))
    for patch in {*stored, *shares}:
        d.check(
            "coverage", patch not in wrong,
            (chip, geometry, patch, shares.get(patch), stored.get(patch)),
        )  # fmt: skip


def _wrong_patches(stored: Mapping[int, int], shares: Mapping[int, float]) -> set[int]:
    wrong = set()
    for patch in {*stored, *shares}:
        share = shares.get(patch, 0.0)
        if patch not in stored or patch not in shares:
            same = share < 1e-8 and stored.get(patch, 1) == 1
        else:
            same = stored[patch] in {max(1, round(255 * share + turn)) for turn in (-1e-4, 1e-4)}
        if not same:
            wrong.add(patch)
    return wrong


def _moved_by_a_hair(
    line: shapely.Geometry, chip: Box, patches: int, stored: Mapping[int, int]
) -> Iterator[set[int]]:
    """Wrong patches of a line moved 1e-8 m, by which it leaves a border that it runs along."""
    for step in ((1e-8, 0.0), (-1e-8, 0.0), (0.0, 1e-8), (0.0, -1e-8)):
        moved = shapely.transform(
            line, lambda xy, step=step: np.clip(xy + step, chip[:2], chip[2:])
        )
        yield _wrong_patches(stored, independent.coverage(moved, chip, patches))


def compare_relations(
    objects: Sequence[Object], chip: Box, arrays: Arrays, n: int, d: Differences
) -> None:
    """Edges of chip `n`: every relation by its matrix, and near edges by the empty circle."""
    a, b = arrays["edge_offset"][n : n + 2]
    rows = arrays["edge"][a:b].tolist()
    stored = {
        (s, t): Relation(r)
        for (s, t), r in zip(rows, arrays["relation"][a:b].tolist(), strict=True)
    }
    d.check("edge twice", len(stored) == len(rows), chip)
    near = {pair for pair, r in stored.items() if r == Relation.NEAR}
    expected = independent.relations([o.geometry for o in objects])
    for pair in {*stored, *expected} - near:
        got, want = stored.get(pair), expected.get(pair)
        ends = [objects[k].geometry for k in pair]
        d.check("relation", got == want, (chip, got, want, ends))
    points = [k for k, o in enumerate(objects) if o.kind == Kind.POINT]
    position = {k: i for i, k in enumerate(points)}
    ok = all(s in position and t in position for s, t in near)
    d.check("near between points", ok, chip)
    if ok:
        places = [(objects[k].geometry.x, objects[k].geometry.y) for k in points]
        faults = independent.near_faults(places, {(position[s], position[t]) for s, t in near})
        d.check("near", not faults, (chip, faults, places))
    d.compared["near edges"] += len(near)


# ------------------------------------------------------------------------------------- labels


def compare_labels(
    place: Place, objects: Sequence[Object], chip: Box, arrays: Arrays, n: int, d: Differences
) -> None:
    grid, classes = place.info.grid, len(place.info.taxonomy.classes)
    raster = independent.raster_by_rasterio(place.areas, chip, 2 * grid.size)
    centres = independent.raster_by_centres(place.areas, chip, 2 * grid.size)
    d.check("raster by centres", np.array_equal(raster, centres), (chip, (raster != centres).sum()))
    label = independent.pixel_labels(raster)
    stored = arrays["label_pixel"][n]
    d.check("label_pixel", np.array_equal(label, stored), (chip, (label != stored).sum()))
    counts = independent.patch_counts(raster, grid.patches, classes)
    whole = 4 * grid.patch**2
    patch = np.floor(counts * 255 / whole + 0.5).astype(np.uint8)
    d.check("label_patch", np.array_equal(patch, arrays["label_patch"][n]), chip)
    region = counts.sum(axis=(0, 1)) / (whole * grid.patches**2)
    off = np.abs(region - arrays["label_region"][n])
    d.check("label_region", bool((off <= 1.2e-7 * region).all()), (chip, off.max()))

    hectares = (chip[2] - chip[0]) * (chip[3] - chip[1]) / 10_000
    for name, kind in (("line_density", Kind.LINE), ("point_density", Kind.POINT)):
        for c in range(1, classes + 1):
            amount = sum(
                o.size if kind == Kind.LINE else 1.0
                for o in objects if o.kind == kind and o.feature.osm_class == c
            )  # fmt: skip
            density = arrays[name][n][c - 1]
            d.check(name, abs(density - amount / hectares) <= 1e-6 * density, (chip, c))
    _compare_statistics(counts / whole, arrays, n, place.info, d)


def _compare_statistics(
    share: NDArray[np.float64], arrays: Arrays, n: int, info: DatasetInfo, d: Differences
) -> None:
    """Moran's I and Lee's L by their weights matrix, one class at a time."""
    p, image = info.grid.patches, arrays["image"][n].astype(np.float64)
    weights = _queen(p)
    side = info.grid.patch
    bright = np.full(p * p, np.nan)
    for i in range(p * p):
        row, column = divmod(i, p)
        part = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        if all((band != info.sensor.nodata).any() for band in part):
            bright[i] = np.mean([band[band != info.sensor.nodata].mean() for band in part])
    bright = np.where(np.isnan(bright), np.nanmean(bright), bright)
    b = bright - bright.mean()
    for c in range(share.shape[2]):
        z = share[:, :, c].ravel() - share[:, :, c].mean()
        flat_z, flat_b = np.ptp(share[:, :, c]) == 0, np.ptp(bright) < 1e-6
        moran = 0.0 if flat_z else (z @ weights @ z) / (z @ z)
        lee = 0.0
        if not (flat_z or flat_b):
            lee = (weights @ z) @ (weights @ b) / np.sqrt((z @ z) * (b @ b))
        d.check("moran", abs(moran - arrays["moran"][n][c]) <= 1e-4, (moran, arrays["moran"][n][c]))
        d.check("lee", abs(lee - arrays["lee"][n][c]) <= 1e-4, (lee, arrays["lee"][n][c]))


@lru_cache
def _queen(p: int) -> NDArray[np.float64]:
    """Weights of a lattice of p x p: each patch's neighbours alike, adding up to one."""
    weights = np.zeros((p * p, p * p))
    for i, j in itertools.product(range(p * p), repeat=2):
        (a, b), (c, e) = divmod(i, p), divmod(j, p)
        weights[i, j] = i != j and abs(a - c) <= 1 and abs(b - e) <= 1
    return weights / weights.sum(axis=1, keepdims=True)


def compare_chip(place: Place, chip: Box, arrays: Arrays, n: int, d: Differences) -> None:
    """Chip `n` of a shard, whole."""
    d.check("bounds", arrays["bounds"][n].tolist() == list(chip), chip)
    place = place.near(chip)
    objects = independent.clip_chip(place.features, chip, place.info.objects)
    check_pieces_by_walking(place.features, chip, d)
    compare_objects(objects, chip, place.info.grid.patches, arrays, n, d)
    if len(objects) == np.diff(arrays["object_offset"][n : n + 2]):
        compare_relations(objects, chip, arrays, n, d)
    compare_pixels(place, chip, arrays, n, d)
    compare_labels(place, objects, chip, arrays, n, d)


def check_pieces_by_walking(features: Sequence[Feature], chip: Box, d: Differences) -> None:
    """Overlay and a walk along the line agree on the pieces of a line that does not meet itself
    (nor comes within a micrometre of it); leaving the chip by less than a micrometre may not count.
    """
    x0, y0, x1, y1 = chip
    wider = (x0 - 1e-6, y0 - 1e-6, x1 + 1e-6, y1 + 1e-6)
    for f in features:
        if f.kind != Kind.LINE or not f.geometry.is_simple:
            continue
        if not shapely.transform(f.geometry, lambda p: p.round(6)).is_simple:
            continue
        cut = sorted((g.coords[0], g.coords[-1]) for g in independent.clip_feature(f, chip))
        walked = [_ends_by_walking(f.geometry, square) for square in (chip, wider)]
        same = any(
            len(cut) == len(ends) and np.allclose(cut, ends, rtol=0, atol=1e-5) for ends in walked
        )
        d.check("line pieces", same, (chip, f.osm, cut, walked))


def _ends_by_walking(line: shapely.LineString, chip: Box) -> list[Ends]:
    pieces = independent.walk_clip(line, chip)
    if len(pieces) > 1 and pieces[0][0] == pieces[-1][-1]:
        pieces[0] = pieces.pop() + pieces[0][1:]
    return sorted((p[0], p[-1]) for p in pieces)
