"""A trained model applied to places: classes and their probabilities over areas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.checkpoint import model_tensors
from geolink.embed.area import Area, Block, chip_places
from geolink.embed.models import as_data, shard_corner
from geolink.embed.windows import Lattice, Pixels, embed_block
from geolink.graph import GraphBatch
from geolink.reader import Dataset
from geolink.stream import read_chips
from geolink.tasks.adapt import check_values, match_bands, preparer
from geolink.tasks.contracts import IGNORE, Encoder, TaskData
from geolink.tasks.dense import Dense
from geolink.tasks.encoders import open_encoder
from geolink.tasks.finetune import Classifier
from geolink.tasks.kept import ENCODER, KeptModel, encoder_checksum, read_model
from geolink.tasks.segmentation import image_maps
from geolink.tasks.train import Given
from schemas.errors import GeoLinkError

STEPS = 254
"""Probabilities are kept in so many steps: p is (value - 1) / `STEPS`, and 0 where no data is."""
_OTHER_GSD = 1.25
"""Factor by which pixels may be larger or smaller than those of the training images."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained encoder and head."""

    kept: KeptModel
    encoder: Encoder
    module: nn.Module
    device: torch.device

    @property
    def window(self) -> int:
        """Side in pixels of what it sees at once: of its training images."""
        return self.kept.image_px[0]

    @property
    def cell(self) -> int:
        """Side in pixels of what gets one class: of a pixel, or of a whole window."""
        return cell_px(self.kept)

    def lattice(self, batch_size: int) -> Lattice:
        """Windows that overlap by a quarter, where pixels get classes; beside one another, where
        windows do.

        Logits of pixels within half a patch of a window's edge are not between patches but beyond
        the last one: they count only at the edge of an area.
        """
        if self.cell > 1:
            return Lattice(1, 0, batch_size)
        grid = max(self.encoder.grid, 1)
        patch = max(self.window // grid, 1)
        overlap = min(max(grid // 4, 1) * patch, self.window // 2)
        return Lattice(self.window, overlap, batch_size, min(patch // 2, overlap // 4))

    @torch.inference_mode()
    def probabilities(self, images: Tensor, graph: GraphBatch | None = None) -> Tensor:
        """Stored images [B, band, window, window] on the device -> float32 [B, class, n, n], with n
        cells along a window's side."""
        x = Given(self.encoder.prepare(images), graph)
        if self.kept.kind == "mask":
            logits = self.module(x, (self.window, self.window))
        else:
            logits = self.module(x.images, x.graph)[..., None, None]
        p: Tensor = logits.float().softmax(1)
        return p

    def cells(self, images: Tensor) -> Tensor:
        """As `probabilities`, [B, n * n, class]."""
        return self.probabilities(images).flatten(2).transpose(1, 2)


def cell_px(kept: KeptModel) -> int:
    """Side in pixels of what gets one class. Raises GeoLinkError if the model makes no maps."""
    if kept.kind == "change":
        raise GeoLinkError(
            "a model of the task change compares two dates and makes no map of one: evaluate "
            "segmentation"
        )
    if kept.kind == "multilabel":
        raise GeoLinkError(
            "the model gives an image any number of classes, and a map has one at each place: "
            "evaluate with labels of one class"
        )
    if kept.image_px[0] != kept.image_px[1]:
        raise GeoLinkError(
            f"the model was trained with images of {list(kept.image_px)} [y, x] px, and windows "
            "over a region are square"
        )
    return 1 if kept.kind == "mask" else kept.image_px[0]


def open_predictor(
    folder: Path,
    areas: Callable[[int], Sequence[Area]],
    dataset: Dataset | None,
    *,
    device: torch.device,
    checkpoint: str | None = None,
) -> Predictor:
    """The model of an evaluation's folder for areas.

    Args:
        folder: of `geolink evaluate --output`.
        areas: from the side of a patch in pixels.
        dataset: what they are of, if of one.
        device: where it runs.
        checkpoint: where the one that it was trained from lies now; none: where it lay.

    Raises GeoLinkError: as `read_model` and `cell_px`; a checkpoint that is gone or another; bands,
    values or pixel size that it was not trained with; objects that are not there.
    """
    kept, tensors = read_model(folder)
    cell_px(kept)
    if kept.inputs != "image" and dataset is None:
        raise GeoLinkError(
            f"the model in {folder} takes {kept.inputs}, and a file of pixels has no OSM objects: "
            "build a dataset of the region (`geolink build`, `geolink pair`) and give that, or "
            "evaluate with --inputs image"
        )
    data = as_data(areas(1), dataset if kept.inputs != "image" else None)
    _check_gsd(kept, data, folder)
    what = checkpoint or kept.checkpoint
    index = match_bands(data.imagery, kept.bands, f"the model in {folder}")
    check_values(
        data, index, kept.mean, kept.std, f"the model in {folder}",
        "predict images of the kind that it was trained with",
    )  # fmt: skip
    if not what.startswith(("timm:", "random:")) and not Path(what).exists():
        raise GeoLinkError(
            f"the checkpoint {what}, from which the model in {folder} was trained, is not there: "
            "say with --checkpoint where it lies now"
        )
    # By these pixels' own scale, which is not used: the model's comes below.
    encoder = open_encoder(
        what, kept.inputs, data, device=device, size=kept.size, normalise="data", seed=kept.seed
    )
    if encoder_checksum(encoder) != kept.encoder_checksum:
        raise GeoLinkError(
            f"{what} holds other weights than those the model in {folder} was trained from: say "
            "with --checkpoint where those lie"
        )
    prepare = preparer(
        index, kept.mean, kept.std, data.imagery.nodata, encoder.size, device
    )  # fmt: skip
    encoder = replace(encoder, prepare=prepare)
    module = _with_head(kept, encoder).to(device)
    _load(module, tensors, kept, folder)
    return Predictor(kept, encoder, module.eval(), device)


def _check_gsd(kept: KeptModel, data: TaskData, folder: Path) -> None:
    here = data.imagery.gsd_m
    if kept.gsd_m is None or here is None:
        return
    if abs(math.log(here / kept.gsd_m)) > math.log(_OTHER_GSD):
        raise GeoLinkError(
            f"pixels of {here:.3g} m are not what the model in {folder} was trained with, which "
            f"are of {kept.gsd_m:.3g} m: resample them (gdalwarp -tr), or evaluate on such as these"
        )


def _with_head(kept: KeptModel, encoder: Encoder) -> nn.Module:
    if kept.kind == "mask":
        return Dense(encoder, kept.head, len(kept.classes), image_maps)
    return Classifier(encoder, len(kept.classes))


def _load(module: nn.Module, tensors: dict[str, Tensor], kept: KeptModel, folder: Path) -> None:
    own = model_tensors(module)
    wanted = {n for n in own if not (kept.frozen and n.startswith(ENCODER))}
    shapes = {n for n in wanted & set(tensors) if own[n].shape == tensors[n].shape}
    if wanted != set(tensors) or shapes != wanted:
        name = sorted((wanted ^ set(tensors)) | (wanted - shapes))[0]
        raise GeoLinkError(
            f"the model in {folder} does not fit its checkpoint ({name}): evaluate again"
        )
    module.load_state_dict(tensors, strict=False)


@dataclass(frozen=True, eq=False)
class Predicted:
    """Classes of a block's cells."""

    classes: NDArray[np.uint8]
    """[y, x], `IGNORE` where no data is."""
    probability: NDArray[np.uint8]
    """[y, x], of that class, in `STEPS`."""


def predict_block(
    predictor: Predictor, pixels: Pixels, area: Area, block: Block, lattice: Lattice
) -> Predicted:
    """Classes of a block: means of the probabilities in all windows that see a cell."""
    p, there = embed_block(pixels, area, block, lattice, predictor.cells, predictor.device)
    return _most(p, there)


@torch.inference_mode()
def predict_chips(
    predictor: Predictor, dataset: Dataset, area: Area, block: Block, batch_size: int
) -> Predicted:
    """Classes of a shard's chips, each seen by itself, with its own OSM objects."""
    assert block.shard is not None
    n = block.rows * area.patch // area.chip
    each = block.rows // n
    classes = np.full((n, n, each, each), IGNORE, np.uint8)
    probability = np.zeros((n, n, each, each), np.uint8)
    corner = shard_corner(block, n)
    for batch in read_chips(replace(dataset, rows=[block.shard]), None, batch_size=batch_size):
        row, column = chip_places(batch.chip_id, corner)
        graph = batch.graph.to(predictor.device)
        p = predictor.probabilities(batch.image.to(predictor.device), graph)
        data = ~(batch.image.numpy() == area.imagery.nodata).all(1)
        there = data.reshape(len(data), each, area.patch, each, area.patch).any((2, 4))
        found = _most(p.permute(0, 2, 3, 1).cpu().numpy(), there)
        classes[row, column], probability[row, column] = found.classes, found.probability
    shape = (n * each, n * each)
    return Predicted(
        classes.swapaxes(1, 2).reshape(shape), probability.swapaxes(1, 2).reshape(shape)
    )


def _most(p: NDArray[np.float32], there: NDArray[np.bool_]) -> Predicted:
    """The class with the highest of probabilities [.., class], where data is [..]."""
    if not p.shape[-1]:
        return Predicted(np.full(there.shape, IGNORE, np.uint8), np.zeros(there.shape, np.uint8))
    steps = 1 + np.rint(STEPS * np.clip(p.max(-1), 0, 1))
    return Predicted(
        np.where(there, p.argmax(-1), IGNORE).astype(np.uint8),
        np.where(there, steps, 0).astype(np.uint8),
    )
