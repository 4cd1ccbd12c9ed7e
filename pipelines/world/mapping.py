"""What OpenStreetMap knows of a place: incomplete, out of date, and typed by many hands."""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world import names
from pipelines.world.features import Features, Tags, concat, features, parts_of
from pipelines.world.noise import fractal_at

# How much likelier than average a thing is to be missing from the map.
MISSING: dict[str, float] = {
    "highway=motorway": 0.0, "highway=primary": 0.0, "highway=secondary": 0.05,
    "highway=tertiary": 0.05,
    "highway=residential": 0.2, "highway=track": 1.3, "highway=service": 1.2,
    "highway=footway": 1.4,
    "highway=path": 1.4, "natural=tree": 2.2, "barrier=hedge": 4.0, "natural=tree_row": 3.0,
    "natural=water": 0.1, "natural=coastline": 0.0, "waterway=river": 0.0,
    "waterway=riverbank": 0.0,
    "aeroway": 0.1, "railway": 0.1, "landuse=harbour": 0.0, "leisure=marina": 0.0, "place": 0.0,
    "building": 1.0, "landuse": 0.7, "leisure": 0.5, "amenity": 0.7, "natural": 0.8,
    "man_made": 0.3,
}  # fmt: skip
_MAIN_KEYS = (
    "aeroway", "railway", "highway", "waterway", "building", "landuse", "leisure", "natural",
    "amenity",
    "shop", "man_made", "barrier", "power", "place",
)  # fmt: skip
DEPRECATED = {
    ("landuse", "farmland"): ("landuse", "farm"),
    ("natural", "wood"): ("landuse", "wood"),
    ("power", "generator"): ("power_source", "photovoltaic"),
    ("highway", "track"): ("highway", "byway"),
}


def survey(
    rng: np.random.Generator, truth: Features, bounds: tuple[float, float, float, float]
) -> Features:
    """`truth` with the tags OSM has of each thing, and things that only OSM has."""
    mapped = [dict(t) for t in truth.truth]
    missing = _missing(rng, truth)
    for i in np.flatnonzero(missing):
        mapped[i] = {}
    known = Features(truth.geometry, truth.truth, mapped)
    _gone(rng, known)
    known = _joined_residential(rng, known, bounds)
    _retag(rng, known.mapped)
    _address(rng, known)
    return concat([known, _mistakes(rng, known)])


def _missing(rng: np.random.Generator, truth: Features) -> NDArray[np.bool_]:
    """Mapping is thorough in some places and thin in others."""
    factor = np.array([_factor(t) for t in truth.truth])
    xy = shapely.get_coordinates(shapely.centroid(truth.geometry))
    salt = int(rng.integers(2**31))
    chance = 0.19 + 0.32 * fractal_at(xy, (1700.0, 600.0), salt)
    return np.asarray(rng.random(len(truth)) < np.clip(chance, 0.05, 0.5) * factor)


def _factor(tags: Tags) -> float:
    for key in _MAIN_KEYS:
        if key in tags:
            return MISSING.get(f"{key}={tags[key]}", MISSING.get(key, 1.0))
    return 1.0


def _gone(rng: np.random.Generator, known: Features) -> None:
    """Buildings and trees that were mapped once and are there no more: no truth, in place."""
    can = np.array(
        [bool(m) and ("building" in m or m.get("natural") == "tree") for m in known.mapped]
    )
    rows = np.flatnonzero(can & (rng.random(len(can)) < 0.02))
    for i in rows:
        known.truth[i].clear()


def _joined_residential(
    rng: np.random.Generator, known: Features, bounds: tuple[float, float, float, float]
) -> Features:
    """Residential areas are mapped by neighbourhood, not block by block."""
    home = np.array([m.get("landuse") == "residential" for m in known.mapped])
    rows = np.flatnonzero(home)
    if not len(rows):
        return known
    xy = shapely.get_coordinates(shapely.centroid(known.geometry[rows]))
    cell = np.floor((xy - bounds[:2] + rng.uniform(-60, 60, xy.shape)) / 340).astype(np.int64)
    group = np.unique(cell, axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(group, kind="stable")
    blocks = shapely.multipolygons(known.geometry[rows][order], indices=group[order])
    joined = shapely.get_parts(shapely.union_all(blocks[:, None], axis=1))
    for i in rows:
        known.mapped[i] = {}
    new = features(joined, [{} for _ in joined], [{"landuse": "residential"} for _ in joined])
    return concat([known, new])


def _retag(rng: np.random.Generator, mapped: list[Tags]) -> None:
    """Simplified, outdated, annotated: what many hands do to tags, in place."""
    draw = rng.random((len(mapped), 6))
    crops = ["wheat", "maize", "rape", "barley;wheat", "Weizen", "vines"]
    for tags, d in zip(mapped, draw, strict=True):
        if not tags:
            continue
        if "building" in tags:
            if d[0] < 0.55:
                tags["building"] = "yes"
            if d[1] < 0.7:
                tags.pop("building:levels", None)
            if d[2] < 0.06:
                tags["roof:shape"] = "gabled" if d[2] < 0.04 else "flat"
        if d[3] < 0.035:
            tags["note" if d[3] < 0.008 else "fixme" if d[3] < 0.014 else "description"] = (
                names.NOTES[int(d[5] * len(names.NOTES))]
            )
        if d[4] < 0.22:
            tags["source"] = names.SOURCES[int(d[5] * len(names.SOURCES))]
        if tags.get("landuse") == "farmland" and d[0] < 0.15:
            tags["crop"] = crops[int(d[5] * len(crops))]
        if "name" in tags and d[1] < 0.04:
            tags |= {
                "name:fr": tags["name"],
                "name:eu": tags["name"] + " (eu)",
                "name:ar": "شارع الميناء",
            }
        if "name" in tags and d[2] > 0.93:
            del tags["name"]
        for (key, value), (old_key, old_value) in DEPRECATED.items():
            if tags.get(key) == value and d[5] < 0.012:
                del tags[key]
                tags[old_key] = old_value


def _address(rng: np.random.Generator, known: Features) -> None:
    """Addresses from the nearest named street, on some buildings, in place."""
    street = np.array(["highway" in m and "name" in m for m in known.mapped])
    street &= shapely.get_dimensions(known.geometry) == 1
    house = np.array(["building" in m for m in known.mapped]) & (rng.random(len(known)) < 0.4)
    if not street.any() or not house.any():
        return
    lines = known.geometry[street]
    word = [m["name"] for m, s in zip(known.mapped, street, strict=True) if s]
    rows = np.flatnonzero(house)
    middle = shapely.centroid(known.geometry[rows])
    near = shapely.STRtree(lines).nearest(middle)
    number = (shapely.line_locate_point(lines[near], middle) / 7).astype(int) + 1
    suffix = rng.choice(["", "", "", "", "", " bis", "A", ";2"], len(rows))
    for i, n, s, end in zip(rows, near, number, suffix, strict=True):
        known.mapped[i] |= {"addr:housenumber": f"{s}{end}", "addr:street": word[n]}
        if s % 9 == 0:
            known.mapped[i]["addr:postcode"] = "29 990"


def _mistakes(rng: np.random.Generator, known: Features) -> Features:
    """Bow ties, slivers and duplicates: only in OSM, never on the ground."""
    area = np.array([bool(m) and ("landuse" in m or "building" in m) for m in known.mapped]) & (
        shapely.get_type_id(known.geometry) == 3
    )
    rows = np.flatnonzero(area & (shapely.get_num_interior_rings(known.geometry) == 0))
    n = max(3, len(rows) // 500)
    twice, bow, thin = rng.choice(rows, (3, min(n, len(rows) // 3)), replace=False)
    copies = [known.mapped[i] | {"source": "import 2009"} for i in twice]
    rings = [shapely.get_coordinates(known.geometry[i]) for i in bow]
    crossed = []
    for xy in rings:
        xy[[1, 2]] = xy[[2, 1]]
        crossed.append(shapely.Polygon(xy))
    edges = [shapely.get_coordinates(known.geometry[i])[:2] for i in thin]
    slivers = [shapely.Polygon(np.round([a, b, (a + b) / 2 + 0.12], 2)) for a, b in edges]
    nothing: list[Tags] = [{} for _ in range(3 * len(twice))]
    tags = [
        *copies,
        *({"building": "yes", "fixme": "crossing"} for _ in bow),
        *({"landuse": "grass"} for _ in thin),
    ]
    parts, where = parts_of(np.array([*known.geometry[twice], *crossed, *slivers], dtype=object), 2)
    return features(parts, [nothing[i] for i in where], [tags[i] for i in where])
