"""Crops, flips and quarter turns of chips, done alike to all that is known of them, on the device.

A crop is a square window of whole patches, scaled up to the whole chip: pixels stay square. That it
follows the patch lattice is what lets objects follow it, since of an object's outline only anchors
and the patches that it meets are stored. Then

- exact: where pixels, labels and points come to lie; which objects are in the window (an object is
  in it if it meets one of its patches); anchors of objects that lie in it as a whole; area and
  length that is left of an object; flips and turns of everything;
- approximate: how what is left is spread over the new patches, since it is taken as evenly spread
  within each old one; for an object that the window cuts, its centroid (the middle of what is left,
  by old patches) and those of its anchors that fell outside (they become that centroid); relations
  (they are those in the whole chip, also where two objects met outside the window only).

Objects outside stay in their place as dead nodes (`GraphBatch.alive`), so that the sizes of all
tensors are known on the host and nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.training.draws import WHOLE, Part
from schemas.layout import Kind
from schemas.training import Augment


@dataclass(frozen=True, eq=False)
class Window:
    """The square of a chip that becomes the whole chip, for B chips, in patches: int64 [B] each."""

    left: Tensor
    top: Tensor
    side: Tensor
    smallest: int
    """The least side there may be, known on the host."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where what is seen of B chips comes to lie: first the window, then x and y swapped, then
    mirrored left to right, then top to bottom; each bool [B], none: of no chip."""

    patches: int
    """Along a side of a chip."""
    window: Window | None = None
    swapped: Tensor | None = None
    mirrored_x: Tensor | None = None
    mirrored_y: Tensor | None = None


def draw_placement(
    chips: int,
    options: Augment,
    patches: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    part: Part = WHOLE,
) -> Placement:
    """Draw a window, a turn and a mirroring for each of B chips.

    The share of the area is drawn evenly between the limits, the side rounded to whole patches, the
    place drawn evenly. With flip and rotate all eight positions of a square are equally likely.
    """

    def coins() -> Tensor:
        return part.rand((chips,), device, generator) < 0.5

    mirrored_x = coins() if options.flip else None
    swapped = mirrored_y = None
    if options.rotate:
        swapped, mirrored_y = coins(), coins()
        # Without a flip of its own: quarter turns only, whose mirrorings come in pairs.
        mirrored_x = mirrored_x if options.flip else swapped ^ mirrored_y
    window = None
    if options.crop is not None:
        low, high = options.crop
        smallest = max(round(low**0.5 * patches), 1)
        draw = part.rand((3, chips), device, generator, chips=1)
        side = (low + (high - low) * draw[0]).sqrt() * patches
        side = side.round().long().clamp(smallest, patches)
        left, top = torch.minimum((draw[1:] * (patches + 1 - side)).long(), patches - side)
        window = Window(left, top, side, smallest)
    return Placement(patches, window, swapped, mirrored_x, mirrored_y)


def place_images(images: Tensor, placement: Placement) -> Tensor:
    """Float [B, bands, y, x] -> the same shape; windows scaled bilinearly."""
    window = placement.window
    if window is not None:
        x, y = (_sources(window, first, images.shape[-1], placement) for first in _corners(window))
        size = images.shape[-1]
        grid = torch.stack(
            [x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1
        )
        images = F.grid_sample(
            images, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
    return _turn(images, placement)


def place_pixels(labels: Tensor, placement: Placement) -> Tensor:
    """Classes [B, y, x] -> the same shape; each pixel takes the class that its centre lies in."""
    window = placement.window
    if window is not None:
        size, patches = labels.shape[-1], placement.patches
        # Whole numbers: the centre of pixel i is (2 i + 1) / 2.
        centre = 2 * torch.arange(size, device=labels.device) + 1
        x, y = (
            (centre * window.side[:, None] + 2 * size * first[:, None]) // (2 * patches)
            for first in _corners(window)
        )
        chip = torch.arange(len(labels), device=labels.device)[:, None, None]
        labels = labels[chip, y[:, :, None], x[:, None, :]]
    return _turn(labels, placement)


def place_patches(labels: Tensor, placement: Placement) -> Tensor:
    """Shares of classes uint8 [B, patch_y, patch_x, class], x255 -> the same of the new patches.

    Taken as evenly spread within each old patch, in the new ones by area.
    """
    window, patches = placement.window, placement.patches
    if window is not None:
        x, y = (_shares(window, first, patches) for first in _corners(window))
        rows = torch.einsum("biy,byxc->bixc", y, labels.float())
        labels = torch.einsum("bjx,bixc->bijc", x, rows).round().to(labels.dtype)
    return _turn(labels.movedim(-1, 1), placement).movedim(1, -1)


def place_gsd_m(gsd_m: Tensor, placement: Placement) -> Tensor:
    """Metres of a pixel [B] -> metres of a pixel of the scaled windows."""
    window = placement.window
    return gsd_m if window is None else gsd_m * (window.side / placement.patches)


def place_graph(graph: GraphBatch, placement: Placement) -> GraphBatch:
    """The graph of what is seen: anchors, patches, sizes; objects outside the window are dead."""
    if placement.window is not None:
        graph = _crop_graph(graph, placement.window, placement.patches)
    if placement.swapped is placement.mirrored_x is placement.mirrored_y is None:
        return graph
    last = placement.patches - 1
    x, y = graph.anchor.unbind(-1)
    row, column = graph.patch // placement.patches, graph.patch % placement.patches
    node = graph.chip
    entry = node[_owners(graph)]
    if placement.swapped is not None:
        swap = placement.swapped
        x, y = torch.where(swap[node, None], y, x), torch.where(swap[node, None], x, y)
        column, row = (
            torch.where(swap[entry], row, column), torch.where(swap[entry], column, row),
        )  # fmt: skip
    if placement.mirrored_x is not None:
        x = torch.where(placement.mirrored_x[node, None], 1 - x, x)
        column = torch.where(placement.mirrored_x[entry], last - column, column)
    if placement.mirrored_y is not None:
        y = torch.where(placement.mirrored_y[node, None], 1 - y, y)
        row = torch.where(placement.mirrored_y[entry], last - row, row)
    return replace(graph, anchor=torch.stack([x, y], -1), patch=row * placement.patches + column)


def _crop_graph(graph: GraphBatch, window: Window, patches: int) -> GraphBatch:
    nodes, owner = graph.nodes, _owners(graph)
    left, top, side = (of[graph.chip] for of in (window.left, window.top, window.side))
    column = graph.patch % patches - left[owner]
    row = graph.patch // patches - top[owner]
    own_side = side[owner]
    seen = (column >= 0) & (column < own_side) & (row >= 0) & (row < own_side)

    def per_node(values: Tensor) -> Tensor:
        return values.new_zeros(nodes).index_add(0, owner, values)

    weight = graph.patch_weight
    seen_weight = weight * seen
    total, left_over = per_node(weight), per_node(seen_weight)
    outside = per_node((~seen).float())
    # A window that is the whole chip leaves nothing out, not even what meets no patch.
    alive = (per_node(seen.float()) > 0) | (side == patches)
    if graph.alive is not None:
        alive = alive & graph.alive
    kept = torch.where(total > 0, left_over / total.clamp(min=1e-9), 1.0)

    # Middle of what is left: x, y in patches of the window.
    middle = torch.stack([per_node(seen_weight * (at + 0.5)) for at in (column, row)], -1)
    middle = middle / left_over.clamp(min=1e-9)[:, None] / side[:, None]
    first = torch.stack([left, top], -1)[:, None]
    anchor = (graph.anchor * patches - first) / side[:, None, None]
    anchor = _mend(anchor, middle, graph, alive & (outside > 0))

    fine_column, share_x = _spread(column, own_side, patches, window.smallest)
    fine_row, share_y = _spread(row, own_side, patches, window.smallest)
    # Polygons: shares of patches; lines and points: shares of the whole, spread over patches.
    is_line = (owner >= graph.kind_ptr[1]) & (owner < graph.kind_ptr[2])
    scale = torch.where(is_line, (own_side / patches) ** 2 / kept[owner].clamp(min=1e-9), 1.0)
    spread = share_y[:, :, None] * share_x[:, None, :] * (seen_weight * scale)[:, None, None]
    fine = fine_row[:, :, None] * patches + fine_column[:, None, :]
    fine, spread = fine.flatten(1), spread.flatten(1)
    # A point's patch is known exactly.
    here = (anchor[:, 0] * patches).long().clamp(0, patches - 1)
    here = (here[:, 1] * patches + here[:, 0])[owner]
    is_point = (owner < graph.kind_ptr[1])[:, None]
    only_first = torch.arange(fine.shape[1], device=fine.device) == 0
    fine = torch.where(is_point & only_first, here[:, None], fine)
    spread = torch.where(is_point, only_first * seen_weight[:, None], spread)
    return replace(
        graph,
        anchor=anchor,
        size=graph.size * kept,
        patch_offset=graph.patch_offset * fine.shape[1],
        patch=fine.flatten().to(graph.patch.dtype),
        patch_weight=spread.flatten().to(weight.dtype),
        alive=alive,
    )


def _mend(anchor: Tensor, middle: Tensor, graph: GraphBatch, cut: Tensor) -> Tensor:
    """Anchors [M, 4, 2] of objects that a window cuts (bool [M]): see the module. In [0, 1]."""
    inside = ((anchor >= 0) & (anchor <= 1)).all(-1)
    # The centroid: a line's first anchor, a polygon's last.
    of_polygon = torch.arange(graph.nodes, device=anchor.device) >= graph.kind_ptr[Kind.POLYGON]
    at = torch.arange(4, device=anchor.device)
    centroid = torch.where(of_polygon[:, None], at == 3, at == 0)
    moved = cut[:, None] & (centroid | ~inside)
    return torch.where(moved[..., None], middle[:, None], anchor).clamp(0, 1)


def _spread(place: Tensor, side: Tensor, patches: int, smallest: int) -> tuple[Tensor, Tensor]:
    """New patches that an old one at int [P] of a window of so many meets on one axis, and how
    much of each it covers: int64 and float32 [P, most there may be]; shares of 0 say nothing.
    """
    first = place * patches // side
    new = first[:, None] + torch.arange(_most_met(patches, smallest), device=place.device)
    # In units of which there are `side` in a new patch and `patches` in an old one.
    low = torch.maximum((place * patches)[:, None], new * side[:, None])
    high = torch.minimum(((place + 1) * patches)[:, None], (new + 1) * side[:, None])
    return new.clamp(0, patches - 1), (high - low).clamp(min=0) / side[:, None]


@lru_cache
def _most_met(patches: int, smallest: int) -> int:
    """Most new patches that an old one meets on one axis."""
    return max(
        -(-(i + 1) * patches // s) - i * patches // s
        for s in range(smallest, patches + 1)
        for i in range(s)
    )


def _shares(window: Window, first: Tensor, patches: int) -> Tensor:
    """How much of new patch i is old patch o, on one axis: float32 [B, i, o]; rows sum to 1."""
    index = torch.arange(patches, device=first.device)
    side = window.side[:, None, None]
    begin = first[:, None, None] * patches + index[:, None] * side
    low = torch.maximum(begin, index * patches)
    high = torch.minimum(begin + side, (index + 1) * patches)
    return (high - low).clamp(min=0) / side


def _sources(window: Window, first: Tensor, size: int, placement: Placement) -> Tensor:
    """Where new pixels' centres lie in the old chip, on one axis: [B, size], -1 to 1 its ends."""
    centre = (torch.arange(size, device=first.device) + 0.5) / size
    at = (first[:, None] + centre * window.side[:, None]) / placement.patches
    return 2 * at - 1


def _corners(window: Window) -> tuple[Tensor, Tensor]:
    return window.left, window.top


def _owners(graph: GraphBatch) -> Tensor:
    """The node of each node-patch correspondence: int64 [P]."""
    # The size of the output is given because it is known; left out, a GPU would be waited for.
    node = torch.arange(graph.nodes, device=graph.chip.device)
    count = graph.patch_offset.diff()
    return torch.repeat_interleave(node, count, output_size=graph.patch.shape[0])


def _turn(values: Tensor, placement: Placement) -> Tensor:
    """Values [B, ..., y, x], y and x of one length, swapped and mirrored."""

    def where(chosen: Tensor, changed: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), changed, values)

    if placement.swapped is not None:
        values = where(placement.swapped, values.transpose(-1, -2))
    if placement.mirrored_x is not None:
        values = where(placement.mirrored_x, values.flip(-1))
    if placement.mirrored_y is not None:
        values = where(placement.mirrored_y, values.flip(-2))
    return values
