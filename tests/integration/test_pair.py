"""Images of a benchmark and their OSM: drawn in their own CRS, found on the same pixels."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import osmium.osm.mutable as mutable
import pytest
import rasterio
import rasterio.features
import shapely
from PIL import Image
from pyproj import Transformer
from rasterio.transform import from_origin
from scipy.ndimage import binary_dilation, binary_erosion

from geolink.cli import main
from geolink.reader import open_dataset, read_shard_at
from geolink.tasks.sources import open_data
from pipelines.pairing import Paired, find_pictures, pair_images
from pipelines.pairs import _name_hash
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

SIZE = 96
LON, LAT = 11.9, 48.1
"""Far from the middle of its UTM zone, so that grid north is not true north."""


@pytest.fixture(scope="module")
def houses() -> Any:
    """Boxes in degrees, some metres to tens of metres wide, over about two kilometres."""
    rng = np.random.default_rng(4)
    x, y = LON + rng.uniform(-0.012, 0.012, 900), LAT + rng.uniform(-0.009, 0.009, 900)
    w, h = rng.uniform(2e-4, 5e-4, 900), rng.uniform(2e-4, 4e-4, 900)
    return shapely.box(x, y, x + w, y + h)


@pytest.fixture(scope="module")
def pbf(houses: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("osm") / "houses.osm.pbf"
    with osmium.SimpleWriter(str(path)) as writer:
        corners = shapely.get_coordinates(houses).reshape(len(houses), 5, 2)[:, :4]
        for n, lonlat in enumerate(corners.reshape(-1, 2).tolist(), start=1):
            writer.add_node(mutable.Node(id=n, location=tuple(lonlat), version=1))
        for n in range(len(houses)):
            nodes = [4 * n + k for k in (1, 2, 3, 4, 1)]
            tags = {"building": "house", "note:hours": "08:00-12:00;13:00-18:00"}
            writer.add_way(mutable.Way(id=n + 1, nodes=nodes, tags=tags, version=1))
    return path


def draw(path: Path, houses: Any, epsg: int, centre: tuple[float, float]) -> Path:
    """A picture of 192 m, white where there is a house, in a CRS."""
    to = Transformer.from_crs(4326, epsg, always_xy=True)
    moved = shapely.transform(houses, lambda p: np.stack(to.transform(*p.T), 1))
    x, y = to.transform(*centre)
    transform = from_origin(x - SIZE, y + SIZE, 2, 2)
    drawn = rasterio.features.rasterize(moved, (SIZE, SIZE), transform=transform)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.repeat(np.where(drawn, 250, 60).astype(np.uint8)[None], 3, 0)
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=SIZE, width=SIZE, dtype="uint8",
        crs=f"EPSG:{epsg}", transform=transform, photometric="RGB",
    ) as file:  # fmt: skip
        file.write(image)
    return path


@pytest.fixture(scope="module")
def images(houses: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in three splits, in four reference systems; one without any place."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n, epsg in enumerate((32632, 32633, 3035, 25832) * 3):
        split, label = ("train", "train", "val", "test")[n % 4], ("dense", "sparse")[n % 2]
        at = (LON + rng.uniform(-0.008, 0.008), LAT + rng.uniform(-0.006, 0.006))
        draw(folder / split / label / f"scene-{n}.tif", houses, epsg, at)
    Image.new("RGB", (8, 8)).save(folder / "train" / "dense" / "lost.png")
    return folder


@pytest.fixture(scope="module")
def paired(images: Path, pbf: Path, tmp_path_factory: pytest.TempPathFactory) -> Paired:
    out = tmp_path_factory.mktemp("paired")
    return pair_images(images, out / "p", str(pbf), cache=out / "cache", patch=8)


def same_outlines(shown: Any, said: Any) -> None:
    """Equal but for pixels on outlines and in gaps thinner than one, of which there are few; and
    less alike if one is moved by a pixel."""
    near = np.ones((3, 3), bool)
    missing = binary_erosion(shown, near) & ~said
    beyond = (said & ~binary_dilation(shown, near))[1:-1, 1:-1]
    assert missing.mean() < 0.002
    assert beyond.mean() < 0.002
    inner = np.s_[1:-1, 1:-1]
    moved = [np.roll(said, (dy, dx), (0, 1))[inner] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    alike = [(shown[inner] == m).mean() for m in moved]
    assert np.argmax(alike) == 4


def test_objects_lie_on_the_pixels_that_show_them_whatever_the_crs(paired: Paired) -> None:
    dataset = open_dataset(paired.config.parent / "dataset")
    seen = 0
    for row in dataset.rows:
        arrays, attributes = read_shard_at(Path(str(dataset.path)) / row.path)
        for image, label in zip(arrays["image"], arrays["label_pixel"]):
            shown, said = image[0] > 150, label > 0
            same_outlines(shown, said)
            seen += 1
        assert len(attributes["scenes"]) == row.chips
    assert seen == paired.images == 12


def test_splits_and_classes_are_those_of_the_folders(paired: Paired, images: Path) -> None:
    with paired.labels.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["label"] for line in lines} == {"dense", "sparse"}
    of_split = {_name_hash(line["id"]): line["split"] for line in lines}
    dataset = open_dataset(paired.config.parent / "dataset")
    found = {}
    for row in dataset.rows:
        arrays, _ = read_shard_at(Path(str(dataset.path)) / row.path)
        found |= {int(packed[1]): row.split for packed in arrays["chip_id"]}
    assert found == of_split
    assert list(paired.skipped) == ["train/dense/lost.png"]
    assert "bounds.csv" in paired.skipped["train/dense/lost.png"]


def test_tags_come_as_they_are_in_osm(paired: Paired) -> None:
    meta = next(paired.pairs.glob("*/osm_polygon.geojson"))
    tags = json.loads(meta.read_text())["features"][0]["properties"]["tags"]
    assert tags["building"] == "house"


def test_what_comes_out_is_data_of_a_task_with_osm(paired: Paired) -> None:
    from geolink.tasks.sources.files import read_pixels

    config = TaskConfig(
        checkpoint=Path("none"), data=paired.config.parent / "dataset", labels=paired.labels
    )
    data = open_data(config, read_pixels)
    assert data.has_graphs
    assert data.classes == ("dense", "sparse")
    assert {s: len(p) for s, p in data.splits.items()} == {"train": 6, "val": 3, "test": 3}
    batch = next(data.batches("train"))
    assert batch.graph is not None
    assert batch.graph.nodes > 6


def test_run_again_nothing_is_made_and_what_is_gone_is_removed(
    paired: Paired, images: Path, pbf: Path, tmp_path: Path
) -> None:
    some = tmp_path / "images"
    shutil.copytree(images, some)
    cache = paired.config.parents[1] / "cache"
    first = pair_images(some, tmp_path / "p", str(pbf), cache=cache, patch=8)
    assert first.written == 12
    next((some / "test").rglob("*.tif")).unlink()
    again = pair_images(some, tmp_path / "p", str(pbf), cache=cache, patch=8)
    assert (again.images, again.written) == (11, 0)
    assert len(list((tmp_path / "p" / "pairs").iterdir())) == 11


def test_what_was_not_made_here_is_not_removed(
    paired: Paired, images: Path, pbf: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs" / "mine").mkdir(parents=True)
    with pytest.raises(GeoLinkError, match="was not made by"):
        pair_images(images, tmp_path, str(pbf), cache=paired.config.parents[1] / "cache", patch=8)
    assert (tmp_path / "pairs" / "mine").exists()


def test_images_with_a_table_of_bounds_are_paired_by_it(
    houses: Any, pbf: Path, paired: Paired, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    west, south, east, north = box = (LON - 0.002, LAT - 0.0015, LON + 0.002, LAT + 0.0015)
    transform = rasterio.transform.from_bounds(*box, SIZE, SIZE)
    drawn = rasterio.features.rasterize(houses, (SIZE, SIZE), transform=transform)
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.where(drawn, 250, 60).astype(np.uint8)).convert("RGB").save(images / "a.png")
    line = f"a.png,{west},{south},{east},{north},dense,test"
    (images / "bounds.csv").write_text(f"file,west,south,east,north,label,split\n{line}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["pair", str(images), str(tmp_path / "p"), "--osm", str(pbf), "--patch", "8",
              "--cache", str(paired.config.parents[1] / "cache"), "--json"])  # fmt: skip
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    dataset = open_dataset(tmp_path / "p" / "dataset")
    (row,) = dataset.rows
    arrays, _ = read_shard_at(tmp_path / "p" / "dataset" / row.path)
    shown, said = arrays["image"][0, 0] > 150, arrays["label_pixel"][0] > 0
    same_outlines(shown, said)
    assert row.split == "test"


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("file,west\na.png,1\n", "needs the columns"),
        ("file,west,south,east,north\na.png,1,2,x,4\n", "not four numbers"),
        ("file,west,south,east,north\na.png,9,2,1,4\n", "no box of degrees"),
        ("file,west,south,east,north\nb.png,1,2,3,4\n", "does not say where it lies"),
    ],
)
def test_bounds_that_are_none_are_told(tmp_path: Path, bounds: str, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "bounds.csv").write_text(bounds)
    with pytest.raises(GeoLinkError, match=message):
        find_pictures(tmp_path)


def test_a_geotiff_that_pairs_cannot_hold_is_told(tmp_path: Path) -> None:
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=8, width=8, dtype="uint16",
        crs="EPSG:32632", transform=from_origin(500_000, 5_000_000, 1, 1),
    ) as file:  # fmt: skip
        file.write(np.ones((4, 8, 8), np.uint16))
    with pytest.raises(GeoLinkError, match="4 bands of uint16"):
        find_pictures(tmp_path)
