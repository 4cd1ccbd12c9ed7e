"""Makes a world on disk: a PBF, two Sentinel-2-like scenes, an aerial picture, their catalogs."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pystac
from numpy.typing import NDArray
from pyproj import Transformer

from pipelines.world.aerial import render_aerial
from pipelines.world.appearance import Drawables, drawables
from pipelines.world.cog import write_cog
from pipelines.world.extract import read_extract, sea_of
from pipelines.world.features import Features
from pipelines.world.pbf import write_pbf
from pipelines.world.sentinel2 import BAND_GSD_M, render_pair
from pipelines.world.stac import Grid, aerial_item, item_folder, sentinel2_item, write_catalog
from pipelines.world.town import make_town

VERSION = 1  # raise when the bytes of a world change
S2_COLLECTION = "sentinel-2-l2a"
AERIAL_COLLECTION = "aerial"
AERIAL_TIME = datetime(2021, 8, 24, 10, 30, tzinfo=UTC)
# How far the pictures' content lies off the map, metres east and north.
S2_SHIFT_M = (4.0, -3.0)
AERIAL_SHIFT_M = (0.4, -0.3)
Bounds = tuple[float, float, float, float]


@dataclass(frozen=True)
class World:
    """Where a world's files are, and what is known of it.

    Bounds are (west, south, east, north) in UTM metres or degrees. `s2_shift_m`,
    `aerial_shift_m`: how far (east, north) image content lies off its true place.
    """

    folder: Path
    pbf: Path
    s2_catalog: Path
    aerial_catalog: Path
    s2_collection: str
    aerial_collection: str
    epsg: int
    bounds_utm: Bounds
    bounds_lonlat: Bounds
    aerial_bounds_utm: Bounds
    aerial_bounds_lonlat: Bounds
    s2_shift_m: tuple[float, float]
    aerial_shift_m: tuple[float, float]


def make_world(
    folder: Path,
    *,
    seed: int = 0,
    size_km: float = 20.0,
    osm_pbf: Path | None = None,
    aerial_km: float = 4.8,
) -> World:
    """Makes a world in `folder`, or returns the one that is there if its inputs are the same.

    Without `osm_pbf` a fictitious region of about `size_km` kilometres; with it scenes over that
    extract, which is used as it is. The aerial picture (1 m) covers up to `aerial_km` kilometres
    about the centre. The same inputs give the same bytes in every file.
    Raises GeoLinkError where `osm_pbf` cannot be read.
    """
    folder = folder.resolve()
    inputs = {
        "version": VERSION,
        "seed": seed,
        "size_km": size_km,
        "aerial_km": aerial_km,
        "osm_pbf": _digest(osm_pbf) if osm_pbf else None,
    }
    manifest = folder / "manifest.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        if found["inputs"] == inputs:
            return _load(folder, found["world"])
        manifest.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    pbf = folder / "world.osm.pbf"
    if osm_pbf:
        features, epsg, bounds = read_extract(osm_pbf)
        centre = ((bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2)
        shutil.copyfile(osm_pbf, pbf)
        sea = sea_of(features, bounds)
    else:
        town = make_town(seed, size_km)
        features, epsg, bounds, centre = town.features, town.epsg, town.bounds_utm, town.centre_utm
        write_pbf(pbf, features, epsg)
        sea = None
    things = drawables(features, sea)
    pictured = aerial_bounds(bounds, centre, aerial_km)
    s2 = _write_sentinel2(folder / "s2", features, things, epsg, bounds, seed)
    image = render_aerial(features, things, pictured, 1.0, AERIAL_SHIFT_M, seed)
    item = write_aerial(folder / "aerial", image, epsg, pictured)
    aerial = write_catalog(folder / "aerial", AERIAL_COLLECTION, "Aerial pictures", [item])
    world = World(
        folder=folder,
        pbf=pbf,
        s2_catalog=s2,
        aerial_catalog=aerial,
        s2_collection=S2_COLLECTION,
        aerial_collection=AERIAL_COLLECTION,
        epsg=epsg,
        bounds_utm=bounds,
        bounds_lonlat=to_lonlat(epsg, bounds),
        aerial_bounds_utm=pictured,
        aerial_bounds_lonlat=to_lonlat(epsg, pictured),
        s2_shift_m=S2_SHIFT_M,
        aerial_shift_m=AERIAL_SHIFT_M,
    )
    _save(manifest, inputs, world)
    return world


def _write_sentinel2(
    folder: Path, features: Features, things: Drawables, epsg: int, bounds: Bounds, seed: int
) -> Path:
    items = []
    for scene in render_pair(features, things, bounds, S2_SHIFT_M, seed):
        home = item_folder(folder, S2_COLLECTION, scene.acquired.name)
        home.mkdir(parents=True, exist_ok=True)
        files = {}
        arrays: dict[str, NDArray[np.uint8] | NDArray[np.uint16]] = {
            **scene.bands,
            "scl": scene.scl,
        }
        for name, array in arrays.items():
            gsd = float(BAND_GSD_M.get(name, 20))
            grid = Grid(epsg, (bounds[0], bounds[3]), gsd, (array.shape[0], array.shape[1]))
            path = home / f"{name}.tif"
            write_cog(path, array, epsg, grid.origin, gsd, categories=name == "scl")
            files[name] = (path, grid)
        items.append(sentinel2_item(scene, home, files))
    return write_catalog(folder, S2_COLLECTION, "Sentinel-2-like scenes", items)


def write_aerial(folder: Path, image: NDArray[np.uint8], epsg: int, bounds: Bounds) -> pystac.Item:
    """Writes an aerial picture [3, H, W] of `bounds` (UTM metres) at 1 m; returns its item."""
    identity = f"aerial-{AERIAL_TIME:%Y%m%d}"
    home = item_folder(folder, AERIAL_COLLECTION, identity)
    home.mkdir(parents=True, exist_ok=True)
    grid = Grid(epsg, (bounds[0], bounds[3]), 1.0, (image.shape[1], image.shape[2]))
    write_cog(home / "image.tif", image, epsg, grid.origin, 1.0)
    return aerial_item(identity, AERIAL_TIME, home, home / "image.tif", grid)


def aerial_bounds(bounds: Bounds, centre: tuple[float, float], size_km: float) -> Bounds:
    """A square (or less) about `centre` within `bounds`, on multiples of 64 m where it can be."""
    out = []
    for axis in (0, 1):
        low, high = np.ceil(bounds[axis] / 64) * 64, np.floor(bounds[axis + 2] / 64) * 64
        size = min(round(size_km * 1000 / 64) * 64, high - low)
        start = np.clip(np.round((centre[axis] - size / 2) / 64) * 64, low, high - size)
        out.append((float(start), float(start + size)))
    return (out[0][0], out[1][0], out[0][1], out[1][1])


def to_lonlat(epsg: int, bounds: Bounds) -> Bounds:
    """Bounds in UTM metres as degrees."""
    transformer = Transformer.from_crs(epsg, 4326, always_xy=True)
    return tuple(round(float(v), 7) for v in transformer.transform_bounds(*bounds))  # type: ignore[return-value]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _save(manifest: Path, inputs: Mapping[str, object], world: World) -> None:
    """Written last, and whole: a folder without it is not a world."""
    fields = {
        k: str(v.relative_to(world.folder)) if isinstance(v, Path) else v
        for k, v in asdict(world).items()
    }
    partial = manifest.with_suffix(".part")
    partial.write_text(
        json.dumps({"inputs": inputs, "world": fields}, indent=1, sort_keys=True) + "\n"
    )
    partial.replace(manifest)


def _load(folder: Path, fields: dict[str, object]) -> World:
    paths = {k: folder / str(fields[k]) for k in ("pbf", "s2_catalog", "aerial_catalog")}
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return World(**{**rest, **paths, "folder": folder})  # type: ignore[arg-type]
