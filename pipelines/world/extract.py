"""A real OSM extract as features to draw: what is mapped is taken to be there."""

import logging
from pathlib import Path

import numpy as np
import osmium
import shapely
from pyproj import Transformer
from shapely import ops

from pipelines.world.features import Features, Tags
from schemas.errors import GeoLinkError

MIN_SIZE_M, MAX_SIZE_M = 1200.0, 45_000.0
_log = logging.getLogger(__name__)
_AREA_KEYS = {"building", "building:part", "landuse", "natural", "leisure", "amenity", "aeroway",
    "man_made", "power",
              "water", "place", "shop", "tourism", "historic", "boundary"}  # fmt: skip
_LINEAR = {"highway", "railway", "barrier", "waterway"}


def read_extract(path: Path) -> tuple[Features, int, tuple[float, float, float, float]]:
    """Features of a PBF in the UTM zone of its middle; the zone's EPSG code; bounds in metres.

    The bounds are those of the tagged objects, without the outermost half per cent that long
    ways and relations reach beyond the extract, widened to multiples of 60 m.
    Raises GeoLinkError where the file is missing, not a PBF, holds no objects or reaches over
    more than 45 km.
    """
    if not path.is_file():
        raise GeoLinkError(f"{path}: no such file; give an OSM extract (.osm.pbf)")
    try:
        lonlat, tags = _read(path)
    except RuntimeError as error:
        raise GeoLinkError(f"{path}: not a readable OSM PBF ({error})") from error
    if not len(lonlat):
        raise GeoLinkError(f"{path}: holds no tagged objects; give an extract of a place")
    centre = np.median(shapely.get_coordinates(shapely.point_on_surface(lonlat)), axis=0)
    epsg = (32600 if centre[1] >= 0 else 32700) + int((centre[0] + 180) // 6) % 60 + 1
    to_utm = Transformer.from_crs(4326, epsg, always_xy=True)
    geometry = shapely.transform(lonlat, lambda x, y: to_utm.transform(x, y), interleaved=False)
    middle = shapely.get_coordinates(shapely.centroid(geometry))
    low, high = np.quantile(middle, [0.005, 0.995], axis=0)
    if (high - low).max() > MAX_SIZE_M:
        raise GeoLinkError(
            f"{path}: reaches over {(high - low).max() / 1000:.0f} km, more than the "
            f"{MAX_SIZE_M / 1000:.0f} km that are rendered; cut a smaller extract out of it"
        )
    room = np.maximum(0, MIN_SIZE_M - (high - low)) / 2
    x0, y0 = np.floor((low - room) / 60) * 60
    x1, y1 = np.ceil((high + room) / 60) * 60
    return Features(geometry, tags, tags), epsg, (float(x0), float(y0), float(x1), float(y1))


def _read(path: Path) -> tuple[np.ndarray[tuple[int], np.dtype[np.object_]], list[Tags]]:
    geometry: list[shapely.Geometry] = []
    tags: list[Tags] = []
    factory = osmium.geom.WKBFactory()
    reader = (
        osmium.FileProcessor(str(path)).with_areas().with_filter(osmium.filter.EmptyTagFilter())
    )
    lost = 0
    for thing in reader:
        known = {t.k: t.v for t in thing.tags}
        area = bool(_AREA_KEYS & known.keys()) and known.get("area") != "no"
        area |= known.get("area") == "yes" or (
            "waterway" in known and known["waterway"] == "riverbank"
        )
        linear = bool(_LINEAR & known.keys()) and known.get("area") != "yes" and not area
        try:
            if thing.is_node():
                wkb = factory.create_point(thing)
            elif thing.is_way() and (not thing.is_closed() or linear):
                wkb = factory.create_linestring(thing)
            elif thing.is_area() and not linear:
                wkb = factory.create_multipolygon(thing)
            else:
                continue
        except (RuntimeError, osmium.InvalidLocationError):
            lost += 1  # cut to nothing by the extract's border, or rings that do not close
            continue
        geometry.append(wkb)
        tags.append(known)
    if lost:
        _log.info("%s: %d objects have no geometry and are not drawn", path.name, lost)
    return np.atleast_1d(
        shapely.from_wkb(np.array(geometry, dtype=object), on_invalid="ignore")
    ), tags


def sea_of(
    features: Features, bounds: tuple[float, float, float, float]
) -> shapely.Geometry | None:
    """The sea within bounds, from coastlines: water lies on their right. None without coastline."""
    is_coast = np.array([t.get("natural") == "coastline" for t in features.truth], dtype=bool)
    coast = features.geometry[is_coast]
    coast = coast[shapely.get_type_id(coast) == 1]
    box = shapely.box(*bounds)
    coast = coast[shapely.intersects(coast, box)]
    if not len(coast):
        return None
    merged = ops.linemerge(list(coast)) if len(coast) > 1 else coast[0]
    inside = shapely.intersection(merged, box)
    faces = shapely.get_parts(
        shapely.polygonize([*shapely.get_parts(shapely.union_all([inside, box.boundary]))])
    )
    lines = shapely.get_parts(inside)
    lines = lines[shapely.get_type_id(lines) == 1]
    middle = shapely.get_coordinates(shapely.line_interpolate_point(lines, 0.5, normalized=True))
    ahead = shapely.get_coordinates(shapely.line_interpolate_point(lines, 0.5001, normalized=True))
    along = (ahead - middle) / np.maximum(np.hypot(*(ahead - middle).T), 1e-9)[:, None]
    right = shapely.points(middle + np.c_[along[:, 1], -along[:, 0]] * 0.5)
    _, face = shapely.STRtree(faces).query(right, predicate="within")
    return shapely.union_all(faces[np.unique(face)]) if len(face) else None
