"""Folders of pairs of images and masks of what changed between them, laid out as LEVIR-CD is.

    <folder>/<split>/A/<name>   the earlier date, beside   B/<name>   the later   and   label/<name>
    <folder>/{A,B,label}/<name>: split by the seed

A mask has one band: 0 where nothing changed, and 1 or 255 (the same in all masks) where something
did. Endings of a pair's three files may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import Part, ReadPixels, TaskBatch, TaskData
from geolink.tasks.sources.common import describe_pixels, unknown_bounds
from geolink.tasks.sources.files import IMAGES, read_mask
from geolink.tasks.sources.folder import SPLIT_FOLDERS, ahead, find_splits, look
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.pixels import Pixels

CLASSES = ("no change", "change")
_SIDES = ("A", "B", "label")
_CHANGED = (1, 255)
"""Values that mean change."""


@dataclass(frozen=True)
class _Pair:
    earlier: Path
    later: Path
    mask: Path


def holds_pairs(folder: Path) -> bool:
    """Whether a folder, or one of a split in it, has masks and one of the dates."""
    roots = (folder, *(folder / name for name in SPLIT_FOLDERS))
    return any((r / "label").is_dir() and _has_side(r, ("A", "B")) for r in roots)


def _has_side(root: Path, sides: tuple[str, ...] = _SIDES) -> bool:
    return any((root / side).is_dir() for side in sides)


def open_pairs(config: TaskConfig, read: ReadPixels) -> TaskData:
    """Pairs and masks of what changed.

    Raises GeoLinkError: a pair lacks a date or its mask; sizes differ; a mask holds a value that
    means nothing; a split has fewer than 2 pairs, or none with a change.
    """
    folder = Path(config.data)
    pairs, notes = find_splits(folder, _has_side, _list_pairs, config.seed)
    for split in ("train", "val", "test"):
        if len(pairs.get(split, [])) < 2:
            raise GeoLinkError(
                f"split {split} of {folder} has {len(pairs.get(split, []))} pairs, at least 2 are "
                "needed"
            )
    first = read(pairs["train"][0].earlier)
    parts, of_images = _look(folder, pairs, read, first)
    changed, of_masks = _check_masks(pairs, first.image.shape[1:])
    still = {split: int((~those).sum()) for split, those in changed.items()}
    for split, count in still.items():
        if count == len(pairs[split]):
            raise GeoLinkError(
                f"nothing changed in the {count} pairs of split {split} of {folder}: a split needs "
                "pixels of both classes to be learnt from, chosen by or scored"
            )
    if any(still.values()):
        told = ", ".join(f"{n:,} of {len(pairs[s]):,} of {s}" for s, n in still.items())
        notes = [*notes, f"pairs in which nothing changed: {told}"]
    return TaskData(
        name=folder.name,
        key=xxhash.xxh3_128_hexdigest(f"{of_images} {of_masks}".encode()),
        kind="change",
        imagery=describe_pixels(config, first, pairs["train"][0].earlier),
        classes=CLASSES,
        splits=parts,
        read=_Reader(pairs, read),
        about={"path": str(folder), "splits": {s: len(p) for s, p in parts.items()}},
        notes=tuple(notes),
    )


def _list_pairs(root: Path) -> list[_Pair]:
    files = {side: _by_name(root / side) for side in _SIDES}
    for name in sorted(set().union(*files.values())):
        if missing := [side for side in _SIDES if name not in files[side]]:
            raise GeoLinkError(
                f"pair {name} of {root} has no file in {' and '.join(missing)}: A holds the "
                "earlier date, B the later, label what changed"
            )
    return [_Pair(*(files[side][name] for side in _SIDES)) for name in sorted(files["A"])]


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise GeoLinkError(
            f"there is no folder {folder}: A holds the earlier date, B the later, label what "
            "changed"
        )
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES):
        if path.stem in found:
            raise GeoLinkError(f"{found[path.stem]} and {path.name} are of one pair: keep one")
        found[path.stem] = path
    return found


def _look(
    folder: Path, pairs: Mapping[str, list[_Pair]], read: ReadPixels, first: Pixels
) -> tuple[dict[str, Part], str]:
    """Every image once: see `look`; both dates' pixels and the place of either."""
    named = {
        split: Part(
            np.array([str(pair.earlier.relative_to(folder)) for pair in those]), None,
            unknown_bounds(len(those)),
        )
        for split, those in pairs.items()
    }  # fmt: skip
    earlier, one = look({s: [p.earlier for p in ps] for s, ps in pairs.items()}, named, read, first)
    later, two = look({s: [p.later for p in ps] for s, ps in pairs.items()}, named, read, first)
    parts = {}
    for split, part in named.items():
        a, b = earlier[split], later[split]
        assert a.pixels is not None
        assert b.pixels is not None
        bounds = np.where(np.isnan(a.bounds_lonlat), b.bounds_lonlat, a.bounds_lonlat)
        parts[split] = Part(part.ids, None, bounds, pixels=np.stack([a.pixels, b.pixels], 1))
    return parts, f"{one} {two}"


def _check_masks(
    pairs: Mapping[str, list[_Pair]], size: tuple[int, ...]
) -> tuple[dict[str, NDArray[np.bool_]], str]:
    """Which pairs [N] of each split have a change, and a hash of all masks, each of which is
    read."""
    digest, changed, known = xxhash.xxh3_128(), {}, None
    for split, those in pairs.items():
        changed[split] = np.zeros(len(those), bool)
        for n, pair in enumerate(those):
            mask = read_mask(pair.mask)
            if mask.shape != tuple(size):
                raise GeoLinkError(
                    f"mask {pair.mask} is {list(mask.shape)} [y, x], its images are {list(size)}"
                )
            for value in np.flatnonzero(np.bincount(mask.ravel())).tolist():
                if value == 0:
                    continue
                known = known or (value, pair.mask)
                if value not in _CHANGED or value != known[0]:
                    other = "" if value == known[0] else f" and {known[1]} holds {known[0]}"
                    raise GeoLinkError(
                        f"mask {pair.mask} holds {value}{other}: masks take 0 where nothing "
                        "changed, and either 1 or 255 where something did"
                    )
            changed[split][n] = mask.any()
            digest.update((mask > 0).tobytes())
    return changed, digest.hexdigest()


class _Reader:
    """Reads pairs and masks by their rows in the splits."""

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
            dates = ([pair.earlier for pair in group], [pair.later for pair in group])
            first, second = (
                torch.from_numpy(np.stack([p.image for _, p in ahead(paths, self._read)]))
                for paths in dates
            )
            mask = np.stack([read_mask(pair.mask) > 0 for pair in group]).astype(np.uint8)
            yield TaskBatch(here, first, mask=torch.from_numpy(mask), second=second)
