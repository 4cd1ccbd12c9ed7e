"""Raster files read one by one say where they lie, what their bands are, and what they lack."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.warp
from pyproj import Geod, Transformer
from rasterio.transform import Affine, from_origin

from pipelines.pixels import look, read_pixels, read_window
from schemas.errors import GeoLinkError

UTM = from_origin(500_000.0, 5_400_000.0, 10.0, 10.0)


def write(path: Path, array: Any, transform: Affine | None = UTM, **profile: Any) -> Path:
    count, height, width = array.shape
    options = {
        "driver": "GTiff", "count": count, "height": height, "width": width,
        "dtype": array.dtype, "crs": "EPSG:32632", **profile,
    }  # fmt: skip
    if transform is not None:
        options["transform"] = transform
    with rasterio.open(path, "w", **options) as file:
        file.write(array)
    return path


@pytest.fixture
def image() -> Any:
    return np.random.default_rng(0).integers(0, 255, (3, 40, 60), np.uint8)


def test_pixels_and_bounds_are_those_of_rasterio(tmp_path: Path, image: Any) -> None:
    path = write(tmp_path / "a.tif", image, photometric="RGB", nodata=0)
    found = read_pixels(path)
    np.testing.assert_array_equal(found.image, image)
    assert found.bands == ("red", "green", "blue")
    assert found.nodata == 0
    with rasterio.open(path) as file:
        expected = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
    assert found.bounds_lonlat == pytest.approx(expected, abs=1e-7)
    assert found.gsd_m == pytest.approx(10 / 0.9996, rel=1e-4)


def test_a_pixel_in_degrees_is_measured_on_the_ground(tmp_path: Path, image: Any) -> None:
    path = write(tmp_path / "a.tif", image, from_origin(9.0, 60.0, 0.001, 0.001), crs="EPSG:4326")
    found = read_pixels(path)
    _, _, right = Geod(ellps="WGS84").inv(9.03, 59.98, 9.031, 59.98)
    _, _, down = Geod(ellps="WGS84").inv(9.03, 59.98, 9.03, 59.979)
    assert found.gsd_m == pytest.approx(np.sqrt(right * down), rel=1e-4)


def test_an_image_across_the_180th_meridian_has_an_east_beyond_it(
    tmp_path: Path, image: Any
) -> None:
    x, y = Transformer.from_crs(4326, 32660, always_xy=True).transform(179.999, 10.0)
    path = write(tmp_path / "a.tif", image, from_origin(x, y, 10, 10), crs="EPSG:32660")
    bounds = read_pixels(path).bounds_lonlat
    assert bounds is not None
    west, _, east, _ = bounds
    assert 179.9 < west < 180 < east < 180.1


def test_names_and_wavelengths_of_bands_are_taken_from_the_file(tmp_path: Path, image: Any) -> None:
    path = write(tmp_path / "a.tif", image)
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B04", "B03", "B02")
        file.update_tags(1, ns="IMAGERY", CENTRAL_WAVELENGTH_UM="0.665")
        file.update_tags(2, wavelength="560", wavelength_units="Nanometers")
    found = read_pixels(path)
    assert found.bands == ("B04", "B03", "B02")
    assert found.wavelength_nm == (pytest.approx(665), pytest.approx(560), None)


def test_an_alpha_band_is_no_band_of_the_image(tmp_path: Path) -> None:
    array = np.full((4, 8, 8), 7, np.uint8)
    path = write(tmp_path / "a.tif", array, photometric="RGB", alpha="YES")
    assert read_pixels(path).image.shape == (3, 8, 8)


def test_a_file_without_a_place_is_read_but_is_no_scene(tmp_path: Path, image: Any) -> None:
    path = write(tmp_path / "a.tif", image, None, crs=None)
    assert read_pixels(path).bounds_lonlat is None
    with pytest.raises(GeoLinkError, match="no coordinate reference system"):
        look(path)
    with pytest.raises(GeoLinkError, match="no geotransform"):
        look(write(tmp_path / "b.tif", image, None))


@pytest.mark.parametrize(
    ("transform", "dtype", "message"),
    [
        (UTM @ Affine.rotation(20), np.uint8, "turned"),
        (UTM, np.int32, "int32"),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, image: Any, transform: Affine, dtype: Any, message: str
) -> None:
    with pytest.raises(GeoLinkError, match=message):
        look(write(tmp_path / "a.tif", image.astype(dtype), transform))


def test_a_window_is_that_part_of_the_whole(tmp_path: Path, image: Any) -> None:
    scene = look(write(tmp_path / "a.tif", image))
    np.testing.assert_array_equal(read_window(scene, 5, 7, 20, 30), image[:, 5:25, 7:37])


def test_what_is_no_raster_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"no")
    with pytest.raises(GeoLinkError, match="cannot be read as a raster"):
        read_pixels(tmp_path / "a.tif")
