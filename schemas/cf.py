"""What a shard tells xarray, rioxarray and GDAL by CF conventions: coordinates and attributes.

The stored arrays stay as `schemas.layout` says. Beside them lie `x` and `y`, the centres of the
pixels of each chip, and the names of bands and classes. The array `epsg` is the grid mapping: it
carries the projection's attributes, and the coordinate of a chip that is picked is its EPSG code.

Pixels keep their stored values wherever a shard is opened. CF's `scale_factor`, `add_offset` and
`_FillValue` would turn them into floats of four times the size as soon as xarray opens them;
scale, offset and nodata stand under names that no reader applies by itself. Only `time` is decoded.

Attributes are written out here instead of taken from PROJ, whose texts differ between versions:
the bytes of a shard must not.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.dataset import DatasetInfo
from schemas.findings import CHIP_FLAGS
from schemas.layout import ARRAYS, UNKNOWN_TIME, Kind, Relation

CONVENTIONS = "CF-1.11"

_UNITS = {
    "image": "1", "valid": "1", "bounds": "m", "center_lonlat": "degrees", "label_region": "1",
    "line_density": "m hectare-1", "point_density": "hectare-1", "moran": "1", "lee": "1",
    "object_anchor": "1", "shift": "m",
}  # fmt: skip
_FLAGS: dict[str, type[IntEnum]] = {"object_kind": Kind, "relation": Relation}
_DEGREE = 'ANGLEUNIT["degree",0.0174532925199433]'
_METRE = 'LENGTHUNIT["metre",1]'


class Coordinate(NamedTuple):
    """An array beside those of the layout, that names places along a dimension."""

    dims: tuple[str, ...]
    values: NDArray[Any]
    """float64, or str."""
    attributes: dict[str, Any]


def array_attributes(
    arrays: Mapping[str, NDArray[Any]], info: DatasetInfo | None
) -> dict[str, dict[str, Any]]:
    """CF attributes of each array of the layout.

    info: names the classes, and says what pixel values mean; left out where there is none.
    """
    found: dict[str, dict[str, Any]] = {
        name: {"long_name": spec.meaning} for name, spec in ARRAYS.items()
    }
    for name, unit in _UNITS.items():
        found[name]["units"] = unit
    for name, codes in _FLAGS.items():
        found[name] |= _flags([code.name.lower() for code in codes])
    # Flags that can hold together (CF conventions, section 3.5): one bit each.
    found["finding"] |= {
        "flag_masks": [1 << bit for bit in range(len(CHIP_FLAGS))],
        "flag_meanings": " ".join(CHIP_FLAGS),
    }
    found["time"] |= {
        "standard_name": "time", "units": "seconds since 1970-01-01 00:00:00",
        "calendar": "proleptic_gregorian", "_FillValue": int(UNKNOWN_TIME),
    }  # fmt: skip
    if info is not None:
        names = ["none", *info.taxonomy.names]
        for name in ("label_pixel", "object_class"):
            found[name] |= _flags(names)
        found["image"] |= {
            "nodata": info.sensor.nodata, "scale": info.sensor.scale,
            "offset": info.sensor.offset, "physical_units": info.sensor.units,
            "comment": "stored values; physical = value * scale + offset",
        }  # fmt: skip
    for name in ("image", "label_pixel"):
        found[name]["coordinates"] = "x y epsg time"
    zones = np.unique(arrays["epsg"])
    if len(zones) == 1 and is_utm(int(zones[0])):
        found["epsg"] |= grid_mapping(int(zones[0]))
        for name in ("image", "label_pixel"):
            found[name]["grid_mapping"] = "epsg"
    return found


def coordinates(
    arrays: Mapping[str, NDArray[Any]], info: DatasetInfo | None
) -> dict[str, Coordinate]:
    """Coordinates of a shard: `x` [chip, x] and `y` [chip, y], metres of the chip's zone, centres
    of pixels; and, where `info` is given, names `band` [band] and `class` [class].
    """
    height, width = arrays["label_pixel"].shape[1:]
    x0, y0, x1, y1 = arrays["bounds"].T[..., None]
    found = {
        "x": Coordinate(
            ("chip", "x"), x0 + (x1 - x0) * ((np.arange(width) + 0.5) / width),
            {"standard_name": "projection_x_coordinate", "axis": "X", "units": "m",
             "long_name": "easting of the pixels' centres"},
        ),
        "y": Coordinate(
            ("chip", "y"), y1 - (y1 - y0) * ((np.arange(height) + 0.5) / height),
            {"standard_name": "projection_y_coordinate", "axis": "Y", "units": "m",
             "long_name": "northing of the pixels' centres"},
        ),
    }  # fmt: skip
    if info is not None:
        wavelength = [band.wavelength_nm for band in info.sensor.bands]
        found["band"] = Coordinate(
            ("band",), np.array([band.name for band in info.sensor.bands]),
            {"long_name": "band"} | ({} if None in wavelength else {"wavelength_nm": wavelength}),
        )  # fmt: skip
        found["class"] = Coordinate(
            ("class",), np.array(info.taxonomy.names), {"long_name": "taxonomy class"}
        )
    return found


def is_utm(epsg: int) -> bool:
    """Whether a code is that of a UTM zone of WGS 84."""
    return epsg // 100 in (326, 327) and 1 <= epsg % 100 <= 60


def grid_mapping(epsg: int) -> dict[str, Any]:
    """CF grid mapping attributes of a UTM zone (CF conventions, appendix F)."""
    return {
        "grid_mapping_name": "transverse_mercator",
        "semi_major_axis": 6378137.0,
        "inverse_flattening": 298.257223563,
        "longitude_of_prime_meridian": 0.0,
        "latitude_of_projection_origin": 0.0,
        "longitude_of_central_meridian": _central_meridian(epsg),
        "scale_factor_at_central_meridian": 0.9996,
        "false_easting": 500000.0,
        "false_northing": _false_northing(epsg),
        "crs_wkt": utm_wkt(epsg),
    }


def utm_wkt(epsg: int) -> str:
    """WKT 2 (ISO 19162) of a UTM zone of WGS 84."""
    zone = f"UTM zone {epsg % 100}{'N' if epsg < 32700 else 'S'}"
    parameters = (
        ("Latitude of natural origin", 0, _DEGREE, 8801),
        ("Longitude of natural origin", f"{_central_meridian(epsg):g}", _DEGREE, 8802),
        ("Scale factor at natural origin", 0.9996, 'SCALEUNIT["unity",1]', 8805),
        ("False easting", 500000, _METRE, 8806),
        ("False northing", f"{_false_northing(epsg):.0f}", _METRE, 8807),
    )
    return (
        f'PROJCRS["WGS 84 / {zone}",BASEGEOGCRS["WGS 84",DATUM["World Geodetic System 1984",'
        f'ELLIPSOID["WGS 84",6378137,298.257223563,{_METRE}]],PRIMEM["Greenwich",0,{_DEGREE}],'
        f'ID["EPSG",4326]],CONVERSION["{zone}",METHOD["Transverse Mercator",ID["EPSG",9807]],'
        + ",".join(f'PARAMETER["{n}",{v},{unit},ID["EPSG",{i}]]' for n, v, unit, i in parameters)
        + f'],CS[Cartesian,2],AXIS["(E)",east,ORDER[1],{_METRE}],AXIS["(N)",north,ORDER[2],'
        f'{_METRE}],ID["EPSG",{epsg}]]'
    )


def _central_meridian(epsg: int) -> float:
    return (epsg % 100) * 6.0 - 183.0


def _false_northing(epsg: int) -> float:
    return 0.0 if epsg < 32700 else 1e7


def _flags(names: list[str]) -> dict[str, Any]:
    return {"flag_values": list(range(len(names))), "flag_meanings": " ".join(names)}
