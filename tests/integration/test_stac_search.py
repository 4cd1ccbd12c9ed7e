"""Searches as real STAC APIs understand them: conditions in both languages, boxes and outlines."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from pipelines import stac
from pipelines.stac import find_items, matches
from schemas.sources import SceneSource
from tests.servers.files import Server, serve
from tests.servers.stac_api import serve_api

EVERYWHERE = (-179.0, -80.0, 179.0, 80.0)


def _item(n: int, lon: float, lat: float) -> dict[str, Any]:
    outline = shapely.box(lon, lat, lon + 0.5, lat + 0.5)
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": f"scene-{n:02}", "collection": "scenes",
        "geometry": json.loads(shapely.to_geojson(outline)), "bbox": list(outline.bounds),
        "properties": {
            "datetime": f"{datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=11 * n):%FT%TZ}",
            "eo:cloud_cover": 4.5 * n, "platform": f"sentinel-2{'abc'[n % 3]}",
            "s2:processing_baseline": ["04.00", "05.10"][n % 2],
        },
        "links": [], "assets": {"red": {"href": f"https://example.org/{n}.tif"}},
    }  # fmt: skip


ITEMS = [_item(n, -100.0 + 9.3 * n, -50.0 + 5.1 * n) for n in range(21)]
COLLECTION = {
    "type": "Collection", "stac_version": "1.0.0", "id": "scenes", "description": "made-up",
    "license": "CC-BY-4.0", "links": [],
    "extent": {"spatial": {"bbox": [list(EVERYWHERE)]}, "temporal": {"interval": [[None, None]]}},
}  # fmt: skip


@pytest.fixture(scope="module", params=["query", "filter"])
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Server]]:
    """An API that takes conditions in one language, behind a server that sees every request."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    served = serve_api(folder / "api", [COLLECTION], {"scenes": ITEMS}, request.param)
    with served as upstream, serve(folder) as server:
        server.upstream = upstream
        yield request.param, server


def _found(
    server: Server, source: SceneSource, region: shapely.Geometry | None = None
) -> list[str]:
    server.requests.clear()
    bounds = EVERYWHERE if region is None else region.bounds
    return sorted(f.item["id"] for f in find_items(source, bounds, region, Counter()))


@pytest.mark.parametrize(
    "query",
    [
        {"eo:cloud_cover": {"lt": 31.5}},
        {"eo:cloud_cover": {"lte": 31.5, "gt": 9}},
        {"eo:cloud_cover": {"gte": 81.0}, "platform": {"neq": "sentinel-2a"}},
        {"platform": {"eq": "sentinel-2b"}},
        {"platform": {"in": ["sentinel-2a", "sentinel-2c"]}, "eo:cloud_cover": {"lt": 50}},
        {"s2:processing_baseline": {"gte": "05.00"}},
        {"eo:cloud_cover": {"lt": 0}},
    ],
)
def test_the_api_itself_leaves_out_what_does_not_meet_the_conditions(
    api: tuple[str, Server], query: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    language, server = api
    monkeypatch.setattr(stac, "_PAGE", 3)
    source = SceneSource(stac=server.address, collections=("scenes",), query=query)
    expected = [i["id"] for i in ITEMS if matches(i, query)]
    # `find_items` tests nothing itself: every page brought only what was asked for.
    assert _found(server, source) == expected
    asked = [json.loads(r.body) for r in server.of("/search") if r.method == "POST"]
    assert len(asked) >= len(expected) / 3
    for body in asked:
        assert language in body
        assert ({"query", "filter"} - {language}).isdisjoint(body)
    if language == "query":
        assert all(body["query"] == query for body in asked)


def test_a_scattered_region_is_asked_for_by_its_outline(
    api: tuple[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    language, server = api
    monkeypatch.setattr(stac, "_PAGE", 2)
    rng = np.random.default_rng(3)
    some = [shapely.Point(shapely.geometry.shape(ITEMS[n]["geometry"]).centroid) for n in
            (1, 4, 5, 11, 17)]  # fmt: skip
    sea = shapely.points(rng.uniform((-150, -60), (150, -55), (6, 2)))
    region = shapely.union_all(shapely.buffer([*some, *sea], 0.02))
    query = {"eo:cloud_cover": {"lt": 60.0}}
    source = SceneSource(
        stac=server.address, query=query, start=datetime(2024, 1, 20), end=datetime(2024, 12, 31)
    )
    ids = _found(server, source, region)
    (area,) = {json.dumps(json.loads(r.body)["intersects"]) for r in server.of("/search")}
    outline = shapely.from_geojson(area)
    expected = [
        i["id"] for i in ITEMS
        if shapely.intersects(shapely.geometry.shape(i["geometry"]), outline) and matches(i, query)
        and "2024-01-20" <= i["properties"]["datetime"] <= "2024-12-31T00:00:00Z"
    ]  # fmt: skip
    assert ids == expected
    assert {"scene-04", "scene-05", "scene-11"} <= set(ids)
    assert len(ids) < 10
    body = json.loads(server.of("/search")[0].body)
    assert "bbox" not in body
    assert language in body
