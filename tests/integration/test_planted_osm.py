"""Faults of places and maps, planted in a town: each is caught by its name."""

from pathlib import Path

import numpy as np
import osmium
import pyarrow.parquet as pq
import pytest
import shapely
from osmium.osm import mutable

from geolink.reader import open_dataset, read_shard
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.grid import to_lonlat
from schemas.layout import Kind
from schemas.load import load_config
from tests.integration.conftest import WriteConfig

VERTICES = 100_000
FIRST = 9_000_000_000


def _build(path: Path) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig))


def _lake(town: World) -> np.ndarray:
    """Corners of a jagged lake over most of the town, [VERTICES, 2] metres."""
    x0, y0, x1, y1 = town.bounds_utm
    angle = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    radius = (x1 - x0) * (0.35 + 0.002 * np.cos(VERTICES / 4 * angle))
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    return centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _lake_in(parquet: Path) -> shapely.Geometry | None:
    """The lake of a converted extract."""
    if parquet.stem.endswith("-tags"):
        return None
    table = pq.read_table(parquet, columns=["osm", "geometry"]).to_pylist()
    return next(
        (shapely.from_wkb(r["geometry"]) for r in table if r["osm"] == FIRST << 2 | 3), None
    )


TAGS = {
    "natural": "tree",
    "inscription": "\u0634\u062c\u0631\u0629 \u05e2\u05e5",  # Arabic and Hebrew: stays
    "species": "Qu\x1b[31mer\ncus\x07",
    "genus": "\u202egnorw\u202c",
    "na\x01me": "hidden from the filter",
}


@pytest.fixture(scope="module")
def planted(town: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old extract that shares a node with the town's, and holds a tree and a huge lake."""
    path = tmp_path_factory.mktemp("planted") / "planted.osm.pbf"
    nodes = osmium.FileProcessor(str(town.pbf), osmium.osm.NODE)
    for node in nodes.with_filter(osmium.filter.EmptyTagFilter()):
        tags = {**dict(node.tags), "planted": "yes"}
        at = (node.location.lon, node.location.lat)
        shared = mutable.Node(id=node.id, location=at, tags=tags, version=node.version)
        break
    lonlat = np.stack(to_lonlat(town.epsg).transform(*_lake(town).T), axis=1)
    header = osmium.io.Header()
    header.set("osmosis_replication_timestamp", "2019-05-05T00:00:00Z")
    with osmium.SimpleWriter(str(path), header=header) as writer:
        writer.add_node(shared)
        for i, at in enumerate(lonlat.tolist()):
            writer.add_node(mutable.Node(id=FIRST + i, location=at, version=1))
        tree = [float(v) for v in lonlat.mean(axis=0)]
        writer.add_node(mutable.Node(id=FIRST + VERTICES, location=tree, tags=TAGS, version=1))
        ring = np.r_[np.arange(VERTICES), 0] + FIRST
        ways = range(0, VERTICES, 2000)
        for n, start in enumerate(ways):
            nodes = ring[start : start + 2001].tolist()
            writer.add_way(mutable.Way(id=FIRST + n, nodes=nodes, version=1))
        members = [("w", FIRST + n, "outer") for n in range(len(ways))]
        tags = {"type": "multipolygon", "natural": "water"}
        writer.add_relation(mutable.Relation(id=FIRST, members=members, tags=tags, version=1))
    return path


@pytest.fixture(scope="module")
def both(town: World, planted: Path) -> dict[str, object]:
    """The config's part of two extracts that overlap."""
    return {"pbf": [str(planted), str(town.pbf)], "max_age_days": 365}


@pytest.fixture
def built(satellite_config: WriteConfig, both: dict[str, object], town: World) -> BuildResult:
    """The town and some of the sea east of it."""
    west, south, east, north = town.bounds_lonlat
    bbox = [west, south, east + 0.02, north]
    return _build(satellite_config("planted", osm=both, region={"bbox": bbox}, min_valid=0.0))


def test_planted_faults_of_the_map_are_found_by_name(
    built: BuildResult, town: World, cache: Path
) -> None:
    counts = built.skipped
    assert counts["osm_extract_stale"] == 1
    assert counts["osm_extracts_overlap"] == 1
    assert counts["osm_tag_cleaned"] == 1
    empty = [r for r in built.rows if r.qc.get("shard_without_osm")]
    assert empty
    assert all(r.objects == 0 for r in empty)
    assert built.qc["shard_without_osm"] == len(empty) < len(built.rows)

    (parquet,) = [p for p in (cache / "osm").glob("*.parquet") if _lake_in(p) is not None]
    assert shapely.get_num_coordinates(_lake_in(parquet)) == VERTICES + 1  # nothing simplified

    dataset = open_dataset(built.dataset)
    texts: set[str] = set()
    area = 0.0
    for row in built.rows:
        if not row.objects:
            continue
        shard = read_shard(dataset, row)
        lake = (shard["object_osm"] == (FIRST << 2 | 3)) & (shard["object_kind"] == Kind.POLYGON)
        area += float(shard["object_size"][lake].sum())
        tree = np.flatnonzero(shard["object_osm"] == ((FIRST + VERTICES) << 2 | 1))
        for i in tree:
            first, last = shard["object_tag_offset"][i : i + 2]
            offset, text = shard["tag_text_offset"], shard["tag_text"].tobytes()
            texts |= {
                text[offset[t] : offset[t + 1]].decode() for t in shard["object_tag"][first:last]
            }
    assert area == pytest.approx(shapely.Polygon(_lake(town)).area, rel=1e-4)
    assert texts == {
        "natural=tree",
        "inscription=\u0634\u062c\u0631\u0629 \u05e2\u05e5",
        "species=Qu[31mercus",
        "genus=gnorw",
    }


def test_a_fresh_extract_is_not_stale(satellite_config: WriteConfig, town: World) -> None:
    result = _build(satellite_config("fresh", osm={"pbf": str(town.pbf), "max_age_days": 36_500}))
    assert not {"osm_extract_stale", "osm_age_unknown"} & result.qc.keys()


def test_a_pbf_cut_in_half_is_told(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    data = town.pbf.read_bytes()
    half = tmp_path / "half.osm.pbf"
    half.write_bytes(data[: len(data) // 2])
    for pbf in (str(half), [str(town.pbf), str(half)]):
        with pytest.raises(GeoLinkError, match=r"half\.osm\.pbf is truncated or damaged"):
            _build(satellite_config("half", osm={"pbf": pbf}))


def test_a_region_with_swapped_axes_is_told(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    west, south, east, north = town.bounds_lonlat
    points = tmp_path / "sites.csv"
    points.write_text(f"{(south + north) / 2},{(west + east) / 2}\n")
    polygon = shapely.box(south, west, north, east)
    outline = tmp_path / "outline.geojson"
    outline.write_text(shapely.to_geojson(polygon))
    for region in ({"points": str(points), "radius_m": 500}, {"file": str(outline)}):
        with pytest.raises(GeoLinkError, match="latitude swapped: give longitude first"):
            _build(satellite_config("swapped", region=region))
