"""An aerial-like RGB picture: patterns, sun and shade, roofs with ridges, cars, a film's tones."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.world.appearance import Drawables, object_spectra
from pipelines.world.covers import COVER_ID, SEASONS
from pipelines.world.details import along_lines
from pipelines.world.features import Features
from pipelines.world.ground import make_ground, shadows
from pipelines.world.materials import BANDS
from pipelines.world.noise import lattice, uniform
from pipelines.world.patterns import fill_rows
from pipelines.world.shore import shallows

_RGB = [BANDS.index(b) for b in ("red", "green", "blue")]
_SKYLIGHT = np.array([0.30, 0.36, 0.46], dtype=np.float32)  # what reaches into shade
_STRIP = 512


@dataclass(frozen=True)
class Flight:
    """What a picture's look depends on beside the ground.

    `sun` azimuth, elevation in degrees; `haze` [3] light added, `gain` [3] exposure of red, green,
    blue; `saturation` 1: colours as they are, 0: grey; `blur` in pixels; `grain` in counts.
    """

    season: str = "late_summer"
    sun: tuple[float, float] = (152.0, 44.0)
    haze: tuple[float, ...] = (0.006, 0.010, 0.018)
    gain: tuple[float, ...] = (1.0, 1.0, 1.0)
    saturation: float = 1.0
    gamma: float = 0.58
    blur: float = 0.55
    grain: float = 5.0


def render_aerial(
    features: Features,
    things: Drawables,
    bounds: tuple[float, float, float, float],
    gsd_m: float,
    shift_m: tuple[float, float],
    seed: int,
    flight: Flight = Flight(),
) -> NDArray[np.uint8]:
    """RGB [3, H, W] uint8 of `bounds` (UTM metres), y down; values are 1..255 (0 is nodata)."""
    detailed = _with_ridges_and_cars(things, features, bounds, flight.sun)
    ground = make_ground(detailed, features, bounds, gsd_m, shift_m, sun=flight.sun)
    dark = shadows(ground, flight.sun)
    shallow = shallows(ground)
    table = ground.spectra[SEASONS.index(flight.season)][:, _RGB]
    if flight.saturation != 1:
        grey = table.mean(1, keepdims=True)
        table = grey + np.float32(flight.saturation) * (table - grey)
    h, w = ground.index.shape
    out = np.empty((3, h, w), dtype=np.uint8)
    margin = 4
    for start in range(0, h, _STRIP):
        rows = slice(max(0, start - margin), min(h, start + _STRIP + margin))
        keep = slice(start - rows.start, min(h, start + _STRIP) - rows.start)
        index, bright = fill_rows(ground, rows)
        shore = shallow.of(rows, index, ground)
        soft = gaussian_filter(dark[rows].astype(np.float32), 0.7)
        for band in range(3):
            light = table[:, band][index] * bright
            if shore is not None:
                light += shore * shallow.difference[_RGB[band]]
            light *= 1 - soft * (1 - _SKYLIGHT[band])
            light = gaussian_filter(light, flight.blur) + np.float32(flight.haze[band])
            if flight.gain[band] != 1:
                light *= np.float32(flight.gain[band])
            noise = lattice(
                np.arange(w)[None, :],
                np.arange(rows.start, rows.stop)[:, None],
                seed * 31 + band + 500,
            ) + lattice(
                np.arange(w)[None, :],
                np.arange(rows.start, rows.stop)[:, None],
                seed * 37 + band + 600,
            )
            out[band, start : start + _STRIP] = _film(light, noise - 1, flight)[keep]
    return out


def _film(
    light: NDArray[np.float32], noise: NDArray[np.float32], flight: Flight
) -> NDArray[np.uint8]:
    """Reflectance to a display value by a gamma, with grain of a few counts."""
    tone = 255 * np.clip(light * np.float32(1 / 0.42), 0, 1) ** np.float32(flight.gamma)
    grain = np.float32(flight.grain) * noise
    return np.asarray(np.clip(np.rint(tone + grain), 1, 255), dtype=np.uint8)


def _with_ridges_and_cars(
    things: Drawables,
    features: Features,
    bounds: tuple[float, float, float, float],
    sun: tuple[float, float],
) -> Drawables:
    """`things` with half of each pitched roof in another light, and cars on the roads."""
    near = np.flatnonzero(shapely.intersects(things.geometry, shapely.box(*bounds)))
    pitched = near[np.isin(things.cover[near], [COVER_ID["roof_pitched"], COVER_ID["roof_farm"]])]
    half, rows, gain = _roof_halves(things, pitched, sun)
    cars = _cars(features, bounds)
    middle = shapely.get_coordinates(shapely.centroid(cars))
    car_cover = np.full(len(cars), COVER_ID["car"], dtype=np.int16)
    return Drawables(
        np.concatenate([things.geometry, half, cars]),
        np.concatenate([things.cover, things.cover[rows], car_cover]),
        np.concatenate(
            [things.height_m, things.height_m[rows], np.full(len(cars), 1.4, np.float32)]
        ),
        np.concatenate([things.angle, things.angle[rows], np.zeros(len(cars), np.float32)]),
        np.concatenate(
            [
                things.spectra,
                things.spectra[:, rows] * gain[:, None],
                object_spectra(car_cover, middle),
            ],
            axis=1,
        ),
    )


def _roof_halves(
    things: Drawables, rows: NDArray[np.int64], sun: tuple[float, float]
) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.float32]]:
    """The side of each roof that lies off the sun (or the brighter one), its row and brightness."""
    roof = things.geometry[rows]
    box = shapely.oriented_envelope(roof)
    fine = shapely.get_num_coordinates(box) == 5
    roof, rows, box = roof[fine], rows[fine], box[fine]
    corner = shapely.get_coordinates(box).reshape(-1, 5, 2)[:, :4]
    long = np.hypot(*(corner[:, 1] - corner[:, 0]).T) >= np.hypot(*(corner[:, 2] - corner[:, 1]).T)
    corner = np.where(long[:, None, None], corner, np.roll(corner, -1, axis=1))
    a, b, c, d = np.moveaxis(corner, 1, 0)
    side = shapely.polygons(np.stack([a, b, (b + c) / 2, (a + d) / 2], axis=1))
    half = shapely.intersection(side, roof)
    outward = (a + b) / 2 - (c + d) / 2
    outward /= np.maximum(np.hypot(*outward.T), 1e-6)[:, None]
    azimuth = np.deg2rad(sun[0])
    facing = outward @ np.array([np.sin(azimuth), np.cos(azimuth)])
    ok = shapely.get_dimensions(half) == 2
    return half[ok], rows[ok], (1 + 0.34 * facing[ok]).astype(np.float32)


def _cars(features: Features, bounds: tuple[float, float, float, float]) -> NDArray[np.object_]:
    """Cars on and beside the carriageways, by place."""
    busy = {"motorway", "primary", "secondary", "tertiary", "residential", "unclassified"}
    road = np.array(
        [
            t.get("highway") in busy and g.geom_type == "LineString"
            for t, g in zip(features.truth, features.geometry, strict=True)
        ],
        dtype=bool,
    )
    lines = features.geometry[road]
    lines = shapely.intersection(
        lines[shapely.intersects(lines, shapely.box(*bounds))], shapely.box(*bounds)
    )
    lines = shapely.get_parts(lines)
    lines = lines[shapely.length(lines) > 12]
    out = []
    for aside, spacing, share, salt in (
        (1.7, 23.0, 0.16, 1),
        (-1.7, 23.0, 0.16, 2),
        (3.4, 7.0, 0.14, 3),
    ):
        here = along_lines(lines, spacing, aside)
        ahead = along_lines(lines, spacing, aside + 1.0)
        across = ahead - here
        along = np.c_[across[:, 1], -across[:, 0]]
        some = uniform(here, 700 + salt) < share
        here, along, across = here[some], along[some] * 2.2, across[some] * 0.9
        corners = [
            here - along - across,
            here + along - across,
            here + along + across,
            here - along + across,
        ]
        if len(here):
            out.append(shapely.polygons(np.stack(corners, axis=1)))
    return np.concatenate(out) if out else np.empty(0, dtype=object)
