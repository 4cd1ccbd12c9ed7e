"""Embeddings on disk and maps: where they lie, what a kill leaves, what xarray reads."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401
import torch
import xarray as xr
from rasterio.transform import from_origin

from flows.embed import embed
from geolink.checkpoint import load_model
from geolink.cli import main
from geolink.reader import open_dataset
from geolink.stream import read_chips
from schemas.errors import GeoLinkError
from tests.shards import make_dataset, make_grid
from tests.tasks import TINY, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "d"
    return make_dataset(folder, shards=4, chips=13, grid=make_grid(), objects=4)


def make_scene(path: Path, height: int = 300, width: int = 410) -> Path:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (3, height, width), np.uint8)
    image[:, 100:200, 200:] //= 4
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=height, width=width, dtype="uint8",
        crs="EPSG:32633", transform=from_origin(400_000, 5_000_000, 2, 2), photometric="RGB",
    ) as file:  # fmt: skip
        file.write(image)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_without_overlap_a_chip_is_embedded_as_the_model_embeds_it(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    embed(dataset, run, tmp_path / "e", overlap=0, clusters=3, accelerator="cpu")
    model, meta = load_model(run)
    opened = open_dataset(dataset)
    found = xr.open_zarr(tmp_path / "e" / "embeddings.zarr", group="32632", decode_coords="all")
    chips = xr.open_zarr(
        tmp_path / "e" / "embeddings.zarr", group="32632/chips", decode_coords="all"
    )
    seen = 0
    for row in opened.rows:
        shard = xr.open_zarr(dataset / row.path)
        pixels = torch.from_numpy(shard["image"].values)
        mean, std = meta.band_scale(torch.device("cpu"))
        with torch.inference_mode():
            normal = (pixels.float() - mean[:, None, None]) / std[:, None, None]
            tokens = model.image_tokens(normal)[-1][:, 1:].numpy()
        for n, (west, south, east, north) in enumerate(shard["bounds"].values):
            own = found["patch"].sel(x=slice(west, east), y=slice(north, south))
            assert own.shape == (16, 4, 4)
            expected = tokens[n].reshape(4, 4, 16).transpose(2, 0, 1)
            np.testing.assert_allclose(own.values, expected, atol=5e-3)
            chip = chips["image"].sel(x=(west + east) / 2, y=(south + north) / 2)
            np.testing.assert_allclose(chip.values, tokens[n].mean(0), atol=5e-3)
            seen += 1
    assert seen == 4 * 13
    assert int(np.isfinite(chips["image"].values).all(0).sum()) == seen
    assert found.rio.crs.to_epsg() == 32632
    assert found["patch"].attrs["relative_error"] < 1e-3


def test_region_and_fusion_are_what_the_model_makes_of_a_chips_objects(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    embed(dataset, run, tmp_path / "e", overlap=0, clusters=3, accelerator="cpu")
    zarr = tmp_path / "e" / "embeddings.zarr"
    found = xr.open_zarr(zarr, group="32632")
    chips = xr.open_zarr(zarr, group="32632/chips")
    model, _ = load_model(run)
    opened = open_dataset(dataset)
    from geolink.reader import tag_table

    model.set_tag_table(torch.from_numpy(tag_table(opened).astype(np.float32)))
    for batch in read_chips(opened, None, batch_size=13):
        with torch.inference_mode():
            region = model.encode_region(batch.graph).numpy()
            normal = (batch.image.float() - 127) / 73
            fused = model.fusion_embedding(normal, batch.graph, [1])[0].numpy()
        for n, lonlat in enumerate(batch.center_lonlat.numpy()):
            x, y = _utm(lonlat)
            own = chips["region"].sel(x=x, y=y, method="nearest")
            np.testing.assert_allclose(own.values, region[n], atol=5e-3)
            near = found["fused"].sel(x=slice(x - 160, x + 160), y=slice(y + 160, y - 160))
            np.testing.assert_allclose(near.values, fused[n], atol=5e-3)


def _utm(lonlat: Any) -> tuple[float, float]:
    from schemas.grid import to_utm

    x, y = to_utm(32632).transform(*lonlat)
    return float(x), float(y)


def test_a_pixel_of_a_map_lies_where_its_patch_lies(run: Path, tmp_path: Path) -> None:
    """A dark corner of the scene is another cluster, at the place where rasterio finds it dark."""
    scene = make_scene(tmp_path / "scene.tif")
    done = embed(scene, run, tmp_path / "e", clusters=2, accelerator="cpu", kept="int8")
    with rasterio.open(scene) as source, rasterio.open(done.maps[1]) as file:
        assert file.crs == source.crs
        assert file.shape == (38, 52)
        dark, bright = ((900, 250), (100, 100), (600, 550)), ((100, 450), (300, 500))
        east, north = source.transform.c, source.transform.f
        found = {
            kind: {int(v[0]) for v in file.sample([(east + x, north - y) for x, y in places])}
            for kind, places in {"dark": dark[:1], "bright": bright}.items()
        }
        assert found["dark"].isdisjoint(found["bright"])
        assert len(found["bright"]) == 1
    with rasterio.open(done.maps[0]) as file:
        assert file.profile["driver"] == "GTiff"
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.bounds.left == 400_000
        assert file.bounds.top == 5_000_000
        assert file.res == (16, 16)
    assert (tmp_path / "e" / "pca-raster.png").exists()
    found_zarr = xr.open_zarr(tmp_path / "e" / "embeddings.zarr", group="raster",
                              decode_coords="all")  # fmt: skip
    assert found_zarr.rio.transform().c == 400_000
    assert found_zarr.rio.crs.to_epsg() == 32633


def test_the_error_of_int8_is_within_what_is_stated(run: Path, tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "scene.tif")
    embed(scene, run, tmp_path / "a", clusters=2, accelerator="cpu")
    embed(scene, run, tmp_path / "b", clusters=2, accelerator="cpu", kept="int8")
    exact, kept = (
        xr.open_zarr(tmp_path / n / "embeddings.zarr", group="raster") for n in ("a", "b")
    )
    back = kept["patch"].astype("float32") * kept["patch_scale"]
    off = np.abs(back - exact["patch"].astype("float32")).values
    stated = kept["patch"].attrs
    assert off.max() <= stated["largest_error"] + 2e-3
    assert stated["largest_error"] <= float(kept["patch_scale"].max()) / 2 * 1.0001
    assert 0 < stated["relative_error"] < 0.01
    assert stated["least_cosine"] > 0.999


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is compared to the bit with a process of one thread has one too; later tests do not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    scene = make_scene(tmp_path / "scene.tif", 500, 700)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import flows.embed as f; f.BLOCK_PX = 64\n"
        "from pathlib import Path\n"
        "f.embed(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), clusters=2, "
        "accelerator='cpu', batch_size=2)"
    )
    arguments = [sys.executable, "-c", code, str(scene), str(run)]
    begun = subprocess.Popen([*arguments, str(tmp_path / "e")], cwd=ROOT, env=os.environ)
    marks = tmp_path / "e" / ".done" / "raster"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(marks.glob("*.json"))) < 5:
        assert begun.poll() is None
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    there = len(list(marks.glob("*.json")))
    assert 5 <= there < 88
    monkeypatch.setattr("flows.embed.BLOCK_PX", 64)
    options: Any = {"clusters": 2, "accelerator": "cpu", "batch_size": 2}
    done = embed(scene, run, tmp_path / "e", **options)
    assert done.embedded.blocks == 88
    assert done.embedded.written <= 88 - there
    embed(scene, run, tmp_path / "whole", **options)
    assert files(tmp_path / "e") == files(tmp_path / "whole")


def test_a_folder_of_other_embeddings_is_refused(run: Path, tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "scene.tif")
    embed(scene, run, tmp_path / "e", clusters=2, accelerator="cpu")
    with pytest.raises(GeoLinkError, match="overlap is 1 there, and 0 now"):
        embed(scene, run, tmp_path / "e", clusters=2, overlap=0, accelerator="cpu")
    with pytest.raises(GeoLinkError, match="not empty"):
        embed(scene, run, tmp_path, clusters=2, accelerator="cpu")


def test_what_cannot_be_embedded_is_told(run: Path, dataset: Path, tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "scene.tif")
    with pytest.raises(GeoLinkError, match="has no objects"):
        embed(scene, run, tmp_path / "a", inputs="image+osm", accelerator="cpu")
    other = make_checkpoint(tmp_path / "run", patch_size=16)
    with pytest.raises(GeoLinkError, match="patches of 16 px"):
        embed(dataset, other, tmp_path / "b", accelerator="cpu")
    assert TINY.patch_size == 8


def test_not_a_number_is_no_data(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "scene.tif"
    image = np.random.default_rng(0).normal(0.2, 0.1, (3, 96, 96)).astype(np.float32)
    image[:, :32, :40] = np.nan
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=96, width=96, dtype="float32", nodata=np.nan,
        crs="EPSG:32633", transform=from_origin(400_000, 5_000_000, 2, 2),
    ) as file:  # fmt: skip
        file.write(image)
    options: Any = {"clusters": 2, "accelerator": "cpu", "bands": ("red", "green", "blue")}
    with pytest.raises(GeoLinkError, match="normalise"):
        embed(path, run, tmp_path / "a", **options)
    embed(path, run, tmp_path / "e", normalise="data", **options)
    found = xr.open_zarr(tmp_path / "e" / "embeddings.zarr", group="raster")["patch"].values
    there = np.isfinite(found).all(0)
    assert there.sum() == 12 * 12 - 4 * 5
    assert not there[:4, :5].any()


def test_the_command_prints_what_was_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = make_scene(tmp_path / "scene.tif")
    with pytest.raises(SystemExit) as stopped:
        main(["embed", str(scene), str(tmp_path / "e"), "--checkpoint", str(run), "--clusters", "2",
              "--keep", "int8", "--accelerator", "cpu", "--json"])  # fmt: skip
    assert stopped.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["embedded"]["blocks"] == 1
    assert told["embedded"]["lost"]["raster"]["patch"]["relative_error"] < 0.01
