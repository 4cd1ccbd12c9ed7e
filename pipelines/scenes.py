"""Finding scenes in STAC APIs, static catalogs and folders."""

import glob
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pystac
from pystac.stac_io import DefaultStacIO
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO

from pipelines.footprints import boxes_meet, item_bounds
from pipelines.items import Scene, scene_of_item, scene_of_raster
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.sensor import Sensor
from schemas.sources import SceneSource

_TIMEOUT_S = 60.0


def find_scenes(
    source: SceneSource, bounds_lonlat: Bounds, sensor: Sensor
) -> tuple[list[Scene], dict[str, int]]:
    """Scenes of a source that meet a box of degrees (east > 180 crosses the antimeridian).

    Scenes that cannot be used are among them, each with its `problem`; the second value counts
    them by code. Ordered by time and id.

    Raises GeoLinkError: no scene, none that can be used, or a source that cannot be read.
    """
    if source.rasters is not None:
        where = ", ".join(source.rasters)
        scenes = _from_rasters(source.rasters, source, sensor)
    else:
        assert source.stac is not None
        where = source.stac
        scenes = _from_stac(source.stac, source, bounds_lonlat, sensor)
    unknown = [s for s in scenes if s.footprint.is_empty]
    scenes = unknown + [
        s
        for s in scenes
        if not s.footprint.is_empty and boxes_meet(s.footprint.bounds, bounds_lonlat)
    ]
    box = ", ".join(f"{v:g}" for v in bounds_lonlat)
    if not scenes:
        raise GeoLinkError(
            f"no scene found in {where} for the region ({box}){_asked(source)}; check the "
            "collections, the time range and the region"
        )
    skipped = Counter(s.problem.code for s in scenes if s.problem)
    if skipped.total() == len(scenes):
        first = next(s for s in scenes if s.problem)
        counts = ", ".join(f"{k} {n}" for k, n in sorted(skipped.items()))
        reason = first.problem.text if first.problem else ""
        raise GeoLinkError(
            f"none of {len(scenes)} scenes in {where} can be used ({counts}); "
            f"for instance {first.id}: {reason}"
        )
    order = sorted(scenes, key=lambda s: (s.seconds, s.id, s.digest))
    return order, dict(sorted(skipped.items()))


def _asked(source: SceneSource) -> str:
    asked = [f"collections {', '.join(source.collections)}"] if source.collections else []
    if source.start or source.end:
        asked.append(f"time {_interval(source)}")
    return f" with {' and '.join(asked)}" if asked else ""


def _interval(source: SceneSource) -> str:
    ends = [t.strftime("%Y-%m-%dT%H:%M:%SZ") if t else ".." for t in (source.start, source.end)]
    return "/".join(ends)


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
    address: str, source: SceneSource, bounds_lonlat: Bounds, sensor: Sensor
) -> list[Scene]:
    scenes: dict[tuple[str, str], Scene] = {}
    try:
        for item, base, licence in _items(address, source, bounds_lonlat):
            if "properties" not in item or "assets" not in item:
                raise GeoLinkError(f"{address}: item {item.get('id')!r} is no STAC item")
            key = (str(item.get("collection") or ""), str(item["id"]))
            if key not in scenes:
                scenes[key] = scene_of_item(item, sensor, source, base, licence)
    except APIError as error:
        raise GeoLinkError(f"cannot read the STAC catalog {address}: {error}") from error
    except pystac.STACError as error:
        raise GeoLinkError(f"{address} is not a valid STAC catalog: {error}") from error
    except OSError as error:
        raise GeoLinkError(f"cannot read the STAC catalog {address}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GeoLinkError(f"{address} is not a valid STAC catalog: {error!r}") from error
    return list(scenes.values())


def _items(
    address: str, source: SceneSource, bounds_lonlat: Bounds
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(item as JSON, where its relative hrefs start, licence of its collection)."""
    io = StacApiIO(timeout=_TIMEOUT_S)
    root = json.loads(io.read_text(address))
    kind = root.get("type") if isinstance(root, dict) else None
    if not isinstance(root, dict) or "stac_version" not in root or kind == "Feature":
        raise GeoLinkError(
            f"{address} is no STAC catalog; give the address of a STAC API or of a catalog.json"
        )
    if any(link.get("rel") == "search" for link in root.get("links", [])):
        yield from _search(Client.open(address, stac_io=io), source, bounds_lonlat)
    else:
        yield from _walk(address, io, source, bounds_lonlat)


def _search(
    client: Client, source: SceneSource, bounds_lonlat: Bounds
) -> Iterator[tuple[dict[str, Any], str, str]]:
    licences: dict[str, str] = {}
    interval = _interval(source) if source.start or source.end else None
    for box in _plain_boxes(bounds_lonlat):
        search = client.search(
            collections=list(source.collections) or None, bbox=box, datetime=interval, limit=100
        )
        for item in search.items_as_dicts():
            collection = str(item.get("collection") or "")
            if collection and collection not in licences:
                licences[collection] = _licence(client, collection)
            own = next((k["href"] for k in item.get("links", []) if k.get("rel") == "self"), "")
            yield item, own, licences.get(collection, "")


def _licence(client: Client, collection: str) -> str:
    try:
        return str(client.get_collection(collection).license or "")
    except (APIError, pystac.STACError, ValueError):
        # The licence is a courtesy here; the dataset's own `licence` takes its place.
        return ""


def _plain_boxes(bounds_lonlat: Bounds) -> list[Bounds]:
    """The box in longitudes within ±180: two boxes where it crosses the antimeridian."""
    west, south, east, north = bounds_lonlat
    if east - west >= 360:
        return [(-180.0, south, 180.0, north)]
    turn = np.floor((west + 180.0) / 360.0) * 360.0
    west, east = float(west - turn), float(east - turn)
    if east <= 180.0:
        return [(west, south, east, north)]
    return [(west, south, 180.0, north), (-180.0, south, east - 360.0, north)]


class _CatalogIO(DefaultStacIO):
    """Reads static catalogs as APIs are read: with a time limit, tries and `APIError`."""

    def __init__(self, api: StacApiIO) -> None:
        super().__init__()
        self._api = api

    def read_text(self, source: pystac.link.HREF, *args: Any, **kwargs: Any) -> str:
        """Text of a path or URL."""
        href = source.absolute_href if isinstance(source, pystac.Link) else str(source)
        text: str = self._api.read_text(href)
        return text


def _walk(
    address: str, io: StacApiIO, source: SceneSource, bounds_lonlat: Bounds
) -> Iterator[tuple[dict[str, Any], str, str]]:
    root = pystac.read_file(address, stac_io=_CatalogIO(io))
    if not isinstance(root, pystac.Catalog):
        raise GeoLinkError(f"{address} is a STAC {type(root).__name__}, not a catalog")
    for item in root.get_items(recursive=True):
        parent = item.get_collection()
        licence = str(getattr(parent, "license", "") or "")
        data = item.to_dict(include_self_link=False, transform_hrefs=False)
        if source.collections and str(item.collection_id) not in source.collections:
            continue
        bounds = item_bounds(data)
        if bounds is None or boxes_meet(bounds, bounds_lonlat):
            yield data, str(item.get_self_href()), licence
