"""Images with the graphs of their OSM objects, as samples of urban function zones are published.

    <folder>[/<split>]/<name>_img.png, <name>_label.png, <name>_graph.npz
    <folder>[/<split>]/<class>/<name>.png (or <name>_img.png) beside <name>_graph.npz

A label map has one band of class numbers from 1; 0 and 255 are not scored. `<folder>/classes.txt`
names the classes in their order, a line each; without it they are `CLASSES`. Graphs: see
`geolink.tasks.sources.graph_files`. What is not split by folders is split as in folders by class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import IGNORE, Part, Read, ReadPixels, TaskBatch, TaskData
from geolink.tasks.graphs import ImageGraphs
from geolink.tasks.sources.common import Found, describe_pixels, number_classes, unknown_bounds
from geolink.tasks.sources.files import IMAGES, read_mask
from geolink.tasks.sources.folder import (
    SPLIT_FOLDERS,
    FileReader,
    add_val,
    look,
    open_folder,
    split_alone,
)
from geolink.tasks.sources.graph_files import graph_path, join_graphs, read_graph
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

ZONES = (
    "water", "green", "farmland", "undeveloped", "residential", "commercial", "institutional",
    "industrial", "transport",
)  # fmt: skip
"""Urban function zones by their number in label maps, from 1."""

CLASSES = {"villages": ("other", "urban village")}
"""Classes of label maps by task, where they are not `ZONES`."""

PATCH = 16
"""Side in pixels of what a label of kind `patch` is of: a patch of the published model."""

_IMAGE, _LABEL = "_img", "_label.png"


@dataclass(frozen=True, eq=False)
class _Maps:
    """Label maps of a split's images and how many pixels they give each class."""

    paths: Sequence[Path]
    pixels: NDArray[np.int64]
    """[N, class]."""
    size: int
    """Pixels of an image, unscored ones among them."""


def holds_zones(folder: Path) -> bool:
    """Whether images of a folder have graphs or, beside them, label maps."""
    graphs = ("*_graph.*", "*/*_graph.*", "*/*/*_graph.*")
    return any(any(folder.glob(p)) for p in graphs) or _holds_maps(folder)


def open_zones(config: TaskConfig, read: ReadPixels) -> TaskData:
    """A folder of images with graphs, labelled by maps (as `config.labels` says) or by class.

    Raises GeoLinkError: an image without its graph or map; a graph that is none, or is pickled; a
    map of another size, or with a number that is no class; a split with fewer than two images; an
    empty class.
    """
    folder = Path(config.data)
    data = _open_maps(config, folder, read) if _holds_maps(folder) else open_folder(config, read)
    return _with_graphs(data, folder)


def _holds_maps(folder: Path) -> bool:
    return any(any(p.glob(f"*{_LABEL}")) for p in (folder, *_split_folders(folder).values()))


def _split_folders(folder: Path) -> dict[str, Path]:
    below = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return {SPLIT_FOLDERS[p.name.lower()]: p for p in below if p.name.lower() in SPLIT_FOLDERS}


def _open_maps(config: TaskConfig, folder: Path, read: ReadPixels) -> TaskData:
    if config.labels not in ("region", "patch", "pixel"):
        raise GeoLinkError(
            f"label maps give {folder} labels region, patch and pixel, not {config.labels}"
        )
    names = _class_names(config, folder)
    paths, notes = _find(folder, names, config.seed)
    for split, those in paths.items():
        if len(those) < 2:
            raise GeoLinkError(
                f"split {split} of {folder} has {len(those)} labelled images, at least 2 are "
                "needed: add some, or divide them into folders train, val and test"
            )
    first = read(paths["train"][0])
    maps = {s: _look_maps(those, first.image.shape[1:], names) for s, those in paths.items()}
    ids = {s: np.array([str(p.relative_to(folder)) for p in those]) for s, those in paths.items()}
    if config.labels == "region":
        found = {s: _regions(ids[s], maps[s], config.min_share) for s in paths}
        classes, parts, rows, more = number_classes(
            found, names, "class", str(folder), strict=False
        )
        notes += more
        paths = {s: [paths[s][n] for n in rows[s].tolist()] for s in parts}
    else:
        classes = names
        parts = {s: Part(ids[s], None, unknown_bounds(len(ids[s]))) for s in paths}
    parts, digest = look(paths, parts, read, first)
    counted = [maps[s].pixels.tobytes() for s in sorted(maps)]
    reader: Read = FileReader(paths, parts, read)
    if config.labels != "region":
        of_images = {s: [_map_path(p) for p in those] for s, those in paths.items()}
        reader = _MapReader(reader, of_images, PATCH if config.labels == "patch" else 1)
    return TaskData(
        name=folder.name,
        key=xxhash.xxh3_128_hexdigest(f"{digest} {counted} {classes} {config.labels}".encode()),
        kind="class" if config.labels == "region" else "mask",
        imagery=describe_pixels(config, first, paths["train"][0]),
        classes=classes,
        splits=parts,
        read=reader,
        about={
            "path": str(folder), "labels": str(config.labels),
            "splits": {s: len(p) for s, p in parts.items()},
        },
        notes=tuple(notes),
    )  # fmt: skip


def _class_names(config: TaskConfig, folder: Path) -> tuple[str, ...]:
    listed = folder / "classes.txt"
    if not listed.is_file():
        return CLASSES.get(config.task, ZONES)
    lines = listed.read_text(encoding="utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2:
        raise GeoLinkError(f"{listed} names {len(names)} classes, at least 2 are needed")
    return names


def _find(folder: Path, names: Sequence[str], seed: int) -> tuple[dict[str, list[Path]], list[str]]:
    """Images by split, and notes; where nothing says which is of which, drawn by the class that
    most of an image is of."""
    by_split = _split_folders(folder)
    if by_split:
        found = {s: [(path, 0) for path in _images(root)] for s, root in by_split.items()}
        notes = add_val(folder, found, seed)
    else:
        files = [(path, _most(_map_path(path))) for path in _images(folder)]
        found, _, notes = split_alone(folder, files, list(names), seed)
    return {split: [path for path, _ in those] for split, those in found.items()}, notes


def _images(root: Path) -> list[Path]:
    return sorted(
        p for p in root.iterdir() if p.stem.endswith(_IMAGE) and p.suffix.lower() in IMAGES
    )


def _map_path(image: Path) -> Path:
    path = image.with_name(image.stem.removesuffix(_IMAGE) + _LABEL)
    if not path.is_file():
        raise GeoLinkError(f"image {image} has no label map {path}")
    return path


def _most(path: Path) -> int:
    """The number that most of a label map's scored pixels have."""
    return int(np.bincount(read_mask(path).ravel(), minlength=IGNORE + 1)[:IGNORE].argmax())


def _look_maps(images: Sequence[Path], size: tuple[int, ...], names: Sequence[str]) -> _Maps:
    paths = [_map_path(image) for image in images]
    pixels = np.zeros((len(paths), len(names)), np.int64)
    for n, path in enumerate(paths):
        found = read_mask(path)
        if found.shape != size:
            raise GeoLinkError(
                f"label map {path} is {list(found.shape)} [y, x], its image is {list(size)}"
            )
        counts = np.bincount(found.ravel(), minlength=IGNORE + 1)
        if wrong := np.flatnonzero(counts[len(names) + 1 : IGNORE]).tolist():
            raise GeoLinkError(
                f"label map {path} holds {wrong[0] + len(names) + 1}, but classes go from 1 to "
                f"{len(names)}, and 0 and {IGNORE} are not scored"
            )
        pixels[n] = counts[1 : len(names) + 1]
    return _Maps(paths, pixels, size[0] * size[1])


def _regions(ids: NDArray[np.str_], maps: _Maps, min_share: float) -> Found:
    """Images by the class of most pixels, the first of equals."""
    most = maps.pixels.max(1)
    none, few = most == 0, (most > 0) & (most < min_share * maps.size)
    kept = np.flatnonzero(~none & ~few)
    left_out = {"no_label": int(none.sum()), "below_min_share": int(few.sum())}
    return Found(
        ids[kept], maps.pixels.argmax(1)[kept], unknown_bounds(len(kept)), kept,
        {reason: count for reason, count in left_out.items() if count},
    )  # fmt: skip


class _MapReader:
    """Adds label maps to images."""

    def __init__(self, images: Read, maps: Mapping[str, Sequence[Path]], patch: int) -> None:
        self._images, self._maps, self._patch = images, maps, patch

    def __call__(
        self, split: str, rows: NDArray[np.int64] | None, batch_size: int
    ) -> Iterator[TaskBatch]:
        for batch in self._images(split, rows, batch_size):
            mask = np.stack([read_mask(self._maps[split][n]) for n in batch.rows.tolist()])
            # 0 is not scored, and wraps to 255.
            mask = np.where(mask == IGNORE, IGNORE, mask - np.uint8(1)).astype(np.uint8)
            if self._patch > 1:
                mask = most_of_patches(mask, self._patch)
            yield replace(batch, mask=torch.from_numpy(mask))


def most_of_patches(mask: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Masks [B, y, x] in which each square of `patch` pixels is of the class of most of it, the
    first of equals; `IGNORE` where nothing of it is scored.

    Raises GeoLinkError if the squares do not fit.
    """
    count, height, width = mask.shape
    if height % patch or width % patch:
        raise GeoLinkError(
            f"label maps of {height} x {width} pixels do not fall into patches of {patch}: use "
            "labels: pixel"
        )
    blocks = mask.reshape(count, height // patch, patch, width // patch, patch)
    most = np.zeros((count, height // patch, width // patch), np.int64)
    named = np.full(most.shape, IGNORE, np.uint8)
    for number in np.unique(mask[mask != IGNORE]).tolist():
        here = (blocks == number).sum((2, 4))
        named = np.where(here > most, np.uint8(number), named)
        most = np.maximum(here, most)
    return named.repeat(patch, 1).repeat(patch, 2)


def _with_graphs(data: TaskData, folder: Path) -> TaskData:
    """The data with the graphs beside their images; as they are if not one image has a graph."""
    paths = {s: [graph_path(folder / i) for i in p.ids.tolist()] for s, p in data.splits.items()}
    if not any(path.is_file() for those in paths.values() for path in those):
        return data
    found = [[read_graph(path) for path in those] for those in paths.values()]
    joined, table = join_graphs(found)
    graphs = dict(zip(paths, joined, strict=True))
    digest = xxhash.xxh3_128(table.tobytes())
    for part in joined:
        for name in sorted(part.arrays):
            digest.update(np.ascontiguousarray(part.arrays[name]).tobytes())
    counts = np.concatenate([np.diff(part.arrays["object_offset"]) for part in joined])
    notes = [
        f"the graphs' texts are taken as they are, {table.shape[1]} numbers an object: the "
        "checkpoint must have learnt from the same text encoder"
    ]
    if empty := int((counts == 0).sum()):
        notes.append(f"{empty:,} of {len(counts):,} images have no OSM object")
    return replace(
        data,
        key=xxhash.xxh3_128_hexdigest(f"{data.key} {digest.hexdigest()}".encode()),
        read=_GraphReader(data.read, graphs),
        has_graphs=True,
        tag_table=table,
        notes=(*data.notes, *notes),
    )


class _GraphReader:
    """Adds graphs to images."""

    def __init__(self, images: Read, graphs: Mapping[str, ImageGraphs]) -> None:
        self._images, self._graphs = images, graphs

    def __call__(
        self, split: str, rows: NDArray[np.int64] | None, batch_size: int
    ) -> Iterator[TaskBatch]:
        for batch in self._images(split, rows, batch_size):
            yield replace(batch, graph=self._graphs[split].take(batch.rows))
