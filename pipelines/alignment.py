"""Image against map in a shard: measured always, and corrected or dropped where the config asks."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.checks import is_shifted
from pipelines.inputs import Inputs, draw
from pipelines.plan import ShardTask
from pipelines.registration import Lattice, Registration, register
from schemas.findings import SURE


class Aligned(NamedTuple):
    """Inputs as the config wants them aligned, and what is left between image and map."""

    inputs: Inputs
    shift: NDArray[np.float32]
    """[N, 3] pixels east, pixels north, confidence; of the chips and objects as they are now."""
    moved_m: list[list[float]]
    """Metres east and north by which the objects were moved: one pair for a block, one a chip
    where each has its own image, none where nothing was moved."""
    counts: dict[str, int]


def align(task: ShardTask, inputs: Inputs) -> Aligned:
    """Measure shifts, and do what `registration` says: keep, correct, drop."""
    found = _measure(task, inputs)
    counts = Counter(shard_map_unrelated=int(found.unrelated))
    shift, moved = found.shift, np.zeros((0, 2))
    if task.registration == "correct":
        step = _step(inputs, shift)
        if step.any():
            moved = step * _gsd_m(task, inputs)
            inputs = _move(task, inputs, moved)
            shift[:, :2] -= step
            moved = moved if inputs.frame is not None else moved[:1]
    elif task.registration == "drop":
        good = np.flatnonzero(~is_shifted(shift))
        counts["chip_dropped_shifted"] = len(shift) - len(good)
        inputs, shift = _keep(inputs, good), shift[good]
    return Aligned(inputs, shift, moved.tolist(), dict(counts))


def shift_m(task: ShardTask, aligned: Aligned) -> NDArray[np.float32]:
    """The shard array: shifts in metres."""
    metres = aligned.shift.copy()
    metres[:, :2] *= _gsd_m(task, aligned.inputs)
    return metres


def _measure(task: ShardTask, inputs: Inputs) -> Registration:
    lattice = Lattice(
        *inputs.lattice, inputs.kept, inputs.arrays["scene"], adjacent=inputs.frame is None
    )
    return register(inputs.arrays["image"], inputs.raster, lattice, task.info.sensor.nodata)


def _gsd_m(task: ShardTask, inputs: Inputs) -> NDArray[np.float64]:
    """[N, 2] metres of a pixel along x and y."""
    bounds = inputs.arrays["bounds"]
    size: NDArray[np.float64] = (bounds[:, 2:] - bounds[:, :2]) / task.info.grid.size
    return size


def _step(inputs: Inputs, shift: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N, 2] pixels to move each chip's map: the median of the block's sure shifts.

    Chips of a block share it, so that an object stays one object; a chip with an image of its own
    (pairs) has its own.
    """
    sure = shift[:, 2] >= SURE
    if inputs.frame is not None:
        return np.where(sure[:, None], shift[:, :2], 0.0).astype(np.float64)
    step = np.median(shift[sure, :2], axis=0) if sure.any() else np.zeros(2)
    return np.tile(np.round(step, 2).astype(np.float64), (len(shift), 1))


def _move(task: ShardTask, inputs: Inputs, metres: NDArray[np.float64]) -> Inputs:
    """Features moved by [N, 2] metres of their chip (of the block: all the same), drawn anew."""
    features = inputs.features
    xy, of = shapely.get_coordinates(features.geometry, return_index=True)
    step = metres[:1] if inputs.frame is None else metres[inputs.frame[of]]
    geometry = shapely.set_coordinates(features.geometry.copy(), xy + step)
    moved = replace(inputs, features=replace(features, geometry=geometry))
    return replace(moved, raster=draw(task, moved))


def _keep(inputs: Inputs, chips: NDArray[np.int64]) -> Inputs:
    """Only some of the chips; those of the lattice that are left out lose their features."""
    frame = inputs.frame
    if frame is not None:
        position = np.full(len(inputs.kept), -1, np.int64)
        position[chips] = np.arange(len(chips))
        frame = position[frame]
    return replace(
        inputs,
        arrays={name: array[chips] for name, array in inputs.arrays.items()},
        frame=frame, kept=inputs.kept[chips], seam=inputs.seam[chips],
    )  # fmt: skip
