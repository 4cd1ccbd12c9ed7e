"""Chips as GeoTIFF, and their label masks as PNG."""

import json
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from schemas.cf import utm_wkt
from schemas.chips import ShardPart
from schemas.storage_local import LocalStorage
from schemas.taxonomy import Taxonomy


def write_geotiffs(part: ShardPart, folder: Path) -> None:
    """Write `images/<shard>/<chip>.tif`: stored values with CRS, transform, names of bands, nodata,
    scale, offset, unit, acquisition, scene, licence and attribution.

    Raises GeoLinkError if a file cannot be written.
    """
    sensor = part.info.sensor
    image = part.arrays["image"]
    count, height, width = image.shape[1:]
    about = {
        "SPLIT": part.row.split,
        "SHARD": part.shard,
        "LICENCE": part.info.licence,
        "TIFFTAG_COPYRIGHT": "; ".join(part.info.attribution),
    }
    for n, (name, stem, time, scene, transform) in enumerate(
        zip(part.names, part.stems, part.times, part.scenes, transforms(part), strict=True)
    ):
        tags = {**about, "CHIP": name}
        if time is not None:
            tags |= {"TIFFTAG_DATETIME": f"{time:%Y:%m:%d %H:%M:%S}", "ACQUISITION": _iso(time)}
        if scene is not None:
            tags["SCENE"] = scene
        with MemoryFile() as memory:
            with memory.open(
                driver="GTiff", count=count, height=height, width=width, dtype=image.dtype,
                crs=CRS.from_epsg(int(part.arrays["epsg"][n])), transform=transform,
                nodata=sensor.nodata, compress="deflate", predictor=2,
            ) as file:  # fmt: skip
                file.update_tags(**tags)
                file.descriptions = [band.name for band in sensor.bands]
                file.scales, file.offsets = [sensor.scale] * count, [sensor.offset] * count
                file.units = [sensor.units] * count
                file.write(image[n])
            LocalStorage(folder).write(f"images/{part.shard}/{stem}.tif", bytes(memory.getbuffer()))


def write_labels(part: ShardPart, folder: Path) -> None:
    """Write `labels/<shard>/<chip>.png`: classes in the colours of the taxonomy, 0 transparent.

    Beside each, the georeference as GDAL reads it (`.png.aux.xml`); once, `labels/legend.json`.

    Raises GeoLinkError if a file cannot be written.
    """
    files = LocalStorage(folder)
    files.write("labels/legend.json", json.dumps(legend(part.info.taxonomy), indent=2).encode())
    colors = palette(part.info.taxonomy)
    for mask, stem, epsg, transform in zip(
        part.arrays["label_pixel"], part.stems, part.arrays["epsg"], transforms(part), strict=True
    ):
        picture = Image.fromarray(mask)
        picture.putpalette(colors.tobytes())
        data = BytesIO()
        picture.save(data, "png", transparency=0, optimize=False)
        name = f"labels/{part.shard}/{stem}.png"
        files.write(f"{name}.aux.xml", _georeference(int(epsg), transform))
        files.write(name, data.getvalue())


def legend(taxonomy: Taxonomy) -> list[dict[str, object]]:
    """Value, name and colour of each class; 0 is where OSM says nothing."""
    none: dict[str, object] = {"value": 0, "name": "none", "color": "#000000"}
    return [none] + [
        {"value": n, "name": c.name, "color": c.color}
        for n, c in enumerate(taxonomy.classes, start=1)
    ]


def palette(taxonomy: Taxonomy) -> NDArray[np.uint8]:
    """Colours [class + 1, 3], black first."""
    text = "".join(str(entry["color"]).removeprefix("#") for entry in legend(taxonomy))
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3)


def transforms(part: ShardPart) -> list[Affine]:
    """From pixel (column, row) to metres of the zone, for each chip."""
    height, width = part.arrays["label_pixel"].shape[1:]
    return [from_bounds(*box, width, height) for box in part.arrays["bounds"].tolist()]


def _georeference(epsg: int, transform: Affine) -> bytes:
    numbers = ", ".join(repr(float(v)) for v in transform.to_gdal())
    return (
        f"<PAMDataset>\n  <SRS>{escape(utm_wkt(epsg))}</SRS>\n"
        f"  <GeoTransform>{numbers}</GeoTransform>\n</PAMDataset>\n"
    ).encode()


def _iso(time: object) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
