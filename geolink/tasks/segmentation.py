"""Segmentation: a head on the encoder's maps says the class of every pixel."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.graph import GraphBatch
from geolink.tasks.calibration import BINS, confidence_bins
from geolink.tasks.contracts import (
    IGNORE,
    Encoder,
    Example,
    Fit,
    Fitted,
    Imagery,
    Masks,
    Outcome,
    TaskBatch,
    TaskData,
)
from geolink.tasks.encoders import own_copy
from geolink.tasks.examples import EACH, picture
from geolink.tasks.finetune import given, write_weights
from geolink.tasks.heads import make_head
from geolink.tasks.held import hold
from geolink.tasks.measures import MEASURES
from geolink.tasks.significance import score
from geolink.tasks.train import Trained, best_of, parameter_groups, train, turned
from schemas.errors import GeoLinkError


class Segmenter(nn.Module):
    """An encoder's maps and a head."""

    def __init__(self, encoder: Encoder, kind: str, classes: int) -> None:
        super().__init__()
        assert encoder.module is not None
        assert encoder.maps is not None
        self.encoder = encoder.module
        self.head = make_head(kind, encoder.widths, classes)
        self._maps = encoder.maps

    def forward(self, images: Tensor, graph: GraphBatch | None, size: tuple[int, int]) -> Tensor:
        """Logits [B, class, y, x] of prepared images, at the size (y, x) of their masks."""
        logits = self.head(self._maps(images, graph))
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def fit_segmentation(fit: Fit) -> Fitted:
    """The head (and encoder, unless `training.freeze`) whose rate and epoch validation chooses.

    Raises GeoLinkError: the encoder has no maps; mixup is asked for; a loss is not finite; a mask
    holds a value that is no class.
    """
    options, kind = fit.config.training, fit.data.kind
    if fit.encoder.maps is None:
        raise GeoLinkError(
            f"segmentation needs maps of images, and inputs {fit.encoder.inputs} have none: use "
            "image or image+osm"
        )
    if options.mixup > 0:
        raise GeoLinkError("mixup is for classes of whole images: set training.mixup to 0")
    held, hidden = hold(fit.data, "train", fit.rows), fit.data

    def run(lr: float) -> tuple[Trained, tuple[Encoder, Segmenter]]:
        encoder = own_copy(fit.encoder)
        with torch.random.fork_rng():
            torch.manual_seed(fit.seed)
            model = Segmenter(encoder, options.head, fit.classes).to(fit.device)
            if options.freeze:
                model.encoder.requires_grad_(False)

            def validate() -> float:
                return float(score(_predict(model, encoder, fit, hidden, "val"), kind)[0])

            trained = train(
                model, parameter_groups(encoder, model.head, options), held,
                _loss(model, encoder, fit), validate, options, lr=lr, seed=fit.seed,
            )  # fmt: skip
        return trained, (encoder, model)

    (encoder, model), lr, trained, trials = best_of(options.lr, run)

    def write(folder: Path) -> None:
        write_weights(model, folder)

    chosen = {
        "lr": lr, "epoch": trained.epoch, "head": options.head,
        "chosen_by": f"{MEASURES[kind][0]} on val",
    }  # fmt: skip
    return Fitted(
        lambda data, split: _predict(model, encoder, fit, data, split), chosen, trials,
        trained.curve, write,
    )  # fmt: skip


def _loss(model: Segmenter, encoder: Encoder, fit: Fit) -> Callable[[TaskBatch], Tensor]:
    options = fit.config.training
    generator = torch.Generator(fit.device).manual_seed(fit.seed)
    patches = fit.data.patches or encoder.grid

    def loss(batch: TaskBatch) -> Tensor:
        if options.freeze:
            model.encoder.eval()
        assert batch.mask is not None
        images, graph = given(encoder, batch, fit.device)
        mask: Tensor | None = batch.mask.to(fit.device)
        if options.flips:
            images, graph, mask = turned(images, graph, mask, patches=patches, generator=generator)
        assert mask is not None
        target = mask.long()
        logits = model(images, graph, (target.shape[-2], target.shape[-1]))
        # The mean over what is scored; 0 where nothing of a batch is.
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp(min=1)

    return loss


def _predict(model: Segmenter, encoder: Encoder, fit: Fit, data: TaskData, split: str) -> Outcome:
    part, classes = data.part(split), fit.classes
    counts = np.zeros((len(part), classes, classes), np.int64)
    bins = np.zeros((BINS, 3))
    shown = Shown(data.imagery)
    for batch in data.batches(split, batch_size=fit.config.batch_size):
        assert batch.mask is not None
        truth = batch.mask.numpy()
        sure, guess = predict_masks(model, encoder, batch, fit.device)
        here = mask_confusion(truth, guess, classes, part.ids[batch.rows])
        counts[batch.rows] = here
        scored = truth != IGNORE
        bins += confidence_bins(sure[scored], (guess == truth)[scored])
        shown.add(batch, part.ids[batch.rows], here, guess)
    return Masks(part.ids, counts, bins, shown.examples())


@torch.inference_mode()
def predict_masks(
    model: Segmenter, encoder: Encoder, batch: TaskBatch, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Confidence and class [B, y, x] of every pixel of a batch's images."""
    size = (batch.image.shape[-2], batch.image.shape[-1])
    sure, guess = model(*given(encoder, batch, device), size).softmax(1).max(1)
    return sure.cpu().numpy(), guess.to(torch.uint8).cpu().numpy()


def mask_confusion(
    truth: NDArray[np.uint8], guess: NDArray[np.uint8], classes: int, ids: NDArray[np.str_]
) -> NDArray[np.int64]:
    """Pixels [B, class, class] by true class (row) and predicted class of masks [B, y, x].

    Raises GeoLinkError naming the image whose mask holds a value that is no class.
    """
    wrong = ((truth >= classes) & (truth != IGNORE)).reshape(len(truth), -1)
    if wrong.any():
        n = int(wrong.any(1).argmax())
        value = int(truth[n].ravel()[wrong[n].argmax()])
        raise GeoLinkError(
            f"the mask of image {ids[n]} holds {value}, but classes go from 0 to {classes - 1}, "
            f"and {IGNORE} is not scored"
        )
    cell = truth.astype(np.int64) * classes + guess
    cell += np.arange(len(truth))[:, None, None] * classes**2
    kept = cell[truth != IGNORE]
    counts = np.bincount(kept, minlength=len(truth) * classes**2)
    return counts.reshape(len(truth), classes, classes)


class Shown:
    """The best and the worst images of those that are added, by their share of right pixels."""

    def __init__(self, imagery: Imagery) -> None:
        self._imagery = imagery
        self._best: list[tuple[float, str, Example]] = []
        self._worst: list[tuple[float, str, Example]] = []

    def add(
        self, batch: TaskBatch, ids: NDArray[np.str_], counts: NDArray[np.int64],
        guess: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """Images of a batch with their confusions [B, class, class] and masks [B, y, x]."""
        assert batch.mask is not None
        total = counts.sum((1, 2))
        right = np.trace(counts, axis1=1, axis2=2) / np.maximum(total, 1)
        for n in np.flatnonzero(total > 0).tolist():
            value = float(right[n])
            for kept, key in ((self._best, value), (self._worst, -value)):
                if len(kept) == EACH and key <= kept[0][0]:
                    continue
                example = Example(
                    str(ids[n]), picture(batch.image[n].numpy(), self._imagery), value,
                    batch.mask[n].numpy(), guess[n],
                )  # fmt: skip
                push = heapq.heappush if len(kept) < EACH else heapq.heappushpop
                push(kept, (key, str(ids[n]), example))

    def examples(self) -> list[Example]:
        """The best first, then the worst, each image once."""
        best = [e for _, _, e in sorted(self._best, key=lambda k: -k[0])]
        worst = [e for _, _, e in sorted(self._worst, key=lambda k: -k[0])]
        there = {e.id for e in best}
        return [*best, *(e for e in worst if e.id not in there)]
