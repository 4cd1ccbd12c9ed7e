"""A .npz file of images and labels.

image [N, band, y, x], label int [N] or uint8 [N, class]; and maybe split [N] of `train`, `val`,
`test`; id [N]; classes; bands; wavelength_nm; bounds_lonlat [N, 4]; gsd_m; nodata
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import Kind, TaskBatch, TaskData
from geolink.tasks.sources.common import (
    DRAWN,
    Found,
    describe_pixels,
    draw_split,
    number_classes,
    unknown_bounds,
)
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.pixels import Pixels


def open_npz(config: TaskConfig) -> TaskData:
    """Images and labels of a .npz file. Raises GeoLinkError naming what it lacks."""
    path = Path(config.data)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise GeoLinkError(f"cannot read {path}: {error}") from error
    if missing := [name for name in ("image", "label") if name not in arrays]:
        raise GeoLinkError(f"{path} has no array {missing[0]}: image [N, band, y, x] and label [N]")
    image, label = arrays["image"], arrays["label"]
    if image.ndim != 4 or len(image) != len(label) or label.ndim > 2:
        raise GeoLinkError(
            f"{path} has image {list(image.shape)} and label {list(label.shape)}, not "
            "[N, band, y, x] and [N] or [N, class]"
        )
    kind: Kind = "class" if label.ndim == 1 else "multilabel"
    names, label = _npz_classes(arrays, label, kind)
    split, notes = _npz_splits(arrays, label, kind, config.seed)
    bounds = arrays.get("bounds_lonlat", unknown_bounds(len(image)))
    ids = (
        arrays["id"].astype(str)
        if "id" in arrays
        else np.array([f"{n}" for n in range(len(image))])
    )
    found = {
        name: Found(ids.astype(str)[here], label[here], bounds[here], here)
        for name in ("train", "val", "test")
        if len(here := np.flatnonzero(split == name))
    }
    for name in ("train", "test"):
        if name not in found:
            raise GeoLinkError(f"{path} has no images of split {name}")
    classes, parts, rows, more = number_classes(found, names, kind, str(path), strict=True)
    first = Pixels(
        image[0], bands=_texts(arrays, "bands"), nodata=_number(arrays, "nodata"),
        gsd_m=_number(arrays, "gsd_m"),
        wavelength_nm=tuple(float(w) for w in arrays["wavelength_nm"])
        if "wavelength_nm" in arrays else None,
    )  # fmt: skip

    def read(split: str, chosen: NDArray[np.int64] | None, batch_size: int) -> Iterator[TaskBatch]:
        part, place = parts[split], rows[split]
        chosen = np.arange(len(part)) if chosen is None else chosen
        for low in range(0, len(chosen), batch_size):
            here = chosen[low : low + batch_size]
            labels = None if part.label is None else part.label[here]
            yield TaskBatch(here, torch.from_numpy(image[place[here]]), label=labels)

    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    digest.update(np.ascontiguousarray(split).tobytes())
    return TaskData(
        name=path.stem, key=digest.hexdigest(), kind=kind,
        imagery=describe_pixels(config, first, path), classes=classes, splits=parts, read=read,
        about={"path": str(path), "splits": {s: len(p) for s, p in parts.items()}},
        notes=(*notes, *more),
    )  # fmt: skip


def _npz_classes(
    arrays: Mapping[str, NDArray[Any]], label: NDArray[Any], kind: Kind
) -> tuple[list[str], NDArray[Any]]:
    count = label.shape[1] if kind == "multilabel" else int(label.max(initial=0)) + 1
    names = _texts(arrays, "classes") or tuple(f"class {n}" for n in range(count))
    if kind == "class" and (label.min(initial=0) < 0 or label.max(initial=0) >= len(names)):
        raise GeoLinkError(
            f"labels go from {label.min()} to {label.max()}, but there are {len(names)} classes"
        )
    return list(names), label.astype(np.int64 if kind == "class" else np.uint8)


def _npz_splits(
    arrays: Mapping[str, NDArray[Any]], label: NDArray[Any], kind: Kind, seed: int
) -> tuple[NDArray[np.str_], list[str]]:
    if "split" in arrays:
        return arrays["split"].astype(str), []
    groups = label if kind == "class" else np.zeros(len(label), np.int64)
    return draw_split(groups, seed), [DRAWN]


def _texts(arrays: Mapping[str, NDArray[Any]], name: str) -> tuple[str, ...] | None:
    return tuple(str(v) for v in arrays[name].tolist()) if name in arrays else None


def _number(arrays: Mapping[str, NDArray[Any]], name: str) -> Any:
    return arrays[name].item() if name in arrays else None
