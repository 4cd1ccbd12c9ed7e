"""Sensor presets, and parts of them."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.sensor import SENSORS, SENTINEL_2_L2A, Mask, Sensor, sensor

BASE: dict[str, Any] = {
    "name": "a", "dataset": "d", "grid": {"gsd_m": 10, "size": 64, "patch": 8},
    "pairs": Path("pairs"),
}  # fmt: skip


def _config(value: Any) -> DatasetConfig:
    return DatasetConfig.model_validate({**BASE, "sensor": value})


def test_presets_have_distinct_bands_and_show_three_of_them() -> None:
    for name, preset in SENSORS.items():
        bands = [band.name for band in preset.bands]
        assert preset.name == name
        assert len(set(bands)) == len(bands)
        if len(bands) >= 3:
            assert preset.rgb is not None
            assert set(preset.rgb) <= set(bands)
    assert len(SENTINEL_2_L2A.bands) == 12


def test_a_sensor_is_a_name_a_part_of_a_preset_or_a_table() -> None:
    assert _config("naip").resolved_sensor() == SENSORS["naip"]
    part = _config({"preset": "naip", "bands": ["nir", "red"]}).resolved_sensor()
    assert [band.name for band in part.bands] == ["nir", "red"]
    table = {
        "name": "mine", "dtype": "uint16", "nodata": 65535,
        "bands": [{"name": "grey", "asset": "data"}],
    }  # fmt: skip
    own = _config(table).resolved_sensor()
    assert isinstance(own, Sensor)
    assert (own.nodata, own.bands[0].index) == (65535, 1)


def test_bands_keep_the_order_asked_for_and_rgb_where_it_is_there() -> None:
    part = sensor("sentinel-2-l2a", ("blue", "green", "red"))
    assert [band.wavelength_nm for band in part.bands] == [490, 560, 665]
    assert part.rgb == ("red", "green", "blue")
    assert sensor("sentinel-2-l2a", ("red", "nir")).rgb is None
    assert part.radiometry == SENTINEL_2_L2A.radiometry


def test_an_unknown_sensor_or_band_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(
        GeoLinkError, match="unknown sensor 'landsat'; known: sentinel-2-l2a, landsat-c2-l2"
    ):
        _config("landsat").resolved_sensor()
    with pytest.raises(GeoLinkError, match="naip has no band 'swir'; it has: red, green"):
        _config({"preset": "naip", "bands": ["swir"]}).resolved_sensor()


def test_sentinel_2_takes_the_names_of_every_catalog() -> None:
    names = {b.name: b.asset.split("|") for b in SENTINEL_2_L2A.bands}
    assert names["red"] == ["red", "B04", "B04_10m"]
    assert names["coastal"] == ["coastal", "B01", "B01_60m"]
    assert names["nir08"] == ["nir08", "B8A", "B8A_20m"]
    assert SENTINEL_2_L2A.mask is not None
    clear = {4, 5, 6, 7, 11}
    assert not clear & set(SENTINEL_2_L2A.mask.invalid)


def test_a_mask_marks_by_values_or_bits_that_16_bits_can_hold() -> None:
    with pytest.raises(ValidationError, match="neither invalid values nor invalid_bits"):
        Mask(asset="qa")
    for field in ({"invalid": (-1,)}, {"invalid": (65536,)}, {"invalid_bits": (16,)}):
        with pytest.raises(ValidationError):
            Mask(asset="qa", **field)


def test_decibels_of_sentinel_1_fit_16_bits() -> None:
    rtc = SENSORS["sentinel-1-rtc"]
    assert 65535 * rtc.scale + rtc.offset == pytest.approx(15.535)
    assert 1 * rtc.scale + rtc.offset == pytest.approx(-49.999)
