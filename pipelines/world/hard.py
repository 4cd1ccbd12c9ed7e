"""A harder world, to compare what models learn: looks that vary, and a map that often errs.

The same region as `make_world`'s, but
- its aerial picture is a mosaic of flights of 512 m, each of its own season, sun, exposure, white
  balance, haze, blur and grain, so that a colour says little about a class;
- neighbours are built and grown alike (a district has its roofs, its crops, its paving), so that
  a look learnt in one place is not that of another;
- the map lacks still more than the usual survey, calls a share of the areas by a wrong name, and
  places things some metres off.

Beside the map there is one of what is truly there, for scoring only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.aerial import Flight, render_aerial
from pipelines.world.appearance import Drawables, drawables, object_spectra
from pipelines.world.build import (
    AERIAL_COLLECTION,
    AERIAL_SHIFT_M,
    Bounds,
    aerial_bounds,
    to_lonlat,
    write_aerial,
)
from pipelines.world.covers import SEASONS
from pipelines.world.features import Features, Tags
from pipelines.world.pbf import write_pbf
from pipelines.world.stac import write_catalog
from pipelines.world.town import make_town

FLIGHT_M = 512
MISSING = 0.15
"""Share of the mapped things that the map lacks on top of what the survey missed."""
WRONG = 0.15
"""Share of the mapped areas that bear another area's name."""
OFFSET_M = 2.0
"""Deviation of the map's error of place, metres east and north."""

_AREA_KEYS = ("landuse", "natural", "leisure", "amenity")


@dataclass(frozen=True)
class HardWorld:
    """Where its files are. `pbf` is the map, `truth_pbf` what is there; bounds are degrees."""

    folder: Path
    pbf: Path
    truth_pbf: Path
    catalog: Path
    collection: str
    bounds_lonlat: Bounds


def make_hard_world(folder: Path, *, seed: int, size_km: float, aerial_km: float) -> HardWorld:
    """Make the world in `folder`; the same arguments give the same bytes.

    `size_km`: side of the region; `aerial_km`: side of the picture (1 m) about its centre.
    """
    folder.mkdir(parents=True, exist_ok=True)
    town = make_town(seed, size_km)
    bounds = aerial_bounds(town.bounds_utm, town.centre_utm, aerial_km)
    near = shapely.intersects(town.features.geometry, shapely.box(*bounds).buffer(200.0))
    known = town.features.take(np.asarray(near))
    pbf, truth_pbf = folder / "world.osm.pbf", folder / "truth.osm.pbf"
    write_pbf(pbf, worsened(known, seed), town.epsg)
    write_pbf(truth_pbf, replace(known, mapped=known.truth), town.epsg)

    things = drawables(known)
    middle = shapely.get_coordinates(shapely.centroid(things.geometry))
    things = replace(things, spectra=object_spectra(things.cover, middle, districts=True))
    image = render_flights(known, things, bounds, seed)
    item = write_aerial(folder / "aerial", image, town.epsg, bounds)
    catalog = write_catalog(folder / "aerial", AERIAL_COLLECTION, "Aerial pictures", [item])
    lonlat = to_lonlat(town.epsg, bounds)
    return HardWorld(folder, pbf, truth_pbf, catalog, AERIAL_COLLECTION, lonlat)


def worsened(known: Features, seed: int) -> Features:
    """The features with a worse map: things missing, areas misnamed, everything a little off."""
    rng = np.random.default_rng((seed, 1))
    lost = rng.random(len(known)) < MISSING
    mapped = [{} if gone else dict(tags) for tags, gone in zip(known.mapped, lost, strict=True)]
    area = np.array([_is_area(tags) for tags in mapped])
    area &= np.asarray(shapely.get_dimensions(known.geometry) == 2)
    rows = np.flatnonzero(area)
    misnamed = rows[rng.random(len(rows)) < WRONG]
    for row, other in zip(misnamed.tolist(), rng.choice(rows, len(misnamed)).tolist(), strict=True):
        mapped[row] = dict(known.mapped[other])
    offset = np.round(rng.normal(0.0, OFFSET_M, (len(known), 2)), 2)
    xy, owner = shapely.get_coordinates(known.geometry, return_index=True)
    moved = shapely.set_coordinates(known.geometry.copy(), np.round(xy + offset[owner], 2))
    return Features(moved, known.truth, mapped)


def _is_area(tags: Tags) -> bool:
    return any(key in tags for key in _AREA_KEYS) and "building" not in tags


def render_flights(
    features: Features, things: Drawables, bounds: Bounds, seed: int
) -> NDArray[np.uint8]:
    """RGB [3, H, W] of `bounds` (UTM metres, multiples of 64 m) at 1 m, flight by flight."""
    west, south, east, north = bounds
    image = np.empty((3, round(north - south), round(east - west)), np.uint8)
    place = _Near(features, things)
    for top in range(0, image.shape[1], FLIGHT_M):
        for left in range(0, image.shape[2], FLIGHT_M):
            height = min(FLIGHT_M, image.shape[1] - top)
            width = min(FLIGHT_M, image.shape[2] - left)
            box = (west + left, north - top - height, west + left + width, north - top)
            rng = np.random.default_rng((seed, 2, top, left))
            image[:, top : top + height, left : left + width] = render_aerial(
                *place.of(box), box, 1.0, AERIAL_SHIFT_M, seed, draw_flight(rng)
            )
    return image


def draw_flight(rng: np.random.Generator) -> Flight:
    """A flight's circumstances."""
    hazy = rng.uniform(0.0, 0.12)
    return Flight(
        season=SEASONS[int(rng.integers(len(SEASONS)))],
        sun=(float(rng.uniform(100, 250)), float(rng.uniform(28, 60))),
        haze=tuple((hazy * rng.uniform((0.6, 0.8, 1.0), (1.0, 1.1, 1.3))).tolist()),
        gain=tuple((rng.uniform(0.7, 1.3) * rng.uniform(0.85, 1.18, 3)).tolist()),
        saturation=float(rng.uniform(0.2, 0.9)),
        gamma=float(rng.uniform(0.45, 0.8)),
        blur=float(rng.uniform(0.5, 1.1)),
        grain=float(rng.uniform(3.0, 12.0)),
    )  # fmt: skip


class _Near:
    """Features and things of a box, found by tree."""

    def __init__(self, features: Features, things: Drawables) -> None:
        self._features, self._things = features, things
        self._trees = shapely.STRtree(features.geometry), shapely.STRtree(things.geometry)

    def of(self, box: Bounds) -> tuple[Features, Drawables]:
        around = shapely.box(*box).buffer(60.0)
        rows, drawn = (np.sort(tree.query(around)) for tree in self._trees)
        t = self._things
        return self._features.take(rows), Drawables(
            t.geometry[drawn], t.cover[drawn], t.height_m[drawn], t.angle[drawn],
            t.spectra[:, drawn],
        )  # fmt: skip
