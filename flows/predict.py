"""Maps of a trained model over a dataset, or over one big image."""

import io
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flows.areas import scene_areas
from geolink.device import pick_device
from geolink.embed.area import Area, Block, cut_blocks, dataset_areas
from geolink.embed.run import Progress, claim, read_ahead
from geolink.page.evaluation import mask_colors
from geolink.reader import Dataset, open_dataset
from geolink.tasks.contracts import IGNORE
from geolink.tasks.kept import KeptModel, read_model
from geolink.tasks.predict import (
    STEPS,
    Predicted,
    Predictor,
    cell_px,
    open_predictor,
    predict_block,
    predict_chips,
)
from pipelines.maps import add_legend, write_map
from pipelines.pixels import look
from pipelines.polygons import row_area_m2, write_polygons
from schemas.errors import GeoLinkError
from schemas.storage import Location
from schemas.storage_local import LocalStorage

BLOCK_PX = 1024
"""Side of a block of pixels."""
CLAIM, DONE, PARTS = "inputs.json", "predict.json", ".parts"


def predict(
    model: Path,
    source: Location,
    folder: Path,
    *,
    snapshot: int | None = None,
    bands: Sequence[str] = (),
    checkpoint: str | None = None,
    batch_size: int = 32,
    accelerator: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply the model of an evaluation to a dataset or a raster file; what is in `predict.json`.

    Writes into `folder`, of each UTM zone of a dataset: `classes.tif`, `probability.tif`,
    `polygons.parquet`, `map.png`. Run again after it was stopped, it goes on, and ends with the
    same maps.

    Args:
        model: folder of `geolink evaluate --output`.
        source: dataset, or a georeferenced raster file.
        folder: of the results, new or begun.
        snapshot: of a dataset; none: the latest.
        bands: names of a file's bands, where it does not say.
        checkpoint: where the model's checkpoint lies now; none: where it lay.
        batch_size: windows seen at once.
        accelerator: where the model runs.
        progress: is told of blocks.

    Raises GeoLinkError: as `open_predictor`; a folder of other maps; a file that cannot be read.
    """
    start = time.perf_counter()
    device = pick_device(accelerator)
    kept, _ = read_model(model)
    dataset: Dataset | None = None
    if isinstance(source, Path) and source.is_file():
        scene = look(source)
        areas: Callable[[int], list[Area]] = scene_areas(scene, bands, BLOCK_PX)
        made_from: dict[str, Any] = {"source": source.name, "source_key": scene.key}
    else:
        dataset = open_dataset(source, snapshot)
        areas = _dataset_blocks(dataset, kept)
        checksums = "".join(r.checksum for r in dataset.rows)
        made_from = {
            "source": dataset.info.name, "snapshot": dataset.snapshot,
            "source_key": xxhash.xxh3_128_hexdigest(checksums.encode()),
        }  # fmt: skip
    predictor = open_predictor(model, areas, dataset, device=device, checkpoint=checkpoint)
    about = {**made_from, "task": kept.task, "weights": kept.checksum, "inputs": kept.inputs,
             "bands": list(bands), "block_px": BLOCK_PX}  # fmt: skip
    claim(folder, CLAIM, about, "maps")
    files = LocalStorage(folder)
    if files.exists(DONE):
        there: dict[str, Any] = json.loads(files.read(DONE))
        return there
    found = areas(predictor.cell)
    written, blocks = _predict_blocks(predictor, found, dataset, files, batch_size, progress)
    maps = {
        area.name: _draw(area, kept, folder, files, f"-{area.name}" if len(found) > 1 else "")
        for area in found
    }
    result = {
        **about, "model": str(model), "data": kept.data, "classes": list(kept.classes),
        "cell_px": predictor.cell, "areas": maps,
        "run": {
            "seconds": round(time.perf_counter() - start, 2), "peak_mb": _peak_mb(),
            "blocks": blocks, "computed_now": written, "device": str(device),
        },
    }  # fmt: skip
    files.write(DONE, (json.dumps(result, indent=2) + "\n").encode())
    shutil.rmtree(folder / PARTS)
    return result


def _dataset_blocks(dataset: Dataset, kept: KeptModel) -> Callable[[int], list[Area]]:
    """Zones of a dataset: cut into blocks if the model sees pixels alone, else a block a shard."""
    size, window = dataset.info.grid.size, kept.image_px[0]
    whole = kept.inputs != "image"
    if (whole and size != window) or (cell_px(kept) > 1 and size % window):
        raise GeoLinkError(
            f"the model takes images of {window} px, the chips of {dataset.path} are {size} px "
            f"wide: build a dataset with chips of {window} px"
        )

    def areas(patch: int) -> list[Area]:
        zones = dataset_areas(dataset, patch)
        if whole:
            return zones
        side = max(1, BLOCK_PX // patch)
        return [replace(z, blocks=cut_blocks(z.shape, patch, side), side=side) for z in zones]

    return areas


def _predict_blocks(
    predictor: Predictor, areas: list[Area], dataset: Dataset | None, files: LocalStorage,
    batch_size: int, progress: Progress | None,
) -> tuple[int, int]:  # fmt: skip
    """Compute the blocks that are not there; how many those are, and how many there are in all."""
    todo = [(a, b) for a in areas for b in a.blocks if not files.exists(_part(a, b))]
    total = sum(len(area.blocks) for area in areas)
    for n, (area, block, found) in enumerate(
        _each(predictor, todo, dataset, batch_size), total - len(todo) + 1
    ):
        data = io.BytesIO()
        np.savez_compressed(data, classes=found.classes, probability=found.probability)
        files.write(_part(area, block), data.getvalue())
        if progress:
            progress(n, total)
    return len(todo), total


def _each(
    predictor: Predictor, todo: list[tuple[Area, Block]], dataset: Dataset | None, batch_size: int
) -> Iterator[tuple[Area, Block, Predicted]]:
    if predictor.kept.inputs == "image":
        lattice = predictor.lattice(batch_size)
        for area, block, pixels in read_ahead(todo, lattice):
            yield area, block, predict_block(predictor, pixels, area, block, lattice)
        return
    assert dataset is not None
    for area, block in todo:
        yield area, block, predict_chips(predictor, dataset, area, block, batch_size)


def _part(area: Area, block: Block) -> str:
    return f"{PARTS}/{area.name}/{block.name}.npz"


def _draw(
    area: Area, kept: KeptModel, folder: Path, files: LocalStorage, suffix: str
) -> dict[str, Any]:
    """Put the blocks of an area together; what lies where, and how much of it."""
    classes, probability, polygons, picture = (
        folder / name.format(suffix)
        for name in ("classes{}.tif", "probability{}.tif", "polygons{}.parquet", "map{}.png")
    )
    colours = _colours(len(kept.classes))
    place = (area.west, area.north, area.step[0] * area.patch, area.step[1] * area.patch)
    wkt = str(area.mapping["crs_wkt"])
    cells = np.zeros((area.patches[0], len(kept.classes)), np.int64)
    said = {f"class_{n}": name for n, name in enumerate(kept.classes)}
    with ExitStack() as maps:
        put, put_sure = (
            maps.enter_context(write_map(path, shape=(1, *area.patches), crs_wkt=wkt,
                                         transform=place, **more))
            for path, more in (
                (classes, {"nodata": IGNORE, "colours": dict(enumerate(colours)), "tags": said,
                           "names": ("class",)}),
                (probability, {"scale": (1 / STEPS, -1 / STEPS),
                               "names": ("probability of the class",)}),
            )
        )  # fmt: skip
        for block in area.blocks:
            with np.load(io.BytesIO(files.read(_part(area, block)))) as part:
                found, sure = part["classes"], part["probability"]
            rows = slice(block.row, block.row + block.rows)
            for n in range(len(kept.classes)):
                cells[rows, n] += (found == n).sum(1)
            put(block.row, block.column, found[None])
            put_sure(block.row, block.column, sure[None])
    area_m2 = row_area_m2(wkt, place, area.patches)
    count = write_polygons(polygons, classes, probability, kept.classes, area_m2)
    total, square_m = cells.sum(0), area_m2 @ cells
    share = total / max(total.sum(), 1)
    drawn = classes.with_suffix(".png")
    add_legend(
        drawn, picture,
        [(c, f"{name}  {s:.1%}") for c, name, s in zip(colours, kept.classes, share, strict=True)],
    )  # fmt: skip
    drawn.unlink()
    return {
        "files": [p.name for p in (classes, probability, polygons, picture)],
        "cells": {
            **{name: int(n) for name, n in zip(kept.classes, total, strict=True)},
            "no data": int(area.patches[0] * area.patches[1] - total.sum()),
        },
        "area_m2": {n: round(float(a), 2) for n, a in zip(kept.classes, square_m, strict=True)},
        "polygons": count,
    }  # fmt: skip


def _colours(count: int) -> list[tuple[int, int, int]]:
    """As the page of an evaluation draws masks."""
    drawn: NDArray[np.uint8] = mask_colors(np.arange(count, dtype=np.uint8)[None])[0]
    return [(r, g, b) for r, g, b in drawn.tolist()]


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)
