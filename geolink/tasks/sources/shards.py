"""Datasets of GeoLink as labelled images: labels of chips, objects, patches and pixels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from geolink.reader import Arrays, Dataset, open_dataset, tag_table
from geolink.stream import read_chips
from geolink.stream.batch import Batch
from geolink.tasks.contracts import IGNORE, Imagery, Kind, Part, TaskBatch, TaskData
from geolink.tasks.sources.common import Found, number_classes
from schemas.dataset import SnapshotRow, certificate_name, read_arrays
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.grid import printed_chip
from schemas.layout import Kind as ObjectKind
from schemas.storage import storage

KINDS: dict[str, Kind] = {
    "region": "class", "regions": "multilabel", "object": "class", "patch": "mask",
    "pixel": "mask",
}  # fmt: skip
"""What labels of each name are."""

_FROM_OSM = (
    "labels are from OpenStreetMap itself: with OSM among the inputs the task is partly to read "
    "them off"
)


def open_shards(config: TaskConfig) -> TaskData:
    """A dataset of GeoLink, labelled as `config.labels` says.

    A class of the taxonomy that no chip of the training split has cannot be learnt: chips of it
    are left out and counted. Raises GeoLinkError: no dataset, an empty split, no chip with a label.
    """
    dataset = open_dataset(config.data, config.snapshot)
    label = _labeller(config, dataset)
    splits = {"train": config.fit, "test": config.held_out}
    if "val" not in {*config.fit, *config.held_out}:
        splits["val"] = ("val",)
    shards = {
        split: held
        for split, names in splits.items()
        if (held := [r for r in dataset.rows if r.chips and r.split in names])
    }
    for split in ("train", "test"):
        if split not in shards:
            dataset.split_rows(splits[split][0])  # says what there is
    found = {split: _look(dataset, rows, label) for split, rows in shards.items()}
    kind = KINDS[config.labels] if isinstance(config.labels, str) else "class"
    names = label.names
    notes = [_FROM_OSM] if isinstance(config.labels, str) else []
    if kind == "mask":
        classes = tuple(names)
        parts = {s: Part(f.ids, None, f.bounds_lonlat, f.left_out) for s, f in found.items()}
        rows = {s: f.row for s, f in found.items()}
    else:
        classes, parts, rows, more = number_classes(
            found, names, kind, str(dataset.path), strict=isinstance(config.labels, Path)
        )
        notes += more
    if config.inputs != "image" and (empty := _without_objects(dataset, shards, rows)):
        notes.append(f"{empty:,} of {sum(map(len, rows.values())):,} chips have no OSM object")
    reader = _Reader(dataset, shards, rows, parts, config.labels)
    info, sensor = dataset.info, dataset.info.sensor
    table = tag_table(dataset).astype(np.float32)
    key = xxhash.xxh3_128_hexdigest(
        repr((
            [(s, [r.checksum for r in shards[s]], rows[s].tobytes()) for s in sorted(shards)],
            str(config.labels), dataset.vocabulary_key,
        )).encode()
    )  # fmt: skip
    return TaskData(
        name=info.name,
        key=key,
        kind=kind,
        imagery=Imagery(
            tuple(b.name for b in sensor.bands), tuple(b.wavelength_nm for b in sensor.bands),
            sensor.dtype, sensor.nodata, (info.grid.size, info.grid.size), info.grid.gsd_m,
        ),
        classes=classes,
        splits=parts,
        read=reader,
        has_graphs=True,
        patches=info.grid.patches,
        tag_table=table,
        tag_encoder=dataset.tag_encoder,
        about={
            "path": str(dataset.path), "snapshot": dataset.snapshot, "labels": str(config.labels),
            "splits": {split: list(names) for split, names in splits.items()},
            "certified": storage(dataset.path).exists(certificate_name(dataset.snapshot)),
        },
        notes=tuple(notes),
        labels_are_osm=isinstance(config.labels, str),
        osm_class_names=info.taxonomy.names,
    )  # fmt: skip


class _Labeller:
    """Which arrays a label is made of, and how."""

    def __init__(
        self, names: tuple[str, ...], arrays: tuple[str, ...],
        label: Callable[[Arrays, NDArray[np.str_]], tuple[NDArray[np.int64], dict[str, int]]],
        *, many: bool = False,
    ) -> None:  # fmt: skip
        self.names, self.arrays, self.label, self.many = names, arrays, label, many
        """`label` gives the class of each chip, less than 0 where it has none (`many`: uint8
        [N, class]), and how many have none, by reason."""


def _labeller(config: TaskConfig, dataset: Dataset) -> _Labeller:
    names = dataset.info.taxonomy.names
    if isinstance(config.labels, Path):
        return _from_table(config.labels)
    if config.labels in ("region", "regions"):
        many = config.labels == "regions"
        give = _regions if many else _region
        return _Labeller(
            names, ("label_region",), lambda a, _: give(a, config.min_share), many=many
        )
    if config.labels == "object":
        arrays = ("object_offset", "object_kind", "object_class", "object_size")
        return _Labeller(names, arrays, lambda a, _: _largest_object(a))
    # Masks are read with the pixels.
    return _Labeller(names, (), lambda _, ids: (np.zeros(len(ids), np.int64), {}))


def _region(a: Arrays, min_share: float) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The class with most area, the first of equals."""
    share = a["label_region"]
    largest = share.max(1)
    few = (largest > 0) & (largest < min_share)
    label = np.where((largest > 0) & ~few, share.argmax(1), -1)
    return label, {"no_label": int((largest <= 0).sum()), "below_min_share": int(few.sum())}


def _regions(a: Arrays, min_share: float) -> tuple[NDArray[np.int64], dict[str, int]]:
    """All classes that cover enough."""
    share = a["label_region"]
    label = ((share > 0) & (share >= min_share)).astype(np.int64)
    return label, {}


def _largest_object(a: Arrays) -> tuple[NDArray[np.int64], dict[str, int]]:
    """The class of the largest polygon that has one, the first of equals."""
    chip = np.repeat(np.arange(len(a["object_offset"]) - 1), np.diff(a["object_offset"]))
    there = (a["object_kind"] == ObjectKind.POLYGON) & (a["object_class"] > 0)
    chip, size, name = chip[there], a["object_size"][there], a["object_class"][there]
    order = np.lexsort((np.arange(len(chip)), -size, chip))
    first = order[np.diff(chip[order], prepend=-1) > 0]
    label = np.full(len(a["object_offset"]) - 1, -1, np.int64)
    label[chip[first]] = name[first].astype(np.int64) - 1
    return label, {"no_label": int((label < 0).sum())}


def _from_table(path: Path) -> _Labeller:
    """Labels of a CSV file: id (of a chip or of an imported image), label."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        known = ", ".join(KINDS)
        raise GeoLinkError(
            f"cannot read labels {path}: {error}; labels are {known} or a CSV file"
        ) from error
    if not table or not {"id", "label"} <= table[0].keys():
        raise GeoLinkError(f"{path} needs the columns id and label, and a line an image")
    names = sorted({line["label"] for line in table})
    number = {line["id"]: names.index(line["label"]) for line in table}

    def label(_: Arrays, ids: NDArray[np.str_]) -> tuple[NDArray[np.int64], dict[str, int]]:
        found = np.array([number.get(i, -1) for i in ids.tolist()], np.int64)
        return found, {"no_label": int((found < 0).sum())}

    return _Labeller(tuple(names), (), label)


def _look(dataset: Dataset, shards: list[SnapshotRow], labeller: _Labeller) -> Found:
    """Labelled chips of some shards; `row` is a chip's place among all of them."""
    ids, labels, bounds, rows = [], [], [], []
    left_out: dict[str, int] = {}
    first = 0
    for shard in shards:
        names = ("chip_id", "scene", "center_lonlat", "bounds", *labeller.arrays)
        arrays, attributes = read_arrays(dataset.path, shard.path, names)
        named = _names(arrays, attributes.get("scenes", []))
        label, counts = labeller.label(arrays, named)
        kept = np.ones(len(label), bool) if labeller.many else label >= 0
        for reason, count in counts.items():
            if count:
                left_out[reason] = left_out.get(reason, 0) + count
        ids.append(named[kept])
        labels.append(label[kept])
        bounds.append(_lonlat_boxes(arrays)[kept])
        rows.append(first + np.flatnonzero(kept))
        first += shard.chips
    return Found(
        np.concatenate(ids), np.concatenate(labels), np.concatenate(bounds), np.concatenate(rows),
        left_out,
    )  # fmt: skip


def _without_objects(
    dataset: Dataset, shards: Mapping[str, list[SnapshotRow]],
    rows: Mapping[str, NDArray[np.int64]],
) -> int:  # fmt: skip
    """How many chips of these rows have no object."""
    empty = 0
    for split, those in shards.items():
        read = [read_arrays(dataset.path, s.path, ("object_offset",))[0] for s in those]
        objects = np.concatenate([np.diff(arrays["object_offset"]) for arrays in read])
        empty += int((objects[rows[split]] == 0).sum())
    return empty


def _names(arrays: Arrays, scenes: list[str]) -> NDArray[np.str_]:
    """Chip ids as printed; of imported images their names."""
    pair = arrays["chip_id"][:, 0] == 0
    return np.array([
        str(scenes[scene]) if imported and 0 <= scene < len(scenes) else printed_chip(chip)
        for chip, scene, imported in zip(arrays["chip_id"], arrays["scene"], pair, strict=True)
    ])  # fmt: skip


def _lonlat_boxes(arrays: Arrays) -> NDArray[np.float64]:
    """Bounds in degrees around the centres, with sides as long as the chips' in metres."""
    lon, lat = arrays["center_lonlat"].T
    box = arrays["bounds"]
    degree = 111_320.0
    half_y = (box[:, 3] - box[:, 1]) / 2 / degree
    half_x = (box[:, 2] - box[:, 0]) / 2 / (degree * np.cos(np.radians(lat)))
    return np.stack([lon - half_x, lat - half_y, lon + half_x, lat + half_y], 1)


class _Reader:
    """Reads chips of a dataset by their rows in the splits of a task."""

    def __init__(
        self, dataset: Dataset, shards: Mapping[str, list[SnapshotRow]],
        rows: Mapping[str, NDArray[np.int64]], parts: Mapping[str, Part], labels: str | Path,
    ) -> None:  # fmt: skip
        self._dataset, self._shards, self._rows, self._parts = dataset, shards, rows, parts
        self._labels = labels

    def __call__(
        self, split: str, rows: NDArray[np.int64] | None, batch_size: int
    ) -> Iterator[TaskBatch]:
        part, place = self._parts[split], self._rows[split]
        rows = np.arange(len(part)) if rows is None else rows
        shards = self._shards[split]
        ends = np.cumsum([0, *(r.chips for r in shards)])
        cut = np.searchsorted(place[rows], ends)
        chosen = [place[rows[a:b]] - e for a, b, e in zip(cut[:-1], cut[1:], ends)]
        dataset = replace(self._dataset, rows=shards)
        done = 0
        asked = ("pixel",) if self._labels == "pixel" else ()
        for batch in read_chips(dataset, None, batch_size=batch_size, labels=asked, chips=chosen):
            here = rows[done : done + len(batch)]
            done += len(batch)
            yield TaskBatch(
                rows=here,
                image=batch.image,
                graph=batch.graph,
                label=None if part.label is None else part.label[here],
                mask=_mask(batch, self._labels),
            )


def _mask(batch: Batch, labels: str | Path) -> Tensor | None:
    """Classes of pixels, counted from 0; where OSM says nothing, `IGNORE`."""
    if labels == "pixel":
        assert batch.label_pixel is not None
        # 0 is no statement, and wraps to 255.
        return batch.label_pixel - 1
    if labels == "patch":
        share = batch.label_patch
        most, place = share.max(-1)
        mask = torch.where(most > 0, place, IGNORE).to(torch.uint8)
        times = batch.image.shape[-1] // mask.shape[-1]
        return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return None
