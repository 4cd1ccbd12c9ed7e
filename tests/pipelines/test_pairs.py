"""Imported pairs: the five real ones against geopandas and PIL, and broken ones."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from PIL import Image
from pyproj import Geod

from pipelines.objects import clip
from pipelines.pairs import Pairs, _parse_label, plan_pairs, read_pairs
from schemas.config import ObjectOptions, Splits
from schemas.dataset import DatasetInfo
from schemas.errors import GeoLinkError
from schemas.grid import Grid
from schemas.layout import UNKNOWN_TIME
from schemas.sensor import SENTINEL_2_L2A
from tests.shards import make_info

GRID = Grid(gsd_m=1.0, size=64, patch=16)
INFO = make_info(GRID, aligned=False, drop_keys=())
ONE_SPLIT = Splits(train=1, val=0, test=0)
BOX = (9.0, 48.0, 9.002, 48.001)


@pytest.fixture
def real(shared: Path) -> Path:
    return shared / "data" / "pairs"


def _read(folder: Path, info: DatasetInfo = INFO, splits: Splits = ONE_SPLIT) -> Pairs:
    shards, skipped = plan_pairs(folder, info.grid, splits)
    assert skipped == {}
    assert len(shards) == 1
    return read_pairs(shards[0], info)


def make_pair(folder: Path, name: str, **changes: object) -> Path:
    """A pair with a house, a road and a tree; the image is red, its top left quarter blue."""
    path = folder / name
    path.mkdir(parents=True)
    west, south, east, north = BOX
    image = np.zeros((40, 80, 3), np.uint8)
    image[..., 0] = 200
    image[:20, :40] = (0, 0, 200)
    Image.fromarray(image).save(path / f"{name}.png")
    meta = {"bounds_lonlat": BOX, "time": [2021, 5, 17, 12, 30], **changes}
    (path / "meta.json").write_text(json.dumps(meta))
    x, y = (west + east) / 2, (south + north) / 2
    _write(
        path / f"{name}_polygon.geojson", [(shapely.box(west, y, x, north), "building:building")]
    )
    _write(
        path / f"{name}_line.geojson",
        [(shapely.LineString([(west, y), (east, y)]), "highway:path")],
    )
    _write(
        path / f"{name}_point.geojson",
        [(shapely.Point(x, y), "natural:tree;leaf_type:needleleaved")],
    )
    return path


def _write(path: Path, features: list[tuple[shapely.Geometry | None, str | None]]) -> None:
    path.write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {
                        "type": "Feature",
                        "properties": {"label": label},
                        "geometry": g and json.loads(shapely.to_geojson(g)),
                    }
                    for g, label in features
                ],
            }
        )
    )


def test_every_object_of_the_real_pairs_is_imported(real: Path) -> None:
    pairs = _read(real)
    assert sorted(pairs.scenes) == sorted(p.name for p in real.iterdir())
    assert pairs.counts == pairs.features.counts == {}
    objects = clip(pairs.features, pairs.arrays["bounds"], ObjectOptions(), frame=pairs.frame)
    assert objects.counts == {}
    for n, (name, rows) in enumerate(zip(pairs.scenes, pairs.rows_of_pair(), strict=True)):
        files = sorted((real / name).glob("*.geojson"))
        frame = geopandas.pd.concat([geopandas.read_file(f) for f in files]).explode()
        of_chip = objects.chip == n
        assert of_chip.sum() == len(rows) == len(frame)
        epsg = int(pairs.arrays["epsg"][n])
        assert epsg == frame.estimate_utm_crs().to_epsg()
        area = shapely.area(objects.geometry[of_chip]).sum()
        # Zone metres are up to 0.04 % short of metres on the ground, and 0.08 % in area.
        assert area == pytest.approx(frame.to_crs(epsg).area.sum(), rel=2e-3)
        tags = {pairs.features.tags[t] for t in pairs.features.tag[
            pairs.features.tag_offset[rows[0]] : pairs.features.tag_offset[rows[-1] + 1]
        ]}  # fmt: skip
        words = {w for label in frame.label for w in label.split(";")}
        assert {t.replace("=", ":") for t in tags if not t.endswith("=yes")} <= words
        assert len(tags) == len(words)
    assert (pairs.features.osm == 0).all()


def test_objects_of_the_real_pairs_lie_on_their_pixels(real: Path) -> None:
    """A place at the share (u, v) of the box of degrees is at the share (u, v) of the image."""
    pairs = _read(real)
    for n, (name, rows) in enumerate(zip(pairs.scenes, pairs.rows_of_pair(), strict=True)):
        west, south, east, north = json.loads((real / name / "meta.json").read_text())[
            "bounds_lonlat"
        ]
        x0, y0, x1, y1 = pairs.arrays["bounds"][n]
        found = shapely.get_coordinates(pairs.features.geometry[rows])
        found = (found - [x0, y0]) / [x1 - x0, y1 - y0]
        lonlat = np.concatenate(
            [
                shapely.get_coordinates(geopandas.read_file(f).geometry)
                for f in sorted((real / name).glob("*.geojson"))
            ]
        )
        share = (lonlat - [west, south]) / [east - west, north - south]
        assert np.allclose(sorted(found.tolist()), sorted(share.tolist()), atol=1e-9)
        # North-up, and the same picture as the file shrunk to the same grid of pixels.
        with Image.open(real / name / f"{name}.jpg") as image:
            wide = np.asarray(image.convert("RGB"), np.float64)
        cell = [np.array_split(np.arange(k), 8) for k in wide.shape[:2]]
        coarse = [[wide[np.ix_(i, j)].mean(axis=(0, 1)) for j in cell[1]] for i in cell[0]]
        mine = pairs.arrays["image"][n].reshape(3, 8, 8, 8, 8).mean(axis=(2, 4)).transpose(1, 2, 0)
        assert np.abs(mine - np.array(coarse)).max() < 12
        assert np.abs(mine - np.array(coarse)).mean() < 2


def test_a_pair_is_as_wide_and_high_as_its_box(tmp_path: Path) -> None:
    make_pair(tmp_path, "a")
    pairs = _read(tmp_path)
    x0, y0, x1, y1 = pairs.arrays["bounds"][0]
    geod = Geod(ellps="WGS84")
    west, south, east, north = BOX
    assert x1 - x0 == pytest.approx(geod.inv(west, 48.0005, east, 48.0005)[2])
    assert y1 - y0 == pytest.approx(geod.inv(9.001, south, 9.001, north)[2])
    centre = geopandas.GeoSeries([shapely.Point(9.001, 48.0005)], crs=4326).to_crs(32632)[0]
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((centre.x, centre.y))
    assert pairs.arrays["center_lonlat"].tolist() == [
        [pytest.approx(9.001), pytest.approx(48.0005)]
    ]
    house = pairs.features.geometry[pairs.features.kind == 2][0]
    assert shapely.bounds(house) == pytest.approx([x0, (y0 + y1) / 2, (x0 + x1) / 2, y1])
    image = pairs.arrays["image"][0]
    assert image[:, :30, :30].reshape(3, -1).mean(axis=1).tolist() == [0, 0, 200]
    assert image[:, 34:, 34:].reshape(3, -1).mean(axis=1).tolist() == [200, 0, 0]


def test_identity_and_time_come_from_the_pair(tmp_path: Path) -> None:
    times = {"a": [2021, 5, 17, 12, 30], "b": 2020, "c": None, "d": [2019, 2]}
    for name, time in times.items():
        make_pair(tmp_path, name, time=time)
    pairs = _read(tmp_path)
    seconds = dict(zip(pairs.scenes, pairs.arrays["time"].tolist(), strict=True))
    assert seconds == {
        "a": datetime(2021, 5, 17, 12, 30, tzinfo=UTC).timestamp(),
        "b": datetime(2020, 1, 1, tzinfo=UTC).timestamp(),
        "c": UNKNOWN_TIME,
        "d": datetime(2019, 2, 1, tzinfo=UTC).timestamp(),
    }
    ids = pairs.arrays["chip_id"]
    assert (ids[:, 0] == 0).all()
    assert (np.diff(ids[:, 1].astype(object)) > 0).all()
    assert pairs.arrays["scene"].tolist() == [0, 1, 2, 3]
    assert pairs.arrays["valid"].tolist() == [1, 1, 1, 1]


Break = Callable[[Path], None]


def _cut_image(pair: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))
    (pair / "x.png").unlink()
    image.save(pair / "x.jpg")
    data = (pair / "x.jpg").read_bytes()
    (pair / "x.jpg").write_bytes(data[: len(data) // 2])


def _meta(**changes: object) -> Break:
    def change(pair: Path) -> None:
        meta = json.loads((pair / "meta.json").read_text())
        (pair / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "meta.json").unlink(), "pair_without_meta"),
        (lambda p: (p / "meta.json").write_text("{"), "pair_damaged_meta"),
        (lambda p: (p / "meta.json").write_text("[]"), "pair_damaged_meta"),
        (_meta(bounds_lonlat=None), "pair_damaged_meta"),
        (_meta(bounds_lonlat=[1, 2, 3]), "pair_damaged_meta"),
        (_meta(time="yesterday"), "pair_damaged_meta"),
        (_meta(bounds_lonlat=[9, 48, 8, 49]), "pair_bad_bounds"),
        (_meta(bounds_lonlat=[9, 48, float("nan"), 49]), "pair_bad_bounds"),
        (_meta(bounds_lonlat=[9, 86, 9.1, 86.1]), "pair_outside_utm"),
        (lambda p: (p / "x.png").unlink(), "pair_without_image"),
        (lambda p: shutil.copy(p / "x.png", p / "y.png"), "pair_with_several_images"),
        (lambda p: (p / "x.png").write_bytes(b""), "pair_damaged_image"),
        (_cut_image, "pair_damaged_image"),
        (lambda p: (p / "x_line.geojson").write_text("{}"), "pair_damaged_vectors"),
        (lambda p: (p / "x_line.geojson").write_bytes(b"\xff{"), "pair_damaged_vectors"),
        (
            lambda p: (p / "x_line.geojson").write_text(
                '{"features": [{"properties": {"label": "a:b"}, "geometry": {"type": "Circle"}}]}'
            ),
            "pair_damaged_vectors",
        ),
    ],
)
def test_a_broken_pair_is_skipped_and_counted(damage: Break, reason: str, tmp_path: Path) -> None:
    make_pair(tmp_path, "good")
    damage(make_pair(tmp_path, "x"))
    shards, skipped = plan_pairs(tmp_path, GRID, ONE_SPLIT)
    pairs = read_pairs(shards[0], INFO)
    assert pairs.scenes == ["good"]
    assert {**skipped, **pairs.counts} == {reason: 1}
    assert len(pairs.arrays["image"]) == 1
    assert (pairs.frame == 0).all()


def test_a_pair_may_lack_vectors_and_features_may_lack_tags(tmp_path: Path) -> None:
    bare = make_pair(tmp_path, "bare")
    for file in bare.glob("*.geojson"):
        file.unlink()
    odd = make_pair(tmp_path, "odd")
    point = shapely.Point(9.001, 48.0005)
    _write(
        odd / "odd_point.geojson", [(point, ""), (None, "a:b"), (point, None), (point, "name:A")]
    )
    _write(odd / "odd_line.geojson", [])
    pairs = _read(tmp_path, INFO.model_copy(update={"drop_keys": ("na*",)}))
    assert pairs.counts == {"feature_filtered": 4}
    rows = dict(zip(pairs.scenes, pairs.rows_of_pair(), strict=True))
    assert len(rows["bare"]) == 0
    assert pairs.features.kind[rows["odd"]].tolist() == [2]


def test_a_shard_whose_pairs_are_all_broken_is_empty(tmp_path: Path) -> None:
    _cut_image(make_pair(tmp_path, "x"))
    pairs = _read(tmp_path)
    assert pairs.counts == {"pair_damaged_image": 1}
    assert pairs.arrays["image"].shape == (0, 3, 64, 64)
    assert pairs.arrays["chip_id"].shape == (0, 2)
    objects = clip(pairs.features, pairs.arrays["bounds"], ObjectOptions(), frame=pairs.frame)
    assert objects.arrays()["object_offset"].tolist() == [0]


def test_a_new_pair_changes_its_own_shard_only(tmp_path: Path) -> None:
    for n in range(40):
        make_pair(tmp_path, f"p{n}", bounds_lonlat=[n, 10, n + 0.01, 10.01])
    splits = Splits(train=0.6, val=0.2, test=0.2)
    before, _ = plan_pairs(tmp_path, GRID, splits, per_shard=5)
    assert sum(len(s.pairs) for s in before) == 40
    assert max(len(s.pairs) for s in before) <= 5
    assert {s.split for s in before} == {"train", "val", "test"}
    assert len({s.name for s in before}) == len(before)
    make_pair(tmp_path, "new")
    after, _ = plan_pairs(tmp_path, GRID, splits, per_shard=5)
    gone, come = set(before) - set(after), set(after) - set(before)
    assert len(gone) == 1
    old = {n for s in gone for n in s.pairs}
    assert {n for s in come for n in s.pairs} - old == {"new"}


def test_a_changed_file_changes_the_digest(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "x")
    seen = set()

    def digest() -> str:
        return plan_pairs(tmp_path, GRID, ONE_SPLIT)[0][0].digests[0]

    seen.add(digest())
    for file in sorted(pair.iterdir()):
        file.write_bytes(file.read_bytes() + b" ")
        seen.add(digest())
    (pair / "x_line.geojson").unlink()
    seen.add(digest())
    assert len(seen) == 7
    (pair / "notes.txt").write_text("not read")
    assert digest() in seen


def test_a_label_becomes_tags() -> None:
    assert _parse_label("highway:service;oneway:oneway") == {"highway": "service", "oneway": "yes"}
    assert _parse_label("building:part:yes;roof:shape:flat") == {
        "building:part": "yes", "roof:shape": "flat",
    }  # fmt: skip
    assert _parse_label("opening_hours:Mo-Fr 08:00-12:00;shop:a;b") == {
        "opening_hours": "Mo-Fr 08:00-12:00", "shop": "a;b",
    }  # fmt: skip
    assert _parse_label("") == _parse_label("nothing") == {}


def test_a_folder_without_pairs_is_told(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="is missing"):
        plan_pairs(tmp_path / "x", GRID, ONE_SPLIT)
    (tmp_path / "a").mkdir()
    with pytest.raises(GeoLinkError, match=r"no pair that can be read \(pair_without_meta: 1\)"):
        plan_pairs(tmp_path, GRID, ONE_SPLIT)


def test_a_sensor_that_is_not_rgb_is_told(tmp_path: Path) -> None:
    make_pair(tmp_path, "x")
    shards, _ = plan_pairs(tmp_path, GRID, ONE_SPLIT)
    info = make_info(GRID, SENTINEL_2_L2A, aligned=False)
    with pytest.raises(GeoLinkError, match="use sensor aerial-rgb"):
        read_pairs(shards[0], info)
