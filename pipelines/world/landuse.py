"""What each face of the network is: kinds of block in settlements, fields and woods outside."""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.layout import Layout
from pipelines.world.noise import fractal_at

# Kinds of block in each kind of quarter, and their shares.
BLOCKS: dict[str, dict[str, float]] = {
    "centre": {"courtyard": 0.42, "rows": 0.22, "commercial": 0.1, "retail": 0.08, "square": 0.02,
               "park": 0.05, "parking": 0.04, "church": 0.05},
    "mixed": {"rows": 0.3, "courtyard": 0.2, "apartments": 0.16, "commercial": 0.09, "park": 0.08,
              "school": 0.05, "parking": 0.04, "retail": 0.04, "church": 0.02, "houses": 0.02},
    "apartments": {"apartments": 0.62, "park": 0.1, "parking": 0.07, "school": 0.06, "houses": 0.1,
                   "pitch": 0.05},
    "houses": {"houses": 0.82, "park": 0.05, "school": 0.02, "allotments": 0.04, "pitch": 0.03,
               "apartments": 0.02, "parking": 0.02},
    "terraces": {"terraces": 0.82, "park": 0.06, "school": 0.04, "parking": 0.04, "pitch": 0.04},
    "industrial": {"industrial": 0.7, "parking": 0.08, "brownfield": 0.06, "grass": 0.07,
                   "depot": 0.05, "construction": 0.04},
    "retail": {"retail": 0.52, "parking": 0.22, "commercial": 0.14, "grass": 0.12},
    "commercial": {"commercial": 0.62, "parking": 0.12, "park": 0.12, "apartments": 0.14},
    "campus": {"school": 0.2, "university": 0.2, "hospital": 0.12, "pitch": 0.12, "park": 0.16,
               "parking": 0.08, "cemetery": 0.07, "grass": 0.05},
    "village": {"village": 0.66, "farmyard": 0.1, "church": 0.04, "meadow": 0.07, "park": 0.03,
                "allotments": 0.03, "orchard": 0.05, "cemetery": 0.02},
}  # fmt: skip

LANDUSE_TAGS: dict[str, dict[str, str]] = {
    "courtyard": {"landuse": "residential"},
    "rows": {"landuse": "residential"},
    "apartments": {"landuse": "residential", "residential": "urban"},
    "houses": {"landuse": "residential"},
    "terraces": {"landuse": "residential"},
    "village": {"landuse": "residential", "residential": "rural"},
    "commercial": {"landuse": "commercial"},
    "retail": {"landuse": "retail"},
    "industrial": {"landuse": "industrial"},
    "depot": {"landuse": "depot"},
    "brownfield": {"landuse": "brownfield"},
    "construction": {"landuse": "construction"},
    "square": {
        "highway": "pedestrian",
        "area": "yes",
        "surface": "paving_stones",
        "place": "square",
    },
    "park": {"leisure": "park"},
    "parking": {"amenity": "parking", "parking": "surface", "surface": "asphalt"},
    "church": {"landuse": "religious"},
    "school": {"amenity": "school"},
    "university": {"amenity": "university"},
    "hospital": {"amenity": "hospital"},
    "pitch": {"leisure": "pitch"},
    "cemetery": {"landuse": "cemetery"},
    "allotments": {"landuse": "allotments"},
    "grass": {"landuse": "grass"},
    "farmyard": {"landuse": "farmyard"},
    "meadow": {"landuse": "meadow"},
    "orchard": {"landuse": "orchard"},
    "vineyard": {"landuse": "vineyard", "crop": "grape"},
    "farmland": {"landuse": "farmland"},
    "forest": {"landuse": "forest"},
    "wood": {"natural": "wood", "leaf_type": "broadleaved"},
    "scrub": {"natural": "scrub"},
    "heath": {"natural": "heath"},
    "wetland": {"natural": "wetland", "wetland": "marsh"},
    "bare_rock": {"natural": "bare_rock"},
    "grassland": {"natural": "grassland"},
}


def classify_faces(
    rng: np.random.Generator, layout: Layout, faces: NDArray[np.object_]
) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Kind of each face ("" for a planned site), and its quarter (-1 outside settlements)."""
    inside = shapely.point_on_surface(faces)
    kind = _country_kinds(rng, layout, inside, shapely.area(faces))
    quarter = np.full(len(faces), -1)
    tree = shapely.STRtree([q.polygon for q in layout.quarters])
    face, q = tree.query(inside, predicate="intersects")
    quarter[face] = q
    for i, each in enumerate(layout.quarters):
        rows = np.flatnonzero(quarter == i)
        names, share = zip(*BLOCKS[each.kind].items(), strict=True)
        kind[rows] = rng.choice(names, len(rows), p=np.array(share) / sum(share))
    small = (quarter >= 0) & (shapely.area(faces) < 900)
    kind[small] = rng.choice(["grass", "parking", "park"], int(small.sum()), p=[0.5, 0.3, 0.2])
    sites = shapely.union_all(list(layout.sites.values()))
    shapely.prepare(sites)
    kind[shapely.contains_properly(sites, inside)] = ""
    return kind, quarter


def _country_kinds(
    rng: np.random.Generator, layout: Layout, inside: NDArray[np.object_], area: NDArray[np.float64]
) -> NDArray[np.str_]:
    """Woods on the hills, vines on slopes, meadows and marsh by the water, else fields."""
    xy = shapely.get_coordinates(inside)
    x0, y0, x1, y1 = layout.bounds
    uv = (xy - [x0, y0]) / [x1 - x0, y1 - y0] * 2 - 1
    salt = int(rng.integers(2**31))
    hill = fractal_at(uv, (0.5, 0.2, 0.08), salt) + 0.3 * (uv[:, 0] + uv[:, 1]) - 0.05
    slope = fractal_at(uv, (0.45, 0.2), salt + 1) - 0.25 * uv[:, 1]
    pasture = fractal_at(uv, (0.4, 0.15), salt + 2)
    chance = rng.random(len(uv))
    near_lake = _distance(inside, layout.lakes) < 240 * layout.scale**0.5
    near_river = _distance(inside, [layout.river, *layout.streams]) < 190 * layout.scale**0.5
    near_coast = _distance(inside, [layout.coast]) < 380 * layout.scale**0.7
    pick = [
        (area < 2500, "grassland"),
        (near_lake & (chance < 0.45), "wetland"),
        (near_river & (uv[:, 0] < -0.25) & (chance < 0.5), "wetland"),
        ((hill > 0.66) & (chance < 0.16), "bare_rock"),
        ((hill > 0.5) & (chance < 0.35), "heath"),
        (near_coast & (chance < 0.14), "wetland"),
        (near_coast & (chance < 0.4), "scrub"),
        (near_coast & (chance < 0.55), "heath"),
        (hill > 0.27, "forest"),
        ((hill > 0.15) & (chance < 0.35), "wood"),
        (near_river & (chance < 0.75), "meadow"),
        (pasture < -0.36, "wood"),
        ((slope > 0.3) & (chance < 0.7), "vineyard"),
        ((slope > 0.2) & (chance < 0.28), "orchard"),
        ((pasture > 0.15) & (chance < 0.6), "meadow"),
        (chance < 0.03, "scrub"),
        (chance < 0.06, "wood"),
        (chance < 0.1, "orchard"),
        (chance < 0.12, "vineyard"),
    ]
    return np.select([p for p, _ in pick], [k for _, k in pick], "farmland").astype("<U12")


def _distance(points: NDArray[np.object_], targets: list[shapely.Geometry]) -> NDArray[np.float64]:
    whole = shapely.union_all(targets)
    shapely.prepare(whole)
    return np.asarray(shapely.distance(points, whole))
