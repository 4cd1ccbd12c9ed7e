"""The ground as a raster: which object is on top at each pixel, and how high it stands.

Pixels hold rows of one table: row 0 is open land, rows 1..N the drawables, and after them a few
kinds of tree, shrub, car and so on that patterns put in (`KINDS`).
"""

from dataclasses import dataclass, replace

import numpy as np
import rasterio.features
import shapely
from numpy.typing import NDArray
from rasterio.transform import Affine

from pipelines.world.appearance import Drawables, object_spectra
from pipelines.world.covers import COVER_ID, COVER_NAMES, COVERS
from pipelines.world.features import Features
from pipelines.world.noise import lattice, uniform, value_noise_at

KINDS: dict[str, tuple[str, int]] = {"tree": ("tree", 24), "car": ("car", 12), "soil": ("bare",
    3), "vine": ("hedge", 4),
                                     "paving": ("plaza", 3), "marking": ("marking", 1)}  # fmt: skip
TREE_CELL_M = 9.0
HEIGHT_STEP_M = 0.25  # heights are stored in these steps, up to 63 m


@dataclass(frozen=True)
class Ground:
    """A raster of a place; `x` [W] and `y` [H] (falling) are pixel centres on the ground, metres.

    `index` [H, W] rows of `cover`, `angle`, `spectra`; `height` [H, W] in steps of 0.25 m;
    `shade` [H, W] brightness of tree crowns ×128, or None; `kinds` first row and count by name.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    gsd_m: float
    index: NDArray[np.int32]
    height: NDArray[np.uint8]
    shade: NDArray[np.uint8] | None
    cover: NDArray[np.int16]
    angle: NDArray[np.float32]
    spectra: NDArray[np.float32]
    kinds: dict[str, tuple[int, int]]


def make_ground(
    things: Drawables,
    features: Features,
    bounds: tuple[float, float, float, float],
    gsd_m: float,
    shift_m: tuple[float, float],
    sun: tuple[float, float] | None = None,
) -> Ground:
    """Draws `things`, and trees OSM knows or not, over `bounds`.

    The picture's content lies `shift_m` (east, north) off its true place. With `sun` (azimuth,
    elevation in degrees) tree crowns are shaded.
    """
    x0, y0, x1, y1 = bounds
    width, height = round((x1 - x0) / gsd_m), round((y1 - y0) / gsd_m)
    west, north = x0 - shift_m[0], y1 - shift_m[1]
    transform = Affine(gsd_m, 0, west, 0, -gsd_m, north)
    x = west + (np.arange(width, dtype=np.float64) + 0.5) * gsd_m
    y = north - (np.arange(height, dtype=np.float64) + 0.5) * gsd_m
    index = np.zeros((height, width), dtype=np.int32)
    reach = shapely.box(west - 5, north - height * gsd_m - 5, west + width * gsd_m + 5, north + 5)
    rows = np.flatnonzero(shapely.intersects(things.geometry, reach))
    if len(rows):
        shapes = zip(_as_geojson(things.geometry[rows]), (rows + 1).tolist(), strict=True)
        rasterio.features.rasterize(list(shapes), out=index, transform=transform)
    index = _carried_on(index, x, y, bounds)
    cover, angle, spectra, kinds = _table(things)
    tall = np.zeros(len(cover), dtype=np.uint8)
    tall[1 : 1 + len(things)] = np.minimum(things.height_m / HEIGHT_STEP_M, 255).astype(np.uint8)
    ground = Ground(x, y, gsd_m, index, tall[index], None, cover, angle, spectra, kinds)
    return _with_trees(ground, features, sun)


def _carried_on(
    index: NDArray[np.int32],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    bounds: tuple[float, float, float, float],
) -> NDArray[np.int32]:
    """The raster with its rim repeated where the shift looks past the edge of the known world."""
    column = np.flatnonzero((x > bounds[0]) & (x < bounds[2]))
    row = np.flatnonzero((y > bounds[1]) & (y < bounds[3]))
    columns = np.clip(np.arange(len(x)), column[0], column[-1])
    rows = np.clip(np.arange(len(y)), row[0], row[-1])
    return np.asarray(index[rows][:, columns])


def _as_geojson(polygons: NDArray[np.object_]) -> list[dict[str, object]]:
    """Polygons as GeoJSON, several times faster than one `__geo_interface__` at a time."""
    parts, owner = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    points = xy.tolist()
    ends = np.r_[np.flatnonzero(np.diff(ring)) + 1, len(ring)].tolist()
    out: list[list[list[object]]] = [[] for _ in range(len(polygons))]
    start, last = 0, -1
    for k, end in zip(part.tolist(), ends, strict=True):
        if k != last:
            out[owner[k]].append([])
        out[owner[k]][-1].append(points[start:end])
        start, last = end, k
    return [{"type": "MultiPolygon", "coordinates": c} for c in out]


def _table(
    things: Drawables,
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float32], dict[str, tuple[int, int]]]:
    covers, kinds = [np.array([COVER_ID["base"]], dtype=np.int16), things.cover], {}
    start = 1 + len(things)
    for name, (cover, count) in KINDS.items():
        kinds[name] = (start, count)
        covers.append(np.full(count, COVER_ID[cover], dtype=np.int16))
        start += count
    place = np.arange(sum(n for _, n in KINDS.values()), dtype=np.float64)
    extra = object_spectra(np.concatenate(covers[2:]), np.c_[place, place * 7])
    base = object_spectra(covers[0], np.zeros((1, 2)))
    angle = np.concatenate([[0], things.angle, np.zeros(len(place))]).astype(np.float32)
    spectra = np.concatenate([base, things.spectra, extra], axis=1)
    return np.concatenate(covers), angle, spectra, kinds


def _with_trees(ground: Ground, features: Features, sun: tuple[float, float] | None) -> Ground:
    known = np.array(
        [
            g.geom_type == "Point" and t.get("natural") == "tree"
            for g, t in zip(features.geometry, features.truth, strict=True)
        ],
        dtype=bool,
    )
    xy = np.concatenate([shapely.get_coordinates(features.geometry[known]), _wild_trees(ground)])
    size = uniform(xy, 41)
    radius = 1.5 + 3.1 * size + 1.2 * uniform(xy, 43) ** 4
    first, count = ground.kinds["tree"]
    stand = value_noise_at(xy, 160.0, 47)  # neighbours are often of a kind
    kind = first + ((uniform(xy, 42) * 0.6 + 0.2 * (stand + 1)) * count).astype(np.int32) % count
    tall = np.minimum((3.0 + radius * 2.1) / HEIGHT_STEP_M, 255).astype(np.uint8)
    shade = None if sun is None else np.full(ground.index.shape, 128, dtype=np.uint8)
    _stamp(ground, xy, radius, kind, tall, shade, sun)
    return replace(ground, shade=shade)


def _wild_trees(ground: Ground) -> NDArray[np.float64]:
    """Trees of no map: a jittered lattice, thinned by what grows where they would stand."""
    step = TREE_CELL_M
    i = np.arange(int(ground.x[0] // step), int(ground.x[-1] // step) + 1)
    j = np.arange(int(ground.y[-1] // step), int(ground.y[0] // step) + 1)
    ii, jj = (a.ravel() for a in np.meshgrid(i, j))
    xy = np.c_[(ii + lattice(ii, jj, 31)) * step, (jj + lattice(ii, jj, 32)) * step]
    column = np.floor((xy[:, 0] - ground.x[0]) / ground.gsd_m + 0.5).astype(np.int64)
    row = np.floor((ground.y[0] - xy[:, 1]) / ground.gsd_m + 0.5).astype(np.int64)
    inside = (column >= 0) & (column < len(ground.x)) & (row >= 0) & (row < len(ground.y))
    xy, row, column, ii, jj = xy[inside], row[inside], column[inside], ii[inside], jj[inside]
    chance = np.array([COVERS[n].trees for n in COVER_NAMES], dtype=np.float32)
    likely = chance[ground.cover[ground.index[row, column]]]
    clump = np.clip(1 + 1.3 * value_noise_at(xy, 90.0, 34), 0.1, None)
    return np.asarray(xy[lattice(ii, jj, 33) < likely * clump])


def _stamp(
    ground: Ground,
    xy: NDArray[np.float64],
    radius_m: NDArray[np.float32],
    kind: NDArray[np.int32],
    tall: NDArray[np.uint8],
    shade: NDArray[np.uint8] | None,
    sun: tuple[float, float] | None,
) -> None:
    """Draws discs into the raster in place; one pass per pixel offset, over all trees at once."""
    g = ground.gsd_m
    column = (xy[:, 0] - ground.x[0]) / g
    row = (ground.y[0] - xy[:, 1]) / g
    c0, r0 = np.round(column).astype(np.int64), np.round(row).astype(np.int64)
    reach = int(np.ceil(radius_m.max(initial=0) / g))
    h, w = ground.index.shape
    toward = (
        np.zeros(2)
        if sun is None
        else np.array([np.sin(np.deg2rad(sun[0])), -np.cos(np.deg2rad(sun[0]))])
    )
    for dr in range(-reach, reach + 1):
        for dc in range(-reach, reach + 1):
            c, r = c0 + dc, r0 + dr
            off = np.c_[c - column, r - row] * g
            away = np.hypot(*off.T) / radius_m
            hit = (away <= 1) & (c >= 0) & (c < w) & (r >= 0) & (r < h)
            at = (r[hit], c[hit])
            ground.index[at] = kind[hit]
            ground.height[at] = (tall[hit] * (1 - 0.45 * away[hit] ** 2)).astype(np.uint8)
            if shade is not None:
                lit = (off[hit] @ toward) / radius_m[hit]
                shade[at] = (128 * (0.95 + 0.42 * lit - 0.12 * away[hit])).astype(np.uint8)


def shadows(ground: Ground, sun: tuple[float, float]) -> NDArray[np.bool_]:
    """Where something toward the sun (azimuth, elevation in degrees) stands in its light [H, W].

    Marches every pixel's ray in steps of a pixel over the height raster.
    """
    azimuth, elevation = np.deg2rad(sun[0]), np.deg2rad(sun[1])
    step_c, step_r = np.sin(azimuth), -np.cos(azimuth)
    rise = np.tan(elevation) * ground.gsd_m / HEIGHT_STEP_M
    dark = np.zeros(ground.index.shape, dtype=bool)
    h, w = len(ground.y), len(ground.x)
    top = int(ground.height.max(initial=0))
    for k in range(1, int(top / rise) + 1):
        dc, dr = round(step_c * k), round(step_r * k)
        if abs(dr) >= h or abs(dc) >= w:
            break
        here = (slice(max(0, -dr), h - max(0, dr)), slice(max(0, -dc), w - max(0, dc)))
        there = (slice(max(0, dr), h - max(0, -dr)), slice(max(0, dc), w - max(0, -dc)))
        gain = np.uint8(min(255, int(k * rise) + 1))
        lowered = np.maximum(ground.height[there], gain)
        lowered -= gain  # what of the blocker's height reaches above the ray's start
        dark[here] |= lowered > ground.height[here]
    return dark
