"""Images of a benchmark get their OSM objects: a folder of image-OSM pairs, and a dataset of it.

An image's place is known from its file (GeoTIFF), or from `bounds.csv` beside the images (file,
west, south, east, north in degrees; maybe label, split). A pair's objects are drawn where the
image's own projection has them: an object's place within the picture is exact, whatever the CRS.
Folders of classes and splits (`<split>/<class>/<image>`, either may be missing) are kept: classes
in `labels.csv`, splits in each pair.
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.dataset as pads
import shapely
import xxhash
import yaml
from numpy.typing import NDArray
from PIL import Image
from platformdirs import user_cache_path
from pyproj import CRS, Transformer

from pipelines.build import BuildResult, build_dataset
from pipelines.osm import Extract, extract_of
from pipelines.pixels import look, read_pixels
from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.grid import Bounds, utm_epsg
from schemas.layout import Kind
from schemas.load import load_config
from schemas.sources import OsmSource, Region
from schemas.splits import SPLITS

_IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
           "test": "test", "testing": "test"}  # fmt: skip
_BOUNDS = ("file", "west", "south", "east", "north")
_MANY_VERTICES = 1000
"""Objects with more are cut near the image before they are written."""

ToPicture = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Degrees [n, 2] -> places in the picture [n, 2]: 0 to 1, x right, y down."""


class Picture(NamedTuple):
    """An image, what it shows and where it lies."""

    path: Path
    name: str
    """Of its pair."""
    label: str | None
    split: str | None
    size: int
    """Longer side in pixels."""
    gsd_m: float
    box: Bounds
    """Degrees: as wide and as high as the picture is through its middle."""
    around: Bounds
    """Degrees: all of the picture lies within."""
    place: ToPicture


@dataclass(frozen=True)
class Paired:
    """What pairing a folder of images came to."""

    pairs: Path
    labels: Path
    config: Path
    """Of the dataset, to build it again."""
    extract: str
    images: int
    written: int
    """Pairs that were made now; the others were there."""
    objects: int
    without_objects: int
    """Images that no OSM object meets."""
    skipped: dict[str, str]
    """Images that were left out, and why."""
    build: BuildResult


def pair_images(
    images: Path,
    folder: Path,
    osm: str,
    *,
    cache: Path | None = None,
    size: int | None = None,
    patch: int = 16,
    block_km: float = 20.0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Paired:
    """Give a folder of images their OSM objects, and build a dataset of both.

    `folder` gets `pairs/`, `labels.csv` (id, label, split), `dataset.yaml` and `dataset/`. Pairs
    whose image and extract are the same as before are left alone.

    Args:
        images: GeoTIFFs, or images with `bounds.csv`, in folders of classes and splits or none.
        folder: of the results.
        osm: a PBF file or its address; `auto`: the smallest published extracts that cover all.
        cache: of converted extracts; none: the user's.
        size: side of chips in pixels; none: of most images.
        patch: side of patches in pixels.
        block_km: where no folders say which image is of which split, blocks of this side share one.
        workers: processes that build shards.
        progress: is told of images.

    Raises GeoLinkError: no image that can be used; no extract; sizes that patches do not divide.
    """
    pictures, skipped = find_pictures(images)
    chosen = size or Counter(p.size for p in pictures).most_common(1)[0][0]
    if chosen % patch:
        raise GeoLinkError(
            f"chips of {chosen} px cannot be cut into patches of {patch} px: choose --size or "
            "--patch"
        )
    source = OsmSource(find="any") if osm == "auto" else OsmSource(pbf=(osm,))
    extract = extract_of(source, _region(pictures), cache or user_cache_path("geolink"))
    pairs = folder / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    _remove_strays(pairs, {p.name for p in pictures})
    written = objects = without = 0
    for n, picture in enumerate(pictures, start=1):
        made, count = _write_pair(picture, extract, pairs / picture.name)
        written, objects, without = written + made, objects + count, without + (count == 0)
        if progress:
            progress(n, len(pictures))
    labels = folder / "labels.csv"
    _write_labels(labels, pictures)
    gsd_m = round(float(np.median([p.gsd_m * p.size / chosen for p in pictures])), 3)
    config = _write_config(folder, images.name, gsd_m, chosen, patch, block_km)
    built = build_dataset(load_config(config, DatasetConfig), workers=workers)
    return Paired(
        pairs, labels, config, extract.source, len(pictures), written, objects, without, skipped,
        built,
    )  # fmt: skip


def find_pictures(images: Path) -> tuple[list[Picture], dict[str, str]]:
    """The images of a folder that have a place, and why others are left out.

    Raises GeoLinkError: no such folder, none has a place, two have one name, `bounds.csv` damaged.
    """
    if not images.is_dir():
        raise GeoLinkError(f"there is no folder of images {images}")
    stated = _read_bounds(images / "bounds.csv")
    found, skipped = [], dict[str, str]()
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in _IMAGES)
    for path in paths:
        relative = path.relative_to(images)
        about = stated.get(relative.as_posix()) or stated.get(path.name)
        try:
            found.append(_picture(path, relative, about))
        except GeoLinkError as error:
            skipped[relative.as_posix()] = str(error)
    if not found:
        why = next(iter(skipped.values())) if skipped else "it holds no image file"
        raise GeoLinkError(f"{images} has no image that can be paired: {why}")
    twice = [name for name, n in Counter(p.name for p in found).items() if n > 1]
    if twice:
        raise GeoLinkError(f"two images of {images} would both be named {twice[0]}: rename one")
    return found, skipped


def _read_bounds(path: Path) -> dict[str, dict[str, str]]:
    """Lines of `bounds.csv` by file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GeoLinkError(f"cannot read {path}: {error}") from error
    if not lines or not set(_BOUNDS) <= set(lines[0]):
        raise GeoLinkError(f"{path} needs the columns {', '.join(_BOUNDS)}, and a line an image")
    return {line["file"]: line for line in lines}


def _picture(path: Path, relative: Path, about: dict[str, str] | None) -> Picture:
    """Raises GeoLinkError if the image has no place."""
    folders = list(relative.parts[:-1])
    split = next((_SPLITS[f.lower()] for f in folders if f.lower() in _SPLITS), None)
    classes = [f for f in folders if f.lower() not in _SPLITS]
    label = classes[-1] if classes else None
    name = "__".join(relative.with_suffix("").parts)
    if about is None:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise GeoLinkError(
                f"{path} does not say where it lies: list it in bounds.csv ({', '.join(_BOUNDS)})"
            )
        return _of_geotiff(path, name, label, split)
    try:
        west, south, east, north = box = tuple(float(about[key]) for key in _BOUNDS[1:])
    except (TypeError, ValueError):
        raise GeoLinkError(f"the bounds of {relative} in bounds.csv are not four numbers") from None
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise GeoLinkError(
            f"the bounds of {relative} in bounds.csv, {list(box)}, are no box of degrees with west "
            "< east and south < north"
        )
    stated = about.get("split") or split
    if stated is not None and stated not in SPLITS:
        raise GeoLinkError(f"{relative} is of split {stated!r}: known are {', '.join(SPLITS)}")
    with Image.open(path) as image:
        size = max(image.size)
    metres = (north - south) * 111_320.0
    scale, corner = np.array([east - west, south - north]), np.array([west, north])
    return Picture(
        path, name, about.get("label") or label, stated, size, metres / size,
        (west, south, east, north), (west, south, east, north), lambda p: (p - corner) / scale,
    )  # fmt: skip


def _of_geotiff(path: Path, name: str, label: str | None, split: str | None) -> Picture:
    scene = look(path)
    if (scene.shape[0], scene.dtype) != (3, "uint8"):
        raise GeoLinkError(
            f"{path} has {scene.shape[0]} bands of {scene.dtype}, pairs hold RGB images of 8 bits: "
            "choose and scale three of its bands first (gdal_translate -b ... -scale -ot Byte)"
        )
    crs = CRS.from_wkt(scene.crs_wkt)
    forth = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    a, _, west, _, e, north = scene.transform
    _, rows, columns = scene.shape
    corner, scale = np.array([west, north]), np.array([a * columns, e * rows])

    def place(lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (np.stack(forth.transform(*lonlat.T), 1) - corner) / scale
        return found

    middle = np.array([[0, 0.5], [1, 0.5], [0.5, 1], [0.5, 0]]) * scale + corner
    lon, lat = back.transform(*middle.T)
    around = back.transform_bounds(west, north + scale[1], west + scale[0], north, densify_pts=21)
    return Picture(
        path, name, label, split, max(rows, columns), scene.gsd_m,
        (float(lon[0]), float(lat[2]), float(lon[1]), float(lat[3])), around, place,
    )  # fmt: skip


def _region(pictures: list[Picture]) -> Region:
    """All images: which extracts cover them. Raises GeoLinkError for one outside UTM."""
    for p in pictures:
        utm_epsg((p.box[0] + p.box[2]) / 2, (p.box[1] + p.box[3]) / 2)
    boxes = shapely.union_all(shapely.box(*np.array([p.around for p in pictures]).T))
    parts = [p for p in shapely.get_parts(boxes) if p.area > 0]
    return Region(geojson=json.loads(shapely.to_geojson(shapely.MultiPolygon(parts))))


def _remove_strays(pairs: Path, names: set[str]) -> None:
    """Remove pairs of images that are gone, and what a killed run left.

    Raises GeoLinkError if the folder holds anything that was not made here.
    """
    for path in sorted(p for p in pairs.iterdir() if p.name not in names):
        meta = path / "meta.json"
        ours = path.name.endswith(".partial") or (
            meta.is_file() and "made_from" in json.loads(meta.read_text(encoding="utf-8"))
        )
        if not ours:
            raise GeoLinkError(f"{path} was not made by `geolink pair`: choose a new folder")
        shutil.rmtree(path)


def _write_pair(picture: Picture, extract: Extract, folder: Path) -> tuple[bool, int]:
    """Write a pair, whole or not at all; whether it was not there yet, and how many objects."""
    digest = xxhash.xxh3_128(picture.path.read_bytes())
    digest.update(f"{extract.key} {picture.box} {picture.split}".encode())
    meta: dict[str, Any] = {"bounds_lonlat": picture.box, "made_from": digest.hexdigest()}
    there = folder / "meta.json"
    if there.is_file():
        before = json.loads(there.read_text(encoding="utf-8"))
        if before.get("made_from") == meta["made_from"]:
            return False, int(before["objects"])
    if picture.split is not None:
        meta["split"] = picture.split
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pixels = read_pixels(picture.path).image
    if len(pixels) == 3 and pixels.dtype == np.uint8:
        Image.fromarray(np.moveaxis(pixels, 0, -1)).save(partial / "image.png")
    else:
        shutil.copy(picture.path, partial / f"image{picture.path.suffix}")
    meta["objects"] = 0
    for kind, features in _objects(picture, extract):
        meta["objects"] += len(features)
        text = json.dumps({"type": "FeatureCollection", "features": features})
        (partial / f"osm_{kind.name.lower()}.geojson").write_text(text, encoding="utf-8")
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True, meta["objects"]


def _objects(picture: Picture, extract: Extract) -> Iterator[tuple[Kind, list[dict[str, Any]]]]:
    """Features that meet a picture, by kind, in the degrees of its box."""
    west, south, east, north = picture.around
    meets = (
        (pads.field("xmax") >= west) & (pads.field("xmin") <= east)
        & (pads.field("ymax") >= south) & (pads.field("ymin") <= north)
    )  # fmt: skip
    table = pads.dataset(extract.parquet, format="parquet").to_table(
        columns=["osm", "geometry", "tags"], filter=meets
    ).sort_by("osm")  # fmt: skip
    shapes = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    tags = table["tags"].to_pylist()
    big = shapely.get_num_coordinates(shapes) > _MANY_VERTICES
    width, height = east - west, north - south
    near = shapely.box(west - width, south - height, east + width, north + height)
    shapes[big] = shapely.intersection(shapely.make_valid(shapes[big]), near)
    shapes = shapely.transform(shapes, lambda p: _in_box(picture, p))
    kept = shapely.intersects(shapes, shapely.box(*picture.box)) & ~shapely.is_empty(shapes)
    dimension = shapely.get_dimensions(shapes)
    for kind in Kind:
        rows = np.flatnonzero(kept & (dimension == int(kind)))
        features = [
            {
                "type": "Feature",
                "properties": {"tags": dict(t.split("=", 1) for t in tags[n])},
                "geometry": json.loads(text),
            }
            for n, text in zip(rows.tolist(), shapely.to_geojson(shapes[rows]))
        ]
        if features:
            yield kind, features


def _in_box(picture: Picture, lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees -> the degrees of a box in which the picture's pixels lie evenly."""
    west, south, east, north = picture.box
    placed: NDArray[np.float64] = np.array([west, north]) + picture.place(lonlat) * np.array(
        [east - west, south - north]
    )
    return placed


def _write_labels(path: Path, pictures: list[Picture]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "label", "split"])
        table.writerows([p.name, p.label or "", p.split or ""] for p in pictures)


def _write_config(
    folder: Path, name: str, gsd_m: float, size: int, patch: int, block_km: float
) -> Path:
    path = folder / "dataset.yaml"
    config = {
        "name": "".join(c if c.isalnum() or c in "-_. " else "-" for c in name) or "paired",
        "dataset": "dataset", "pairs": "pairs", "sensor": "aerial-rgb",
        "grid": {"gsd_m": gsd_m, "size": size, "patch": patch},
        "splits": {"block_km": block_km, "train": 0.6, "val": 0.2, "test": 0.2},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path
