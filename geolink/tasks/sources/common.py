"""What all sources do: classes are counted and numbered, images without a use left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.adapt import wavelength_nm
from geolink.tasks.contracts import Imagery, Kind, Part
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.pixels import Pixels


@dataclass(eq=False)
class Found:
    """Images of a split as a source finds them, before classes are numbered."""

    ids: NDArray[np.str_]
    label: NDArray[Any]
    """int64 [N] or uint8 [N, class]: places in the source's own list of classes."""
    bounds_lonlat: NDArray[np.float64]
    row: NDArray[np.int64]
    """[N], where the source finds the image again."""
    left_out: dict[str, int] = field(default_factory=dict)


DRAWN = "nothing says which image is of which split: 60 % train, 20 % val, 20 % test by the seed"
"""The note where splits are drawn."""


def draw_split(label: NDArray[np.int64], seed: int) -> NDArray[np.str_]:
    """`train`, `val` or `test` [N], 60, 20 and 20 % of each class, by a seed."""
    split = np.full(len(label), "train", dtype="<U5")
    split[draw_out(label, 0.2, seed)] = "test"
    rest = np.flatnonzero(split == "train")
    split[rest[draw_out(label[rest], 0.25, seed + 1)]] = "val"
    return split


def draw_out(label: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """A share [N] of the images of each class, by a seed; one of each is never drawn."""
    out = np.zeros(len(label), bool)
    for number in np.unique(label).tolist():
        drawn = np.random.default_rng((seed, number)).permutation(np.flatnonzero(label == number))
        out[drawn[: min(round(share * len(drawn)), len(drawn) - 1)]] = True
    return out


def describe_pixels(config: TaskConfig, first: Pixels, path: Path) -> Imagery:
    """What pixels are; bands as the config names them, as files say, or RGB.

    Raises GeoLinkError if the bands have no names.
    """
    count = len(first.image)
    bands = config.bands or first.bands or (("red", "green", "blue") if count == 3 else ())
    if len(bands) != count:
        told = f"{len(bands)} are named" if bands else "none are named"
        raise GeoLinkError(
            f"{path} has {count} bands, and {told}: name them in their order (bands: [...])"
        )
    known = first.wavelength_nm or tuple(wavelength_nm(b) for b in bands)
    nodata = -1 if first.nodata is None else first.nodata
    return Imagery(
        tuple(bands), tuple(known), str(first.image.dtype), nodata,
        (first.image.shape[1], first.image.shape[2]), first.gsd_m,
    )  # fmt: skip


def unknown_bounds(count: int) -> NDArray[np.float64]:
    """Bounds [N, 4] of images that lie nobody knows where."""
    return np.full((count, 4), np.nan)


def number_classes(
    found: Mapping[str, Found], names: Sequence[str], kind: Kind, where: str, *, strict: bool
) -> tuple[tuple[str, ...], dict[str, Part], dict[str, NDArray[np.int64]], list[str]]:
    """Classes that can be learnt, and the images of these.

    Args:
        found: by split; `train` is one of them.
        names: of the source's classes.
        kind: `class` or `multilabel`.
        where: what the data are called.
        strict: whether a class that no image, or none of `train`, has is an error; else its images
            are left out and counted.

    Returns names of the classes, the splits, the rows of their images in the source, and notes.
    Raises GeoLinkError: a class is empty, or is not in `train`; a split has no image left, or
    fewer than two classes.
    """
    have = {s: _counts(f.label, kind, len(names)) for s, f in found.items()}
    total = np.sum(list(have.values()), axis=0)
    taught = have["train"] > 0
    empty, unseen = np.flatnonzero(total == 0), np.flatnonzero((total > 0) & ~taught)
    if strict and len(empty):
        raise GeoLinkError(
            f"class {names[empty[0]]} of {where} has no image: remove its folder, or fill it"
        )
    if strict and len(unseen):
        split = next(s for s in found if have[s][unseen[0]])
        raise GeoLinkError(
            f"class {names[unseen[0]]} of {where} has images in split {split} and none in train, "
            "so nothing can learn it: move some to train, or leave the class out"
        )
    known = np.flatnonzero(taught).tolist()
    if len(known) < (2 if kind == "class" else 1):
        only = f"the only class is {names[known[0]]}" if len(known) else "no image has a class"
        raise GeoLinkError(f"there is nothing to tell apart in {where}: {only} in split train")
    number = np.full(len(names), -1)
    number[known] = np.arange(len(known))
    parts, rows, notes = {}, {}, []
    for split, f in found.items():
        if kind == "multilabel":
            label: NDArray[Any] = np.ascontiguousarray(f.label[:, known])
            kept = np.ones(len(label), bool)
        else:
            label = number[f.label]
            kept = label >= 0
        left_out = dict(f.left_out)
        if not kept.all():
            left_out["class_not_in_train"] = int((~kept).sum())
        if kept.sum() < 2:
            reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
            raise GeoLinkError(
                f"split {split} of {where} has {int(kept.sum())} labelled images, at least 2 are "
                f"needed{f' ({reasons})' if reasons else ''}"
            )
        parts[split] = Part(f.ids[kept], label[kept], f.bounds_lonlat[kept], left_out)
        rows[split] = f.row[kept]
    if len(unseen):
        told = ", ".join(names[n] for n in unseen.tolist())
        notes.append(f"classes without an image in train are left out: {told}")
    return tuple(names[n] for n in known), parts, rows, notes


def _counts(label: NDArray[Any], kind: Kind, classes: int) -> NDArray[np.int64]:
    if kind == "multilabel":
        counts: NDArray[np.int64] = label.astype(np.int64).sum(0)
    else:
        counts = np.bincount(label, minlength=classes)
    return counts
