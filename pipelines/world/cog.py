"""Arrays to Cloud Optimized GeoTIFFs, the same bytes every time."""

import hashlib
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.transform import from_origin


def write_cog(
    path: Path,
    array: NDArray[np.uint8] | NDArray[np.uint16],
    epsg: int,
    origin: tuple[float, float],
    gsd_m: float,
    *,
    categories: bool = False,
) -> None:
    """Writes [band, y, x] or [y, x] with nodata 0; `origin` is the west, north corner.

    Overviews average, or take the nearest where values are `categories`. Tiled by 512 and
    compressed without loss (GDAL COG driver, https://gdal.org/drivers/raster/cog.html).
    """
    layers = array if array.ndim == 3 else array[None]
    profile = {
        "driver": "GTiff",
        "count": layers.shape[0],
        "height": layers.shape[1],
        "width": layers.shape[2],
        "dtype": str(array.dtype),
        "crs": f"EPSG:{epsg}",
        "transform": from_origin(*origin, gsd_m, gsd_m),
        "nodata": 0,
    }
    if layers.shape[0] == 3:
        profile["photometric"] = "RGB"
    with MemoryFile() as memory:
        with memory.open(**profile) as flat:
            flat.write(layers)
        rasterio.shutil.copy(
            memory.name,
            str(path),
            driver="COG",
            COMPRESS="DEFLATE",
            LEVEL="1",
            PREDICTOR="NO" if categories else "YES",
            BLOCKSIZE="512" if min(layers.shape[1:]) > 512 else "128",
            OVERVIEW_RESAMPLING="NEAREST" if categories else "AVERAGE",
            NUM_THREADS="1",
        )


def sha256_multihash(path: Path) -> str:
    """`file:checksum` of a file: multihash prefix (sha2-256, 32 bytes) and digest, hex."""
    with path.open("rb") as f:
        return "1220" + hashlib.file_digest(f, "sha256").hexdigest()
