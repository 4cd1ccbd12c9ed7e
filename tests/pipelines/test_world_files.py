"""The world's files: read back by others than those that wrote them, and the same every time."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import osmium
import pystac
import pytest
import rasterio
import shapely
from pyproj import Transformer

from pipelines.world import World, make_world
from pipelines.world.clouds import HIGH, MEDIUM, NO_DATA, make_sky
from pipelines.world.covers import COVERS, variants_of
from pipelines.world.extract import read_extract
from pipelines.world.features import features
from pipelines.world.pbf import write_pbf
from pipelines.world.sentinel2 import BAND_GSD_M, PASSES
from pipelines.world.town import make_town
from schemas.errors import GeoLinkError
from schemas.sensor import SENTINEL_2_L2A
from schemas.taxonomy import default_taxonomy

SIZE_KM = 2.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), size_km=SIZE_KM, aerial_km=1.0)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def items(catalog: Path) -> list[pystac.Item]:
    return sorted(pystac.Catalog.from_file(catalog).get_items(recursive=True), key=lambda i: i.id)


def read(item: pystac.Item, asset: str) -> np.ndarray:
    with rasterio.open(item.assets[asset].get_absolute_href()) as file:
        return file.read(1)


def test_the_same_seed_gives_the_same_bytes_of_every_file(world: World, tmp_path: Path) -> None:
    again = make_world(tmp_path / "elsewhere", size_km=SIZE_KM, aerial_km=1.0)
    assert digests(world.folder) == digests(again.folder)


def test_another_seed_gives_another_town() -> None:
    one, two = make_town(0, SIZE_KM), make_town(1, SIZE_KM)
    assert one.bounds_utm == two.bounds_utm
    assert not set(shapely.to_wkb(one.features.geometry)) >= set(
        shapely.to_wkb(two.features.geometry)
    )


def test_a_finished_world_is_used_again_and_an_unfinished_one_is_not(world: World) -> None:
    manifest = world.folder / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = make_world(world.folder, size_km=SIZE_KM, aerial_km=1.0)
    assert again == world
    assert manifest.stat().st_mtime_ns == before


def test_every_mapped_thing_is_read_back_from_the_pbf(world: World) -> None:
    town = make_town(0, SIZE_KM)
    to_utm = Transformer.from_crs(4326, town.epsg, always_xy=True)
    want, area, length = Counter(), 0.0, 0.0
    for g, tags in zip(town.features.geometry, town.features.mapped, strict=True):
        if tags:
            want[(g.geom_type, tuple(sorted(tags.items())))] += 1
            area += g.area if tags.get("fixme") != "crossing" else 0
            length += g.length if g.geom_type == "LineString" else 0
    got, got_area, got_length = Counter(), 0.0, 0.0
    factory = osmium.geom.WKBFactory()

    def metric(wkb: str) -> shapely.Geometry:
        return shapely.transform(
            shapely.from_wkb(wkb), lambda x, y: to_utm.transform(x, y), interleaved=False
        )

    def area_like(way: osmium.osm.Way, key: tuple[tuple[str, str], ...]) -> bool:
        return way.is_closed() and ("Polygon", key) in want

    for thing in osmium.FileProcessor(str(world.pbf)).with_areas():
        tags = {t.k: t.v for t in thing.tags if (t.k, t.v) != ("type", "multipolygon")}
        key = tuple(sorted(tags.items()))
        if not tags or thing.is_relation():
            continue
        if thing.is_node():
            got[("Point", key)] += 1
        elif thing.is_way() and ("LineString", key) in want and not area_like(thing, key):
            got[("LineString", key)] += 1
            got_length += metric(factory.create_linestring(thing)).length
        elif thing.is_area() and ("Polygon", key) in want:
            got[("Polygon", key)] += 1
            if tags.get("fixme") != "crossing":  # a bow tie, of which osmium makes no rings
                got_area += metric(factory.create_multipolygon(thing)).area
    assert got == want
    assert got_length == pytest.approx(length, rel=1e-5)
    assert got_area == pytest.approx(area, rel=2e-3)


def test_holes_of_multipolygons_and_shared_nodes_survive(tmp_path: Path) -> None:
    ring = shapely.box(500000, 5000000, 500100, 5000100)
    island = shapely.box(500040, 5000040, 500060, 5000060)
    lake = ring.difference(island)
    neighbour = shapely.box(500100, 5000000, 500200, 5000100)
    tags = [{"natural": "water"}, {"landuse": "forest"}, {"note": "שלום; مرحبا"}]
    point = shapely.Point(500000, 5000000)
    file = tmp_path / "lake.osm.pbf"
    written = write_pbf(file, features([lake, neighbour, point], tags), 32630)
    assert (written.nodes, written.ways, written.relations) == (10, 3, 1)
    areas = {
        a.tags.get("natural", a.tags.get("landuse")): a.num_rings()
        for a in osmium.FileProcessor(str(file)).with_areas()
        if a.is_area()
    }
    assert areas == {"water": (1, 1), "forest": (1, 0)}
    notes = [n.tags.get("note") for n in osmium.FileProcessor(str(file)) if n.is_node()]
    assert "שלום; مرحبا" in notes


@pytest.mark.slow
def test_quackosm_reads_all_that_was_written(world: World, tmp_path: Path) -> None:
    quackosm = pytest.importorskip("quackosm")
    table = quackosm.convert_pbf_to_geodataframe(
        world.pbf, working_directory=tmp_path, ignore_cache=True, verbosity_mode="silent"
    )
    mapped = [bool(t) for t in make_town(0, SIZE_KM).features.mapped]
    assert len(table) == sum(mapped)
    assert table.geometry.apply(lambda g: len(getattr(g, "interiors", []))).sum() > 0


def test_every_class_of_the_taxonomy_occurs_on_the_map() -> None:
    seen: set[str] = set()
    for tags in make_town(0, 4.0).features.mapped:
        seen |= {f"{k}={v}" for k, v in tags.items()} | {f"{k}=*" for k in tags}
    absent = [c.name for c in default_taxonomy().classes if not seen & set(c.rules)]
    assert absent == []


def test_only_mappers_make_invalid_geometry() -> None:
    town = make_town(0, 4.0).features
    bad = ~shapely.is_valid(town.geometry)
    assert bad.any()
    assert {t.get("fixme") for t, b in zip(town.mapped, bad, strict=True) if b} == {"crossing"}


def test_the_map_is_incomplete_and_partly_out_of_date() -> None:
    town = make_town(0, 4.0).features
    building = [
        ("building" in t, "building" in m) for t, m in zip(town.truth, town.mapped, strict=True)
    ]
    real = sum(t for t, _ in building)
    unmapped = sum(t and not m for t, m in building) / real
    gone = sum(m and not t for t, m in building) / real
    assert 0.08 < unmapped < 0.4  # patchy: 15 % over the whole of a large region
    assert 0.003 < gone < 0.05


def test_scenes_are_cloud_optimized_and_carry_their_metadata(world: World) -> None:
    for catalog in (world.s2_catalog, world.aerial_catalog):
        for item in items(catalog):
            assert item.properties["proj:code"] == f"EPSG:{world.epsg}"
            for name, asset in item.assets.items():
                path = Path(asset.get_absolute_href())
                with rasterio.open(path) as file:
                    assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                    assert file.profile["tiled"]
                    assert file.nodata == 0
                    assert file.crs.to_epsg() == world.epsg
                    assert list(file.shape) == asset.extra_fields["proj:shape"]
                    assert list(file.transform)[:6] == asset.extra_fields["proj:transform"]
                    if max(file.shape) > 512:
                        assert file.overviews(1)
                    kind = "uint8" if name in ("scl", "image") else "uint16"
                    assert file.dtypes[0] == kind
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert asset.extra_fields["file:checksum"] == "1220" + digest


def test_catalogs_are_self_contained_and_hold_the_sensors_bands(world: World) -> None:
    for file in (*world.folder.glob("s2/**/*.json"), *world.folder.glob("aerial/**/*.json")):
        links = json.loads(file.read_text()).get("links", [])
        assert all(not str(link["href"]).startswith(("/", "http")) for link in links)
    for item in items(world.s2_catalog):
        assert set(item.assets) == {b.asset.split("|")[0] for b in SENTINEL_2_L2A.bands} | {"scl"}
        assert item.properties["s2:processing_baseline"] in ("02.11", "04.00")
        box = shapely.box(*(item.bbox or []))
        assert box.buffer(1e-6).covers(shapely.box(*world.bounds_lonlat))
        assert shapely.geometry.shape(item.geometry).is_valid
    assert [set(i.assets) for i in items(world.aerial_catalog)] == [{"image"}]


def test_both_scenes_agree_on_water_once_their_offsets_are_taken_off(
    world: World,
) -> None:
    old, new = items(world.s2_catalog)
    offsets = [i.assets["red"].extra_fields["raster:bands"][0]["offset"] for i in (old, new)]
    assert offsets == [0, -0.1]
    scl = [read(i, "scl") for i in (old, new)]
    water = (scl[0] == 6) & (scl[1] == 6)
    assert water.sum() > 200
    for band in ("green", "red", "nir08"):
        grids = [
            read(i, band).astype(float) * 1e-4 + o for i, o in zip((old, new), offsets, strict=True)
        ]
        k = 20 // BAND_GSD_M[band]
        values = [g[np.kron(water, np.ones((k, k), bool))] for g in grids]
        assert abs(np.median(values[0]) - np.median(values[1])) < 0.012
        # Without the offset they differ by far more.
        assert abs(np.median(values[0]) - np.median(values[1]) - 0.1) > 0.05


def test_the_scene_classification_marks_the_clouds_and_the_missing_corner(world: World) -> None:
    x0, y0, x1, y1 = world.bounds_utm
    step = 10.0
    for k, (item, acquired) in enumerate(zip(items(world.s2_catalog), PASSES, strict=True)):
        scl = read(item, "scl")
        # The sky is a function of place and seed; half a coarse pixel's shift is of no account.
        x = np.arange(x0 + step / 2, x1, step) - world.s2_shift_m[0] - 10 / 3
        y = np.arange(y1 - step / 2, y0, -step) - world.s2_shift_m[1] + 10 / 3
        thick = make_sky(x, y, acquired.cloud_cover, acquired.sun, 9000 + k).thick
        thick = thick.reshape(len(y) // 2, 2, -1, 2).mean(axis=(1, 3))
        inside = scl != NO_DATA
        cloud = np.isin(scl, [MEDIUM, HIGH])
        assert (cloud[inside & (thick > 0.35)]).mean() > 0.97
        assert (cloud[inside & (thick < 0.1)]).mean() < 0.01
        red = read(item, "red")
        gone = np.kron(scl == NO_DATA, np.ones((2, 2), bool))
        assert (red[~gone] > 0).all()
        assert (red[gone] == 0).mean() > 0.9 if gone.any() else not acquired.swath_corner
        assert item.properties["eo:cloud_cover"] == pytest.approx(
            np.isin(scl[inside], [8, 9, 10]).mean() * 100, abs=1e-3
        )


def test_a_real_extract_gets_scenes_of_its_own_region(shared: Path, tmp_path: Path) -> None:
    world = make_world(tmp_path, osm_pbf=shared / "data/monaco.osm.pbf", aerial_km=0.5)
    assert world.epsg == 32632
    assert shapely.box(*world.bounds_lonlat).contains(shapely.Point(7.4246, 43.7384))
    assert world.pbf.read_bytes() == (shared / "data/monaco.osm.pbf").read_bytes()
    scl = read(items(world.s2_catalog)[1], "scl")
    assert 0.2 < (scl == 6).mean() < 0.7  # the sea, from coastlines alone


@pytest.mark.parametrize("content", [None, b"", b"not a pbf at all"])
def test_a_bad_extract_is_a_clear_error(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "bad.osm.pbf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(GeoLinkError, match=r"bad\.osm\.pbf"):
        make_world(tmp_path / "w", osm_pbf=file)


def test_an_extract_of_one_object_has_room_around_it_and_a_continent_is_refused(
    tmp_path: Path,
) -> None:
    house = features([shapely.box(500000, 5000000, 500010, 5000012)], {"building": "yes"})
    write_pbf(tmp_path / "house.osm.pbf", house, 32630)
    _, epsg, bounds = read_extract(tmp_path / "house.osm.pbf")
    assert epsg == 32630
    assert bounds[2] - bounds[0] >= 1200
    ends = [shapely.Point(500000 + 1000 * k, 5000000) for k in range(90)]
    write_pbf(tmp_path / "wide.osm.pbf", features(ends, {"natural": "tree"}), 32630)
    with pytest.raises(GeoLinkError, match="45 km"):
        read_extract(tmp_path / "wide.osm.pbf")


def test_every_surface_is_made_of_known_materials() -> None:
    for name in COVERS:
        weight, table = variants_of(name)
        assert weight[-1] == 1
        assert ((table > 0) & (table < 0.7)).all()
