"""An encoder run over a block of an area, so that no seam shows where its windows meet.

An encoder sees one window at a time, and a patch at its edge sees less of its surroundings than
one in its middle. So windows lie on one lattice over the whole area and overlap by `overlap`
patches; where they do, a patch's token is the mean of theirs, weighted by how far it lies from
each window's edge: the weight falls linearly over the overlap, so that one window fades into the
next. Windows reach across chips, shards and blocks. A block's tokens depend on the area and the
lattice alone, not on how it is cut into blocks. Beyond the area's edge, pixels are mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.embed.area import Area, Block
from schemas.errors import GeoLinkError

_LEAST = 1e-4
"""Weight of the margin."""

Tokens = Callable[[Tensor], Tensor]
"""Stored images [B, band, y, x] on the device -> patch tokens float32 [B, grid**2, C]."""


@dataclass(frozen=True)
class Lattice:
    """Windows over an area."""

    grid: int
    """Patches along a side of a window."""
    overlap: int
    """Patches that neighbouring windows share."""
    batch_size: int
    """Windows encoded at once."""
    margin: int = 0
    """Outermost patches of a window that count only where no other window has them."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= self.grid // 2:
            raise GeoLinkError(
                f"windows of {self.grid} patches cannot overlap by {self.overlap}: choose 0 to "
                f"{self.grid // 2}"
            )

    @property
    def stride(self) -> int:
        """Patches from one window to the next."""
        return self.grid - self.overlap

    def over(self, first: int, last: int, count: int) -> range:
        """Windows along an axis of `count` patches that meet those from `first` to before `last`.

        Window n begins at patch n * stride; the last one reaches the end or beyond.
        """
        most = max(-(-(count - self.grid) // self.stride), 0)
        low = max((first - self.grid) // self.stride + 1, 0)
        return range(low, min((last - 1) // self.stride, most) + 1)

    def weights(self) -> NDArray[np.float32]:
        """[grid**2] of the tokens of a window; those of overlapping windows add up to 1, but for
        the margin's."""
        at = np.arange(self.grid) + 0.5
        edge = np.minimum(at, self.grid - at) - self.margin
        fade = self.overlap - 2 * self.margin
        ramp = np.clip(edge / fade, _LEAST, 1.0) if fade else np.ones(self.grid)
        return np.outer(ramp, ramp).astype(np.float32).ravel()


@dataclass(frozen=True, eq=False)
class Pixels:
    """What is read for a block: the pixels of all windows that meet it."""

    image: NDArray[Any]
    """[band, y, x]."""
    there: NDArray[np.bool_]
    """[rows, columns] of patches that have a pixel with data."""
    rows: range
    columns: range
    """Windows of the lattice."""


def read_block(area: Area, block: Block, lattice: Lattice) -> Pixels:
    """Read the pixels for a block. Raises GeoLinkError if they cannot be read."""
    rows = lattice.over(block.row, block.row + block.rows, area.patches[0])
    columns = lattice.over(block.column, block.column + block.columns, area.patches[1])
    p = area.patch
    y, x = rows.start * lattice.stride * p, columns.start * lattice.stride * p
    height = ((len(rows) - 1) * lattice.stride + lattice.grid) * p
    width = ((len(columns) - 1) * lattice.stride + lattice.grid) * p
    (top, inside_y, below), (left, inside_x, beside) = (
        _beyond(y, height, area.shape[0]),
        _beyond(x, width, area.shape[1]),
    )
    image = area.read(y - top, x - left, top + inside_y, left + inside_x)
    data = ~(image[:, top:, left:] == area.imagery.nodata).all(0)
    data = np.pad(data, ((0, below), (0, beside)))
    there = np.asarray(data.reshape(height // p, p, width // p, p).any((1, 3)))
    if below or beside:
        image = np.pad(image, ((0, 0), (0, below), (0, beside)), mode="symmetric")
    return Pixels(image[:, top:, left:], there, rows, columns)


def _beyond(first: int, length: int, size: int) -> tuple[int, int, int]:
    """Pixels that are read before `first`, of the `length` from there on, and mirrored at the end.

    Those before are what is mirrored, where the window itself holds too few.
    """
    inside = min(length, size - first)
    beyond = length - inside
    return min(first, max(0, beyond - inside)), inside, beyond


def embed_block(
    pixels: Pixels, area: Area, block: Block, lattice: Lattice, tokens: Tokens, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Tokens [rows, columns, C] of a block's patches, and [rows, columns]: which have data.

    Windows without any data are not encoded; patches without are zero.
    """
    stride, grid, p = lattice.stride, lattice.grid, area.patch
    height, width = pixels.there.shape
    lines = np.arange(grid)
    inside = (lines[:, None] * width + lines).ravel()
    weight = torch.from_numpy(lattice.weights()).to(device)
    total: Tensor | None = None
    sums = torch.zeros(height * width, device=device)
    for starts in _apart(pixels, lattice):
        for low in range(0, len(starts), lattice.batch_size):
            group = starts[low : low + lattice.batch_size]
            images = np.stack(
                [pixels.image[:, y * p : (y + grid) * p, x * p : (x + grid) * p] for y, x in group]
            )
            found = tokens(torch.from_numpy(images).to(device)).float()
            if total is None:
                total = torch.zeros(height * width, found.shape[-1], device=device)
            first = np.array([y * width + x for y, x in group])
            place = torch.from_numpy((first[:, None] + inside).ravel()).to(device)
            # No two windows of a group meet, so every place is there once.
            total[place] += (found * weight[:, None]).flatten(0, 1)
            sums[place] += weight.repeat(len(group))
    top = block.row - pixels.rows.start * stride
    left = block.column - pixels.columns.start * stride
    part = (slice(top, top + block.rows), slice(left, left + block.columns))
    there = pixels.there[part]
    if total is None:
        return np.zeros((*there.shape, 0), np.float32), there
    mean = (total / sums.clamp(min=1e-9)[:, None]).view(height, width, -1)[part]
    return np.where(there[..., None], mean.cpu().numpy(), np.float32(0)), there


def _apart(pixels: Pixels, lattice: Lattice) -> list[list[tuple[int, int]]]:
    """First patches (row, column) of the windows with data, in groups in which none meet."""
    steps = (0, 1) if lattice.overlap else (0,)
    by = len(steps)
    groups = []
    for odd_row, odd_column in product(steps, steps):
        group = [
            (r * lattice.stride, c * lattice.stride)
            for r in range(len(pixels.rows))
            for c in range(len(pixels.columns))
            if (pixels.rows[r] % by, pixels.columns[c] % by) == (odd_row, odd_column)
        ]
        groups.append([
            (y, x) for y, x in group
            if pixels.there[y : y + lattice.grid, x : x + lattice.grid].any()
        ])  # fmt: skip
    return groups
