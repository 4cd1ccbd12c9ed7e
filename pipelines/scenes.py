"""Finding scenes in STAC APIs, static catalogs and folders."""

import glob
from collections import Counter
from pathlib import Path

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from pipelines.footprints import boxes_meet, item_bounds
from pipelines.items import Scene, scene_of_item, scene_of_raster
from pipelines.remote import public
from pipelines.select import mark_duplicates
from pipelines.stac import cover, find_items, interval, matches
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.sensor import Sensor
from schemas.sources import SceneSource


def find_scenes(
    source: SceneSource,
    bounds_lonlat: Bounds,
    sensor: Sensor,
    region: BaseGeometry | None = None,
) -> tuple[list[Scene], dict[str, int]]:
    """Scenes of a source that meet a box of degrees (east > 180 crosses the antimeridian).

    region: degrees, within those bounds; where it fills little of them (scattered sites), only
    scenes that meet it are looked for. Scenes that cannot be used are among the found ones, each
    with its `problem`; the second value counts them by code. Ordered by time and id.

    Raises GeoLinkError: no scene, none that can be used, or a source that cannot be read.
    """
    counts: Counter[str] = Counter()
    if source.rasters is not None:
        where = ", ".join(source.rasters)
        scenes = _from_rasters(source.rasters, source, sensor)
    else:
        assert source.stac is not None
        where = source.stac
        scenes = _from_stac(source, bounds_lonlat, region, sensor, counts)
    scenes = mark_duplicates(_meeting(scenes, bounds_lonlat, region))
    box = ", ".join(f"{v:g}" for v in bounds_lonlat)
    if not scenes:
        raise GeoLinkError(
            f"no scene found in {where} for the region ({box}){_asked(source)}; check the "
            "collections, the time range and the region"
        )
    skipped = Counter(s.problem.code for s in scenes if s.problem)
    if skipped.total() == len(scenes):
        first = next(s for s in scenes if s.problem)
        shown = ", ".join(f"{k} {n}" for k, n in sorted(skipped.items()))
        reason = first.problem.text if first.problem else ""
        raise GeoLinkError(
            f"none of {len(scenes)} scenes in {where} can be used ({shown}); "
            f"for instance {first.id}: {reason}"
        )
    order = sorted(scenes, key=lambda s: (s.seconds, s.id, s.digest))
    return order, dict(sorted((skipped + counts).items()))


def _meeting(
    scenes: list[Scene], bounds_lonlat: Bounds, region: BaseGeometry | None
) -> list[Scene]:
    """Scenes that meet the bounds and the cells over the region; those of no known place too."""
    near = [
        s for s in scenes
        if s.footprint.is_empty or boxes_meet(s.footprint.bounds, bounds_lonlat)
    ]  # fmt: skip
    if region is None or region.is_empty or not near:
        return near
    cells = cover(region)
    turned = [
        shapely.transform(cells, lambda xy, t=t: xy + np.array([t, 0.0])) for t in (-360, 0, 360)
    ]
    everywhere = shapely.union_all(turned)
    shapely.prepare(everywhere)
    footprints = np.array([s.footprint for s in near])
    meets = shapely.is_empty(footprints) | shapely.intersects(everywhere, footprints)
    return [s for s, m in zip(near, meets, strict=True) if m]


def _asked(source: SceneSource) -> str:
    asked = [f"collections {', '.join(source.collections)}"] if source.collections else []
    if source.start or source.end:
        asked.append(f"time {interval(source)}")
    if source.query:
        asked.append(f"query {source.query}")
    return f" with {' and '.join(asked)}" if asked else ""


def _from_rasters(patterns: tuple[str, ...], source: SceneSource, sensor: Sensor) -> list[Scene]:
    paths: set[Path] = set()
    for pattern in patterns:
        found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        found = [p for p in found if p.is_file()]
        if not found:
            raise GeoLinkError(f"no raster matches {pattern}; check `rasters` in the config")
        paths.update(found)
    sidecars = {".prj", ".xml", ".ovr", ".jgw", ".pgw", ".tfw", ".wld", ".msk"}
    rasters = sorted(p for p in paths if p.suffix.lower() not in sidecars)
    stems = Counter(p.stem for p in rasters)
    # A file's name is its scene id; where two folders share a name, the folder goes before it.
    ids = [p.stem if stems[p.stem] == 1 else f"{p.parent.name}/{p.name}" for p in rasters]
    return [scene_of_raster(p, i, sensor, source) for p, i in zip(rasters, ids, strict=True)]


def _from_stac(
    source: SceneSource,
    bounds_lonlat: Bounds,
    region: BaseGeometry | None,
    sensor: Sensor,
    counts: Counter[str],
) -> list[Scene]:
    """Scenes of the items asked for; an item that comes twice is taken once."""
    address = public(source.stac)
    scenes: dict[tuple[str, str], Scene] = {}
    try:
        for item, base, collection in find_items(source, bounds_lonlat, region, counts):
            if "properties" not in item or "assets" not in item:
                raise GeoLinkError(f"{address}: item {item.get('id')!r} is no STAC item")
            key = (str(item.get("collection") or ""), str(item["id"]))
            bounds = item_bounds(item)
            if key in scenes or not matches(item, source.query):
                continue
            if bounds is None or boxes_meet(bounds, bounds_lonlat):
                scenes[key] = scene_of_item(item, sensor, source, base, collection)
    except OSError as error:
        raise GeoLinkError(f"cannot read the STAC catalog {address}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GeoLinkError(f"{address} is not a valid STAC catalog: {error!r}") from error
    return list(scenes.values())
