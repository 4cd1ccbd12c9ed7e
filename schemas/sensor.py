"""Sensors: which bands an image has, and what its digital numbers mean.

A frozen preset here is the only source of truth about a sensor. Values are stored as delivered;
`physical = DN * scale + offset` with the figures written into `dataset.json`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.errors import GeoLinkError


class Band(BaseModel):
    """One spectral band of a sensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(description="Name in the dataset.")]
    asset: Annotated[str, Field(description="STAC asset key; several may be separated by `|`.")]
    index: Annotated[int, Field(ge=1, description="1-based band within the asset's file.")] = 1
    wavelength_nm: Annotated[
        float | None, Field(description="Centre wavelength in nanometres.")
    ] = None
    gsd_m: Annotated[float | None, Field(description="Native pixel size in metres.")] = None


class Mask(BaseModel):
    """A quality asset that names pixels to leave out, by their value or by bits of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: Annotated[str, Field(description="STAC asset key; several may be separated by `|`.")]
    invalid: Annotated[
        tuple[Annotated[int, Field(ge=0, le=65535)], ...],
        Field(description="Values that mark a pixel as invalid."),
    ] = ()
    invalid_bits: Annotated[
        tuple[Annotated[int, Field(ge=0, le=15)], ...],
        Field(description="Bits, the lowest is 0, any of which marks a pixel as invalid."),
    ] = ()
    nodata: Annotated[
        int, Field(ge=0, le=65535, description="Value where the scene has no data at all.")
    ] = 0

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.invalid and not self.invalid_bits:
            raise ValueError(f"mask {self.asset} names neither invalid values nor invalid_bits")
        return self


class Sensor(BaseModel):
    """Bands, storage type and radiometry of an image source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(description="Name of the sensor.")]
    bands: Annotated[tuple[Band, ...], Field(min_length=1, description="Bands in stored order.")]
    dtype: Annotated[Literal["uint8", "uint16"], Field(description="Storage type of the pixels.")]
    nodata: Annotated[int, Field(ge=0, description="Value of pixels without data.")] = 0
    scale: Annotated[float, Field(gt=0, description="physical = DN * scale + offset.")] = 1.0
    offset: Annotated[float, Field(description="physical = DN * scale + offset.")] = 0.0
    units: Annotated[str, Field(description="Unit of the physical value.")] = "1"
    mask: Annotated[Mask | None, Field(description="Cloud and quality mask, if any.")] = None
    radiometry: Annotated[
        Literal["none", "sentinel-2", "decibel"],
        Field(
            description="`sentinel-2`: DN of processing baseline 04.00 and later carry +1000, "
            "which is taken off once unless the item says it was. `decibel`: files hold linear "
            "power, stored as 10 log10 of it by scale and offset."
        ),
    ] = "none"
    rgb: Annotated[
        tuple[str, str, str] | None, Field(description="Bands shown as red, green, blue.")
    ] = None


def _s2(name: str, code: str, wavelength_nm: float, gsd_m: int) -> Band:
    # Names of Earth Search v1 and stactools; Earth Search v0 and Planetary Computer; Copernicus
    # Data Space, which serves each band at several pixel sizes, of which the native one is taken.
    asset = f"{name}|{code}|{code}_{gsd_m}m"
    return Band(name=name, asset=asset, wavelength_nm=wavelength_nm, gsd_m=gsd_m)


SENTINEL_2_L2A = Sensor(
    name="sentinel-2-l2a",
    # Bands of 20 and 60 m are brought to the grid by `resampling` of the config's scenes, bilinear
    # unless it says otherwise; those of 10 m are copied on a grid of 10 m.
    bands=(
        _s2("coastal", "B01", 443, 60),
        _s2("blue", "B02", 490, 10),
        _s2("green", "B03", 560, 10),
        _s2("red", "B04", 665, 10),
        _s2("rededge1", "B05", 705, 20),
        _s2("rededge2", "B06", 740, 20),
        _s2("rededge3", "B07", 783, 20),
        _s2("nir", "B08", 842, 10),
        _s2("nir08", "B8A", 865, 20),
        _s2("nir09", "B09", 945, 60),
        _s2("swir16", "B11", 1610, 20),
        _s2("swir22", "B12", 2190, 20),
    ),
    dtype="uint16",
    scale=1e-4,
    units="surface reflectance",
    # No data, saturated, cloud shadow, medium and high cloud probability, thin cirrus.
    mask=Mask(asset="scl|SCL|SCL_20m", invalid=(0, 1, 3, 8, 9, 10)),
    radiometry="sentinel-2",
    rgb=("red", "green", "blue"),
)


def _oli(name: str, number: int, wavelength_nm: float) -> Band:
    # Names of Planetary Computer, Earth Search and USGS; of USGS before STAC 1.0.
    asset = f"{name}|SR_B{number}|SR_B{number}.TIF"
    return Band(name=name, asset=asset, wavelength_nm=wavelength_nm, gsd_m=30)


LANDSAT_C2_L2 = Sensor(
    name="landsat-c2-l2",
    # Landsat 8 and 9. For 4 to 7 leave coastal out: their other bands have the same names in
    # catalogs of STAC 1.0. Their pixels' edges are odd multiples of 15 m, so that on a grid of
    # 30 m all bands are resampled by half a pixel.
    bands=(
        _oli("coastal", 1, 443),
        _oli("blue", 2, 482),
        _oli("green", 3, 561),
        _oli("red", 4, 655),
        _oli("nir08", 5, 865),
        _oli("swir16", 6, 1609),
        _oli("swir22", 7, 2201),
    ),
    dtype="uint16",
    scale=2.75e-5,
    offset=-0.2,
    units="surface reflectance",
    # Landsat 8-9 Collection 2 Level 2 Science Product Guide, table of QA_PIXEL: fill, dilated
    # cloud, cirrus, cloud, cloud shadow. Fill is exactly 1.
    mask=Mask(asset="qa_pixel|QA_PIXEL|QA_PIXEL.TIF", invalid_bits=(0, 1, 2, 3, 4), nodata=1),
    rgb=("red", "green", "blue"),
)

_VV_VH = (Band(name="vv", asset="vv|VV", gsd_m=10), Band(name="vh", asset="vh|VH", gsd_m=10))

SENTINEL_1_GRD = Sensor(
    name="sentinel-1-grd",
    # Amplitude as delivered: neither calibrated nor corrected for terrain. The files lie in radar
    # geometry and are placed by their ground control points, which is right for flat land only.
    bands=_VV_VH,
    dtype="uint16",
    units="amplitude, digital number",
)

SENTINEL_1_RTC = Sensor(
    name="sentinel-1-rtc",
    # Terrain-corrected power (float) as decibels in steps of 0.001 from -50 dB: DN 1 to 65535 is
    # -49.999 to 15.535 dB, finer than speckle and the sensor's noise floor need.
    bands=_VV_VH,
    dtype="uint16",
    scale=0.001,
    offset=-50.0,
    units="dB",
    radiometry="decibel",
)

_RGB = (
    Band(name="red", asset="image", index=1, wavelength_nm=650),
    Band(name="green", asset="image", index=2, wavelength_nm=550),
    Band(name="blue", asset="image", index=3, wavelength_nm=470),
)

NAIP = Sensor(
    name="naip",
    bands=(*_RGB, Band(name="nir", asset="image", index=4, wavelength_nm=850)),
    dtype="uint8",
    units="digital number",
    rgb=("red", "green", "blue"),
)

AERIAL_RGB = Sensor(
    name="aerial-rgb",
    bands=_RGB,
    dtype="uint8",
    units="digital number",
    rgb=("red", "green", "blue"),
)

SENSORS: dict[str, Sensor] = {
    s.name: s
    for s in (
        SENTINEL_2_L2A, LANDSAT_C2_L2, SENTINEL_1_GRD, SENTINEL_1_RTC, NAIP, AERIAL_RGB,
    )
}  # fmt: skip


def sensor(name: str, bands: tuple[str, ...] | None = None) -> Sensor:
    """A preset, or a part of its bands in the order given.

    Raises GeoLinkError for an unknown sensor or band.
    """
    if name not in SENSORS:
        raise GeoLinkError(f"unknown sensor {name!r}; known: {', '.join(SENSORS)}")
    preset = SENSORS[name]
    if bands is None:
        return preset
    by_name = {b.name: b for b in preset.bands}
    unknown = [b for b in bands if b not in by_name]
    if unknown:
        raise GeoLinkError(f"{name} has no band {unknown[0]!r}; it has: {', '.join(by_name)}")
    rgb = preset.rgb if preset.rgb and set(preset.rgb) <= set(bands) else None
    return preset.model_copy(update={"bands": tuple(by_name[b] for b in bands), "rgb": rgb})
