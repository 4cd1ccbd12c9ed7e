"""A shard as an xarray Dataset, chip by chip, or its chips put together where they belong.

Any xarray opens a shard by itself (`xarray.open_zarr`): it finds coordinates, names, CRS and times,
and rioxarray finds the transform of a chip (`shard.isel(chip=0)`). These functions add the names
of chips, and the place of chips among each other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from schemas.errors import GeoLinkError
from schemas.grid import chip_name, unpack_chip

_MOSAIC = ("image", "label_pixel")


def open_shard(path: Path | str) -> xr.Dataset:
    """A shard, a folder or an address that fsspec reads; `chip` is indexed by the chips' names.

    Arrays are read when they are asked for (through Dask where it is installed).

    Raises GeoLinkError if there is no shard.
    """
    try:
        shard: xr.Dataset = xr.open_zarr(str(path), consolidated=True, chunks=None)
    except (OSError, KeyError, ValueError) as error:
        raise GeoLinkError(f"{path} is no shard that xarray can open: {error}") from error
    ids = shard["chip_id"].values
    names = [
        chip_name(unpack_chip(packed)) if packed[0] else f"pair-{int(packed[1]):016x}"
        for packed in ids
    ]
    if len(set(names)) == len(names):
        shard = shard.assign_coords(chip=("chip", names))
    return shard


def mosaic(shard: xr.Dataset) -> xr.Dataset:
    """The pixels and labels of a shard in one picture: `image` [band, y, x], `label_pixel` [y, x].

    x and y are metres of the shard's zone. Where the shard has no chip, pixels are nodata and
    labels 0.

    Raises GeoLinkError where the chips do not lie on one lattice (imported pairs).
    """
    bounds = shard["bounds"].values
    zones = np.unique(shard["epsg"].values)
    if not len(bounds) or len(zones) != 1:
        raise GeoLinkError("a shard without chips, or of several zones, has no mosaic")
    side = bounds[:, 2:] - bounds[:, :2]
    column = (bounds[:, 0] - bounds[:, 0].min()) / side[0, 0]
    row = (bounds[:, 3].max() - bounds[:, 3]) / side[0, 1]
    lattice = np.stack([row, column], axis=1)
    places = np.rint(lattice).astype(int)
    if not np.allclose(side, side[0]) or not np.allclose(lattice, places, atol=1e-6):
        raise GeoLinkError("the chips of this shard lie on no lattice; they have no mosaic")
    if len(np.unique(places, axis=0)) != len(places):
        raise GeoLinkError("this shard has a place twice; it has no mosaic")
    rows, columns = places.max(axis=0) + 1
    height, width = shard.sizes["y"], shard.sizes["x"]
    found = {}
    for name in _MOSAIC:
        pixels = shard[name].values
        fill = shard[name].attrs.get("nodata", 0)
        shape = (*pixels.shape[1:-2], rows, height, columns, width)
        out = np.full(shape, fill, pixels.dtype)
        # numpy puts indices with slices between them first: [chip, ..., y, x], as the pixels are.
        out[..., places[:, 0], :, places[:, 1], :] = pixels
        dims = (*shard[name].dims[1:-2], "y", "x")
        attributes = {k: v for k, v in shard[name].attrs.items() if k != "coordinates"}
        found[name] = (dims, out.reshape(*out.shape[:-4], rows * height, columns * width),
                       attributes)  # fmt: skip
    west, north = bounds[:, 0].min(), bounds[:, 3].max()
    pixel_x, pixel_y = side[0, 0] / width, side[0, 1] / height
    coordinates: dict[str, Any] = {
        "x": ("x", west + (np.arange(columns * width) + 0.5) * pixel_x, shard["x"].attrs),
        "y": ("y", north - (np.arange(rows * height) + 0.5) * pixel_y, shard["y"].attrs),
        "epsg": ((), int(zones[0]), shard["epsg"].attrs),
    }
    if "band" in shard.coords:
        coordinates["band"] = shard["band"]
    return xr.Dataset(found, coords=coordinates, attrs=shard.attrs)
