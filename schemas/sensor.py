"""Sensors: which bands an image has, and what its digital numbers mean.

A frozen preset here is the only source of truth about a sensor. Values are stored as delivered;
`physical = DN * scale + offset` with the figures written into `dataset.json`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    """A quality asset whose values name pixels to leave out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asset: Annotated[str, Field(description="STAC asset key; several may be separated by `|`.")]
    invalid: Annotated[tuple[int, ...], Field(description="Values that mark a pixel as invalid.")]


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
        Literal["none", "sentinel-2"],
        Field(
            description="`sentinel-2`: DN of processing baseline 04.00 and later carry +1000, "
            "which is taken off once unless the item says it was."
        ),
    ] = "none"
    rgb: Annotated[
        tuple[str, str, str] | None, Field(description="Bands shown as red, green, blue.")
    ] = None


def _s2(name: str, asset: str, wavelength_nm: float, gsd_m: float) -> Band:
    return Band(name=name, asset=asset, wavelength_nm=wavelength_nm, gsd_m=gsd_m)


SENTINEL_2_L2A = Sensor(
    name="sentinel-2-l2a",
    bands=(
        _s2("coastal", "coastal|B01", 443, 60),
        _s2("blue", "blue|B02", 490, 10),
        _s2("green", "green|B03", 560, 10),
        _s2("red", "red|B04", 665, 10),
        _s2("rededge1", "rededge1|B05", 705, 20),
        _s2("rededge2", "rededge2|B06", 740, 20),
        _s2("rededge3", "rededge3|B07", 783, 20),
        _s2("nir", "nir|B08", 842, 10),
        _s2("nir08", "nir08|B8A", 865, 20),
        _s2("nir09", "nir09|B09", 945, 60),
        _s2("swir16", "swir16|B11", 1610, 20),
        _s2("swir22", "swir22|B12", 2190, 20),
    ),
    dtype="uint16",
    scale=1e-4,
    units="surface reflectance",
    # No data, saturated, cloud shadow, medium and high cloud probability, thin cirrus.
    mask=Mask(asset="scl|SCL", invalid=(0, 1, 3, 8, 9, 10)),
    radiometry="sentinel-2",
    rgb=("red", "green", "blue"),
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

SENSORS: dict[str, Sensor] = {s.name: s for s in (SENTINEL_2_L2A, NAIP, AERIAL_RGB)}


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
