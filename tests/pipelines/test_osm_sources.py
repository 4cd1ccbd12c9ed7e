"""Extracts from the web, from a finder, and several at once: over real HTTP, with its faults."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import osmium
import pyarrow.parquet as pq
import pytest
import shapely
from osmium.osm import mutable

from pipelines import remote
from pipelines.download import download, remove_superseded
from pipelines.osm import convert_extracts, extract_of
from pipelines.osm_find import find_extracts
from pipelines.osm_merge import merge_pbfs
from schemas.errors import GeoLinkError
from schemas.sources import OsmSource, Region
from tests.servers.files import Fault, Server, serve

ANYWHERE = Region(bbox=(9, 48, 9.01, 48.01))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of `tmp_path/web`, and a client that does not wait long."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as state:
        yield state


@pytest.fixture
def data(server: Server) -> bytes:
    content = os.urandom(3_000_000)
    (server.folder / "x.osm.pbf").write_bytes(content)
    return content


def _get(server: Server, tmp_path: Path) -> Path:
    return download(f"{server.files}/x.osm.pbf", tmp_path / "cache", ".osm.pbf")


def _bodies(server: Server) -> list[tuple[int, int]]:
    return [(r.status, r.bytes) for r in server.of(r"x\.osm\.pbf$")]


def test_a_file_is_fetched_once_and_named_by_its_content(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    path = _get(server, tmp_path)
    assert path.name == f"{hashlib.sha256(data).hexdigest()}.osm.pbf"
    assert path.read_bytes() == data
    assert _get(server, tmp_path) == path
    assert _bodies(server) == [(200, len(data)), (304, 0)]


def test_an_address_that_changes_its_content_gives_a_new_file(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    old = _get(server, tmp_path)
    (server.folder / "x.osm.pbf").write_bytes(b"new" + data)
    new = _get(server, tmp_path)
    assert (old.read_bytes(), new.read_bytes()) == (data, b"new" + data)


def test_a_version_that_its_address_no_longer_has_is_removed_when_it_is_old(
    server: Server, data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, grace = tmp_path / "cache", timedelta(hours=24)
    first, mine = _get(server, tmp_path), cache / "mine.osm.pbf"
    mine.write_bytes(data)
    (server.folder / "x.osm.pbf").write_bytes(data[::-1])
    second = _get(server, tmp_path)
    assert remove_superseded(cache, grace) == []  # somebody may be reading it
    days_ago = time.time() - 2 * 86400
    for path in (first, second, mine):
        os.utime(path, (days_ago, days_ago))
    assert remove_superseded(cache, grace) == [first]
    assert (first.exists(), second.exists(), mine.exists()) == (False, True, True)
    assert f"removed {first}" in caplog.text
    # What is used becomes young; back at the first version, the second one is the old one.
    os.utime(second, (days_ago, days_ago))
    assert _get(server, tmp_path) == second
    assert time.time() - second.stat().st_mtime < 60
    (server.folder / "x.osm.pbf").write_bytes(data)
    assert _get(server, tmp_path) == first
    future = time.time() + 86400
    os.utime(second, (future, future))
    assert remove_superseded(cache, grace) == []


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    server.faults.append(Fault(r"x\.osm\.pbf$", "cut", times=2))
    assert _get(server, tmp_path).read_bytes() == data
    assert [s for s, _ in _bodies(server)] == [200, 206, 206]
    ranges = [r.range for r in server.of(r"x\.osm\.pbf$")]
    assert ranges[1] is not None
    kept = int(ranges[1].removeprefix("bytes=").rstrip("-"))
    assert len(data) // 2 - 65_536 <= kept <= len(data) // 2


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    server.faults += [
        Fault(r"x\.osm\.pbf$", "cut", times=1),
        Fault(r"x\.osm\.pbf$", "status", 503, times=remote.TRIES - 1),
    ]
    with pytest.raises(GeoLinkError, match=r"503 .* goes on where it stopped"):
        _get(server, tmp_path)
    assert not list((tmp_path / "cache").glob("*.osm.pbf"))
    server.requests.clear()
    assert _get(server, tmp_path).read_bytes() == data
    ((status, left),) = _bodies(server)
    assert status == 206
    assert left <= len(data) - len(data) // 2 + 65_536


def test_a_file_that_changed_while_it_was_fetched_is_fetched_whole(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    server.faults += [
        Fault(r"x\.osm\.pbf$", "cut", times=1),
        Fault(r"x\.osm\.pbf$", "close", times=remote.TRIES - 1),
    ]
    with pytest.raises(GeoLinkError, match="cannot download"):
        _get(server, tmp_path)
    (server.folder / "x.osm.pbf").write_bytes(data[::-1])
    assert _get(server, tmp_path).read_bytes() == data[::-1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(
    status: int, server: Server, data: bytes, tmp_path: Path
) -> None:
    server.faults.append(Fault(r"x\.osm\.pbf$", "status", status, retry_after="0", times=3))
    assert _get(server, tmp_path).read_bytes() == data


def test_an_answer_for_good_is_told_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match=r"404 .*; check the address"):
        _get(server, tmp_path)
    assert len(server.requests) == 1
    with pytest.raises(GeoLinkError, match="give a path, or a http"):
        download("ftp://example.org/x.osm.pbf", tmp_path, "")


def test_the_md5_that_the_server_states_is_checked(
    server: Server, data: bytes, tmp_path: Path
) -> None:
    stated = server.folder / "x.osm.pbf.md5"
    stated.write_text(f"{'0' * 32}  x.osm.pbf\n")
    with pytest.raises(GeoLinkError, match=f"not {'0' * 32} as the server says"):
        _get(server, tmp_path)
    stated.write_text(f"{hashlib.md5(data).hexdigest()}  x.osm.pbf\n")
    assert _get(server, tmp_path).read_bytes() == data


def _write(path: Path, *elements: mutable.OSMObject, stated: str = "") -> Path:
    header = osmium.io.Header()
    if stated:
        header.set("osmosis_replication_timestamp", stated)
    kinds = (mutable.Node, mutable.Way, mutable.Relation)
    with osmium.SimpleWriter(str(path), header=header, overwrite=True) as writer:
        for element in sorted(elements, key=lambda e: (kinds.index(type(e)), e.id)):
            writer.add(element)
    return path


def _node(i: int, x: float, version: int = 1, **tags: str) -> mutable.Node:
    return mutable.Node(id=i, location=(9 + x / 1e3, 48), tags=tags, version=version)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A forest whose border lies half in either of two extracts, which share what is between."""
    folder = tmp_path_factory.mktemp("halves")
    shared = [_node(1, 0), mutable.Node(id=2, location=(9, 48.001), version=1)]
    members = [("w", 1, "outer"), ("w", 2, "outer")]
    tags = {"type": "multipolygon", "landuse": "forest"}
    forest = mutable.Relation(id=1, members=members, tags=tags, version=1)
    west = [
        *shared, _node(3, -1), mutable.Way(id=1, nodes=[1, 3, 2], version=1), forest,
        _node(10, 3, version=2, natural="tree", height="2"), _node(11, -2, natural="peak"),
    ]  # fmt: skip
    east = [
        *shared, _node(4, 1), mutable.Way(id=2, nodes=[2, 4, 1], version=1), forest,
        _node(10, 3, version=3, natural="tree", height="3"), _node(12, 2, natural="spring"),
        _node(13, 4, version=9),
    ]  # fmt: skip
    return [
        _write(folder / "west.osm.pbf", *west, stated="2026-02-01T00:00:00Z"),
        _write(folder / "east.osm.pbf", *east, stated="2026-01-01T00:00:00Z"),
    ]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests share, so that the halves are converted once."""
    return tmp_path_factory.mktemp("merged")


def test_extracts_that_overlap_are_one_and_what_spans_them_is_whole(
    halves: list[Path], merged: Path, tmp_path: Path
) -> None:
    source = OsmSource(pbf=tuple(str(p) for p in halves))
    extract = extract_of(source, ANYWHERE, merged)
    table = pq.read_table(extract.parquet).to_pylist()
    found = {row["osm"]: (shapely.from_wkb(row["geometry"]), row["tags"]) for row in table}
    assert sorted(found) == [1 << 2 | 3, 10 << 2 | 1, 11 << 2 | 1, 12 << 2 | 1]
    assert len(table) == len(found)
    forest, tags = found[1 << 2 | 3]
    assert tags == ["landuse=forest"]
    assert forest.equals(shapely.Polygon([(9, 48), (8.999, 48), (9, 48.001), (9.001, 48)]))
    assert found[10 << 2 | 1][1] == ["height=3", "natural=tree"]
    assert extract.counts == {"osm_extracts_overlap": 2, "osm_extracts_differ": 1}
    assert extract.osm_timestamp == "2026-01-01T00:00:00Z"
    assert extract.source == ", ".join(source.pbf)

    copy = tmp_path / "copy.osm.pbf"
    copy.write_bytes(halves[0].read_bytes())
    again = extract_of(OsmSource(pbf=(*source.pbf[::-1], str(copy))), ANYWHERE, merged)
    assert (again.key, again.sha256, again.counts) == (extract.key, extract.sha256, extract.counts)


def test_of_one_version_the_newest_extract_gives_the_element(tmp_path: Path) -> None:
    pbfs = [
        _write(
            tmp_path / f"{name}.osm.pbf", _node(1, 0, shop=name), _node(2, 0, version, shop=name)
        )
        for name, version in (("new", 1), ("old", 2))
    ]
    counts = merge_pbfs(pbfs, tmp_path / "merged.osm.pbf")
    assert counts == {"osm_extracts_overlap": 2, "osm_extracts_differ": 1}
    elements = osmium.FileProcessor(str(tmp_path / "merged.osm.pbf"))
    assert [(n.version, n.tags["shop"]) for n in elements] == [(1, "new"), (2, "old")]


def test_an_extract_that_is_not_sorted_cannot_be_merged(halves: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd.osm.pbf"
    with osmium.SimpleWriter(str(odd)) as writer:
        for i in (2, 1):
            writer.add(_node(i, 0, natural="tree"))
    with pytest.raises(GeoLinkError, match=r"odd\.osm\.pbf is not sorted .*`osmium sort"):
        convert_extracts([halves[0], odd], tmp_path, OsmSource(pbf=("x",)))
    assert not list((tmp_path / "osm").glob("converting-*"))


def _index(server: Server) -> str:
    """An index in Geofabrik's format of four regions side by side, and the town's own."""

    def feature(name: str, west: float, east: float) -> dict[str, object]:
        return {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(shapely.box(west, 47, east, 49))),
            "properties": {
                "id": name, "urls": {"pbf": f"{server.files}/{name}.osm.pbf"}, "parent": "land",
            },
        }  # fmt: skip

    parts = [feature("west", 8.0, 9.0), feature("east", 9.0, 10.0), feature("far", 20.0, 21.0)]
    land = feature("land", 0.0, 30.0)
    del land["properties"]["parent"]  # type: ignore[attr-defined]
    return json.dumps({"type": "FeatureCollection", "features": [land, *parts]})


@pytest.fixture
def finder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The finder, with its index on the server and nothing in its cache."""
    import osmfinder.extract
    import osmfinder.sources.geofabrik

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(osmfinder.extract, "LFS_DIRECTORY_URL", f"{server.files}/none")
    address = f"{server.files}/index.json"
    monkeypatch.setattr(osmfinder.sources.geofabrik, "GEOFABRIK_INDEX_URL", address)
    (server.folder / "index.json").write_text(_index(server))
    osmfinder.extract._clear_in_memory_cache()
    yield server
    osmfinder.extract._clear_in_memory_cache()


def test_the_smallest_extracts_that_cover_a_region_are_found_fetched_and_merged(
    finder: Server, halves: list[Path], merged: Path
) -> None:
    for pbf in halves:
        (finder.folder / pbf.name).write_bytes(pbf.read_bytes())
    extract = extract_of(OsmSource(find="geofabrik"), Region(bbox=(8.5, 47.9, 9.5, 48.1)), merged)
    assert extract.source == f"{finder.files}/east.osm.pbf, {finder.files}/west.osm.pbf"
    assert extract.counts == {"osm_extracts_overlap": 2, "osm_extracts_differ": 1}
    assert extract.objects == 4
    urls, counts = find_extracts(Region(points=((20.5, 48.0),), radius_m=500), "geofabrik")
    assert (urls, counts) == ((f"{finder.files}/far.osm.pbf",), {})


def test_a_region_that_reaches_out_of_all_extracts_is_a_finding(finder: Server) -> None:
    urls, counts = find_extracts(Region(bbox=(8.2, 46.5, 8.8, 48.5)), "geofabrik")
    assert urls == (f"{finder.files}/west.osm.pbf",)
    assert counts == {"osm_region_uncovered": 1}
    with pytest.raises(GeoLinkError, match="no OSM extract of geofabrik covers the region"):
        find_extracts(Region(bbox=(-60, -30, -59, -29)), "geofabrik")


def test_a_finder_without_network_is_told(finder: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import osmfinder.extract

    monkeypatch.setattr(osmfinder.extract, "LFS_DIRECTORY_URL", "http://127.0.0.1:9/none")
    with pytest.raises(GeoLinkError, match=r"cannot look up .*; check the network, or download"):
        find_extracts(ANYWHERE, "geofabrik")


_CONVERT = """
import sys
from pathlib import Path
from pipelines.osm import convert_extracts
from schemas.sources import OsmSource
convert_extracts([Path(sys.argv[1])], Path(sys.argv[2]), OsmSource(pbf=(sys.argv[1],)))
"""


def test_what_a_killed_conversion_leaves_is_removed_and_the_result_is_the_same(
    halves: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "osm"
    child = subprocess.Popen([sys.executable, "-c", _CONVERT, str(halves[0]), str(tmp_path)])
    while not list(folder.glob("converting-*/*")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(folder.glob("converting-*"))
    (folder / "converting-other").mkdir()
    (folder / "converting-other" / "big").write_bytes(b"left by another killed run")
    source = OsmSource(pbf=(str(halves[0]),))
    extract = convert_extracts([halves[0]], tmp_path, source)
    assert not list(folder.glob("converting-*"))
    fresh = convert_extracts([halves[0]], tmp_path / "fresh", source)
    assert extract.parquet.read_bytes() == fresh.parquet.read_bytes()
