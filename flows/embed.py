"""Embeddings and maps of a dataset, or of one big image."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from geolink.device import pick_device
from geolink.embed.area import Area, cut_blocks, dataset_areas
from geolink.embed.colours import PALETTE, Colours, fit_colours, paint, sample_patches
from geolink.embed.models import open_embedder
from geolink.embed.run import ZARR, Embedded, Progress, embed_areas
from geolink.embed.store import Kept
from geolink.embed.windows import Lattice
from geolink.reader import Dataset, open_dataset
from geolink.tasks.adapt import wavelength_nm
from geolink.tasks.contracts import Imagery
from pipelines.maps import write_map
from pipelines.pixels import Scene, look, read_window
from schemas.cf import grid_mapping, is_utm
from schemas.errors import GeoLinkError
from schemas.evaluation import Inputs
from schemas.storage import Location

BLOCK_PX = 2048
"""Side of a block of a file of pixels."""
_MISSING = -9999
"""Stands for not-a-number in pixels of float32."""


@dataclass(frozen=True, eq=False)
class Maps:
    """What an embedding of an area came to."""

    embedded: Embedded
    maps: list[Path]
    """PCA and k-means, an area."""
    explained: tuple[float, ...]
    """Share of the variance in each of the colours."""


def embed(
    source: Location,
    checkpoint: Path | str,
    folder: Path,
    *,
    inputs: Inputs | None = None,
    snapshot: int | None = None,
    bands: Sequence[str] = (),
    normalise: str = "checkpoint",
    overlap: int | None = None,
    kept: Kept = "float16",
    clusters: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    accelerator: str = "auto",
    progress: Progress | None = None,
) -> Maps:
    """Embed a dataset or a raster file into `folder`: Zarr with coordinates, PCA and k-means maps.

    Run again after it was stopped, it goes on, and ends with the same bytes.

    Args:
        source: dataset, or a georeferenced raster file.
        checkpoint: as `geolink.tasks.encoders.open_encoder` takes.
        folder: of the results, new or begun.
        inputs: `image`, or `image+osm`; none: `image+osm` for a dataset, else `image`.
        snapshot: of a dataset; none: the latest.
        bands: names of a file's bands, where it does not say.
        normalise: by whose mean and deviation pixels are scaled: `checkpoint`, or `data`.
        overlap: patches that neighbouring windows share; none: a quarter of a window.
        kept: `float16` or `int8`.
        clusters: of the k-means map.
        seed: of the sample that maps are fitted on.
        batch_size: windows encoded at once.
        accelerator: where the encoder runs.
        progress: is told of blocks.

    Raises GeoLinkError: nothing there that can be embedded, as `open_embedder` and `embed_areas`.
    """
    device = pick_device(accelerator)
    dataset: Dataset | None = None
    if isinstance(source, Path) and source.is_file():
        scene = look(source)
        areas = _of_scene(scene, bands)
        made_from: dict[str, Any] = {"source": source.name, "source_key": scene.key}
    else:
        dataset = open_dataset(source, snapshot)
        areas = partial(dataset_areas, dataset)
        checksums = "".join(r.checksum for r in dataset.rows)
        made_from = {
            "source": dataset.info.name, "snapshot": dataset.snapshot,
            "source_key": xxhash.xxh3_128_hexdigest(checksums.encode()),
        }  # fmt: skip
    embedder, found = open_embedder(
        checkpoint, inputs or ("image" if dataset is None else "image+osm"), areas, dataset,
        device=device, normalise=normalise,
    )  # fmt: skip
    grid = embedder.encoder.grid
    lattice = Lattice(grid, grid // 4 if overlap is None else overlap, batch_size)
    embedded = embed_areas(
        embedder, found, dataset, folder, made_from, lattice=lattice, kept=kept, progress=progress
    )
    root = zarr.open_group(str(folder / ZARR), mode="r")
    colours = fit_colours(sample_patches(root, found, "patch", seed), clusters, seed)
    maps = [path for area in found for path in _draw(root, area, colours, folder, embedder.patch)]
    return Maps(embedded, maps, colours.explained)


def _of_scene(scene: Scene, bands: Sequence[str]) -> Callable[[int], list[Area]]:
    """A raster file as an area, from the side of a patch."""
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
        side = max(1, BLOCK_PX // patch)
        return [
            Area("raster", mapping, west, north, (a, -e), shape, patch, imagery,
                 cut_blocks(shape, patch, side), side, read)
        ]  # fmt: skip

    return areas


def _draw(root: zarr.Group, area: Area, colours: Colours, folder: Path, patch: int) -> list[Path]:
    """The maps of an area, a pixel a patch."""
    pca, kmeans = (folder / f"{name}-{area.name}.tif" for name in ("pca", "kmeans"))
    place: dict[str, Any] = {
        "crs_wkt": str(area.mapping["crs_wkt"]),
        "transform": (area.west, area.north, area.step[0] * patch, area.step[1] * patch),
    }
    table = {n: _rgb(colour) for n, colour in enumerate(PALETTE[: len(colours.centres)], start=1)}
    with ExitStack() as open_maps:
        put_rgb, put_cluster = (
            open_maps.enter_context(write_map(pca, shape=(3, *area.patches), **place)),
            open_maps.enter_context(
                write_map(kmeans, shape=(1, *area.patches), colours=table, **place)
            ),
        )
        for row, column, rgb, cluster in paint(root, area, "patch", colours):
            put_rgb(row, column, rgb)
            put_cluster(row, column, cluster)
    return [pca, kmeans]


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue
