"""What is looked for: tags, or a place that others are to be like."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from geolink.graph import GraphBatch, pack
from geolink.models.base import PretrainModel
from geolink.reader import Dataset
from geolink.search.index import Index, project_regions
from schemas.dataset import SnapshotRow, read_arrays, vocabulary_name
from schemas.errors import GeoLinkError
from schemas.layout import Kind
from schemas.parquet import read_parquet
from schemas.storage import storage

_TAG_ARRAYS = ("object_offset", "object_kind", "object_size", "object_tag_offset", "object_tag",
               "tag")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tags:
    """Tags that a place is to have, all of them."""

    names: tuple[str, ...]
    """`key=value`."""
    rows: NDArray[np.int64]
    """[T], of the vocabulary."""
    has: NDArray[np.bool_]
    """[N]: chips that have them all."""
    kind: tuple[int, ...]
    """[T], point, line or polygon: what most objects with a tag are in the training split."""
    size: tuple[float, ...]
    """[T], their median size, m2 or m."""


def find_tags(index: Index, names: tuple[str, ...], fit: str = "train") -> Tags:
    """Look up tags, and which chips have them. Pixels are not read.

    fit: split whose objects say what an object with a tag is like; none of any other is looked at.
    Raises GeoLinkError if the dataset has no such tag, naming those most like it.
    """
    dataset = index.dataset
    rows = np.array([_row(dataset, name) for name in names], np.int64)
    ids = dataset.vocabulary[rows]
    has, kinds, sizes = [], [np.zeros(0, np.int64)], [np.zeros((0, 2))]
    for shard in dataset.split_rows(None):
        own, kind, size = _in_shard(dataset, shard, ids)
        has.append(own.all(1))
        if shard.split == fit:
            kinds.append(kind)
            sizes.append(size)
    every, size = np.concatenate(kinds), np.concatenate(sizes)
    most = [_usual(every, size, n) for n in range(len(names))]
    return Tags(
        names, rows, np.concatenate(has), tuple(kind for kind, _ in most),
        tuple(median for _, median in most),
    )  # fmt: skip


def _row(dataset: Dataset, name: str) -> int:
    table = _vocabulary(dataset)
    texts = [f"{k}={v}" for k, v in zip(table["key"].to_pylist(), table["value"].to_pylist())]
    if name in texts:
        return texts.index(name)
    close = difflib.get_close_matches(name, texts, 3, 0.5) or texts[:3]
    raise GeoLinkError(
        f"no object of {dataset.path} has the tag {name!r}; it has for example {', '.join(close)}"
    )


def _vocabulary(dataset: Dataset) -> pa.Table:
    return read_parquet(storage(dataset.path).read(vocabulary_name(dataset.vocabulary_key)))


def _in_shard(
    dataset: Dataset, shard: SnapshotRow, ids: NDArray[np.uint64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64]]:
    """[chips, T]: which have the tags; of the objects with one, kind [M] and (tag, size) [M, 2]."""
    a, _ = read_arrays(dataset.path, shard.path, _TAG_ARRAYS)
    place = np.full(len(a["tag"]), -1, np.int64)
    for n, tag in enumerate(ids):
        place[a["tag"] == tag] = n
    objects = len(a["object_kind"])
    entry = np.repeat(np.arange(objects), np.diff(a["object_tag_offset"]))
    which = place[a["object_tag"]] if objects else np.zeros(0, np.int64)
    entry, which = entry[which >= 0], which[which >= 0]
    chip = np.repeat(np.arange(shard.chips), np.diff(a["object_offset"]))
    has = np.zeros((shard.chips, len(ids)), bool)
    has[chip[entry], which] = True
    size = np.stack([which.astype(np.float64), a["object_size"][entry].astype(np.float64)], 1)
    return has, a["object_kind"][entry].astype(np.int64), size


def _usual(kind: NDArray[np.int64], size: NDArray[np.float64], tag: int) -> tuple[int, float]:
    """Kind of most objects with a tag and their median size; without any, a polygon of 1,000 m2."""
    own = size[:, 0] == tag
    if not own.any():
        return int(Kind.POLYGON), 1000.0
    most = int(np.bincount(kind[own]).argmax())
    return most, float(np.median(size[own & (kind == most), 1]))


@torch.inference_mode()
def project_tags(model: PretrainModel, tags: Tags) -> NDArray[np.float32]:
    """Unit projection [P] of a chip that holds nothing but one object of each tag."""
    graph = tag_graph(tags).to(model.tag_table.device)
    found: NDArray[np.float32] = project_regions(model, graph)[0].cpu().numpy()
    return found


def tag_graph(tags: Tags) -> GraphBatch:
    """A chip of one object a tag, each in its middle, unrelated to the others."""
    n = len(tags.rows)
    whole = np.arange(n + 1)
    return pack(
        object_offset=np.array([0, n]), kind=np.array(tags.kind, np.uint8),
        osm_class=np.zeros(n, np.uint8), osm_id=np.zeros(n, np.int64),
        size=np.array(tags.size, np.float32), anchor=np.full((n, 4, 2), 0.5, np.float32),
        tag_offset=whole, tag=tags.rows, tag_weight=np.ones(n, np.float32),
        edge_offset=np.array([0, n]), edge=np.repeat(whole[:-1], 2).reshape(n, 2),
        relation=np.zeros(n, np.uint8), patch_offset=np.zeros(n + 1, np.int64),
        patch=np.zeros(0, np.int32), patch_weight=np.zeros(0, np.uint8),
    )  # fmt: skip


def chip_at(index: Index, lon: float, lat: float) -> int:
    """The chip that a place lies in. Raises GeoLinkError if it lies in none."""
    east = (index.lonlat[:, 0] - lon + 180) % 360 - 180
    north = index.lonlat[:, 1] - lat
    metres = 111_320 * np.hypot(east * np.cos(np.radians(lat)), north)
    nearest = int(metres.argmin())
    info = index.dataset.info
    if metres[nearest] > info.grid.chip_m * 0.75:
        raise GeoLinkError(
            f"no chip of {index.dataset.path} lies at {lon:g}, {lat:g}: the nearest is centred "
            f"{metres[nearest]:,.0f} m away, at {index.lonlat[nearest, 0]:.5f}, "
            f"{index.lonlat[nearest, 1]:.5f}"
        )
    return nearest
