"""Items of STAC catalogs: APIs searched page by page, static catalogs walked.

Both stream: an item is handed on before the next page is asked for. A list is whole or an error:
every document is fetched by `pipelines.remote.fetch`, which never takes a fault for an end.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import numpy as np
import shapely
from pystac import Link
from pystac_client import Client, ItemSearch
from pystac_client.stac_api_io import StacApiIO
from shapely.geometry.base import BaseGeometry

from pipelines.remote import Refused, fetch, is_remote, local_path, public
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.sources import SceneSource

_PAGE = 100
"""Items asked for at once: full Sentinel-2 items are 30 KB, and servers limit an answer's size."""
_THREADS = 8
"""Items of a static catalog fetched at a time."""

Json = dict[str, Any]


class Found(NamedTuple):
    """An item as its catalog has it."""

    item: Json
    base: str
    """Where its relative hrefs start."""
    collection: Json
    """Document of its collection; empty where there is none."""


def find_items(
    source: SceneSource,
    bounds_lonlat: Bounds,
    region: BaseGeometry | None,
    counts: Counter[str],
) -> Iterator[Found]:
    """Items of a STAC source near a region (degrees); more than was asked for may come.

    counts: takes `scene_list_short`, by how many items an API returned fewer than it stated.

    Raises GeoLinkError, OSError.
    """
    address = source.stac
    assert address is not None
    reads = _Reads()
    with reads.session:
        root = fetch(address, session=reads.session)
        if not isinstance(root, dict) or "stac_version" not in root or _kind(root) == "Item":
            raise GeoLinkError(
                f"{public(address)} is no STAC catalog; give the address of a STAC API or of a "
                "catalog.json"
            )
        if _link(root, "search"):
            # Landing pages leave out what pystac insists on and a search does not need.
            landing = {"id": "", "description": "", **root, "type": "Catalog"}
            api = Client.from_dict(landing, href=address)
            for area in search_areas(bounds_lonlat, region):
                yield from _search(api, reads, source, area, counts)
        else:
            yield from _walk(address, root, source, reads)


def matches(item: Mapping[str, Any], query: Mapping[str, Mapping[Any, object]]) -> bool:
    """Whether an item's properties meet every condition; one that it lacks is not met."""
    properties = item["properties"]
    return all(
        _compare(op, properties.get(name), _plain(value))
        for name, conditions in query.items()
        for op, value in conditions.items()
    )


def search_areas(bounds_lonlat: Bounds, region: BaseGeometry | None) -> list[Json]:
    """What to ask an API for: its box (two across the antimeridian), or cells over the region.

    Cells are asked for where the region fills less than half of its box: one polygon that covers
    it, of few enough corners for a request.
    """
    if region is not None and not region.is_empty:
        box = shapely.box(*region.bounds)
        if box.area and region.area < 0.5 * box.area:
            return [{"intersects": json.loads(shapely.to_geojson(_within_180(cover(region))))}]
    return [{"bbox": list(box)} for box in _plain_boxes(bounds_lonlat)]


def cover(region: BaseGeometry, corners: int = 400) -> BaseGeometry:
    """A union of square cells that covers a region, with at most about so many corners."""
    west, south, east, north = region.bounds
    cell = max(east - west, north - south, 1e-6) / 64
    shapely.prepare(region)
    while True:
        x = np.arange(math.floor(west / cell), math.ceil(east / cell) + 1)
        y = np.arange(math.floor(south / cell), math.ceil(north / cell) + 1)
        xs, ys = (a.ravel() * cell for a in np.meshgrid(x, y))
        cells = shapely.box(xs, np.maximum(ys, -90), xs + cell, np.minimum(ys + cell, 90))
        union = shapely.union_all(cells[shapely.intersects(region, cells)])
        if shapely.get_num_coordinates(union) <= corners or len(cells) <= 4:
            return union
        cell *= 2


def _within_180(geometry: BaseGeometry) -> BaseGeometry:
    """A geometry of longitudes from -540 to 540 in longitudes within ±180."""
    parts = []
    for turn in (-360.0, 0.0, 360.0):
        moved = shapely.transform(geometry, lambda xy, t=turn: xy + np.array([t, 0.0]))
        parts.append(shapely.intersection(moved, shapely.box(-180, -90, 180, 90)))
    areas = [p for p in shapely.get_parts(parts) if p.area]
    return shapely.union_all(areas)


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


class _Reads(StacApiIO):  # type: ignore[misc]
    """What pystac-client asks of an API, by the one rule for reads over a network.

    Requests of its own would be tried again at once, whatever Retry-After says, and without a
    limit to the whole of an answer.
    """

    def __init__(self) -> None:
        super().__init__(max_retries=None)

    def request(
        self, href: str, method: str | None = None, headers: Any = None, parameters: Any = None
    ) -> Any:
        """A document; parsed, as only that tells whether it is whole."""
        posted = (method or "GET").upper() == "POST"
        sent = {"method": "POST", "body": parameters} if posted else {"params": parameters}
        return fetch(href, headers=headers, session=self.session, **sent)

    def json_loads(self, txt: Any, *_: Any, **__: Any) -> Any:
        """What `request` gave."""
        return txt

    def get_pages(
        self, url: str, method: str | None = None, parameters: Json | None = None
    ) -> Iterator[Json]:
        """Pages of a search: all of them, or an error.

        pystac-client's own ends at an empty page or one that is none, and goes round in circles.
        """
        page = self.read_json(url, method=method, parameters=parameters)
        seen: set[str] = set()
        while True:
            if not isinstance(page, dict) or not isinstance(page.get("features"), list):
                raise GeoLinkError(f"{public(url)} answers a search with no list of items")
            yield page
            link = _link(page, "next")
            if link is None:
                return
            url, how = urljoin(url, str(link["href"])), str(link.get("method") or "GET").upper()
            link = {**link, "href": url, "method": how, "body": link.get("body") or {}}
            request = json.dumps(link)
            if request in seen:
                raise GeoLinkError(
                    f"{public(url)} pages in a circle: page {len(seen) + 1} of a search points to "
                    "one that was read; narrow the region or the time range"
                )
            seen.add(request)
            page = self.read_json(Link.from_dict(link), parameters=parameters)


def _search(
    api: Client, reads: _Reads, source: SceneSource, area: Json, counts: Counter[str]
) -> Iterator[Found]:
    """Items of one area."""
    links = [link for link in api.links if link.rel == "search"]
    posts = [k for k in links if str(k.extra_fields.get("method")).upper() == "POST"]
    # Over GET, conditions would be text of another grammar: they are then tested here only.
    search = ItemSearch(
        (posts or links)[0].absolute_href,
        method="POST" if posts else "GET",
        limit=_PAGE,
        collections=source.collections or None,
        datetime=interval(source) if source.start or source.end else None,
        **area,
        **(_conditions(api, source) if posts else {}),
    )
    collections: dict[str, Json] = {}
    received, stated = 0, 0
    for page in reads.get_pages(search.url, search.method, search.get_parameters()):
        context = page.get("context") or {}
        stated = int(page.get("numberMatched") or context.get("matched") or 0)
        received += len(page["features"])
        for item in page["features"]:
            name = str(item.get("collection") or "")
            if name not in collections:
                collections[name] = _collection(api, reads, name) if name else {}
            own = _link(item, "self") or {"href": api.self_href}
            yield Found(item, str(own["href"]), collections[name])
    if received < stated:
        counts["scene_list_short"] += stated - received


def _conditions(api: Client, source: SceneSource) -> Json:
    """The config's conditions in a language the server understands, if any."""
    query = {k: {op: _plain(v) for op, v in c.items()} for k, c in source.query.items()}
    if query and api.conforms_to("QUERY"):
        return {"query": query}
    cql2 = any(c.endswith("conf/cql2-json") for c in api.get_conforms_to())
    if query and cql2 and api.conforms_to("FILTER"):
        return {"filter": as_cql2(query)}
    return {}


def _collection(api: Client, reads: _Reads, name: str) -> Json:
    url = f"{str(api.self_href).rstrip('/')}/collections/{name}"
    try:
        collection = reads.read_json(url)
    except Refused as error:
        if error.status not in (404, 405, 410):
            raise
        # An API need not have collections; the dataset's own `licence` takes its place.
        collection = {}
    return collection if isinstance(collection, dict) else {}


def _walk(address: str, root: Json, source: SceneSource, reads: _Reads) -> Iterator[Found]:
    """Items of a static catalog in the order of its links, catalogs depth first."""
    get = partial(fetch, session=reads.session)
    pending, seen = [(address, root)], {address}
    with ThreadPoolExecutor(_THREADS if is_remote(address) else 1) as pool:
        while pending:
            where, catalog = pending.pop()
            is_collection = _kind(catalog) == "Collection"
            asked = not (is_collection and source.collections) or (
                catalog.get("id") in source.collections
            )
            hrefs = _hrefs(catalog, "item", where) if asked else []
            for start in range(0, len(hrefs), 8 * _THREADS):
                some = hrefs[start : start + 8 * _THREADS]
                for href, item in zip(some, pool.map(get, some), strict=True):
                    if not source.collections or item.get("collection") in source.collections:
                        yield Found(item, href, catalog if is_collection else {})
            children = [h for h in _hrefs(catalog, "child", where) if h not in seen]
            seen.update(children)
            pending += [(h, get(h)) for h in reversed(children)]


def _hrefs(catalog: Json, rel: str, base: str) -> list[str]:
    links = (str(link["href"]) for link in catalog.get("links", []) if link.get("rel") == rel)
    return [_absolute(href, base) for href in links]


def _absolute(href: str, base: str) -> str:
    if is_remote(base) or is_remote(href):
        return urljoin(base, href)
    return str((local_path(base).parent / Path(local_path(href))).resolve())


def _kind(document: Json) -> str:
    """Item, Collection or Catalog; the type has a field of its own since STAC 1.0."""
    if document.get("type") == "Feature":
        return "Item"
    return "Collection" if "extent" in document else "Catalog"


def _link(document: Json, rel: str) -> Json | None:
    return next((link for link in document.get("links", []) if link.get("rel") == rel), None)


def interval(source: SceneSource) -> str:
    """The time range asked for, as STAC writes it."""
    ends = [t.strftime("%Y-%m-%dT%H:%M:%SZ") if t else ".." for t in (source.start, source.end)]
    return "/".join(ends)


def as_cql2(query: Mapping[str, Mapping[Any, object]]) -> Json:
    """Conditions as CQL2-JSON (OGC 21-065r2)."""
    names = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "in"}
    tests = [
        {"op": names[op], "args": [{"property": name}, value]}
        for name, conditions in query.items()
        for op, value in conditions.items()
    ]
    return tests[0] if len(tests) == 1 else {"op": "and", "args": tests}


def _compare(op: str, found: object, wanted: object) -> bool:
    if found is None:
        return False
    if op == "in":
        return isinstance(wanted, list) and found in wanted
    if op in ("eq", "neq"):
        return (found == wanted) is (op == "eq")
    numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
    if not numbers and not (isinstance(found, str) and isinstance(wanted, str)):
        return False
    less: bool = found < wanted  # type: ignore[operator]
    equal = found == wanted
    return {"lt": less, "lte": less or equal, "gt": not (less or equal), "gte": not less}[op]


def _plain(value: object) -> object:
    """A value of a config as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.isoformat() if isinstance(value, date) else value
