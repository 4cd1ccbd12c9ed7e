"""Folders of images and their masks.

    <folder>/<split>/images/<name>   beside   <folder>/<split>/masks/<name>.png (.tif, .npy)
    <folder>/images/<name>           beside   <folder>/masks/...: split by the seed

A mask has one band of class numbers from 0; 255 is not scored. `<folder>/classes.txt` names the
classes, a line each; without it there are as many as the largest number in the masks of `train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import IGNORE, Part, ReadPixels, TaskBatch, TaskData
from geolink.tasks.sources.common import describe_pixels, unknown_bounds
from geolink.tasks.sources.files import IMAGES, read_mask
from geolink.tasks.sources.folder import SPLIT_FOLDERS, ahead, find_splits, look
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

_ENDINGS = (".png", ".tif", ".tiff", ".npy", ".bmp")


@dataclass(frozen=True)
class _Pair:
    image: Path
    mask: Path


def holds_masks(folder: Path) -> bool:
    """Whether a folder, or one of a split in it, has images and masks."""
    return any(_holds(root) for root in (folder, *(folder / name for name in SPLIT_FOLDERS)))


def _holds(root: Path) -> bool:
    return (root / "images").is_dir() and (root / "masks").is_dir()


def open_masks(config: TaskConfig, read: ReadPixels) -> TaskData:
    """A folder of images and masks. Raises GeoLinkError: an image without a mask, or of another
    size; a mask that is none, or holds a number that is no class; an empty split."""
    folder = Path(config.data)
    pairs, notes = find_splits(folder, _holds, _pairs, config.seed)
    for split in ("train", "test"):
        if len(pairs.get(split, [])) < 2:
            raise GeoLinkError(
                f"split {split} of {folder} has {len(pairs.get(split, []))} images with masks, at "
                "least 2 are needed"
            )
    paths = {split: [pair.image for pair in those] for split, those in pairs.items()}
    first = read(paths["train"][0])
    parts = {
        split: Part(
            np.array([str(path.relative_to(folder)) for path in those]), None,
            unknown_bounds(len(those)),
        )
        for split, those in paths.items()
    }  # fmt: skip
    parts, digest = look(paths, parts, read, first)
    classes, of_masks = _check_masks(folder, pairs, first.image.shape[1:])
    return TaskData(
        name=folder.name,
        key=xxhash.xxh3_128_hexdigest(f"{digest} {of_masks} {classes}".encode()),
        kind="mask",
        imagery=describe_pixels(config, first, paths["train"][0]),
        classes=classes,
        splits=parts,
        read=_Reader(pairs, read),
        about={"path": str(folder), "splits": {s: len(p) for s, p in parts.items()}},
        notes=tuple(notes),
    )


def _pairs(root: Path) -> list[_Pair]:
    masks = {p.stem: p for p in sorted((root / "masks").iterdir()) if p.suffix.lower() in _ENDINGS}
    images = [p for p in sorted((root / "images").iterdir()) if p.suffix.lower() in IMAGES]
    if missing := [p for p in images if p.stem not in masks]:
        raise GeoLinkError(f"image {missing[0]} has no mask {root / 'masks' / missing[0].stem}.png")
    return [_Pair(path, masks[path.stem]) for path in images]


def _check_masks(
    folder: Path, pairs: Mapping[str, list[_Pair]], size: tuple[int, ...]
) -> tuple[tuple[str, ...], str]:
    """Names of the classes, and a hash of all masks, each of which is read."""
    digest, most = xxhash.xxh3_128(), {}
    for split in sorted(pairs):
        for pair in pairs[split]:
            mask = _mask(pair, size)
            digest.update(mask.tobytes())
            scored = mask[mask != IGNORE]
            most[pair.mask] = int(scored.max(initial=0))
    listed = folder / "classes.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    else:
        count = max(most[pair.mask] for pair in pairs["train"]) + 1
        names = tuple(f"class {n}" for n in range(count))
    if len(names) < 2:
        raise GeoLinkError(f"the masks of {folder} tell nothing apart: they hold one class")
    for path, value in most.items():
        if value >= len(names):
            raise GeoLinkError(
                f"mask {path} holds {value}, but classes go from 0 to {len(names) - 1}, and "
                f"{IGNORE} is not scored"
            )
    return names, digest.hexdigest()


def _mask(pair: _Pair, size: tuple[int, ...]) -> NDArray[np.uint8]:
    mask = read_mask(pair.mask)
    if mask.shape != tuple(size):
        raise GeoLinkError(
            f"mask {pair.mask} is {list(mask.shape)} [y, x], its image is {list(size)}"
        )
    return mask


class _Reader:
    """Reads images and masks by their rows in the splits."""

    def __init__(self, pairs: Mapping[str, list[_Pair]], read: ReadPixels) -> None:
        self._pairs, self._read = pairs, read

    def __call__(
        self, split: str, rows: NDArray[np.int64] | None, batch_size: int
    ) -> Iterator[TaskBatch]:
        those = self._pairs[split]
        rows = np.arange(len(those)) if rows is None else rows
        for low in range(0, len(rows), batch_size):
            here = rows[low : low + batch_size]
            group = [those[n] for n in here.tolist()]
            images = [p.image for _, p in ahead([pair.image for pair in group], self._read)]
            masks = [_mask(pair, images[0].shape[1:]) for pair in group]
            yield TaskBatch(
                here, torch.from_numpy(np.stack(images)), mask=torch.from_numpy(np.stack(masks))
            )
