"""What a checkpoint makes of windows, and of chips with their OSM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.embed.area import Area, Block, chip_places
from geolink.embed.store import Kind
from geolink.models.base import PretrainModel
from geolink.reader import Dataset, tag_table
from geolink.stream import read_chips
from geolink.tasks.contracts import Encoder, Part, TaskBatch, TaskData
from geolink.tasks.encoders import open_encoder
from schemas.errors import GeoLinkError
from schemas.evaluation import Inputs

_LOOKED_AT = 32
"""Windows whose values are compared with those that a checkpoint learnt from."""
_SIDE = 256


@dataclass(frozen=True, eq=False)
class Embedder:
    """An encoder, and what it gives."""

    encoder: Encoder
    kinds: tuple[Kind, ...]
    patch: int
    """Side of a patch in pixels."""
    device: torch.device

    @torch.inference_mode()
    def tokens(self, images: Tensor) -> Tensor:
        """Stored images [B, band, y, x] of the encoder's size -> normed patch tokens [B, L, C]."""
        prepared = self.encoder.prepare(images)
        model = self.encoder.module
        if isinstance(model, PretrainModel):
            return model.image_tokens(prepared)[-1][:, model.prefix :]
        assert self.encoder.maps is not None
        return self.encoder.maps(prepared, None)[-1].flatten(2).transpose(1, 2)


def open_embedder(
    checkpoint: Path | str,
    inputs: Inputs,
    areas: Callable[[int], Sequence[Area]],
    dataset: Dataset | None,
    *,
    device: torch.device,
    normalise: str = "checkpoint",
) -> tuple[Embedder, list[Area]]:
    """An encoder for areas, which come cut by its patches.

    Args:
        checkpoint: as `open_encoder` takes.
        inputs: `image`, or `image+osm` for a dataset.
        areas: from the side of a patch in pixels.
        dataset: what they are of, if of one.
        device: where it runs.
        normalise: `checkpoint`, or `data`: by mean and deviation of some windows.

    Raises GeoLinkError: as `open_encoder`; chips that are not of the size the encoder fuses.
    """
    if inputs == "osm" or (inputs != "image" and dataset is None):
        raise GeoLinkError(
            "inputs are image, or image+osm of a dataset: a file of pixels has no objects"
        )
    # Patches of one pixel divide every chip: of these areas, only some pixels are read.
    data = as_data(areas(1), dataset if inputs != "image" else None)
    encoder = open_encoder(checkpoint, inputs, data, device=device, normalise=normalise)
    patch = encoder.size // encoder.grid
    found = list(areas(patch))
    width = encoder.widths[0]
    kinds = [Kind("patch", width, "image embedding of each patch: normed tokens")]
    if found[0].chip:
        about = "image embedding of each chip: mean of its patches"
        kinds.append(Kind("image", width, about, True))
    if inputs == "image+osm":
        assert dataset is not None
        kinds += _osm_kinds(encoder, dataset, patch)
    return Embedder(encoder, tuple(kinds), patch, device), found


def _osm_kinds(encoder: Encoder, dataset: Dataset, patch: int) -> list[Kind]:
    model, grid = encoder.module, dataset.info.grid
    assert isinstance(model, PretrainModel)
    if (grid.patches, grid.patch) != (encoder.grid, patch):
        raise GeoLinkError(
            f"{encoder.name} fuses OSM with {encoder.grid} x {encoder.grid} patches of {patch} px, "
            f"the chips of {dataset.path} have {grid.patches} x {grid.patches} of {grid.patch} px: "
            "use --inputs image"
        )
    c = model.config
    return [
        Kind("fused", c.fusion_dim, "embedding of each patch, fused with the chip's OSM objects"),
        Kind("region", c.osm_dim, "embedding of each chip's OSM objects", True),
    ]


def as_data(areas: Sequence[Area], dataset: Dataset | None) -> TaskData:
    """Some windows as images without labels, for the checks of bands and values."""
    blocks = [(area, block) for area in areas for block in area.blocks]
    at = np.unique(np.linspace(0, len(blocks) - 1, min(len(blocks), _LOOKED_AT)).round())
    chosen = [blocks[int(n)] for n in at]

    def read(split: str, rows: NDArray[np.int64] | None, size: int) -> Iterator[TaskBatch]:
        for n in range(len(chosen)) if rows is None else rows.tolist():
            area, block = chosen[n]
            image = _middle(area, block)
            yield TaskBatch(np.array([n]), torch.from_numpy(image[None]))

    part = Part(
        np.array([f"{area.name} {block.name}" for area, block in chosen]),
        np.zeros(len(chosen), np.int64), np.full((len(chosen), 4), np.nan),
    )  # fmt: skip
    plain = TaskData(
        name="the pixels" if dataset is None else dataset.info.name, key="", kind="class",
        imagery=areas[0].imagery, classes=(), splits={"train": part}, read=read,
    )  # fmt: skip
    if dataset is None:
        return plain
    return replace(
        plain, has_graphs=True, patches=dataset.info.grid.patches,
        tag_table=tag_table(dataset).astype(np.float32), tag_encoder=dataset.tag_encoder,
    )  # fmt: skip


def _middle(area: Area, block: Block) -> NDArray[np.generic]:
    """Pixels of the middle of a block."""
    p = area.patch
    y, x = (block.row + block.rows // 2) * p, (block.column + block.columns // 2) * p
    y, x = max(0, y - _SIDE // 2), max(0, x - _SIDE // 2)
    return area.read(y, x, min(_SIDE, area.shape[0] - y), min(_SIDE, area.shape[1] - x))


@torch.inference_mode()
def embed_chips(
    embedder: Embedder, dataset: Dataset, area: Area, block: Block, tokens: NDArray[np.float32],
    batch_size: int,
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]:  # fmt: skip
    """Embeddings of the chips of a shard by kind: vectors and where they are there.

    tokens: [rows, columns, C] of the block's patches (`embed_block`). `image` and `region` come
    [chip rows, chip columns, .], `fused` [rows, columns, .]: the tokens, which have seen beyond
    the chip's border, fused with the objects of the chip.
    """
    assert block.shard is not None
    each = area.chip // area.patch
    n = block.rows // each
    by_chip = tokens.reshape(n, each, n, each, -1).swapaxes(1, 2)
    corner = shard_corner(block, n)
    kinds = {kind.name: kind for kind in embedder.kinds}
    model, device = embedder.encoder.module, embedder.device
    there = np.zeros((n, n), bool)
    region = np.zeros((n, n, kinds["region"].width if "region" in kinds else 0), np.float32)
    fused = np.zeros((n, n, each, each, kinds["fused"].width if "fused" in kinds else 0),
                     np.float32)  # fmt: skip
    for batch in read_chips(replace(dataset, rows=[block.shard]), None, batch_size=batch_size):
        row, column = chip_places(batch.chip_id, corner)
        there[row, column] = True
        if "fused" not in kinds:
            continue
        assert isinstance(model, PretrainModel)
        graph = batch.graph.to(device)
        nodes = model.encode_nodes(graph)
        region[row, column] = model.region_of(nodes, graph).float().cpu().numpy()
        own = torch.from_numpy(by_chip[row, column]).to(device).flatten(1, 2)
        found = model.fuse(own, nodes, graph).float().cpu().numpy()
        fused[row, column] = found.reshape(len(row), each, each, -1)
    of_patch = there.repeat(each, 0).repeat(each, 1)
    whole = {
        "image": (by_chip.mean((2, 3)), there),
        "region": (region, there),
        "fused": (fused.swapaxes(1, 2).reshape(n * each, n * each, -1), of_patch),
    }
    return {name: whole[name] for name in kinds if name in whole}


def shard_corner(block: Block, n: int) -> tuple[int, int]:
    """Column and row (of the zone's grid) that a shard's chips, `n` a side, are counted from."""
    assert block.shard is not None
    _, column, row = (int(v) for v in block.shard.shard.split("-"))
    return column * n, (row + 1) * n
