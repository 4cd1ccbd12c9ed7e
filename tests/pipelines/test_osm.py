"""OSM extracts: against libosmium, and against features made by hand."""

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import duckdb
import numpy as np
import osmium
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import osm
from pipelines.features import load_features
from pipelines.osm import (
    EMPTY_DIGEST,
    Extract,
    block_digests,
    convert_extracts,
    row_group_bounds,
)
from pipelines.osm_convert import any_glob
from schemas.errors import GeoLinkError
from schemas.grid import to_lonlat, to_utm
from schemas.sources import DROP_KEYS, OsmSource
from schemas.taxonomy import default_taxonomy


def _features(extract: Extract) -> dict[int, tuple[shapely.Geometry, list[str]]]:
    table = pq.read_table(extract.parquet)
    geometry = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    return dict(
        zip(table["osm"].to_pylist(), zip(geometry, table["tags"].to_pylist(), strict=True))
    )


def test_every_tagged_element_of_monaco_is_a_feature_or_is_counted(
    monaco_extract: Extract, monaco_pbf: Path
) -> None:
    expected, skipped = set(), 0
    for element in osmium.FileProcessor(str(monaco_pbf)):
        keys = [t.k for t in element.tags]
        kind = "nwr".index(element.type_str()) + 1
        if kind == 3 and element.tags.get("type") not in ("multipolygon", "boundary"):
            skipped += 1
        elif any(not any(fnmatchcase(k, p) for p in DROP_KEYS) for k in keys):
            expected.add(element.id << 2 | kind)
    found = set(_features(monaco_extract))
    lost = {i & 3 for i in expected - found}
    assert not found - expected
    assert lost <= {3}
    counts = monaco_extract.counts
    assert counts["osm_relation_incomplete"] == len(expected - found)
    assert counts["osm_relation_without_geometry"] == skipped
    assert monaco_extract.objects == len(found)


def test_multipolygons_of_monaco_are_those_that_libosmium_assembles(
    monaco_extract: Extract, monaco_pbf: Path
) -> None:
    factory = osmium.geom.WKBFactory()
    areas = {
        a.orig_id() << 2 | 3: shapely.from_wkb(factory.create_multipolygon(a))
        for a in osmium.FileProcessor(str(monaco_pbf)).with_areas()
        if a.is_area() and not a.from_way()
    }
    found = {i: g for i, (g, _) in _features(monaco_extract).items() if i & 3 == 3}
    assert set(found) == set(areas)
    assert any(shapely.get_num_interior_rings(shapely.get_parts(g)).any() for g in found.values())
    for i, geometry in found.items():
        assert shapely.symmetric_difference(geometry, areas[i]).area <= 1e-12 * areas[i].area


def test_lines_of_monaco_keep_every_node_in_order(
    monaco_extract: Extract, monaco_pbf: Path
) -> None:
    features = _features(monaco_extract)
    checked = 0
    for way in osmium.FileProcessor(str(monaco_pbf)).with_locations():
        geometry, _ = features.get(way.id << 2 | 2, (None, None)) if way.is_way() else (None, None)
        if geometry is not None and geometry.geom_type == "LineString":
            expected = [(n.lon, n.lat) for n in way.nodes]
            assert shapely.get_coordinates(geometry).tolist() == [list(p) for p in expected]
            checked += 1
    assert checked > 3000


def test_a_dropped_key_is_in_no_tag_and_tags_are_sorted(monaco_extract: Extract) -> None:
    for _, tags in _features(monaco_extract).values():
        assert tags
        assert tags == sorted(tags)
        assert not any(fnmatchcase(t.partition("=")[0], p) for t in tags for p in DROP_KEYS)


def test_the_timestamp_is_that_of_the_header(monaco_extract: Extract, monaco_pbf: Path) -> None:
    with osmium.io.Reader(str(monaco_pbf)) as reader:
        stated = reader.header().get("osmosis_replication_timestamp")
    assert monaco_extract.osm_timestamp == stated == "2023-12-26T21:21:22Z"


def test_tag_counts_are_those_of_the_features(monaco_extract: Extract) -> None:
    counts = {
        (r["key"], r["value"]): r["objects"]
        for r in pq.read_table(monaco_extract.tag_counts).to_pylist()
    }
    tags = [t for _, tags in _features(monaco_extract).values() for t in tags]
    assert counts[("building", "yes")] == tags.count("building=yes") > 100
    assert sum(counts.values()) == len(tags)


def test_closed_ways_are_polygons_only_where_their_tags_mean_an_area(
    hamlet, hamlet_extract: Extract
) -> None:
    features = _features(hamlet_extract)
    kinds = {
        name: features[hamlet.osm(name)][0].geom_type
        for name in ("house", "square", "loop", "roundabout", "bow tie", "forest")
    }
    assert kinds == {
        "house": "Polygon", "square": "Polygon", "loop": "LineString", "roundabout": "LineString",
        "bow tie": "MultiPolygon", "forest": "MultiPolygon",
    }  # fmt: skip


def test_a_multipolygon_has_its_holes_and_parts(hamlet, hamlet_extract: Extract) -> None:
    forest, tags = _features(hamlet_extract)[hamlet.osm("forest")]
    assert forest.area * 1e8 == pytest.approx(20 * 20 - 4 * 4 + 5 * 5)
    assert tags == ["landuse=forest"]


def test_what_cannot_be_a_feature_is_counted(hamlet, hamlet_extract: Extract) -> None:
    assert hamlet_extract.counts == {
        "osm_way_incomplete": 1,
        "osm_relation_incomplete": 1,
        "osm_relation_without_geometry": 1,
        "osm_way_without_length": 1,
        "osm_filtered": 1,
        "osm_way_repaired": 2,
        "osm_spans_antimeridian": 1,
    }
    features = _features(hamlet_extract)
    for name in ("no length", "incomplete", "untagged", "across", "broken", "bus"):
        assert hamlet.osm(name) not in features
    assert hamlet_extract.osm_timestamp == ""


def test_the_order_of_members_does_not_change_a_byte(
    reversed_hamlet, hamlet_extract: Extract, tmp_path: Path
) -> None:
    pbf = reversed_hamlet.write(tmp_path / "reversed.osm.pbf")
    other = convert_extracts([pbf], tmp_path / "cache", OsmSource(pbf=pbf))
    assert other.sha256 != hamlet_extract.sha256
    assert other.parquet.read_bytes() == hamlet_extract.parquet.read_bytes()
    assert other.tag_counts.read_bytes() == hamlet_extract.tag_counts.read_bytes()
    assert sorted(p.suffix for p in other.parquet.parent.iterdir()) == [".parquet", ".parquet"]


def test_an_extract_is_converted_once(
    hamlet_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(osm, "_convert", refuse)
    pbf = Path(hamlet_extract.source)
    cache = hamlet_extract.parquet.parents[1]
    assert convert_extracts([pbf], cache, OsmSource(pbf=pbf)) == hamlet_extract
    with pytest.raises(AssertionError, match="converted again"):
        convert_extracts([pbf], cache, OsmSource(pbf=pbf, drop_keys=("name",)))


def test_any_reader_of_geoparquet_reads_the_features(monaco_extract: Extract) -> None:
    import geopandas

    frame = geopandas.read_parquet(monaco_extract.parquet)
    assert len(frame) == monaco_extract.objects
    assert frame.crs.equals("OGC:CRS84")
    bounds = frame.geometry.bounds.to_numpy()
    assert np.array_equal(bounds, frame[["xmin", "ymin", "xmax", "ymax"]].to_numpy())
    assert frame["osm"].is_unique
    step = np.abs(np.diff(frame[["xmin", "ymin"]].to_numpy(), axis=0)).sum(axis=1)
    shuffled = frame.sample(frac=1, random_state=0)[["xmin", "ymin"]].to_numpy()
    assert np.median(step) < np.median(np.abs(np.diff(shuffled, axis=0)).sum(axis=1)) / 5


def _rewritten(extract: Extract, table: pa.Table, path: Path, rows: int = 1000) -> Extract:
    pq.write_table(table, path, row_group_size=rows)
    return dataclasses.replace(extract, parquet=path)


def test_a_digest_depends_on_the_features_that_meet_the_box_and_on_nothing_else(
    monaco_extract: Extract, tmp_path: Path
) -> None:
    table = pq.read_table(monaco_extract.parquet)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(7.40, 7.44, 40), rng.uniform(43.72, 43.75, 40)
    boxes = list(zip(x, y, x + 0.004, y + 0.003, strict=True))
    before = block_digests(monaco_extract, boxes)
    shuffled = table.take(rng.permutation(len(table)))
    assert block_digests(_rewritten(monaco_extract, shuffled, tmp_path / "a"), boxes) == before
    assert block_digests(monaco_extract, boxes[::-1]) == before[::-1]

    gone = int(rng.integers(len(table)))
    less = table.take(np.delete(np.arange(len(table)), gone))
    after = block_digests(_rewritten(monaco_extract, less, tmp_path / "b"), boxes)
    west, south, east, north = (table[c][gone].as_py() for c in ("xmin", "ymin", "xmax", "ymax"))
    meets = [w <= east and e >= west and s <= north and n >= south for w, s, e, n in boxes]
    assert [a != b for a, b in zip(after, before, strict=True)] == meets


def test_a_query_reads_only_the_row_groups_that_meet_it(
    monaco_extract: Extract, tmp_path: Path
) -> None:
    """All other row groups are overwritten with rubbish, and nothing changes."""
    path = tmp_path / "groups.parquet"
    parts = _rewritten(monaco_extract, pq.read_table(monaco_extract.parquet), path, 300)
    bounds = row_group_bounds(pq.read_metadata(path))
    lonlat = (7.412, 43.727, 7.414, 43.729)
    square = to_utm(32632).transform_bounds(*lonlat)
    taxonomy = default_taxonomy()
    before = load_features(path, 32632, square, taxonomy)
    digest = block_digests(parts, [lonlat])

    # What the query asks for is a little wider: the square's own box of degrees.
    west, south, east, north = to_lonlat(32632).transform_bounds(*square, densify_pts=21)
    meets = (bounds[:, 0] <= east) & (bounds[:, 2] >= west)
    meets &= (bounds[:, 1] <= north) & (bounds[:, 3] >= south)
    assert 0 < meets.sum() < len(meets) / 2
    data = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    for g in np.flatnonzero(~meets).tolist():
        for c in range(metadata.num_columns):
            column = metadata.row_group(g).column(c)
            first = column.dictionary_page_offset or column.data_page_offset
            last = first + column.total_compressed_size
            data[first:last] = b"\xff" * (last - first)
    path.write_bytes(data)
    after = load_features(path, 32632, square, taxonomy)
    assert len(before.osm) > 10
    assert (after.osm == before.osm).all()
    assert (after.geometry == before.geometry).all()
    assert block_digests(parts, [lonlat]) == digest
    with pytest.raises(GeoLinkError, match="cannot read converted extract"):
        load_features(path, 32632, to_utm(32632).transform_bounds(*bounds[~meets][0]), taxonomy)


def test_a_wide_feature_does_not_stretch_the_row_groups_of_small_ones(tmp_path: Path) -> None:
    """Between some thousand small features and a few wide ones: each in groups of their own."""
    pbf = tmp_path / "wide.osm.pbf"
    rng = np.random.default_rng(0)
    with osmium.SimpleWriter(str(pbf)) as writer:
        places = rng.uniform(0, 1, (25_000, 2)) + np.array([9, 48])
        for i, at in enumerate(places.tolist(), start=1):
            tags = {"natural": "tree"}
            writer.add_node(osmium.osm.mutable.Node(id=i, location=at, tags=tags))
        for i in range(20):
            ends = [1 + i, 25_000 - i]
            tags = {"power": "line"}
            writer.add_way(osmium.osm.mutable.Way(id=1 + i, nodes=ends, tags=tags))
    extract = convert_extracts([pbf], tmp_path / "cache", OsmSource(pbf=(str(pbf),)))
    bounds = row_group_bounds(pq.read_metadata(extract.parquet))
    area = (bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1])
    # Trees fill a square; three groups along the curve do not overlap much more than they must.
    assert len(bounds) == 3
    assert area[:2].sum() < 1.3


def test_a_box_across_the_antimeridian_is_the_union_of_its_halves(tmp_path: Path) -> None:
    xmin = np.array([179.5, -179.9, 0.0, -180.0, 179.9])
    xmax = np.array([179.9, -179.5, 1.0, -179.0, 180.0])
    ones = np.ones(5)
    table = pa.table(
        {"xmin": xmin, "ymin": 0 * ones, "xmax": xmax, "ymax": ones,
         "digest": np.array([3, 5, 7, 11, 13], np.uint64)}
    )  # fmt: skip
    pq.write_table(table, tmp_path / "x.parquet")
    extract = Extract("", tmp_path / "x.parquet", tmp_path, "", "", "", 5, 0, {})
    across, without, nothing = block_digests(
        extract, [(179.0, 0.0, -179.0, 1.0), (-180.0, 0.0, 180.0, 1.0), (40.0, 0.0, 50.0, 1.0)]
    )
    pq.write_table(table.filter(pc.not_equal(table["digest"], 7)), tmp_path / "x.parquet")
    assert block_digests(extract, [(-180.0, 0.0, 180.0, 1.0)]) == [across]
    assert across != without
    assert nothing == EMPTY_DIGEST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is empty"),
        (b"<?xml version='1.0'?><osm version='0.6'></osm>", "is not an OSM PBF file"),
    ],
)
def test_a_file_that_is_no_extract_is_told_apart(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    pbf = tmp_path / "x.osm.pbf"
    if content is not None:
        pbf.write_bytes(content)
    with pytest.raises(GeoLinkError, match=message):
        convert_extracts([pbf], tmp_path, OsmSource(pbf=pbf))


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_extract_is_told(share: float, monaco_pbf: Path, tmp_path: Path) -> None:
    data = monaco_pbf.read_bytes()
    pbf = tmp_path / "cut.osm.pbf"
    pbf.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(GeoLinkError, match=r"truncated or damaged .* download it again"):
        convert_extracts([pbf], tmp_path, OsmSource(pbf=pbf))
    assert list(tmp_path.iterdir()) == [pbf]


def test_an_extract_without_a_tag_is_told(tmp_path: Path) -> None:
    pbf = tmp_path / "bare.osm.pbf"
    with osmium.SimpleWriter(str(pbf)) as writer:
        writer.add_node(osmium.osm.mutable.Node(id=1, location=(9, 48)))
    with pytest.raises(GeoLinkError, match="no tagged element"):
        convert_extracts([pbf], tmp_path, OsmSource(pbf=pbf))


def test_a_kept_key_that_does_not_occur_is_told_with_the_nearest_one(
    monaco_pbf: Path, tmp_path: Path
) -> None:
    source = OsmSource(pbf=monaco_pbf, keep_keys=("highway", "bulding"))
    with pytest.raises(GeoLinkError, match=r"has a key 'bulding'; did you mean 'building'\?"):
        convert_extracts([monaco_pbf], tmp_path, source)


def test_a_cache_folder_that_cannot_be_used_is_told(
    hamlet_extract: Extract, tmp_path: Path
) -> None:
    pbf = Path(hamlet_extract.source)
    with pytest.raises(GeoLinkError, match="set `cache` to another folder"):
        convert_extracts([pbf], tmp_path / "it's", OsmSource(pbf=pbf))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(GeoLinkError, match="cannot convert"):
        convert_extracts([pbf], file, OsmSource(pbf=pbf))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("a:*_ö.x", min_size=1, max_size=5), max_size=3), st.text("a:_ö.x", max_size=6)
)
def test_a_star_stands_for_any_text(patterns: list[str], key: str) -> None:
    row = duckdb.execute("SELECT regexp_full_match(?, ?)", [key, any_glob(patterns)]).fetchone()
    assert row == (any(fnmatchcase(key, p) for p in patterns),)
