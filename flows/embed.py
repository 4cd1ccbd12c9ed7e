"""Embeddings and maps of a dataset, or of one big image."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
import zarr

from flows.areas import scene_areas
from geolink.device import pick_device
from geolink.embed.area import Area, dataset_areas
from geolink.embed.colours import PALETTE, Colours, fit_colours, paint, sample_patches
from geolink.embed.models import open_embedder
from geolink.embed.run import ZARR, Embedded, Progress, embed_areas
from geolink.embed.store import Kept
from geolink.embed.windows import Lattice
from geolink.reader import Dataset, open_dataset
from pipelines.maps import write_map
from pipelines.pixels import look
from schemas.evaluation import Inputs
from schemas.storage import Location

BLOCK_PX = 2048
"""Side of a block of a file of pixels."""


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
        areas = scene_areas(scene, bands, BLOCK_PX)
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
