"""A shard in xarray and rioxarray, against rasterio, pyproj and the arrays that were written."""

import json
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio.transform
import rioxarray  # noqa: F401
import xarray as xr
import zarr

from geolink.xarray import mosaic, open_shard
from pipelines.store import write_shard
from schemas import cf
from schemas.dataset import read_arrays
from schemas.errors import GeoLinkError
from schemas.findings import CHIP_FLAGS, flagged
from schemas.grid import Block
from schemas.layout import LAYOUT, UNKNOWN_TIME, Relation
from schemas.sensor import SENTINEL_2_L2A
from tests.shards import Arrays, make_grid, make_info, random_arrays

GRID = make_grid()


@pytest.fixture(scope="module", params=[Block(32632, 10, 100), Block(32733, 10, 700)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    arrays = random_arrays(3, chips=7, sensor=SENTINEL_2_L2A, grid=GRID, block=request.param)
    arrays["time"][2] = UNKNOWN_TIME
    info = make_info(GRID, SENTINEL_2_L2A)
    stored = write_shard(folder, "a", "key", arrays, {"scenes": ["x"]}, info)
    np.savez(folder / "arrays.npz", **arrays)
    return folder / stored.path


def _arrays(shard: Path) -> Arrays:
    with np.load(shard.parents[2] / "arrays.npz") as arrays:
        return dict(arrays)


def test_rioxarray_finds_the_crs_and_the_transform_of_every_chip(written: Path) -> None:
    shard, arrays = xr.open_zarr(written), _arrays(written)
    for n, box in enumerate(arrays["bounds"]):
        chip = shard.isel(chip=n)
        for name in ("image", "label_pixel"):
            assert chip[name].rio.crs.to_epsg() == arrays["epsg"][n]
            assert chip[name].rio.transform() == rasterio.transform.from_bounds(*box, 32, 32)
            assert chip[name].rio.bounds() == tuple(box)


def test_xarray_names_bands_classes_and_times_and_leaves_pixels_as_they_are(written: Path) -> None:
    shard, arrays = xr.open_zarr(written), _arrays(written)
    assert shard["image"].dtype == np.uint16
    np.testing.assert_array_equal(shard["image"].sel(band="red"), arrays["image"][:, 3])
    np.testing.assert_array_equal(
        shard["label_region"].sel({"class": "forest"}), arrays["label_region"][:, 1]
    )
    seconds = arrays["time"].astype("datetime64[s]")
    assert np.isnat(shard["time"].values[2])
    np.testing.assert_array_equal(np.delete(shard["time"].values, 2), np.delete(seconds, 2))
    about = shard["image"].attrs
    assert (about["scale"], about["offset"], about["nodata"]) == (1e-4, 0.0, 0)
    assert not {"scale_factor", "add_offset"} & {*about, *shard["image"].encoding}


def test_every_array_says_what_it_holds_and_flags_name_its_codes(written: Path) -> None:
    shard = xr.open_zarr(written)
    for spec in LAYOUT:
        assert shard[spec.name].attrs["long_name"] == spec.meaning
    relation = shard["relation"].attrs
    assert relation["flag_meanings"].split()[Relation.NEAR] == "near"
    for name in ("label_pixel", "object_class", "object_kind", "relation"):
        flags = shard[name].attrs
        assert len(flags["flag_values"]) == len(flags["flag_meanings"].split())
        assert int(shard[name].max()) <= max(flags["flag_values"])


def test_findings_of_chips_are_told_apart_by_masks_that_cf_names(written: Path) -> None:
    finding, arrays = xr.open_zarr(written)["finding"], _arrays(written)
    masks, meanings = finding.attrs["flag_masks"], finding.attrs["flag_meanings"].split()
    assert len(masks) == len(meanings) == len(CHIP_FLAGS)
    assert finding.dtype == np.uint32
    assert arrays["finding"].any()
    for mask, meaning in zip(masks, meanings, strict=True):
        here = (finding & mask) != 0
        np.testing.assert_array_equal(here, flagged(arrays["finding"], [meaning]))


def test_one_read_of_metadata_opens_a_shard(written: Path) -> None:
    group = json.loads((written / "zarr.json").read_bytes())
    inline = group["consolidated_metadata"]["metadata"]
    on_disk = {p.parent.name: json.loads(p.read_bytes()) for p in written.glob("*/zarr.json")}
    assert inline == on_disk
    for path in written.glob("*/zarr.json"):
        path.rename(path.with_name("hidden"))
    try:
        opened = zarr.open_group(written, mode="r", zarr_format=3)
        np.testing.assert_array_equal(opened["edge"][...], _arrays(written)["edge"])
    finally:
        for path in written.glob("*/hidden"):
            path.rename(path.with_name("zarr.json"))
    assert read_arrays(written.parent, written.name, ["edge"])[1]["Conventions"] == cf.CONVENTIONS


@pytest.mark.parametrize("epsg", [32601, 32632, 32660, 32701, 32733, 32760])
def test_the_projection_written_out_is_that_of_proj(epsg: int) -> None:
    ours, theirs = pyproj.CRS.from_wkt(cf.utm_wkt(epsg)), pyproj.CRS.from_epsg(epsg)
    assert ours.to_epsg(min_confidence=100) == epsg
    assert ours.equals(theirs, ignore_axis_order=True)
    mapping = cf.grid_mapping(epsg)
    named = pyproj.CRS.from_cf({k: v for k, v in mapping.items() if k != "crs_wkt"})
    here = pyproj.Transformer.from_crs(named, theirs, always_xy=True)
    assert here.transform(432_100.5, 5_000_000.25) == pytest.approx((432_100.5, 5_000_000.25))


def test_pairs_of_several_zones_have_no_common_projection(tmp_path: Path) -> None:
    arrays = random_arrays(1)
    arrays["epsg"][0] = 32633
    stored = write_shard(tmp_path, "a", "key", arrays, {})
    shard = xr.open_zarr(tmp_path / stored.path)
    assert "grid_mapping" not in shard["image"].attrs
    assert shard["epsg"].values[0] == 32633


def test_a_mosaic_puts_every_chip_where_its_bounds_are(written: Path) -> None:
    arrays, shard = _arrays(written), open_shard(written)
    whole = mosaic(shard)
    assert whole["image"].rio.crs.to_epsg() == arrays["epsg"][0]
    for n, (x0, y0, x1, y1) in enumerate(arrays["bounds"]):
        part = whole.sel(x=slice(x0, x1), y=slice(y1, y0))
        np.testing.assert_array_equal(part["image"], arrays["image"][n])
        np.testing.assert_array_equal(part["label_pixel"], arrays["label_pixel"][n])
        name = str(shard["chip"].values[n])
        np.testing.assert_array_equal(shard["image"].sel(chip=name), arrays["image"][n])
    covered = (whole["image"].values != 0).sum()
    assert covered == (arrays["image"] != 0).sum()


def test_no_shard_and_no_lattice_are_said(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="no shard"):
        open_shard(tmp_path / "nothing")
    arrays = random_arrays(2)
    arrays["bounds"][1] += 3.0
    stored = write_shard(tmp_path, "a", "key", arrays, {})
    with pytest.raises(GeoLinkError, match="lattice"):
        mosaic(open_shard(tmp_path / stored.path))
