"""What is asked of STAC catalogs, and what is made of their answers."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import remote
from pipelines.stac import as_cql2, cover, find_items, matches, search_areas
from schemas.errors import GeoLinkError
from schemas.sources import SceneSource
from tests.servers.files import serve

WORLD = (-180.0, -85.0, 180.0, 85.0)


def test_a_region_that_fills_its_box_is_asked_for_by_the_box() -> None:
    box = (10.0, 47.0, 11.0, 48.0)
    assert search_areas(box, shapely.box(*box)) == [{"bbox": list(box)}]
    assert search_areas(box, None) == [{"bbox": list(box)}]


def test_a_box_across_the_antimeridian_is_asked_for_in_two() -> None:
    assert search_areas((178.0, -18.0, 182.0, -16.0), None) == [
        {"bbox": [178.0, -18.0, 180.0, -16.0]},
        {"bbox": [-180.0, -18.0, -178.0, -16.0]},
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-179.9, 189.9), st.floats(-79, 79)),
        min_size=2,
        max_size=60,
        unique=True,
    )
)
def test_scattered_sites_are_covered_by_few_cells(places: list[tuple[float, float]]) -> None:
    sites = shapely.union_all(shapely.buffer(shapely.points(places), 0.01))
    (area,) = search_areas(sites.bounds, sites)
    if "intersects" not in area:
        return
    asked = shapely.geometry.shape(area["intersects"])
    assert shapely.get_num_coordinates(asked) <= 500
    west, _, east, _ = asked.bounds
    assert -180 <= west < east <= 180
    turned = shapely.transform(
        shapely.get_parts(sites), lambda xy: np.stack([(xy[:, 0] + 180) % 360 - 180, xy[:, 1]], 1)
    )
    # A site across the antimeridian is torn by this, and left to the next test.
    whole = turned[shapely.area(turned) < 0.001]
    assert shapely.covers(shapely.buffer(asked, 1e-9), whole).all()


def test_cells_cover_a_region_across_the_antimeridian() -> None:
    region = shapely.union(shapely.box(179, 0, 181, 1), shapely.box(170, 30, 171, 31))
    assert shapely.covers(cover(region), region)
    (area,) = search_areas(region.bounds, region)
    asked = shapely.geometry.shape(area["intersects"])
    for lonlat, inside in [((179.5, 0.5), True), ((-179.5, 0.5), True), ((-170.5, 30.5), False)]:
        assert asked.intersects(shapely.Point(lonlat)) is inside


@pytest.mark.parametrize(
    ("query", "met"),
    [
        ({"eo:cloud_cover": {"lt": 10}}, True),
        ({"eo:cloud_cover": {"lt": 5}}, False),
        ({"eo:cloud_cover": {"lte": 5, "gte": 5.0}}, True),
        ({"eo:cloud_cover": {"gt": 5}}, False),
        ({"platform": {"eq": "sentinel-2a"}}, True),
        ({"platform": {"neq": "sentinel-2a"}}, False),
        ({"platform": {"in": ["sentinel-2a", "sentinel-2b"]}}, True),
        ({"platform": {"lt": 3}}, False),
        ({"datetime": {"gt": "2024-01-01"}}, True),
        ({"absent": {"neq": 1}}, False),
        ({"platform": {"eq": "sentinel-2a"}, "eo:cloud_cover": {"gt": 50}}, False),
    ],
)
def test_conditions_are_tested_here_too(query: dict[str, Any], met: bool) -> None:
    properties = {
        "eo:cloud_cover": 5,
        "platform": "sentinel-2a",
        "datetime": "2024-06-01T00:00:00Z",
    }
    assert matches({"properties": properties}, query) is met


def test_conditions_in_cql2() -> None:
    assert as_cql2({"a": {"neq": 1}}) == {"op": "<>", "args": [{"property": "a"}, 1]}
    both = as_cql2({"a": {"in": ["x"]}, "b": {"gte": 2, "lt": 3}})
    assert [a["op"] for a in both["args"]] == ["in", ">=", "<"]
    assert both["op"] == "and"


@contextmanager
def _paged(folder: Path, pages: list[dict[str, Any]], conforms: str = "") -> Iterator[Any]:
    """An API of written pages over GET; page n's `next` is filled in."""
    with serve(folder) as server:
        root = {
            "stac_version": "1.0.0", "type": "Catalog", "id": "a", "conformsTo": [conforms],
            "links": [{"rel": "search", "href": f"{server.files}/0.json"}],
        }  # fmt: skip
        (folder / "root.json").write_text(json.dumps(root))
        for n, page in enumerate(pages):
            to = page.pop("to", None)
            links = [] if to is None else [{"rel": "next", "href": f"{server.files}/{to}.json"}]
            page["links"] = links
            (folder / f"{n}.json").write_text(json.dumps(page))
        yield server


def _ids(server: Any, counts: Counter[str] | None = None) -> list[str]:
    source = SceneSource(stac=f"{server.files}/root.json")
    return [f.item["id"] for f in find_items(source, WORLD, None, counts or Counter())]


def _items(*ids: str) -> dict[str, Any]:
    return {"features": [{"id": i, "properties": {}, "assets": {}} for i in ids]}


def test_an_empty_page_with_a_next_one_is_no_end(tmp_path: Path) -> None:
    pages = [{**_items("a"), "to": 1}, {**_items(), "to": 2}, _items("b")]
    with _paged(tmp_path, pages) as server:
        assert _ids(server) == ["a", "b"]


def test_pages_in_a_circle_are_an_error(tmp_path: Path) -> None:
    pages = [{**_items("a"), "to": 1}, {**_items("b"), "to": 1}]
    with _paged(tmp_path, pages) as server, pytest.raises(GeoLinkError, match="in a circle"):
        _ids(server)


def test_a_page_without_a_list_is_an_error(tmp_path: Path) -> None:
    with (
        _paged(tmp_path, [{**_items("a"), "to": 1}, {"code": "Timeout"}]) as server,
        pytest.raises(GeoLinkError, match="with no list of items"),
    ):
        _ids(server)


def test_a_list_shorter_than_stated_is_counted(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    with _paged(tmp_path, [{**_items("a", "b"), "numberMatched": 5}]) as server:
        source = SceneSource(stac=f"{server.files}/root.json")
        assert len(list(find_items(source, WORLD, None, counts))) == 2
    assert counts == {"scene_list_short": 3}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'/vsicurl/http://a.org/b.tif?sig=x#4' is", "'/vsicurl/http://a.org/b.tif' is"),
        ("b.tif?sv=1&sig=x#4, band 1", "b.tif, band 1"),
        ("https://a.org/b.tif?sig=x: (403)", "https://a.org/b.tif (403)"),
        ("what is this? a=b", "what is this? a=b"),
    ],
)
def test_messages_hold_no_tokens(text: str, shown: str) -> None:
    assert remote.public(text) == shown


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 0), ("", 0), ("7", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", 0)],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float) -> None:
    assert remote.retry_after(value) == seconds
