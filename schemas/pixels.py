"""What a reader of one image file gives, whatever the file's format."""

from typing import Any, NamedTuple

from numpy.typing import NDArray


class Pixels(NamedTuple):
    """An image and what its file says about it."""

    image: NDArray[Any]
    """[band, y, x], uint8, uint16 or float32, as stored."""
    bounds_lonlat: tuple[float, float, float, float] | None = None
    """West, south, east, north in degrees."""
    gsd_m: float | None = None
    """Side of a pixel in metres."""
    bands: tuple[str, ...] | None = None
    """Names of the bands."""
    wavelength_nm: tuple[float | None, ...] | None = None
    """Centre wavelengths of the bands."""
    nodata: int | None = None
    """Value of pixels without data."""
