"""Folders of images by class.

<folder>/<class>/<image>                 split by a seed into 60 % train, 20 % val, 20 % test
<folder>/<split>/<class>/<image>         split: train, val (or valid, validation), test
<folder>/{train,val,test}.txt beside <class>/: a line an image, `<class>/<image>` or `<image>`
<file>.npz: image [N, band, y, x], label int [N] or uint8 [N, class], and maybe split [N] of
`train`, `val`, `test`; id [N]; classes; bands; wavelength_nm; bounds_lonlat [N, 4]; gsd_m
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import Part, ReadPixels, TaskBatch, TaskData
from geolink.tasks.leaks import image_hash
from geolink.tasks.sources.common import (
    DRAWN,
    Found,
    describe_pixels,
    draw_out,
    draw_split,
    number_classes,
    unknown_bounds,
)
from geolink.tasks.sources.files import IMAGES
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.pixels import Pixels

SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_SPLITS = ("train", "val", "test")
_THREADS = 8
_Item = TypeVar("_Item")
_File = tuple[Path, int]
"""An image and its class."""


def open_folder(config: TaskConfig, read: ReadPixels) -> TaskData:
    """A folder of images by class. Raises GeoLinkError: nothing there, an empty class, a class that
    `train` lacks, images of several sizes or bands."""
    folder = Path(config.data)
    files, names, notes = _find(folder, config.seed)
    found = {
        split: Found(
            np.array([str(f.relative_to(folder)) for f, _ in those]),
            np.array([label for _, label in those], np.int64),
            unknown_bounds(len(those)),
            np.arange(len(those)),
        )
        for split, those in files.items()
    }
    classes, parts, rows, more = number_classes(found, names, "class", str(folder), strict=True)
    paths = {split: [files[split][n][0] for n in rows[split].tolist()] for split in parts}
    every = [path for split in sorted(paths) for path in paths[split]]
    first = read(every[0])
    parts, digest = look(paths, parts, read, first)
    return TaskData(
        name=folder.name,
        key=xxhash.xxh3_128_hexdigest(f"{digest} {classes}".encode()),
        kind="class",
        imagery=describe_pixels(config, first, every[0]),
        classes=classes,
        splits=parts,
        read=FileReader(paths, parts, read),
        about={"path": str(folder), "splits": {s: len(p) for s, p in parts.items()}},
        notes=(*notes, *more),
    )


def _find(folder: Path, seed: int) -> tuple[dict[str, list[_File]], list[str], list[str]]:
    """Files with their class by split, names of the classes, and notes."""
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_split = {SPLIT_FOLDERS[p.name.lower()]: p for p in below if p.name.lower() in SPLIT_FOLDERS}
    roots = by_split if by_split else {"": folder}
    if by_split and len(by_split) < len(below):
        other = next(p for p in below if p.name.lower() not in SPLIT_FOLDERS)
        raise GeoLinkError(
            f"{folder} holds both folders of splits and {other.name}: classes belong into each "
            "split's folder"
        )
    classes = sorted({p.name for r in roots.values() for p in r.iterdir() if p.is_dir()})
    if not classes:
        raise GeoLinkError(
            f"{folder} is neither a dataset of GeoLink nor a folder of images by class: it has no "
            "folders of images"
        )
    found = {
        split: [
            (path, number)
            for number, name in enumerate(classes)
            if (root / name).is_dir()
            for path in sorted((root / name).iterdir())
            if path.suffix.lower() in IMAGES
        ]
        for split, root in roots.items()
    }
    if not by_split:
        return split_alone(folder, found[""], classes, seed)
    return found, classes, add_val(folder, found, seed)


def add_val(folder: Path, found: dict[str, list[_File]], seed: int) -> list[str]:
    """Take validation out of train where no folder holds it; what was done, as notes.

    Raises GeoLinkError if train or test is empty.
    """
    for split in ("train", "test"):
        if not found.get(split):
            raise GeoLinkError(f"{folder} has no images of split {split}")
    if found.get("val"):
        return []
    found["train"], found["val"] = _without_some(found["train"], 0.2, seed)
    return ["no val folder: a fifth of the training images, by the seed, is validation"]


def split_alone(
    folder: Path, files: list[_File], classes: list[str], seed: int
) -> tuple[dict[str, list[_File]], list[str], list[str]]:
    """Files with their class by split: of lists in the folder, else drawn; classes, and notes.

    Raises GeoLinkError if a list names what is not there.
    """
    lists = {s: folder / f"{s}.txt" for s in ("train", "val", "test")}
    if lists["train"].is_file() and lists["test"].is_file():
        by_name = {str(p.relative_to(folder)): (p, n) for p, n in files}
        by_name |= {p.name: (p, n) for p, n in files}
        found: dict[str, list[_File]] = {}
        for split, path in lists.items():
            names = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            wanted = [name.strip() for name in names if name.strip()]
            if missing := [name for name in wanted if name not in by_name]:
                raise GeoLinkError(f"{path} names {missing[0]}, which {folder} does not hold")
            found[split] = sorted({by_name[name] for name in wanted})
        notes = []
        if not found["val"]:
            found["train"], found["val"] = _without_some(found["train"], 0.2, seed)
            notes.append("no val.txt: a fifth of the training images, by the seed, is validation")
        return found, classes, notes
    drawn = draw_split(np.array([n for _, n in files], np.int64), seed).tolist()
    by_split = {s: [f for f, own in zip(files, drawn) if own == s] for s in lists}
    return by_split, classes, [DRAWN]


def _without_some(files: list[_File], share: float, seed: int) -> tuple[list[_File], list[_File]]:
    """Files that stay, and a share of each class that is taken out."""
    out = draw_out(np.array([n for _, n in files], np.int64), share, seed).tolist()
    return (
        [f for f, gone in zip(files, out, strict=True) if not gone],
        [f for f, gone in zip(files, out, strict=True) if gone],
    )


def find_splits(
    folder: Path, holds: Callable[[Path], bool], listed: Callable[[Path], list[_Item]], seed: int
) -> tuple[dict[str, list[_Item]], list[str]]:
    """What is listed in the folder of each split that `holds` something, and notes; without such
    folders what is listed in the folder itself is split by the seed. Splits come in one order."""
    roots = {split: folder / n for n, split in SPLIT_FOLDERS.items() if holds(folder / n)}
    if not roots:
        every = listed(folder)
        drawn = draw_split(np.zeros(len(every), np.int64), seed).tolist()
        return {s: [i for i, own in zip(every, drawn) if own == s] for s in _SPLITS}, [DRAWN]
    found = {split: listed(root) for split, root in roots.items()}
    if found.get("val") or not found.get("train"):
        return found, []
    train = found["train"]
    out = draw_out(np.zeros(len(train), np.int64), 0.2, seed).tolist()
    found["val"] = [item for item, gone in zip(train, out) if gone]
    found["train"] = [item for item, gone in zip(train, out) if not gone]
    found = {split: found[split] for split in _SPLITS if split in found}
    return found, ["no val folder: a fifth of the training images, by the seed, is validation"]


def look(
    paths: Mapping[str, Sequence[Path]], parts: Mapping[str, Part], read: ReadPixels, first: Pixels
) -> tuple[dict[str, Part], str]:
    """Every image once: bounds that files state, and a hash of all; all are of one shape."""
    digest, looked = xxhash.xxh3_128(), {}
    for split, those in paths.items():
        bounds, hashes = unknown_bounds(len(those)), np.zeros(len(those), np.uint64)
        for n, (path, pixels) in enumerate(ahead(those, read)):
            _same_shape(path, pixels.image, first.image)
            if pixels.bounds_lonlat is not None:
                bounds[n] = pixels.bounds_lonlat
            hashes[n] = image_hash(pixels.image)
            # The hash does not tell images of one colour apart; their first pixel does.
            digest.update(f"{split} {parts[split].ids[n]} {pixels.image[:, 0, 0]}".encode())
        digest.update(hashes.tobytes())
        part = parts[split]
        looked[split] = Part(part.ids, part.label, bounds, part.left_out, hashes)
    return looked, digest.hexdigest()


def _same_shape(path: Path, image: NDArray[Any], first: NDArray[Any]) -> None:
    if image.shape != first.shape or image.dtype != first.dtype:
        raise GeoLinkError(
            f"{path} is {image.dtype} {list(image.shape)}, the images before it are {first.dtype} "
            f"{list(first.shape)} [band, y, x]: images of one size and one set of bands are needed"
        )


def ahead(paths: Sequence[Path], read: ReadPixels) -> Iterator[tuple[Path, Pixels]]:
    """Images in order, read by several threads, a few ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for low in range(0, len(paths), 4 * _THREADS):
            group = paths[low : low + 4 * _THREADS]
            yield from zip(group, pool.map(read, group), strict=True)


class FileReader:
    """Reads image files by their rows in the splits."""

    def __init__(
        self, paths: Mapping[str, Sequence[Path]], parts: Mapping[str, Part], read: ReadPixels
    ) -> None:
        self._paths, self._parts, self._read = paths, parts, read

    def __call__(
        self, split: str, rows: NDArray[np.int64] | None, batch_size: int
    ) -> Iterator[TaskBatch]:
        part = self._parts[split]
        rows = np.arange(len(part)) if rows is None else rows
        for low in range(0, len(rows), batch_size):
            here = rows[low : low + batch_size]
            group = [self._paths[split][n] for n in here.tolist()]
            images = np.stack([p.image for _, p in ahead(group, self._read)])
            label = None if part.label is None else part.label[here]
            yield TaskBatch(here, torch.from_numpy(images), label=label)
