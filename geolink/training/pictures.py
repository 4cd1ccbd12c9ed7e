"""Pictures of what a model does: reconstructions, attention to objects, a map of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.checkpoint import CheckpointMeta
from geolink.device import normalise
from geolink.graph import KINDS
from geolink.models.base import PretrainModel
from geolink.models.fusion import Attention
from geolink.models.guided import CrossAttention
from geolink.models.masking import node_slots
from geolink.models.ops import patchify
from geolink.show import class_colors, rgb, save
from geolink.stream import Batch
from geolink.training.parts import chip_context
from schemas.dataset import DatasetInfo
from schemas.layout import Kind

_OBJECTS = 3
"""Objects of a chip whose attention is drawn."""

_TO_NODES = ("cross_attn_token_to_image", "to_nodes")
"""What the attention of patches to objects is called in the fusion of either variant."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Chips that have a class, as an encoder sees them."""

    features: Tensor
    """float32 [N, D]."""
    label: NDArray[np.int64]
    """[N], index into the taxonomy's names."""
    center_lonlat: NDArray[np.float64]
    """[N, 2], degrees."""


@dataclass(frozen=True, eq=False)
class Shown:
    """Chips to draw, one a batch, and what is needed to run a model on them."""

    chips: Sequence[Batch]
    model: PretrainModel
    """On the device, in evaluation mode."""
    meta: CheckpointMeta
    info: DatasetInfo
    device: torch.device
    tags: Mapping[int, str]
    """`key=value` of the chips' tags by their rows of the vocabulary."""

    def images(self, chip: Batch) -> Tensor:
        """Normalised float32 [1, bands, y, x] on the device."""
        scale = self.meta.band_scale(self.device)
        return normalise(chip.image.to(self.device), *scale, self.meta.nodata)

    def known(self, chip: Batch) -> dict[str, Any]:
        """What else the model may be told of a chip."""
        return {"context": chip_context(chip.to(self.device), None)}


@torch.no_grad()
def draw_reconstructions(shown: Shown, picture: Path) -> None:
    """A row a chip: the image, the visible patches, the image with the hidden ones as predicted.

    Raises GeoLinkError if the picture cannot be written.
    """
    size = shown.meta.config.model.patch_size
    figure, axes = _sheet(len(shown.chips), ("image", "what the model sees", "what it paints"))
    for n, (row, chip) in enumerate(zip(axes, shown.chips, strict=True)):
        images = shown.images(chip)
        generator = torch.Generator(shown.device).manual_seed(n)
        found = shown.model(
            images, chip.graph.to(shown.device), generator=generator, **shown.known(chip)
        )
        patches = patchify(images, size).float()
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        # The model predicts pixels normalised within their patch (`reconstruction_loss`).
        painted = found["prediction"].float() * (variance + 1e-6).sqrt() + mean
        hidden = found["masked"].bool()[..., None]
        whole = torch.where(hidden, painted, patches)
        stored = chip.image[0].numpy()
        bands = len(shown.meta.bands)
        for axis, values in zip(row[1:], (patches, whole), strict=True):
            pixels = _stored(_unpatchify(values, size, bands), shown.meta)
            drawn = rgb(pixels, shown.info, stretched_as=stored)
            if values is patches:
                cover = _unpatchify(hidden.expand(-1, -1, size * size), size, 1)[0] > 0
                drawn = np.where(cover[..., None], 0.62, drawn)
            axis.imshow(drawn)
        row[0].imshow(rgb(stored, shown.info))
    save(figure, picture)


@torch.no_grad()
def draw_attention(shown: Shown, picture: Path) -> None:
    """A row a chip: its objects, and for some of them how much each patch looks at the object.

    Patches attend to objects in the fusion; drawn is its last block, mean over the heads. Raises
    GeoLinkError if the picture cannot be written.
    """
    grid = shown.meta.config.model.image_size // shown.meta.config.model.patch_size
    figure, axes = _sheet(len(shown.chips), ("objects", *[""] * _OBJECTS))
    for row, chip in zip(axes, shown.chips, strict=True):
        stored = chip.image[0].numpy()
        picture_rgb = rgb(stored, shown.info)
        side = stored.shape[-1]
        row[0].imshow(picture_rgb, extent=(0, side, side, 0))
        _draw_objects(row[0], chip, shown.info, side)
        chosen = pick_objects(chip)
        looked = attention_to_objects(shown, chip) if chosen else None
        for axis, node in zip(row[1:], chosen, strict=False):
            assert looked is not None
            heat = looked[:, node].reshape(grid, grid)
            axis.imshow(picture_rgb.mean(-1) * 0.55, cmap="gray", vmin=0, vmax=1,
                        extent=(0, side, side, 0))  # fmt: skip
            # By one measure for all: what it would be if every object were looked at evenly.
            even = 1 / chip.graph.nodes
            axis.imshow(heat, cmap="magma", alpha=0.62, extent=(0, side, side, 0),
                        vmin=0, vmax=max(2 * even, heat.max()))  # fmt: skip
            _outline(axis, chip, node, side)
            axis.set_title(
                f"{_name(shown, chip, node)}: {heat.max():.1%} (even: {even:.1%})", fontsize=8
            )
        for axis in row[1 + len(chosen) :]:
            axis.axis("off")
    save(figure, picture)


@torch.no_grad()
def attention_to_objects(shown: Shown, chip: Batch) -> NDArray[np.float32]:
    """How much each patch of a chip looks at each of its objects: [patches, nodes], all objects
    entering the fusion."""
    graph = chip.graph.to(shown.device)
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        assert isinstance(module, Attention | CrossAttention)
        query, key, _, which = inputs[:4]
        maps.append(module.attention_map(query, key, which)[0])

    module = [m for name, m in shown.model.named_modules() if name.endswith(_TO_NODES)][-1]
    handle = module.register_forward_hook(keep)
    try:
        generator = torch.Generator(shown.device).manual_seed(0)
        last = shown.model.config.depth - 1
        shown.model.fusion_embedding(shown.images(chip), graph, [last], generator=generator)
    finally:
        handle.remove()
    # The slots are in the order of the noise that was drawn; once more the same.
    noise = torch.rand(graph.nodes, device=shown.device,
                       generator=torch.Generator(shown.device).manual_seed(0))  # fmt: skip
    slot, valid = node_slots(graph, torch.ones_like(graph.chip, dtype=torch.bool), noise, None)
    looked = torch.zeros(maps[-1].shape[0], graph.nodes, device=shown.device)
    looked[:, slot[0][valid[0]]] = maps[-1][:, valid[0]].float()
    return looked.cpu().numpy()


def pick_objects(chip: Batch) -> list[int]:
    """Nodes to draw: the largest that are not nearly everywhere, of different classes first, those
    of none last."""
    graph = chip.graph
    met = graph.patch_offset.diff().numpy()
    patches = chip.label_patch.shape[1] * chip.label_patch.shape[2]
    order = np.lexsort((-met, graph.osm_class.numpy() == 0))
    order = order[(met[order] > 0) & (met[order] <= patches // 2)]
    chosen: list[int] = []
    classes: set[int] = set()
    again: list[int] = []
    for node in order.tolist():
        osm_class = int(graph.osm_class[node])
        (again if osm_class in classes else chosen).append(node)
        classes.add(osm_class)
        if len(chosen) == _OBJECTS:
            break
    return (chosen + again)[:_OBJECTS]


def draw_map(fit: Seen, held_out: Seen, picture: Path) -> None:
    """Chips where they lie, coloured by principal components of their embeddings.

    Raises GeoLinkError if the picture cannot be written.
    """
    features = torch.cat([fit.features, held_out.features])
    lonlat = np.concatenate([fit.center_lonlat, held_out.center_lonlat])
    wide, tall = np.ptp(lonlat, axis=0) + 1e-9
    shape = tall / wide / max(np.cos(np.radians(lonlat[:, 1].mean())), 0.05)
    height = float(np.clip(7 * shape + 0.8, 2.5, 8))
    figure = Figure(figsize=(8, height), facecolor="white", layout="constrained")
    axis = figure.subplots()
    color = principal_colors(features)
    # Squares of about the chips' distance from one another.
    area = np.ptp(lonlat, axis=0).prod() if len(lonlat) > 1 else 0.0
    span = np.ptp(lonlat[:, 1]) if area else 1.0
    side = np.sqrt(area / max(len(lonlat), 1)) / max(span, 1e-12) * 330
    size = float(np.clip(side, 2, 14)) ** 2
    axis.scatter(lonlat[:, 0], lonlat[:, 1], c=color, s=size, marker="s", linewidths=0)
    axis.set_aspect(1 / max(np.cos(np.radians(lonlat[:, 1].mean())), 0.05))
    axis.margins(0.06)
    axis.set_xlabel("longitude")
    axis.set_ylabel("latitude")
    axis.ticklabel_format(useOffset=False)
    axis.tick_params(labelsize=8)
    save(figure, picture)


def principal_colors(features: Tensor) -> NDArray[np.float32]:
    """Red, green, blue [N, 3] in [0, 1]: ranks along the first three principal components.

    The largest weight of a component is positive, so that a map keeps its colours from one
    evaluation to the next where the embeddings do.
    """
    centred = features.double() - features.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    largest = axes.abs().argmax(1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()
    along = (centred @ axes.t()).numpy()
    color = np.full((len(features), 3), 0.5, np.float32)
    ranks = along.argsort(0, kind="stable").argsort(0, kind="stable")
    color[:, : ranks.shape[1]] = ranks / max(len(features) - 1, 1)
    return color


def _sheet(rows: int, titles: Sequence[str]) -> tuple[Figure, NDArray[Any]]:
    columns = len(titles)
    figure = Figure(
        figsize=(2.6 * columns, 2.6 * rows + 0.3), facecolor="white", layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure, axes


def _unpatchify(values: Tensor, size: int, bands: int) -> NDArray[np.float32]:
    """Patches [1, L, size² * bands], pixels then bands as `patchify` -> [bands, y, x]."""
    grid = int(values.shape[1] ** 0.5)
    shaped = values[0].float().reshape(grid, grid, size, size, bands)
    pixels: NDArray[np.float32] = (
        shaped.permute(4, 0, 2, 1, 3).reshape(bands, grid * size, grid * size).cpu().numpy()
    )
    return pixels


def _stored(pixels: NDArray[np.float32], meta: CheckpointMeta) -> NDArray[np.float32]:
    """Normalised pixels [bands, y, x] -> in stored units."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (meta.mean, meta.std))
    return pixels * np.where(std > 0, std, 1) + mean


def _name(shown: Shown, chip: Batch, node: int) -> str:
    """An object's class; of one without, the tag that says most, else its kind."""
    graph = chip.graph
    if osm_class := int(graph.osm_class[node]):
        return shown.info.taxonomy.names[osm_class - 1].replace("_", " ")
    first, last = graph.tag_offset[node : node + 2].tolist()
    if first < last:
        heaviest = first + int(graph.tag_weight[first:last].argmax())
        text = shown.tags.get(int(graph.tag[heaviest]), "")
        # The font has no others, and a dollar would begin a formula.
        if text.isascii() and text.isprintable() and "$" not in text and len(text) <= 26:
            return text
    return KINDS[int(graph.kind()[node])]


def _outline(axis: Axes, chip: Batch, node: int, side: int) -> None:
    """The dataset's patches that an object meets, framed together."""
    grid = chip.label_patch.shape[1]
    first, last = chip.graph.patch_offset[node : node + 2].tolist()
    inside = np.zeros((grid + 2, grid + 2), bool)
    met = chip.graph.patch[first:last].numpy()
    inside[1 + met // grid, 1 + met % grid] = True
    step = side / grid
    down, right = np.nonzero(inside[1:] != inside[:-1]), np.nonzero(inside[:, 1:] != inside[:, :-1])
    for y, x in zip(*down, strict=True):
        axis.plot([(x - 1) * step, x * step], [y * step] * 2, color="white", lw=1.1)
    for y, x in zip(*right, strict=True):
        axis.plot([x * step] * 2, [(y - 1) * step, y * step], color="white", lw=1.1)
    axis.set_xlim(0, side)
    axis.set_ylim(side, 0)


def _draw_objects(axis: Axes, chip: Batch, info: DatasetInfo, side: int) -> None:
    colors = class_colors(info)[chip.graph.osm_class.numpy()]
    kind = chip.graph.kind().numpy()
    anchor = chip.graph.anchor.numpy()
    centre = np.where((kind == Kind.POLYGON)[:, None], anchor[:, 3], anchor[:, 0]) * side
    for which, marker in ((Kind.POLYGON, "s"), (Kind.LINE, "D"), (Kind.POINT, "o")):
        rows = kind == which
        axis.scatter(
            centre[rows, 0], centre[rows, 1], s=12, c=colors[rows], marker=marker,
            edgecolors="black", linewidths=0.4,
        )  # fmt: skip
    axis.set_xlim(0, side)
    axis.set_ylim(side, 0)
