"""Fabricated shards and datasets: random, valid by the layout, small, the same for a seed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.snapshot import publish
from pipelines.store import prepare_dataset, write_shard
from schemas.config import ObjectOptions, Splits
from schemas.dataset import DatasetInfo, SnapshotRow, tag_table_name, vocabulary_name
from schemas.findings import CHIP_FLAGS
from schemas.grid import Block, Grid, block_chips, pack_chips
from schemas.layout import SCHEMA_VERSION, Kind, Relation
from schemas.sensor import AERIAL_RGB, Sensor
from schemas.taxonomy import default_taxonomy

Arrays = dict[str, NDArray[Any]]

TAGS = sorted(
    f"{key}={value}"
    for key, values in {
        "building": "yes house garage shed retail", "highway": "residential service footway",
        "landuse": "forest grass farmland", "natural": "water tree", "surface": "asphalt gravel",
        "amenity": "bench", "café": "oui",
    }.items()
    for value in values.split()
)  # fmt: skip


def tag_id(text: str) -> int:
    """First eight bytes, big endian, of blake2b of a tag's text."""
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


def random_arrays(
    seed: int,
    *,
    chips: int = 6,
    objects: float = 8.0,
    grid: Grid | None = None,
    sensor: Sensor = AERIAL_RGB,
    block: Block | None = None,
) -> Arrays:
    """All arrays of a shard of `chips` chips with about `objects` objects each (0: none)."""
    rng = np.random.default_rng(seed)
    grid = grid or make_grid()
    block = block or Block(32632, 10, 100)
    classes = len(default_taxonomy().classes)
    p, limit = grid.patches, np.iinfo(sensor.dtype).max
    place = block_chips(grid, block)
    patch = rng.dirichlet(np.full(classes, 0.2), (chips, p, p)) * 254
    return {
        "image": rng.integers(
            1, limit, (chips, len(sensor.bands), grid.size, grid.size), sensor.dtype
        ),
        "valid": rng.uniform(0.5, 1.0, chips).astype(np.float32),
        "chip_id": pack_chips(block.epsg, grid, place.cols[:chips], place.rows[:chips]),
        "epsg": np.full(chips, block.epsg, np.int32),
        "bounds": place.bounds_utm[:chips],
        "center_lonlat": place.center_lonlat[:chips],
        "time": rng.integers(1_600_000_000, 1_700_000_000, chips),
        "scene": rng.integers(0, 2, chips).astype(np.int16),
        "label_pixel": rng.integers(0, classes + 1, (chips, grid.size, grid.size), np.uint8),
        "label_patch": patch.astype(np.uint8),
        "label_region": (patch.mean(axis=(1, 2)) / 255).astype(np.float32),
        "line_density": rng.gamma(1.0, 50.0, (chips, classes)).astype(np.float32),
        "point_density": rng.gamma(1.0, 2.0, (chips, classes)).astype(np.float32),
        "moran": rng.uniform(-1, 1, (chips, classes)).astype(np.float32),
        "lee": rng.uniform(-1, 1, (chips, classes)).astype(np.float32),
        "shift": rng.uniform(0, 1, (chips, 3)).astype(np.float32),
        "finding": rng.integers(0, 1 << len(CHIP_FLAGS), chips, np.uint32),
        **_objects(rng, rng.poisson(objects, chips), classes, p * p),
    }  # fmt: skip


def _objects(
    rng: np.random.Generator, counts: NDArray[np.int64], classes: int, patches: int
) -> Arrays:
    total = int(counts.sum())
    chip = np.repeat(np.arange(len(counts)), counts)
    kind = rng.choice(np.array(list(Kind), np.uint8), total, p=(0.3, 0.3, 0.4))
    osm = rng.integers(1, 1 << 33, total) << 2 | rng.integers(1, 4, total)
    order = np.lexsort((osm, kind, chip))
    kind, osm = kind[order], osm[order]
    tag = np.sort(np.array([tag_id(t) for t in TAGS], np.uint64))
    text = [t.encode() for t in sorted(TAGS, key=tag_id)]
    tags, tag_offset = _distinct(rng, rng.integers(0, 4, total), len(tag))
    met, patch_offset = _distinct(rng, np.where(kind == Kind.POINT, 1, rng.integers(1, 7, total)),
                                  patches)  # fmt: skip
    anchor = rng.uniform(0, 1, (total, 4, 2)).astype(np.float32)
    anchor[kind == Kind.POINT] = anchor[kind == Kind.POINT, :1]
    return {
        "object_offset": _offsets(counts),
        "object_kind": kind,
        "object_class": rng.integers(0, classes + 1, total, np.uint8),
        "object_osm": osm,
        "object_size": np.where(kind == 0, 0, rng.gamma(2.0, 40.0, total)).astype(np.float32),
        "object_anchor": anchor,
        "object_tag_offset": tag_offset,
        "object_tag": tags.astype(np.int32),
        "tag": tag,
        "tag_text_offset": _offsets(np.array([len(t) for t in text])),
        "tag_text": np.frombuffer(b"".join(text), np.uint8),
        "patch_offset": patch_offset,
        "patch": met.astype(np.uint16),
        "patch_weight": rng.integers(1, 256, len(met), np.uint8),
        **_edges(rng, counts),
    }


def _edges(rng: np.random.Generator, counts: NDArray[np.int64]) -> Arrays:
    """A self edge for every object, and about 1.5 related pairs, in both directions."""
    pairs = np.where(counts > 1, (1.5 * counts).astype(np.int64), 0)
    chip = np.repeat(np.arange(len(counts)), pairs)
    source = rng.integers(0, counts[chip])
    target = (source + rng.integers(1, np.maximum(counts[chip], 2))) % counts[chip]
    found = np.unique(
        np.stack([chip, np.minimum(source, target), np.maximum(source, target)], axis=1), axis=0
    )
    relation = rng.choice([Relation.TOUCHES, Relation.OVERLAPS, Relation.NEAR], len(found))
    own = np.repeat(np.arange(len(counts)), counts)
    local = np.arange(len(own)) - np.repeat(_offsets(counts)[:-1], counts)
    rows = np.concatenate(
        [
            np.stack([own, local, local, np.full(len(own), Relation.SELF)], axis=1),
            np.column_stack([found, relation]),
            np.column_stack([found[:, [0, 2, 1]], relation]),
        ]
    )
    rows = rows[np.lexsort(rows.T[::-1])]
    return {
        "edge_offset": _offsets(np.bincount(rows[:, 0], minlength=len(counts))),
        "edge": rows[:, 1:3].astype(np.int32),
        "relation": rows[:, 3].astype(np.uint8),
    }


def _distinct(
    rng: np.random.Generator, counts: NDArray[np.int64], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values below `limit`, rising and distinct within each run of a CSR array, and its offsets."""
    run = np.repeat(np.arange(len(counts)), counts)
    found = np.unique(np.stack([run, rng.integers(0, limit, len(run))], axis=1), axis=0)
    return found[:, 1], _offsets(np.bincount(found[:, 0], minlength=len(counts)))


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def make_grid(size: int = 32, patch: int = 8, shard_side: int = 4) -> Grid:
    """A grid of 10 m pixels."""
    return Grid(gsd_m=10.0, size=size, patch=patch, shard_side=shard_side)


def make_info(grid: Grid | None = None, sensor: Sensor = AERIAL_RGB, **changes: Any) -> DatasetInfo:
    """`dataset.json` of a fabricated dataset."""
    return DatasetInfo(
        **{
            "schema_version": SCHEMA_VERSION, "name": "fabricated", "grid": grid or make_grid(),
            "aligned": True, "sensor": sensor, "taxonomy": default_taxonomy(),
            "drop_keys": ("name",), "keep_keys": (), "objects": ObjectOptions(),
            "splits": Splits(), "tag_encoder": "wordllama", "licences": (),
            **changes,
        }
    )  # fmt: skip


def make_dataset(
    folder: Path,
    *,
    shards: int = 4,
    chips: int = 6,
    objects: float = 8.0,
    splits: tuple[str, ...] = ("train",),
    grid: Grid | None = None,
    sensor: Sensor = AERIAL_RGB,
    tag_dim: int = 16,
    seed: int = 0,
) -> Path:
    """Write and publish a dataset; shard n is of split `splits[n % len(splits)]`."""
    grid = grid or make_grid()
    prepare_dataset(folder, make_info(grid, sensor))
    rows = []
    for n in range(shards):
        block = Block(32632, 10 + n, 100)
        arrays = random_arrays(
            1000 * seed + n, chips=chips, objects=objects, grid=grid, sensor=sensor, block=block
        )
        rows.append(store_row(folder, block, arrays, splits[n % len(splits)]))
    key = write_vocabulary(folder, tag_dim, seed)
    publish(folder, rows, key, make_info(grid, sensor))
    return folder


def store_row(folder: Path, block: Block, arrays: Arrays, split: str = "train") -> SnapshotRow:
    """Write a shard and describe it as a snapshot does."""
    key = f"{int(arrays['image'].sum()):032x}"
    stored = write_shard(folder, block.name, key, arrays, {"scenes": ["a", "b"]})
    image = arrays["image"].astype(np.float64)
    low, high = arrays["center_lonlat"].min(axis=0), arrays["center_lonlat"].max(axis=0)
    axes = (0, 2, 3)
    return SnapshotRow(
        shard=block.name, path=stored.path, key=key, checksum=stored.checksum, split=split,
        chips=stored.sizes["chip"], objects=stored.sizes["object"], edges=stored.sizes["edge"],
        bytes=stored.bytes, epsg=block.epsg, bounds_lonlat=[*low.tolist(), *high.tolist()],
        scenes=["a", "b"], osm_timestamp="2026-01-01T00:00:00Z",
        pixels=[image[:, 0].size] * image.shape[1], pixel_sum=image.sum(axis=axes).tolist(),
        pixel_sum_squares=(image**2).sum(axis=axes).tolist(), qc={"object_invalid": 1},
        chip_findings=arrays["finding"].tolist(),
    )  # fmt: skip


def write_vocabulary(folder: Path, tag_dim: int, seed: int = 0) -> str:
    """Write the vocabulary of `TAGS` and random embeddings; returns its key."""
    texts = sorted(TAGS, key=tag_id)
    table = pa.table(
        {
            "id": pa.array([tag_id(t) for t in texts], pa.uint64()),
            "key": [t.partition("=")[0] for t in texts],
            "value": [t.partition("=")[2] for t in texts],
            "objects": pa.array(range(1, len(texts) + 1), pa.int64()),
        }
    )
    path = folder / vocabulary_name("fabricated")
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    embedding = np.random.default_rng(seed).normal(size=(len(texts), tag_dim))
    np.save((folder / tag_table_name("fabricated", "wordllama")), embedding.astype(np.float16))
    return "fabricated"
