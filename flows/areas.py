"""A raster file as an area whose pixels are read window by window."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.embed.area import Area, cut_blocks
from geolink.tasks.adapt import wavelength_nm
from geolink.tasks.contracts import Imagery
from pipelines.pixels import Scene, read_window
from schemas.cf import grid_mapping, is_utm
from schemas.errors import GeoLinkError

_MISSING = -9999
"""Stands for not-a-number in pixels of float32."""


def scene_areas(scene: Scene, bands: Sequence[str], block_px: int) -> Callable[[int], list[Area]]:
    """A raster file as an area, from the side of a patch.

    bands: names, where the file does not say. block_px: side of a block.
    Raises GeoLinkError if there are other bands than names.
    """
    count = scene.shape[0]
    names = tuple(bands) or scene.bands or (("red", "green", "blue") if count == 3 else ())
    if len(names) != count:
        told = f"{len(names)} are named" if names else "none are named"
        raise GeoLinkError(
            f"{scene.path} has {count} bands, and {told}: name them in their order (--bands)"
        )
    whole = scene.dtype == "float32"
    nodata = scene.nodata if scene.nodata is not None else (_MISSING if whole else -1)
    imagery = Imagery(
        names, scene.wavelength_nm or tuple(wavelength_nm(b) for b in names), scene.dtype, nodata,
        (scene.shape[1], scene.shape[2]), scene.gsd_m,
    )  # fmt: skip
    if scene.epsg is not None and is_utm(scene.epsg):
        mapping = grid_mapping(scene.epsg)
    else:
        plain = {"crs_wkt": scene.crs_wkt, "spatial_ref": scene.crs_wkt}
        degrees = scene.crs_wkt.startswith("GEOG")
        mapping = plain | ({"grid_mapping_name": "latitude_longitude"} if degrees else {})

    def read(y: int, x: int, height: int, width: int) -> NDArray[Any]:
        image = read_window(scene, y, x, height, width)
        return np.where(np.isnan(image), np.float32(nodata), image) if whole else image

    def areas(patch: int) -> list[Area]:
        a, _, west, _, e, north = scene.transform
        shape = (scene.shape[1], scene.shape[2])
        side = max(1, block_px // patch)
        return [
            Area("raster", mapping, west, north, (a, -e), shape, patch, imagery,
                 cut_blocks(shape, patch, side), side, read)
        ]  # fmt: skip

    return areas
