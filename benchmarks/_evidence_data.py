"""What `evidence.py` learns from and scores on: an embedded world, its map, and what is there.

Three datasets of the same chips are built: the map's, and two of what is truly there, by land cover
and by function zone. `labelled` holds the chips as the map's dataset has them, pixels and objects,
with masks of what is there in place of those of the map; two CSV files hold the true cover and zone
of each chip. So tasks see the map, and are scored by what it may be wrong about.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml
from numpy.typing import NDArray

from geolink.reader import Dataset, open_dataset, read_shard
from geolink.tasks.contracts import Masks
from geolink.tasks.dense import mask_confusion
from pipelines.build import build_dataset
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset, write_shard
from pipelines.world.hard import HardWorld, make_hard_world
from schemas.config import DatasetConfig
from schemas.dataset import SnapshotRow, read_arrays
from schemas.grid import printed_chip

ZONES: dict[str, list[str]] = {
    "water": ["natural=water", "natural=bay", "waterway=riverbank", "landuse=reservoir",
              "landuse=basin", "place=sea"],
    "green": ["landuse=forest", "natural=wood", "leisure=park", "leisure=garden", "leisure=pitch",
              "leisure=playground", "leisure=golf_course", "leisure=sports_centre",
              "leisure=stadium", "landuse=cemetery", "landuse=grass", "landuse=allotments",
              "landuse=recreation_ground"],
    "farmland": ["landuse=farmland", "landuse=farmyard", "landuse=meadow", "landuse=orchard",
                 "landuse=vineyard"],
    "undeveloped": ["natural=grassland", "natural=heath", "natural=scrub", "natural=wetland",
                    "natural=bare_rock", "natural=sand", "natural=beach", "landuse=brownfield",
                    "landuse=construction", "landuse=greenfield"],
    "residential": ["landuse=residential"],
    "commercial": ["landuse=commercial", "landuse=retail"],
    "institutional": ["amenity=school", "amenity=university", "amenity=hospital",
                      "landuse=religious", "landuse=education", "landuse=institutional"],
    "industrial": ["landuse=industrial", "landuse=depot", "landuse=quarry", "landuse=landfill",
                   "landuse=port", "landuse=harbour", "power=substation", "power=plant",
                   "man_made=wastewater_plant", "man_made=works"],
    "transport": ["aeroway=aerodrome", "aeroway=apron", "aeroway=runway", "landuse=railway",
                  "amenity=parking"],
}  # fmt: skip
"""Function zones, those that `geolink evaluate zones` knows, by the true tags of areas."""

_COLORS = (
    "#4a90d9", "#2f7d3b", "#e6cf7a", "#aab13b", "#d9a6a0", "#f06292", "#e57373", "#9575cd",
    "#8d8d8d",
)  # fmt: skip
_LABELS = ("label_pixel", "label_patch", "label_region")
_ZONE_SHARE = 0.5
"""Least share of a chip that its zone covers; other chips have no label."""
_VALIDATION = 250
"""Labelled chips of val: tasks that train look at them after every epoch."""


@dataclass(frozen=True)
class Size:
    """Sides of the world and of its aerial picture."""

    world_km: float
    aerial_km: float


@dataclass(frozen=True)
class Data:
    """Where everything lies."""

    map: Path
    """Dataset that models learn from; its train split."""
    labelled: Path
    """Dataset that tasks learn from and are scored on."""
    labels: dict[str, Path]
    """`cover` and `zone` of chips of `labelled`, CSV."""
    mask_share: float
    """Share of the train split that makes as many masks as there are other labels."""


def make_data(folder: Path, size: Size, labels: int) -> Data:
    """Make all that is not there yet. `labels`: how many chips of the train split have some."""
    tables = {k: folder / f"{k}.csv" for k in ("cover", "zone")}
    # The last thing written.
    if not tables["zone"].exists():
        _make(folder, size, labels, tables)
    dataset = open_dataset(folder / "labelled")
    chips = sum(row.chips for row in dataset.split_rows("train"))
    return Data(folder / "map", folder / "labelled", tables, min(1.0, labels / chips))


def _make(folder: Path, size: Size, labels: int, tables: dict[str, Path]) -> None:
    world = make_hard_world(
        folder / "world", seed=0, size_km=size.world_km, aerial_km=size.aerial_km
    )
    taxonomy = folder / "zones.yaml"
    taxonomy.write_text(yaml.safe_dump({"classes": [
        {"name": name, "color": color, "rules": rules}
        for (name, rules), color in zip(ZONES.items(), _COLORS, strict=True)
    ]}))  # fmt: skip
    mapped = _build(folder, "map", world, world.pbf)
    cover = _build(folder, "cover", world, world.truth_pbf)
    zones = _build(folder, "zones", world, world.truth_pbf, taxonomy)
    shutil.rmtree(folder / "labelled", ignore_errors=True)
    _write_labelled(folder / "labelled", mapped, cover)
    _write_labels(tables["cover"], cover, labels, 0.0)
    _write_labels(tables["zone"], zones, labels, _ZONE_SHARE)


def blocks(data: Data) -> dict[str, str]:
    """By the name of each labelled chip its shard: a block of 512 m with a flight of its own."""
    dataset = open_dataset(data.labelled)
    return {
        printed_chip(chip): row.shard
        for row in dataset.rows
        for chip in read_shard(dataset, row, ("chip_id",))["chip_id"]
    }


def map_masks(data: Data) -> Masks:
    """The map's own pixel labels as a segmentation of the test chips, nothing learnt; the last
    class is none: where the map says nothing, which is never right."""
    mapped, labelled = open_dataset(data.map), open_dataset(data.labelled)
    truth = {row.shard: row for row in labelled.rows}
    classes = len(mapped.info.taxonomy.names) + 1
    ids, counts = [], []
    for row in mapped.split_rows("test"):
        said = read_shard(mapped, row, ("chip_id", "label_pixel"))
        there = read_shard(labelled, truth[row.shard], ("label_pixel",))["label_pixel"]
        names = np.array([printed_chip(chip) for chip in said["chip_id"]])
        guess = np.where(said["label_pixel"] == 0, classes - 1, said["label_pixel"] - 1)
        # 0 is no statement of the truth, and wraps to what is not scored.
        counts.append(mask_confusion(there - np.uint8(1), guess.astype(np.uint8), classes, names))
        ids.append(names)
    return Masks(np.concatenate(ids), np.concatenate(counts), np.zeros((1, 3)))


def _build(
    folder: Path, name: str, world: HardWorld, pbf: Path, taxonomy: Path | None = None
) -> Dataset:
    build_dataset(
        DatasetConfig.model_validate({
            "name": name, "dataset": folder / name, "cache": folder / "cache",
            "region": {"bbox": world.bounds_lonlat}, "scenes": {"stac": str(world.catalog)},
            "osm": {"pbf": pbf}, "sensor": "aerial-rgb", "taxonomy": taxonomy,
            "grid": {"gsd_m": 1, "size": 64, "patch": 8, "shard_side": 8},
            "splits": {"block_km": 0.512, "train": 0.7, "val": 0.1, "test": 0.2, "seed": 0},
        }),
        workers=1,
    )  # fmt: skip
    return open_dataset(folder / name)


def _write_labelled(folder: Path, mapped: Dataset, cover: Dataset) -> None:
    info = mapped.info.model_copy(update={"name": "labelled"})
    prepare_dataset(folder, info)
    shutil.copytree(Path(str(mapped.path)) / "tags", folder / "tags")
    truth = {row.shard: row for row in cover.rows}
    written = []
    for row in mapped.rows:
        arrays, attributes = read_arrays(mapped.path, row.path)
        found = _truth(cover, truth[row.shard], arrays["chip_id"], _LABELS)
        key = xxhash.xxh3_128_hexdigest(f"{row.key} {truth[row.shard].key}".encode())
        stored = write_shard(folder, row.shard, key, {**arrays, **found}, attributes, info)
        written.append(
            row._replace(path=stored.path, key=key, checksum=stored.checksum, bytes=stored.bytes)
        )
    publish(folder, written, mapped.vocabulary_key, info)


def _write_labels(path: Path, truth: Dataset, labels: int, min_share: float) -> None:
    """The class that truly covers most of each chip, where it covers enough: of `labels` chips of
    train, of some of val and all of test whose class is among them."""
    lines: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for row in truth.rows:
        arrays = read_shard(truth, row, ("chip_id", "label_region"))
        share = arrays["label_region"]
        kept = (share.max(1) > 0) & (share.max(1) >= min_share)
        names = np.array(truth.info.taxonomy.names)[share.argmax(1)]
        lines[row.split] += [
            (printed_chip(chip), name)
            for chip, name in zip(arrays["chip_id"][kept], names[kept].tolist(), strict=True)
        ]
    table = _drawn(lines["train"], labels)
    known = {name for _, name in table}
    val, test = ([line for line in lines[split] if line[1] in known] for split in ("val", "test"))
    table += _drawn(val, _VALIDATION) + test
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label"), *table])
    partial.replace(path)


def _drawn(lines: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    drawn = np.random.default_rng(0).permutation(len(lines))[:count]
    return [lines[n] for n in sorted(drawn.tolist())]


def _truth(
    dataset: Dataset, row: SnapshotRow, chips: NDArray[np.uint64], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    arrays = read_shard(dataset, row, ("chip_id", *names))
    assert np.array_equal(arrays["chip_id"], chips), "the datasets are not of the same chips"
    return {name: arrays[name] for name in names}
