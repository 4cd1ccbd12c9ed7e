"""Maps written block by block: a Cloud Optimized GeoTIFF, and a PNG to look at."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from schemas.errors import GeoLinkError

_LEAST, _MOST = 768, 4096
"""Pixels of the longer side of a PNG: smaller maps are enlarged, larger ones reduced."""

Put = Callable[[int, int, NDArray[Any]], None]
"""(row, column, [band, y, x]): writes a part of a map."""


@contextmanager
def write_map(
    path: Path,
    *,
    shape: tuple[int, int, int],
    crs_wkt: str,
    transform: tuple[float, float, float, float],
    dtype: str = "uint8",
    nodata: float = 0,
    colours: Mapping[int, tuple[int, int, int]] | None = None,
    names: tuple[str, ...] = (),
    tags: Mapping[str, str] | None = None,
    scale: tuple[float, float] | None = None,
) -> Iterator[Put]:
    """A map at `path` (.tif), finished, with a PNG beside it, when the context ends.

    Parts lie in a temporary file until then, so memory is bounded; what was not put is nodata.
    The same parts give the same bytes.

    Args:
        path: of the COG.
        shape: bands, rows, columns; three bands are red, green and blue.
        crs_wkt: of the map.
        transform: west, north, width and height of a pixel.
        dtype: of the values.
        nodata: value of pixels without any.
        colours: of the values of one band, which are categories then.
        names: of the bands.
        tags: of the file.
        scale: factor and offset that stored values stand for others by.

    Raises GeoLinkError if it cannot be written.
    """
    bands, rows, columns = shape
    west, north, width, height = transform
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": bands, "height": rows, "width": columns, "dtype": dtype,
        "crs": crs_wkt, "transform": Affine(width, 0, west, 0, -height, north), "nodata": nodata,
        "tiled": True, "blockxsize": 256, "blockysize": 256, "bigtiff": "IF_SAFER",
        "sparse_ok": True,
    }  # fmt: skip
    if bands == 3:
        profile["photometric"] = "RGB"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".map-") as work:
            flat = Path(work) / "flat.tif"
            with rasterio.open(flat, "w", **profile) as file:
                if names:
                    file.descriptions = names
                file.update_tags(**(tags or {}))
                if scale is not None:
                    file.scales, file.offsets = [(v,) * bands for v in scale]
                if colours is not None:
                    file.write_colormap(1, {k: (*v, 255) for k, v in colours.items()})

                def put(row: int, column: int, part: NDArray[Any]) -> None:
                    window = Window(column, row, part.shape[2], part.shape[1])
                    file.write(part, window=window)

                yield put
            done = Path(work) / "done.tif"
            _to_cog(flat, done, shape, categories=colours is not None)
            if dtype == "uint8":
                _picture(done, Path(work) / "done.png", colours)
                (Path(work) / "done.png").replace(path.with_suffix(".png"))
            done.replace(path)
    except (RasterioError, OSError) as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def _to_cog(flat: Path, done: Path, shape: tuple[int, int, int], *, categories: bool) -> None:
    rasterio.shutil.copy(
        str(flat), str(done), driver="COG", COMPRESS="DEFLATE",
        BLOCKSIZE="512" if min(shape[1:]) > 512 else "128",
        OVERVIEW_RESAMPLING="NEAREST" if categories else "AVERAGE", BIGTIFF="IF_SAFER",
        NUM_THREADS="1",
    )  # fmt: skip


def _picture(cog: Path, png: Path, colours: Mapping[int, tuple[int, int, int]] | None) -> None:
    """Draw a map, transparent where nothing is."""
    with rasterio.open(cog) as file:
        longer = max(file.shape)
        scale = min(_MOST / longer, 1.0)
        size = tuple(max(1, round(scale * n)) for n in file.shape)
        way = Resampling.nearest if colours is not None else Resampling.average
        drawn = file.read(out_shape=(file.count, *size), resampling=way)
        nodata = file.nodata
    there = (drawn != nodata).any(0)
    if colours is not None:
        table = np.zeros((256, 3), np.uint8)
        for value, colour in colours.items():
            table[value] = colour
        rgb = table[drawn[0]]
    else:
        rgb = np.moveaxis(drawn if len(drawn) == 3 else drawn[[0, 0, 0]], 0, -1)
    picture = np.dstack([rgb, np.where(there, 255, 0).astype(np.uint8)])
    times = max(1, _LEAST // longer)
    Image.fromarray(picture.repeat(times, 0).repeat(times, 1)).save(png)


def add_legend(
    picture: Path, out: Path, entries: Sequence[tuple[tuple[int, int, int], str]]
) -> None:
    """A picture on white with a legend at its right: colours and what they mean.

    Raises GeoLinkError if it cannot be written.
    """
    font, line, gap = ImageFont.load_default(18), 28, 16
    wide = max((font.getlength(text) for _, text in entries), default=0)
    with Image.open(picture) as drawn:
        height = max(drawn.height, len(entries) * line) + 2 * gap
        page = Image.new("RGB", (drawn.width + int(wide) + 4 * gap + line, height), "white")
        page.paste(drawn, (gap, gap), drawn if drawn.mode == "RGBA" else None)
        left = drawn.width + 2 * gap
    pen = ImageDraw.Draw(page)
    for n, (colour, text) in enumerate(entries):
        top = gap + n * line
        pen.rectangle((left, top, left + 20, top + 20), fill=colour, outline="black")
        pen.text((left + line + 2, top), text, fill="black", font=font)
    try:
        page.save(out)
    except OSError as error:
        raise GeoLinkError(f"cannot write {out}: {error}") from error
