"""Chips as `torch_geometric.data.HeteroData`: one file a shard, one graph with its image a chip.

The files hold tensors and plain values only (`HeteroData.to_dict`), which torch loads without
running anything that a file says; `read_pyg` makes graphs of them again.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import HeteroData

from geolink.graph import normalise_tag_weight, pack
from geolink.reader import Dataset, tag_rows
from schemas.chips import ShardPart, take_chips
from schemas.dataset import tag_table_name, vocabulary_name
from schemas.storage import storage
from schemas.storage_local import LocalStorage

_LABELS = ("label_pixel", "label_patch", "label_region", "bounds", "center_lonlat")


def write_pyg(part: ShardPart, folder: Path, *, dataset: Dataset) -> None:
    """Write `pyg/<split>/<shard>.pt`, and once the vocabulary its `tag` rows
    point into: `pyg/tags.parquet` (texts) and `pyg/tags.npy` (embeddings).

    A graph is as `GraphBatch.to_pyg` gives it, of one chip, with `image` [1, band, y, x] in stored
    values, `label_pixel`, `label_patch`, `label_region`, `bounds`, `center_lonlat` (leading 1, so
    that a DataLoader stacks them), and `chip`, `shard` and `split`.

    Raises GeoLinkError if a file cannot be written.
    """
    files = LocalStorage(folder)
    for name, source in (
        ("pyg/tags.parquet", vocabulary_name(dataset.vocabulary_key)),
        ("pyg/tags.npy", tag_table_name(dataset.vocabulary_key, dataset.tag_encoder)),
    ):
        if not files.exists(name):
            files.write(name, storage(dataset.path).read(source))
    rows = tag_rows(dataset, part.arrays["tag"])
    graphs = [_graph(part, n, dataset, rows).to_dict() for n in range(len(part.names))]
    data = io.BytesIO()
    torch.save(graphs, data)
    files.write(f"pyg/{part.row.split}/{part.shard}.pt", data.getvalue())


def read_pyg(path: Path) -> list[HeteroData]:
    """The graphs of a file that `write_pyg` wrote."""
    return [HeteroData.from_dict(graph) for graph in torch.load(path, weights_only=True)]


def _graph(part: ShardPart, n: int, dataset: Dataset, rows: np.ndarray) -> HeteroData:
    a = take_chips(part.arrays, np.array([n]))
    tag = rows[a["object_tag"]]
    weight = normalise_tag_weight(a["object_tag_offset"], dataset.key_weight[tag])
    graph = pack(
        object_offset=a["object_offset"], kind=a["object_kind"], osm_class=a["object_class"],
        osm_id=a["object_osm"], size=a["object_size"], anchor=a["object_anchor"],
        tag_offset=a["object_tag_offset"], tag=tag, tag_weight=weight,
        edge_offset=a["edge_offset"], edge=a["edge"], relation=a["relation"],
        patch_offset=a["patch_offset"], patch=a["patch"], patch_weight=a["patch_weight"],
    ).to_pyg()  # fmt: skip
    graph.image = torch.from_numpy(a["image"])
    for name in _LABELS:
        graph[name] = torch.from_numpy(a[name])
    graph.chip, graph.shard, graph.split = part.names[n], part.shard, part.row.split
    return graph
