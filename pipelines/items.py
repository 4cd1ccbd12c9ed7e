"""STAC items and local rasters of any vintage, made into `Scene`: one plain value for all of them.

What differs between catalogs ends here: `proj:epsg` or `proj:code`, grids on the item, its assets
or only in the file, asset keys, where the cloud cover and the processing baseline stand.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

import numpy as np
import shapely
from pyproj import CRS
from pyproj.exceptions import CRSError
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.transform import Affine
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

from pipelines.files import Asset, file_sha256, open_raster
from pipelines.footprints import grid_outline, item_footprint
from pipelines.licences import licence_of
from pipelines.radiometry import item_offset, processing_baseline
from pipelines.remote import is_remote, local_path, retried
from schemas.layout import UNKNOWN_TIME
from schemas.licences import Licence
from schemas.sensor import Sensor
from schemas.sources import SceneSource


class Problem(NamedTuple):
    """Why a scene cannot be used: a code to count by, and a sentence."""

    code: str
    text: str


@dataclass(frozen=True)
class Scene:
    """One acquisition, with all that is needed to read a sensor's bands from it."""

    id: str
    datetime: datetime | None
    """UTC."""
    cloud_cover: float | None
    """Percent; None: unknown."""
    licence: Licence
    bands: tuple[Asset, ...]
    """In the sensor's order; empty where the scene has a problem with them."""
    mask: Asset | None
    offset: int
    """Added to every digital number at load."""
    offset_reason: str
    footprint: BaseGeometry
    """Where it has data, lon/lat degrees; across the antimeridian longitudes go past 180."""
    digest: str
    """Hash of what its pixels are: bytes, grid, offset."""
    problem: Problem | None = None
    sun_elevation: float | None = None
    """Degrees; None: unknown."""
    orbit: str = ""
    """Platform and orbit of the pass, as far as stated."""
    baseline: int | None = None
    """Processing baseline times 100 (Sentinel-2), where stated."""

    @property
    def seconds(self) -> int:
        """Acquisition in seconds since 1970 UTC; `schemas.layout.UNKNOWN_TIME` where unknown."""
        return UNKNOWN_TIME if self.datetime is None else int(self.datetime.timestamp())

    def identity(self) -> str:
        """What a content key needs to know of it."""
        return f"{self.id} {self.digest}"


def scene_of_item(
    item: Mapping[str, Any], sensor: Sensor, source: SceneSource, base: str,
    collection: Mapping[str, Any],
) -> Scene:  # fmt: skip
    """A scene of a STAC item (0.8 to 1.1) as JSON; `base`: where relative hrefs start;
    `collection`: the document of its collection, empty where there is none.

    An item that cannot be used comes back with its `problem`.
    """
    properties = item["properties"]
    found, missing = _find_assets(item, sensor)
    image_assets = [found[b.asset] for b in sensor.bands if b.asset in found]
    offset = item_offset(sensor, item, image_assets)
    scene = Scene(
        id=str(item["id"]),
        datetime=_parse_time(properties.get("datetime") or properties.get("start_datetime")),
        cloud_cover=_number(properties.get("eo:cloud_cover")),
        licence=licence_of(item, collection),
        bands=(),
        mask=None,
        offset=offset.dn or 0,
        offset_reason=offset.reason,
        footprint=item_footprint(item),
        digest="",
        sun_elevation=_sun_elevation(properties),
        orbit=_orbit(properties),
        baseline=processing_baseline(item),
    )
    problem = _filtered(scene, source)
    if problem is None and missing:
        has = ", ".join(sorted(item["assets"])) or "none"
        problem = Problem("scene_asset_missing", f"has no asset {missing[0]!r} (it has: {has})")
    if problem is None and offset.dn is None:
        problem = Problem("scene_offset_unknown", offset.reason)
    if problem is not None:
        return replace(scene, problem=problem)
    sign: str = source.sign
    if sign == "planetary-computer":
        sign += f"/{item.get('collection') or ''}"
    bands = tuple(_asset(item, found[b.asset], b.index, base, sign) for b in sensor.bands)
    mask = _asset(item, found[sensor.mask.asset], 1, base, sign) if sensor.mask else None
    wanted = [*bands, *([mask] if mask else [])]
    if scene.footprint.is_empty:
        scene = replace(scene, footprint=_asset_outline(bands[0]))
    problem = _asset_problem(wanted) or _place_problem(scene, bands[0])
    if problem is not None:
        return replace(scene, problem=problem)
    entries = [found[b.asset] for b in sensor.bands]
    entries += [found[sensor.mask.asset]] if sensor.mask else []
    updated = str(properties.get("updated") or "")
    digests = [_asset_digest(a, e, updated) for a, e in zip(wanted, entries, strict=True)]
    scene = replace(scene, bands=bands, mask=mask)
    return replace(scene, digest=_scene_digest(scene, digests))


def scene_of_raster(path: Path, scene_id: str, sensor: Sensor, source: SceneSource) -> Scene:
    """A scene of a local raster, by its header; a `.prj` file beside it may state its CRS.

    A band is found by its `index` where all of the sensor's bands share an asset, else by its
    place in the sensor's order. Digital numbers are taken as they are.
    """
    blank = Scene(
        scene_id, None, None, Licence(source="rasters", licence=""), (), None, 0,
        "local raster: taken as it is", shapely.Polygon(), "",
    )  # fmt: skip
    try:
        with open_raster(str(path)) as dataset:
            count, kinds = dataset.count, dataset.dtypes
            epsg = dataset.crs.to_epsg() if dataset.crs else _sidecar_epsg(path)
            transform, shape = dataset.transform, dataset.shape
            tags = {**dataset.tags(ns="IMAGERY"), **dataset.tags()}
    except RasterioIOError as error:
        return replace(blank, problem=Problem("scene_unreadable", f"cannot be read: {error}"))
    scene = replace(
        blank,
        datetime=_parse_time(tags.get("ACQUISITIONDATETIME") or tags.get("TIFFTAG_DATETIME")),
    )
    if epsg is None or transform.is_identity:
        what = "no CRS with an EPSG code" if epsg is None else "no georeference"
        return replace(scene, problem=Problem("scene_no_crs", f"{path} has {what}"))
    scene = replace(scene, footprint=grid_outline(transform, shape, epsg))
    shared = len({b.asset for b in sensor.bands}) == 1
    indexes = [b.index if shared else n for n, b in enumerate(sensor.bands, 1)]
    problem = _filtered(scene, source)
    if problem is None and max(indexes) > count:
        problem = Problem(
            "scene_asset_missing",
            f"{path} has {count} bands, sensor {sensor.name} needs {max(indexes)}",
        )
    if problem is None and any(kinds[i - 1].startswith("complex") for i in indexes):
        problem = Problem("scene_unreadable", f"{path} holds complex numbers")
    if problem is not None:
        return replace(scene, problem=problem)
    bands = tuple(Asset(str(path), i, epsg, tuple(transform)[:6], shape) for i in indexes)
    scene = replace(scene, bands=bands)
    return replace(scene, digest=_scene_digest(scene, [file_sha256(path)]))


def stac_item(scene: Scene, assets: Mapping[str, Asset]) -> dict[str, Any]:
    """A STAC item for stackstac, with one asset per band under the name given.

    stackstac 0.5.1 knows `proj:epsg` only (not `proj:code`) and assets of a single band only, so
    both are spelt out, and an asset's href is its `Asset.key`.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, asset in assets.items():
        entries[name] = {"href": asset.key, "proj:epsg": asset.epsg}
        if asset.transform and asset.shape:
            entries[name]["proj:transform"] = list(asset.transform)
            entries[name]["proj:shape"] = list(asset.shape)
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": scene.id,
        "bbox": list(scene.footprint.bounds),
        "properties": {
            "datetime": scene.datetime.isoformat() if scene.datetime else None,
            "proj:epsg": scene.bands[0].epsg,
        },
        "assets": entries,
    }


def _find_assets(
    item: Mapping[str, Any], sensor: Sensor
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The item's assets by the sensor's (alternative) keys, and the keys that are not there."""
    wanted = [b.asset for b in sensor.bands] + ([sensor.mask.asset] if sensor.mask else [])
    found: dict[str, Mapping[str, Any]] = {}
    for names in dict.fromkeys(wanted):
        key = next((k for k in names.split("|") if k in item["assets"]), None)
        if key is not None:
            found[names] = item["assets"][key]
    return found, [names for names in dict.fromkeys(wanted) if names not in found]


def _asset(
    item: Mapping[str, Any], entry: Mapping[str, Any], index: int, base: str, sign: str
) -> Asset:
    """One band of an asset; its grid is read from the file where no metadata has it."""
    properties = item["properties"]
    href = _absolute(str(entry["href"]), base)
    epsg = _epsg(entry) or _epsg(properties)
    # Transform and shape belong together: those of the item are of its main pixel size only.
    own = entry if "proj:transform" in entry or "proj:shape" in entry else properties
    transform, shape = own.get("proj:transform"), own.get("proj:shape")
    blank = Asset(href, index, epsg, None, None, sign)
    if epsg and transform and shape:
        grid = tuple(float(v) for v in transform[:6])
        return replace(blank, transform=grid, shape=(int(shape[0]), int(shape[1])))

    def placed(address: str) -> Asset:
        with open_raster(address) as dataset:
            return _placed(blank, dataset)

    try:
        return retried(href, sign, placed, lambda: None)
    except (RasterioError, OSError):
        # A missing file is found by `_asset_problem`, or when the block is loaded.
        return blank


def _placed(asset: Asset, dataset: Any) -> Asset:
    """An asset of an open file, placed by its transform or by its ground control points."""
    points, points_crs = dataset.gcps
    if dataset.crs is None and points and points_crs is not None:
        return replace(asset, epsg=points_crs.to_epsg())
    own = dataset.crs.to_epsg() if dataset.crs else None
    grid = tuple(dataset.transform)[:6]
    return replace(asset, epsg=own or asset.epsg, transform=grid, shape=dataset.shape)


def _epsg(fields: Mapping[str, Any]) -> int | None:
    """EPSG code from `proj:code`, `proj:epsg`, `proj:wkt2` or `proj:projjson`."""
    code = fields.get("proj:code")
    if isinstance(code, str) and code.upper().startswith("EPSG:") and code[5:].isdigit():
        return int(code[5:])
    if fields.get("proj:epsg"):
        return int(fields["proj:epsg"])
    text = fields.get("proj:wkt2") or fields.get("proj:projjson")
    try:
        return CRS.from_user_input(text).to_epsg() if text else None
    except CRSError:
        return None


def _sidecar_epsg(path: Path) -> int | None:
    sidecar = path.with_suffix(".prj")
    try:
        return CRS.from_wkt(sidecar.read_text(encoding="utf-8")).to_epsg()
    except (OSError, UnicodeDecodeError, CRSError):
        return None


def _asset_problem(assets: list[Asset]) -> Problem | None:
    for asset in assets:
        if not is_remote(asset.href) and not local_path(asset.href).is_file():
            return Problem("scene_asset_missing", f"asset file {asset.href} does not exist")
        if asset.epsg is None:
            return Problem("scene_no_crs", f"no CRS with an EPSG code for {asset.href}")
    return None


def _filtered(scene: Scene, source: SceneSource) -> Problem | None:
    """Why the config's filters leave a scene out."""
    when = scene.datetime
    if (source.start or source.end) and when is None:
        return Problem("scene_outside_time", "has no acquisition time")
    if source.start and when and when < source.start:
        return Problem("scene_outside_time", f"{when.isoformat()} is before {source.start}")
    if source.end and when and when > source.end:
        return Problem("scene_outside_time", f"{when.isoformat()} is after {source.end}")
    if scene.cloud_cover is not None and scene.cloud_cover > source.max_cloud:
        return Problem(
            "scene_too_cloudy", f"cloud cover {scene.cloud_cover:g} % > {source.max_cloud:g} %"
        )
    sun = scene.sun_elevation
    if sun is not None and sun < source.min_sun_elevation:
        return Problem(
            "scene_low_sun", f"sun elevation {sun:g} degrees < {source.min_sun_elevation:g}"
        )
    return None


def _sun_elevation(properties: Mapping[str, Any]) -> float | None:
    """Degrees above the horizon, by the view extension or what came before it."""
    for key in ("view:sun_elevation", "eo:sun_elevation"):
        if (value := _number(properties.get(key))) is not None:
            return value
    zenith = _number(properties.get("s2:mean_solar_zenith"))
    return None if zenith is None else 90.0 - zenith


def _orbit(properties: Mapping[str, Any]) -> str:
    """What tells one pass over a place from another on the same day."""
    platform = str(properties.get("platform") or properties.get("eo:platform") or "")
    orbit = properties.get("sat:relative_orbit", properties.get("landsat:wrs_path", ""))
    return f"{platform.lower()} {orbit}".strip()


def _place_problem(scene: Scene, band: Asset) -> Problem | None:
    """Whether an item's geometry and its pixel grid are different places.

    That is what a wrong CRS, or latitude and longitude exchanged, come to.
    """
    outline = _asset_outline(band)
    if outline.is_empty or not scene.footprint.area:
        return None
    turns = [translate(outline, t) for t in (-360.0, 0.0, 360.0)]
    shared = shapely.area(shapely.intersection(scene.footprint, turns)).max()
    # A footprint is drawn around the data, so most of it lies within the grid.
    if shared >= 0.5 * scene.footprint.area:
        return None
    west, south, east, north = (round(v, 3) for v in scene.footprint.bounds)
    grid = [round(v, 3) for v in outline.bounds]
    return Problem(
        "scene_place_wrong",
        f"its geometry is at {[west, south, east, north]} degrees, its pixels at {grid}: wrong "
        "CRS, or latitude and longitude exchanged",
    )


def _absolute(href: str, base: str) -> str:
    if "://" in href or href.startswith("/"):
        return str(local_path(href)) if not is_remote(href) else href
    if is_remote(base):
        return urljoin(base, href)
    return str((local_path(base).parent / href).resolve())


def _asset_digest(asset: Asset, entry: Mapping[str, Any], updated: str) -> str:
    """Hash or name of a file's bytes: stated checksum, own hash, or address and time of change."""
    checksum = str(entry.get("file:checksum") or "")
    if not is_remote(asset.href):
        path = local_path(asset.href)
        # The size tells a file that was cut short since its checksum was written.
        return f"{checksum}:{path.stat().st_size}" if checksum else file_sha256(path)
    if checksum:
        return checksum
    # Signed URLs change with every request; their query is no part of the file's name.
    plain = urlunsplit(urlsplit(asset.href)._replace(query="", fragment=""))
    return f"{plain} {entry.get('updated') or updated} {entry.get('file:size') or ''}"


def _scene_digest(scene: Scene, digests: list[str]) -> str:
    assets = [*scene.bands, *([scene.mask] if scene.mask else [])]
    facts = [
        digests,
        [[a.index, a.epsg, a.transform, a.shape] for a in assets],
        scene.offset,
        scene.seconds,
        scene.orbit,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _asset_outline(asset: Asset) -> BaseGeometry:
    """Outline of an asset's grid, lon/lat degrees; empty where metadata has no grid."""
    if asset.transform is None or asset.shape is None or asset.epsg is None:
        return shapely.Polygon()
    return grid_outline(Affine(*asset.transform), asset.shape, asset.epsg)


def _parse_time(text: object) -> datetime | None:
    """UTC time of ISO 8601, or of TIFF's `YYYY:MM:DD hh:mm:ss`; None where there is none."""
    if not text:
        return None
    plain = str(text).strip()
    if len(plain) == 19 and plain[4] == plain[7] == ":":
        plain = plain.replace(":", "-", 2)
    try:
        value = datetime.fromisoformat(plain)
    except ValueError:
        return None
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None
