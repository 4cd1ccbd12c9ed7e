"""Builds over a real STAC API and files over HTTP, with every fault that a network knows."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines import execute, remote, stac
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.load import load_config
from schemas.sources import SceneSource
from tests.integration.conftest import WriteConfig
from tests.servers.files import Fault, Server, serve
from tests.servers.stac_api import serve_api

Build = Callable[..., BuildResult]


@pytest.fixture(scope="module")
def api(town: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The town's catalog as an API and its files, behind one server that can fail."""
    folder = town.s2_catalog.parent
    with serve(folder) as server:
        items = []
        for path in sorted(folder.rglob("*/*/*.json")):
            item = json.loads(path.read_text())
            for asset in item["assets"].values():
                place = (path.parent / asset["href"]).resolve().relative_to(folder)
                asset["href"] = f"{server.files}/{place}"
            items.append(item)
        collection = json.loads(next(folder.rglob("collection.json")).read_text())
        with serve_api(
            tmp_path_factory.mktemp("api") / "api", [collection], {collection["id"]: items}
        ) as upstream:
            server.upstream = upstream
            yield server


@pytest.fixture(autouse=True)
def well(api: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without faults, and a client that does not wait long."""
    api.faults.clear()
    api.requests.clear()
    api.tokens.clear()
    api.token_uses = None
    remote._tokens.clear()
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(execute, "RETRY_WAITS_S", (0.01,))
    monkeypatch.setenv("GDAL_HTTP_RETRY_DELAY", "0.01")


@pytest.fixture
def build(api: Server, satellite_config: WriteConfig, town: World) -> Build:
    """Builds the middle of the town over the API, or over the local catalog."""

    def run(
        name: str = "served", *, local: bool = False, workers: int = 1, **scenes: Any
    ) -> BuildResult:
        source = {"stac": str(town.s2_catalog) if local else api.address, **scenes}
        path = satellite_config(name, scenes=source, region={"bbox": _middle(town)})
        return build_dataset(load_config(path, DatasetConfig), workers=workers)

    return run


def _middle(town: World) -> list[float]:
    """A box over two shards, one north of the other."""
    west, south, east, north = town.bounds_lonlat
    dx, dy = east - west, north - south
    return [west + 0.37 * dx, south + 0.2 * dy, west + 0.62 * dx, south + 0.5 * dy]


def _shards(arrays: dict[str, bytes]) -> set[str]:
    return {name.split("/")[0] for name in arrays}


def _arrays(result: BuildResult) -> dict[str, bytes]:
    """The chunks of every array of every shard."""
    assert result.failed == {}
    found = {}
    for row in result.rows:
        home = Path(str(result.dataset)) / row.path
        for file in sorted(home.rglob("*")):
            if file.is_file() and file.name != "zarr.json":
                found[f"{row.shard}/{file.relative_to(home)}"] = file.read_bytes()
    return found


_expected: dict[str, bytes] = {}


@pytest.fixture
def expected(build: Build) -> dict[str, bytes]:
    """The arrays of the build over the local catalog; built once."""
    if not _expected:
        _expected.update(_arrays(build("local", local=True)))
    return _expected


S2A, S2B = "S2A_30TWR_20190421", "S2B_30TWR_20220618"


def test_over_api_and_http_the_shards_are_those_of_the_local_catalog(
    build: Build, api: Server, expected: dict[str, bytes]
) -> None:
    result = build()
    assert _arrays(result) == expected
    assert len(expected) > 30
    assert len(api.of("/search")) == 1
    # A file is opened by two requests, which bring a small mask whole; a band takes one more.
    # Two scenes of four bands, and their masks, read once: to choose, and to composite.
    assert {r.method for r in api.of(r"\.tif")} == {"HEAD", "GET"}
    assert not any(r.method == "GET" and r.range is None for r in api.of(r"\.tif"))
    per_shard = len(api.of(r"\.tif")) / len(result.rows)
    assert per_shard <= 24
    assert len({r.connection for r in api.of(r"\.tif")}) < len(api.of(r"\.tif")) / 3


def test_two_workers_over_http_write_the_bytes_of_one(build: Build, api: Server) -> None:
    api.faults[:] = [Fault(r"red\.tif", "status", 503, times=2), Fault(r"scl\.tif", "cut", times=1)]
    one, two = build("one"), build("two", workers=2)
    assert one.failed == two.failed == {}
    assert len(two.rows) > 1
    # Of everything, metadata and consolidated attributes included.
    assert [r.checksum for r in one.rows] == [r.checksum for r in two.rows]
    assert one.rows == two.rows


PASSING = {
    "files: 429, come back in a second": [Fault(r"red\.tif", "status", 429, "1", times=1)],
    "files: 429 without a word": [Fault(r"\.tif", "status", 429, times=4)],
    "files: 500": [Fault(r"nir\.tif", "status", 500, times=6)],
    "files: 503 at first": [Fault(r"\.tif", "status", 503, times=12)],
    "files: 503 while bytes are read": [Fault(r"\.tif", "status", 503, after=9, times=8)],
    "files: mask gone for a while": [Fault(r"scl\.tif", "status", 502, times=4)],
    "files: cut in mid-body": [Fault(r"(red|scl)\.tif", "cut", times=5)],
    "files: cut later": [Fault(r"\.tif", "cut", after=8, times=6)],
    "files: closed without an answer": [Fault(r"\.tif", "close", after=2, times=5)],
    "api: 429, come back in a second": [Fault("/search", "status", 429, "1", times=1)],
    "api: 503": [Fault("/search", "status", 503, times=3)],
    "api: 500 of its root": [Fault("^/$", "status", 500, times=2)],
    "api: 503 of a collection": [Fault("/collections/", "status", 503, times=2)],
    "api: cut in mid-body": [Fault("/search", "cut", times=2)],
    "api: closed without an answer": [Fault("/", "close", times=2)],
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_leaves_no_trace(
    build: Build, api: Server, expected: dict[str, bytes], name: str
) -> None:
    api.faults[:] = [replace(f) for f in PASSING[name]]
    assert _arrays(build()) == expected
    assert [f.done for f in api.faults] == [f.times for f in api.faults]


def test_retry_after_is_waited_for(build: Build, api: Server) -> None:
    api.faults[:] = [
        Fault("/search", "status", 429, "1", times=1),
        # One for GDAL, one for the question what the matter is.
        Fault(r"red\.tif", "status", 429, "1", times=2),
    ]
    build()
    for match in ("/search", r"red\.tif"):
        refused = [r.at_s for r in api.of(match) if r.status == 429]
        well = [r.at_s for r in api.of(match) if r.status < 300]
        assert min(well) - max(refused) >= 0.9


def test_a_slow_answer_is_given_up_and_asked_for_again(
    build: Build, api: Server, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WHOLE_S", 0.5)
    monkeypatch.setenv("GDAL_HTTP_TIMEOUT", "1")
    api.faults[:] = [Fault("/search", "slow", times=1), Fault(r"red\.tif", "slow", times=2)]
    assert _arrays(build()) == expected
    assert [f.done for f in api.faults] == [1, 2]


LASTING_API = {
    "503": (Fault("/search", "status", 503), r"/search cannot be fetched \(503 .*tried 5 times\)"),
    "429 with an hour's wait": (
        Fault("/search", "status", 429, "3600"), r"\(429 .*asks to wait 3600 s; tried 1 times\)"
    ),
    "cut": (Fault("/search", "cut"), r"/search cannot be fetched \(the connection was cut"),
    "closed": (Fault("/", "close"), r"cannot be fetched \(no connection"),
    "404": (Fault("/search", "status", 404), r"/search answers 404"),
    "401": (Fault("/search", "status", 401), r"/search is refused \(401.*scenes\.sign"),
}  # fmt: skip


@pytest.mark.parametrize("name", LASTING_API)
def test_a_fault_of_the_api_that_lasts_is_one_sentence(
    build: Build, api: Server, name: str
) -> None:
    fault, message = LASTING_API[name]
    api.faults[:] = [replace(fault)]
    with pytest.raises(GeoLinkError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)


def test_a_page_that_fails_in_the_middle_never_shortens_the_list(
    build: Build, api: Server, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stac, "_PAGE", 1)
    api.faults[:] = [Fault("/search", "cut", after=1, times=1)]
    assert _arrays(build("whole")) == expected
    # Two items, and a page that says there are no more.
    assert len([r for r in api.of("/search") if r.method == "POST"]) == 4
    api.faults[:] = [Fault("/search", "status", 500, after=1)]
    with pytest.raises(GeoLinkError, match=r"/search cannot be fetched \(500"):
        build("cut")


def test_a_server_of_files_that_stays_away_fails_the_shards_and_publishes_nothing(
    build: Build, api: Server, expected: dict[str, bytes]
) -> None:
    api.faults[:] = [Fault(r"red\.tif", "status", 503)]
    result = build()
    assert result.snapshot is None
    assert len(result.failed) == len(_shards(expected))
    assert all("red.tif cannot be fetched (503" in m for m in result.failed.values())
    # When it is back, the same command ends well.
    api.faults.clear()
    assert _arrays(build()) == expected


def test_an_asset_that_is_not_there_is_counted_and_the_other_scene_used(
    build: Build, api: Server
) -> None:
    api.faults[:] = [Fault(rf"{S2A}.*red\.tif", "status", 404)]
    result = build()
    assert result.failed == {}
    assert result.qc["scene_unreadable"] > 0
    assert {s for r in result.rows for s in r.scenes} == {f"{S2B}_0_L2A"}


def test_a_truncated_file_is_counted_and_the_other_scene_used(
    build: Build, town: World, tmp_path: Path, api: Server
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(town.s2_catalog.parent, folder)
    for band in ("red", "blue"):
        file = next(folder.rglob(f"{S2A}*/{band}.tif"))
        os.truncate(file, file.stat().st_size // 3)
    with serve(folder) as server:
        result = build(stac=f"{server.files}/catalog.json")
    assert result.failed == {}
    assert result.qc["scene_unreadable"] > 0
    assert {s for r in result.rows for s in r.scenes} == {f"{S2B}_0_L2A"}


def test_a_static_catalog_over_http_gives_the_same(
    build: Build, town: World, expected: dict[str, bytes]
) -> None:
    with serve(town.s2_catalog.parent, Fault(r"\.json", "cut", after=1, times=2)) as server:
        assert _arrays(build(stac=f"{server.files}/catalog.json")) == expected


def test_an_item_whose_address_is_gone_is_one_sentence(build: Build, town: World) -> None:
    gone = Fault(rf"{S2A}\S*json", "status", 404)
    message = rf"{S2A}\S*json answers 404"
    with (
        serve(town.s2_catalog.parent, gone) as server,
        pytest.raises(GeoLinkError, match=message),
    ):
        build(stac=f"{server.files}/catalog.json")


def test_tokens_are_renewed_when_they_expire_and_are_told_to_nobody(
    build: Build, api: Server, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    api.token_uses = 25
    monkeypatch.setenv("PC_SDK_SAS_URL", f"{api.address}/token")
    with caplog.at_level(logging.INFO):
        result = build(sign="planetary-computer")
        assert _arrays(result) == expected
        assert len(api.tokens) >= 4
        assert len(api.of("/token/sentinel-2-l2a")) == len(api.tokens)
        api.token_uses = 0
        failing = build("refused", sign="planetary-computer")
    assert all("is refused (403" in m for m in failing.failed.values())
    assert failing.failed
    told = json.dumps([failing.failed, caplog.text, *capfd.readouterr()])
    assert "secret" not in told
    dataset = Path(str(result.dataset))
    assert not any(b"secret" in f.read_bytes() for f in dataset.rglob("*") if f.is_file())


def test_without_signing_a_refusal_says_what_to_check(build: Build, api: Server) -> None:
    api.token_uses = 1
    result = build()
    assert result.snapshot is None
    assert all("check `scenes.sign`" in m for m in result.failed.values())


def test_tokens_go_only_to_azure_and_the_host_they_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = datetime(2999, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(remote, "_tokens", {"c": ("sig=secret", later)})
    sign = "planetary-computer/c"
    azure = "https://a.blob.core.windows.net/b/c.tif"
    assert remote.signed(f"{azure}?sig=old", sign) == f"{azure}?sig=secret"
    for other in ("https://a.org/c.tif", "https://blob.core.windows.net.a.org/c.tif", "s3://a/c"):
        assert remote.signed(other, sign) == other
    assert remote.signed(azure, "none") == azure


def test_the_server_is_asked_for_what_it_can_answer_and_the_rest_is_tested_here(
    build: Build, api: Server
) -> None:
    query: dict[str, Any] = {"platform": {"eq": "sentinel-2b"}, "eo:cloud_cover": {"lt": 101}}
    result = build(query=query)
    assert {s for r in result.rows for s in r.scenes} == {f"{S2B}_0_L2A"}
    asked = json.loads(api.of("/search")[0].body)
    platform = {"op": "=", "args": [{"property": "platform"}, "sentinel-2b"]}
    assert platform in asked["filter"]["args"]
    local = build("local", local=True, query=query)
    assert {s for r in local.rows for s in r.scenes} == {f"{S2B}_0_L2A"}
    assert _arrays(local) == _arrays(result)


def test_our_pages_are_those_of_pystac_client(
    api: Server, town: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pystac_client = pytest.importorskip("pystac_client")
    monkeypatch.setattr(stac, "_PAGE", 1)
    source = SceneSource(stac=api.address, start=datetime(2019, 1, 1), end=datetime(2023, 1, 1))
    ours = [f.item["id"] for f in stac.find_items(source, town.bounds_lonlat, None, Counter())]
    search = pystac_client.Client.open(api.address).search(
        bbox=town.bounds_lonlat, datetime="2019-01-01/2023-01-01", limit=1
    )
    assert ours == [i.id for i in search.items()]
    assert len(ours) == 2
