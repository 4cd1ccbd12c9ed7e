"""From tagged geometries to things to draw: surface, layer, height and spectrum of each."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.covers import (
    COVER_ID,
    COVER_NAMES,
    COVERS,
    SEASONS,
    TEXTURES,
    variants_of,
)
from pipelines.world.features import Features, Tags
from pipelines.world.materials import BANDS
from pipelines.world.noise import uniform, value_noise_at

# Layers from the ground up.
ZONE, LAND, GROUND, WATER, VERGE, PATH, STREET, ROAD, RAIL, DECK, BUILDING, ROOF, TOP = range(13)
PITCHED = {
    "house",
    "detached",
    "terrace",
    "bungalow",
    "farm",
    "church",
    "chapel",
    "semidetached_house",
    "cabin",
}
HALLS = {"industrial", "warehouse", "manufacture", "retail", "supermarket", "hangar",
    "train_station", "shed",
         "garage", "garages", "roof", "carport"}  # fmt: skip
FARM = {"barn", "farm_auxiliary", "cowshed", "stable", "sty"}

# First rule that fits wins: key, values ("*" any), cover, layer. Areas only.
_AREAS: tuple[tuple[str, str, str, int], ...] = (
    ("natural", "water", "lake", WATER),
    ("waterway", "riverbank dock river canal", "river", WATER),
    ("landuse", "reservoir basin", "lake", WATER),
    ("leisure", "swimming_pool", "pool", DECK),
    ("man_made", "pier breakwater quay groyne", "concrete", DECK),
    ("aeroway", "runway", "runway", STREET),
    ("aeroway", "taxiway apron helipad", "concrete", PATH),
    ("aeroway", "aerodrome", "lawn", ZONE),
    ("railway", "platform", "concrete", DECK),
    ("power", "generator", "solar", BUILDING),
    ("power", "plant substation", "lawn", ZONE),
    ("amenity", "parking parking_space bicycle_parking", "parking", GROUND),
    ("highway", "*", "plaza", PATH),
    ("golf", "bunker", "sand", VERGE),
    ("golf", "*", "fairway", GROUND),
    ("leisure", "pitch track", "court", VERGE),
    ("leisure", "golf_course", "golf", ZONE),
    ("leisure", "marina", "none", ZONE),
    ("leisure", "park garden nature_reserve common dog_park recreation_ground", "park", LAND),
    ("leisure", "playground", "sand", VERGE),
    ("leisure", "sports_centre stadium", "campus", LAND),
    ("landuse", "harbour", "none", ZONE),
    ("landuse", "cemetery", "cemetery", LAND),
    ("amenity", "grave_yard", "cemetery", LAND),
    ("amenity", "school university college hospital kindergarten", "campus", LAND),
    ("amenity", "marketplace", "plaza", GROUND),
    ("landuse", "residential", "garden", ZONE),
    ("landuse", "religious education institutional", "campus", ZONE),
    ("landuse", "industrial railway depot port commercial retail garages", "yard", ZONE),
    ("landuse", "farmyard", "yard", GROUND),
    ("landuse", "farmland farm greenhouse_horticulture plant_nursery", "field", LAND),
    ("landuse", "orchard", "orchard", LAND),
    ("landuse", "vineyard", "vineyard", LAND),
    ("landuse", "forest", "forest", LAND),
    ("natural", "wood", "forest", LAND),
    ("landuse", "meadow", "meadow", LAND),
    ("landuse", "grass village_green recreation_ground", "lawn", LAND),
    ("natural", "grassland fell", "meadow", LAND),
    ("natural", "scrub", "scrub", LAND),
    ("natural", "heath", "heath", LAND),
    ("natural", "wetland mud", "wetland", LAND),
    ("natural", "beach sand shingle", "sand", GROUND),
    ("natural", "bare_rock scree cliff", "rock", GROUND),
    ("landuse", "quarry landfill", "quarry", LAND),
    ("landuse", "brownfield construction greenfield", "bare", LAND),
    ("landuse", "allotments", "allotment", LAND),
    ("barrier", "hedge", "hedge", TOP),
)
# Lines: key, values, cover, layer, width in metres.
_LINES: tuple[tuple[str, str, str, int, float], ...] = (
    ("highway", "motorway", "asphalt", ROAD, 11.0),
    ("highway", "trunk", "asphalt", ROAD, 10.0),
    ("highway", "primary", "asphalt", ROAD, 9.0),
    ("highway", "secondary", "asphalt", ROAD, 8.0),
    ("highway", "tertiary tertiary_link", "asphalt", STREET, 7.0),
    ("highway", "motorway_link trunk_link primary_link secondary_link", "asphalt", ROAD, 6.5),
    ("highway", "residential unclassified living_street road", "asphalt", STREET, 5.8),
    ("highway", "service", "asphalt", STREET, 4.0),
    ("highway", "pedestrian", "plaza", STREET, 6.0),
    ("highway", "track byway", "track", PATH, 3.0),
    ("highway", "cycleway", "asphalt", PATH, 2.2),
    ("highway", "footway path bridleway steps corridor", "path", PATH, 1.7),
    ("railway", "rail light_rail narrow_gauge", "ballast", RAIL, 4.2),
    ("railway", "platform", "concrete", DECK, 4.0),
    ("aeroway", "runway", "runway", STREET, 38.0),
    ("aeroway", "taxiway", "concrete", PATH, 15.0),
    ("waterway", "river", "river", WATER, 12.0),
    ("waterway", "canal", "river", WATER, 10.0),
    ("waterway", "stream ditch drain", "river", WATER, 2.2),
    ("man_made", "pier breakwater groyne", "concrete", DECK, 4.0),
    ("barrier", "hedge", "hedge", TOP, 2.6),
    ("barrier", "wall city_wall", "wall", DECK, 0.7),
    ("natural", "tree_row", "hedge", TOP, 5.5),
)
_HEIGHT = {"hedge": 2.4, "forest": 12.0, "orchard": 1.5, "scrub": 1.2, "vineyard": 1.0,
    "wall": 1.5, "car": 1.4,
           "solar": 2.0, "hedge_row": 8.0}  # fmt: skip


@dataclass(frozen=True)
class Drawables:
    """N polygons in drawing order; later ones cover earlier ones.

    `cover` [N] index into `COVER_NAMES`; `height_m` [N]; `angle` [N] radians of rows and ridges;
    `spectra` [season, N, 12] reflectance.
    """

    geometry: NDArray[np.object_]
    cover: NDArray[np.int16]
    height_m: NDArray[np.float32]
    angle: NDArray[np.float32]
    spectra: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.geometry)


def drawables(features: Features, sea: shapely.Geometry | None = None) -> Drawables:
    """What is there of `features` as polygons to draw; `sea` (optional) is drawn as water.

    Lines are given their width. Tunnels and things underground are left out, as are tags that
    have no look of their own. Trees (points) are not polygons: see `ground.trees`.
    """
    looks = [_look(t, g) for t, g in zip(features.truth, features.geometry, strict=True)]
    rows = np.array([i for i, look in enumerate(looks) if look is not None], dtype=np.int64)
    cover, layer, height, half = (np.array(c) for c in zip(*[looks[i] for i in rows], strict=True))
    shape = features.geometry[rows].copy()
    wide = half > 0
    shape[wide] = shapely.buffer(shape[wide], half[wide], quad_segs=3)
    walk = _sidewalks(features, rows, cover, half)
    shape = np.concatenate([shape, walk, [] if sea is None else shapely.get_parts(sea)])
    extra = len(shape) - len(rows)
    names = ["sidewalk"] * len(walk) + ["sea"] * (extra - len(walk))
    layers = [VERGE] * len(walk) + [WATER] * (extra - len(walk))
    cover = np.r_[cover, np.array([COVER_ID[n] for n in names], dtype=np.int64)].astype(np.int16)
    layer, height = np.r_[layer, layers], np.r_[height, np.zeros(extra)]
    keep = (shapely.get_dimensions(shape) == 2) & ~shapely.is_empty(shape)
    shape, cover, layer, height = shape[keep], cover[keep], layer[keep], height[keep]
    order = _drawing_order(shape, layer)
    shape, cover, height = shape[order], cover[order], height[order]
    xy = shapely.get_coordinates(shapely.centroid(shape))
    return Drawables(
        shape, cover, height.astype(np.float32), _angles(shape), object_spectra(cover, xy)
    )


def _drawing_order(shape: NDArray[np.object_], layer: NDArray[np.int64]) -> NDArray[np.int64]:
    """By layer, large before small; ties by position, so that row order does not matter."""
    box = np.round(shapely.bounds(shape), 2)
    return np.lexsort((box[:, 1], box[:, 0], -np.round(shapely.area(shape), 2), layer))


def _sidewalks(
    features: Features, rows: NDArray[np.int64], cover: NDArray[np.int64], half: NDArray[np.float64]
) -> NDArray[np.object_]:
    built = {"residential", "living_street", "tertiary", "pedestrian"}
    street = np.array([features.truth[i].get("highway") in built for i in rows]) & (half > 0)
    return np.asarray(
        shapely.buffer(features.geometry[rows[street]], half[street] + 1.8, quad_segs=2),
        dtype=object,
    )


def _look(tags: Tags, geometry: shapely.Geometry) -> tuple[int, int, float, float] | None:
    """Cover, layer, height, half width (0 for areas) of one feature; None where nothing shows."""
    if not tags or geometry.geom_type == "Point" or tags.get("location") == "underground":
        return None
    if (
        tags.get("tunnel", "no") not in ("no", "building_passage")
        or _number(tags.get("layer"), 0) < -1
    ):
        return None
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return _area_look(tags, float(geometry.area))
    for key, values, cover, layer, width in _LINES:
        if tags.get(key) in values.split():
            if key == "highway" and "lanes" in tags and layer >= STREET:
                width = max(width, 3.3 * _number(tags["lanes"], 1))
            height = 8.0 if tags.get("natural") == "tree_row" else _HEIGHT.get(cover, 0.0)
            deck = 6.0 if tags.get("bridge", "no") != "no" else 0.0
            return COVER_ID[cover], layer, max(height, deck), width / 2
    return None


def _area_look(tags: Tags, area_m2: float) -> tuple[int, int, float, float] | None:
    if tags.get("man_made") in ("storage_tank", "silo"):
        return COVER_ID["roof_hall"], BUILDING, 12.0, 0.0
    value = tags.get("building", tags.get("building:part", "no"))
    if value != "no":
        cover, height = _roof(value, area_m2, tags)
        return COVER_ID[cover], BUILDING, height, 0.0
    for key, values, cover, layer in _AREAS:
        if key in tags and (values == "*" or tags[key] in values.split()):
            if cover == "court" and tags.get("surface", "grass") in ("grass", "artificial_turf"):
                cover = "turf"
            if cover == "lake" and tags.get("water") in ("river", "canal"):
                cover = "river"
            if cover == "lake" and tags.get("water") in ("bay", "harbour", "lagoon", "sea"):
                cover = "sea"
            return (
                None if cover == "none" else (COVER_ID[cover], layer, _HEIGHT.get(cover, 0.0), 0.0)
            )
    return None


def _roof(value: str, area_m2: float, tags: Tags) -> tuple[str, float]:
    levels = _number(tags.get("building:levels"), 0)
    height = _number(tags.get("height"), levels * 3.0 + 1.0 if levels else 0)
    if value == "greenhouse":
        return "greenhouse", height or 4.0
    if value in FARM:
        return "roof_farm", height or 6.0
    if value in HALLS:
        return "roof_hall", height or (3.0 if area_m2 < 60 else 8.0)
    if tags.get("roof:shape") == "flat":
        return "roof_flat", height or 9.0
    if value in PITCHED or area_m2 < 260:
        return "roof_pitched", (height or 6.5) + (1.5 if area_m2 > 40 else 0)
    return "roof_flat", height or (12.0 if area_m2 < 3000 else 9.0)


def _number(text: str | None, default: float) -> float:
    try:
        return float((text or "").split(";")[0].removesuffix("m"))
    except ValueError:
        return default  # mappers also write "12 ft", "?" and the like


def _angles(shape: NDArray[np.object_]) -> NDArray[np.float32]:
    """Direction of each shape's first long edge, radians: fields are worked along it."""
    ring = shapely.get_exterior_ring(shape)
    ring = np.where(
        shapely.is_missing(ring), shapely.get_exterior_ring(shapely.get_geometry(shape, 0)), ring
    )
    xy, which = shapely.get_coordinates(ring, return_index=True)
    same = which[1:] == which[:-1]
    edge, owner = (xy[1:] - xy[:-1])[same], which[:-1][same]
    order = np.lexsort((np.round(np.hypot(*edge.T), 1), owner))
    last = np.r_[np.flatnonzero(np.diff(owner[order])), len(order) - 1]
    angle = np.zeros(len(shape), dtype=np.float32)
    angle[owner[order][last]] = np.arctan2(edge[order][last, 1], edge[order][last, 0])
    return np.mod(angle, np.float32(np.pi))


def object_spectra(
    cover: NDArray[np.int16], xy: NDArray[np.float64], *, districts: bool = False
) -> NDArray[np.float32]:
    """Reflectance [season, N, 12] of objects at `xy` [N, 2]: variant and brightness by place.

    With `districts` neighbours are of one variant whatever their cover.
    """
    out = np.empty((len(SEASONS), len(cover), len(BANDS)), dtype=np.float32)
    pick, bright, tint = uniform(xy, 101), uniform(xy, 202), uniform(xy, 303)
    for c in np.unique(cover):
        rows = np.flatnonzero(cover == c)
        look = COVERS[COVER_NAMES[c]]
        weight, table = variants_of(COVER_NAMES[c])
        chance = pick[rows]
        if look.stands or districts:
            chance = 0.25 * chance + 0.375 * (1 + value_noise_at(xy[rows], 1500.0, 404))
        variant = np.searchsorted(weight, chance, side="right").clip(0, len(weight) - 1)
        gain = 1 + look.spread * (2 * bright[rows] - 1) * np.float32(1.7)
        lean = look.spread * (tint[rows] - 0.5) * 0.5
        slope = 1 + lean[:, None] * np.linspace(-1, 1, len(BANDS), dtype=np.float32)
        out[:, rows] = table[:, variant] * (gain[:, None] * slope)
    return out


def textures_of(cover: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Index into `TEXTURES` of each object's texture."""
    of_cover = np.array([TEXTURES.index(COVERS[n].texture) for n in COVER_NAMES], dtype=np.uint8)
    return of_cover[cover]
