"""Static STAC catalogs of the rendered scenes: self-contained, relative links, one item a scene.

Items follow what current catalogs serve: STAC 1.1, projection 2.x (`proj:code`), EO, raster, file
and view extensions; for Sentinel-2 the asset names and properties of Earth Search.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pystac
import shapely
from pyproj import Transformer

from pipelines.world.clouds import CIRRUS, HIGH, MEDIUM, SHADOW, VEGETATION, WATER
from pipelines.world.cog import sha256_multihash
from pipelines.world.sentinel2 import BAND_GSD_M, Pass, Scene

_CREATED = "2024-01-01T00:00:00Z"
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_EXTENSIONS = {
    "proj": "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "eo": "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "raster": "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "file": "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "view": "https://stac-extensions.github.io/view/v1.0.0/schema.json",
    "s2": "https://stac-extensions.github.io/sentinel-2/v1.0.0/schema.json",
    "class": "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
}
_CENTRE_UM = {"coastal": 0.443, "blue": 0.49, "green": 0.56, "red": 0.665, "rededge1": 0.704,
    "rededge2": 0.74,
              "rededge3": 0.783, "nir": 0.842, "nir08": 0.865, "nir09": 0.945, "swir16": 1.61,
              "swir22": 2.19}  # fmt: skip
_COMMON = {"rededge1": "rededge", "rededge2": "rededge", "rededge3": "rededge"}
_SCL_NAMES = ["no_data", "saturated_or_defective", "dark_area_pixels", "cloud_shadows",
    "vegetation",
              "not_vegetated", "water", "unclassified", "cloud_medium_probability",
              "cloud_high_probability",
              "thin_cirrus", "snow"]  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Where a file's pixels lie: `origin` is the west, north corner in UTM metres."""

    epsg: int
    origin: tuple[float, float]
    gsd_m: float
    shape: tuple[int, int]

    def properties(self) -> dict[str, Any]:
        """The projection extension's fields of an asset."""
        transform = [self.gsd_m, 0.0, self.origin[0], 0.0, -self.gsd_m, self.origin[1]]
        return {
            "proj:code": f"EPSG:{self.epsg}",
            "proj:shape": list(self.shape),
            "proj:transform": transform,
        }


def sentinel2_item(scene: Scene, folder: Path, files: dict[str, tuple[Path, Grid]]) -> pystac.Item:
    """The item of a scene whose assets are written at `files`, below `folder`."""
    acquired = scene.acquired
    share = {
        v: float((scene.scl == v).sum()) / max(1, int((scene.scl > 0).sum())) * 100
        for v in range(12)
    }
    cloud = share[MEDIUM] + share[HIGH] + share[CIRRUS]
    item = _item(acquired.name, acquired.time, files["red"][1])
    item.stac_extensions = list(_EXTENSIONS.values())
    item.properties |= {
        "constellation": "sentinel-2",
        "platform": acquired.platform,
        "instruments": ["msi"],
        "eo:cloud_cover": round(cloud, 4),
        "view:sun_azimuth": acquired.sun[0],
        "view:sun_elevation": acquired.sun[1],
        "s2:processing_baseline": acquired.baseline,
        "s2:product_type": "S2MSI2A",
        "s2:cloud_shadow_percentage": round(share[SHADOW], 4),
        "s2:vegetation_percentage": round(share[VEGETATION], 4),
        "s2:water_percentage": round(share[WATER], 4),
        "s2:nodata_pixel_percentage": round(float((scene.scl == 0).mean()) * 100, 4),
        "earthsearch:boa_offset_applied": False,
    }
    for name, (path, grid) in files.items():
        fields = _scl_fields() if name == "scl" else _band_fields(name, acquired)
        _add_asset(item, name, path, folder, grid, fields)
    return item


def aerial_item(identity: str, time: datetime, folder: Path, path: Path, grid: Grid) -> pystac.Item:
    """The item of an aerial RGB picture."""
    item = _item(identity, time, grid)
    item.stac_extensions = [_EXTENSIONS[k] for k in ("proj", "eo", "raster", "file")]
    item.properties |= {"gsd": grid.gsd_m, "instruments": ["rgb-camera"], "eo:cloud_cover": 0}
    names = ("red", "green", "blue")
    fields = {
        "title": "RGB image",
        "roles": ["data", "visual"],
        "gsd": grid.gsd_m,
        "eo:bands": [{"name": n, "common_name": n} for n in names],
        "raster:bands": [
            {"data_type": "uint8", "nodata": 0, "spatial_resolution": grid.gsd_m} for _ in names
        ],
    }
    _add_asset(item, "image", path, folder, grid, fields)
    return item


def write_catalog(folder: Path, identity: str, title: str, items: list[pystac.Item]) -> Path:
    """Writes a catalog with a collection of `items` to `folder/catalog.json`; returns its path."""
    boxes = [item.bbox for item in items if item.bbox]
    box = [
        min(b[0] for b in boxes),
        min(b[1] for b in boxes),
        max(b[2] for b in boxes),
        max(b[3] for b in boxes),
    ]
    times = sorted(item.datetime for item in items if item.datetime)
    collection = pystac.Collection(
        id=identity,
        title=title,
        description=f"{title}: rendered scenes of a place that exists only here.",
        license="CC0-1.0",
        extent=pystac.Extent(
            pystac.SpatialExtent([box]), pystac.TemporalExtent([[times[0], times[-1]]])
        ),
    )
    collection.add_items(items)
    catalog = pystac.Catalog(f"{identity}-catalog", "A static catalog; links are relative.", title)
    catalog.add_child(collection)
    catalog.normalize_hrefs(str(folder))
    catalog.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def item_folder(folder: Path, collection: str, item: str) -> Path:
    """Where `write_catalog` puts an item, and where its files belong."""
    return folder / collection / item


def _item(identity: str, time: datetime, grid: Grid) -> pystac.Item:
    (west, north), (h, w) = grid.origin, grid.shape
    edge = shapely.segmentize(
        shapely.box(west, north - h * grid.gsd_m, west + w * grid.gsd_m, north), 5000.0
    )
    to_lonlat = Transformer.from_crs(grid.epsg, 4326, always_xy=True)
    outline = shapely.transform(edge, lambda x, y: to_lonlat.transform(x, y), interleaved=False)
    outline = shapely.set_precision(outline, 1e-7)
    item = pystac.Item(
        id=identity,
        geometry=shapely.geometry.mapping(outline),
        bbox=[round(float(v), 7) for v in outline.bounds],
        datetime=time.astimezone(UTC),
        properties={"created": _CREATED, "license": "CC0-1.0"},
    )
    item.properties["proj:code"] = f"EPSG:{grid.epsg}"
    return item


def _add_asset(
    item: pystac.Item, name: str, path: Path, folder: Path, grid: Grid, fields: dict[str, Any]
) -> None:
    size = path.stat().st_size
    extra = (
        fields | grid.properties() | {"file:checksum": sha256_multihash(path), "file:size": size}
    )
    title, roles = extra.pop("title"), extra.pop("roles")
    href = str(path.relative_to(folder))
    item.add_asset(
        name, pystac.Asset(f"./{href}", title, media_type=_COG, roles=roles, extra_fields=extra)
    )


def _band_fields(name: str, acquired: Pass) -> dict[str, Any]:
    gsd = BAND_GSD_M[name]
    band = {
        "name": name,
        "common_name": _COMMON.get(name, name),
        "center_wavelength": _CENTRE_UM[name],
    }
    radiometry = {
        "data_type": "uint16",
        "nodata": 0,
        "spatial_resolution": gsd,
        "scale": 0.0001,
        "offset": -acquired.offset_dn / 10000 if acquired.offset_dn else 0,
    }
    return {
        "title": f"{name} - {gsd}m",
        "roles": ["data", "reflectance"],
        "gsd": gsd,
        "eo:bands": [band],
        "raster:bands": [radiometry],
    }


def _scl_fields() -> dict[str, Any]:
    return {
        "title": "Scene classification map (SCL)",
        "roles": ["data"],
        "gsd": 20,
        "raster:bands": [{"data_type": "uint8", "nodata": 0, "spatial_resolution": 20}],
        "classification:classes": [
            {"value": v, "name": n, "description": n.replace("_", " ")}
            for v, n in enumerate(_SCL_NAMES)
        ],
    }
