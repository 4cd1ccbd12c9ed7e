"""Embeddings in Zarr v3 with coordinates: float16 or int8, written a block at a time.

A group an area, which xarray opens (`xr.open_zarr(path, group=..., decode_coords="all")`) and
rioxarray knows the CRS and transform of: arrays [<name>_feature, y, x], x and y the centres of
patches. Embeddings of chips lie in its group `chips`. int8: a vector is its values times
`<name>_scale` [y, x] there; the scale is the largest magnitude of the vector over 127, so that no
value is off by more than half of it. Where there is nothing, float16 and scales are not-a-number.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from geolink.embed.area import Area, Block
from schemas.errors import GeoLinkError

Kept = Literal["float16", "int8"]
CHIPS = "chips"


@dataclass(frozen=True)
class Kind:
    """Embeddings of one kind."""

    name: str
    width: int
    about: str
    of_chips: bool = False
    """Whether there is one a chip, not one a patch."""


Errors = dict[str, float]
"""Of one block and kind: `largest` difference of a value, `squared` sum of the squared differences,
`total` sum of the squared values, `cosine` least between a vector and what is kept of it."""


def create(
    path: Path, areas: list[Area], kinds: list[Kind], kept: Kept, about: Mapping[str, Any]
) -> None:
    """Make the Zarr store with its empty arrays and coordinates, whole or not at all.

    Nothing is done where it is there. Raises GeoLinkError if it cannot be written.
    """
    if path.exists():
        return
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        root = zarr.open_group(str(partial), mode="w", attributes=dict(about))
        for area in areas:
            group = root.create_group(area.name, attributes={"Conventions": "CF-1.11"})
            _coordinates(group, area, area.patch, area.patches)
            _arrays(group, [k for k in kinds if not k.of_chips], kept, area.patches, area.side)
            of_chips = [k for k in kinds if k.of_chips]
            if of_chips:
                inner = group.create_group(CHIPS, attributes={"Conventions": "CF-1.11"})
                shape = (area.shape[0] // area.chip, area.shape[1] // area.chip)
                _coordinates(inner, area, area.chip, shape)
                _arrays(inner, of_chips, kept, shape, area.side * area.patch // area.chip)
        partial.rename(path)
    except OSError as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def _coordinates(group: zarr.Group, area: Area, side: int, shape: tuple[int, int]) -> None:
    """Centres of squares of `side` pixels, and the CRS."""
    width, height = area.step[0] * side, area.step[1] * side
    x = area.west + (np.arange(shape[1]) + 0.5) * width
    y = area.north - (np.arange(shape[0]) + 0.5) * height
    geographic = area.mapping.get("grid_mapping_name") == "latitude_longitude"
    for name, values in (("x", x), ("y", y)):
        array = group.create_array(
            name, shape=values.shape, dtype=np.float64, chunks=values.shape,
            dimension_names=(name,), attributes=_axis(name, geographic),
        )  # fmt: skip
        array[:] = values
    transform = (area.west, width, 0.0, area.north, 0.0, -height)
    attributes = {**area.mapping, "GeoTransform": " ".join(repr(float(v)) for v in transform)}
    group.create_array("spatial_ref", shape=(), dtype=np.int64, attributes=attributes)


def _axis(name: str, geographic: bool) -> dict[str, Any]:
    if geographic:
        what, unit = {"x": ("longitude", "degrees_east"), "y": ("latitude", "degrees_north")}[name]
        return {"standard_name": what, "units": unit, "axis": name.upper()}
    return {"standard_name": f"projection_{name}_coordinate", "units": "m", "axis": name.upper()}


def _arrays(
    group: zarr.Group, kinds: list[Kind], kept: Kept, shape: tuple[int, int], side: int
) -> None:
    for kind in kinds:
        attributes: dict[str, Any] = {"long_name": kind.about, "grid_mapping": "spatial_ref"}
        whole = kept == "float16"
        group.create_array(
            kind.name, shape=(kind.width, *shape), chunks=(kind.width, side, side), dtype=kept,
            fill_value=float("nan") if whole else 0,
            dimension_names=(f"{kind.name}_feature", "y", "x"), attributes=attributes,
        )  # fmt: skip
        if not whole:
            group.create_array(
                f"{kind.name}_scale", shape=shape, chunks=(side, side), dtype=np.float32,
                fill_value=float("nan"), dimension_names=("y", "x"),
                attributes={
                    "long_name": f"what {kind.name} is to be multiplied by",
                    "grid_mapping": "spatial_ref",
                },
            )  # fmt: skip


def write_block(
    group: zarr.Group, kind: Kind, at: tuple[int, int], values: NDArray[np.float32],
    there: NDArray[np.bool_],
) -> Errors:  # fmt: skip
    """Write vectors [rows, columns, width] from row and column `at` on, where they are there;
    what was lost."""
    name = _path(kind)
    array = group[name]
    assert isinstance(array, zarr.Array)
    part = (slice(at[0], at[0] + values.shape[0]), slice(at[1], at[1] + values.shape[1]))
    if array.dtype == np.int8:
        stored, scale = to_int8(values)
        back = stored * scale[..., None]
        scales = group[f"{name}_scale"]
        assert isinstance(scales, zarr.Array)
        scales[part] = np.where(there, scale, np.float32("nan"))
    else:
        stored = values.astype(np.float16)
        if not np.isfinite(stored[there]).all():
            raise GeoLinkError(
                f"embeddings {kind.name} exceed what float16 holds: keep them as int8"
            )
        back = stored.astype(np.float32)
        stored = np.where(there[..., None], stored, np.float16("nan"))
    array[(slice(None), *part)] = np.moveaxis(stored, -1, 0)
    return _errors(values[there], back[there])


def to_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Vectors [.., C] as int8, and their scales [..]: vector = int8 * scale."""
    scale = (np.abs(values).max(-1) / 127).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))[..., None]
    return np.rint(values / divisor).astype(np.int8), scale


def _errors(values: NDArray[np.float32], back: NDArray[np.float32]) -> Errors:
    if not len(values):
        return {"largest": 0.0, "squared": 0.0, "total": 0.0, "cosine": 1.0}
    off = (values - back).astype(np.float64)
    norm = np.linalg.norm(values, axis=1) * np.linalg.norm(back, axis=1)
    cosine = (values * back).sum(1) / np.where(norm > 0, norm, 1.0)
    return {
        "largest": float(np.abs(off).max()),
        "squared": float((off**2).sum()),
        "total": float((values.astype(np.float64) ** 2).sum()),
        "cosine": float(cosine[norm > 0].min(initial=1.0)),
    }


def state_errors(group: zarr.Group, kind: Kind, blocks: list[Errors]) -> dict[str, float]:
    """Write what was lost over all blocks into an array's attributes; also returned."""
    total = sum(b["total"] for b in blocks)
    stated = {
        "largest_error": max(b["largest"] for b in blocks),
        "relative_error": (sum(b["squared"] for b in blocks) / total) ** 0.5 if total else 0.0,
        "least_cosine": min(b["cosine"] for b in blocks),
    }
    group[_path(kind)].attrs.update(stated)
    return stated


def _path(kind: Kind) -> str:
    return f"{CHIPS}/{kind.name}" if kind.of_chips else kind.name


def read_block(
    group: zarr.Group, name: str, block: Block
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Vectors [rows, columns, C] of a block's patches, and which are there."""
    part = (slice(block.row, block.row + block.rows),
            slice(block.column, block.column + block.columns))  # fmt: skip
    array = group[name]
    assert isinstance(array, zarr.Array)
    values = np.moveaxis(np.asarray(array[(slice(None), *part)]).astype(np.float32), 0, -1)
    if f"{name}_scale" in group:
        scales = group[f"{name}_scale"]
        assert isinstance(scales, zarr.Array)
        values = values * np.asarray(scales[part])[..., None]
    there = np.asarray(np.isfinite(values).all(-1))
    return np.where(there[..., None], values, np.float32(0)), there
