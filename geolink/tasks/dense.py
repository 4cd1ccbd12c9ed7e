"""A head on an encoder's maps says the class of every pixel: fitted, applied, counted by image."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.tasks.calibration import BINS, confidence_bins
from geolink.tasks.contracts import (
    IGNORE,
    Encoder,
    Example,
    Fit,
    Fitted,
    Kind,
    Masks,
    Outcome,
    TaskBatch,
    TaskData,
)
from geolink.tasks.encoders import own_copy
from geolink.tasks.examples import EACH, picture
from geolink.tasks.heads import make_head
from geolink.tasks.held import Held, hold
from geolink.tasks.kept import keep_model
from geolink.tasks.measures import MEASURES, scores_of
from geolink.tasks.significance import score
from geolink.tasks.train import (
    Given,
    Trained,
    best_of,
    given,
    parameter_groups,
    train,
    turned,
)
from schemas.errors import GeoLinkError

Features = Callable[[Encoder, Given], list[Tensor]]
"""Four maps that a head sees."""

Say = Callable[[TaskBatch], tuple[NDArray[np.float32], NDArray[np.uint8]]]
"""Confidence and class [B, y, x] of every pixel of a batch's images."""


class Dense(nn.Module):
    """A head on what `features` makes of an encoder's maps."""

    def __init__(self, encoder: Encoder, kind: str, classes: int, features: Features) -> None:
        super().__init__()
        assert encoder.module is not None
        self.encoder = encoder.module
        self.head = make_head(kind, encoder.widths, classes)
        self._of, self._features = encoder, features

    def forward(self, x: Given, size: tuple[int, int]) -> Tensor:
        """Logits [B, class, y, x] at the size (y, x) of their masks."""
        logits = self.head(self._features(self._of, x))
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def fit_dense(fit: Fit, features: Features) -> Fitted:
    """The head (and encoder, unless `training.freeze`) whose rate and epoch validation chooses.

    Raises GeoLinkError: the encoder has no maps; mixup is asked for; a loss is not finite; a mask
    holds a value that is no class.
    """
    options, kind = fit.config.training, fit.data.kind
    if fit.encoder.maps is None:
        raise GeoLinkError(
            f"{fit.config.task} needs maps of images, and inputs {fit.encoder.inputs} have none: "
            "use image or image+osm"
            if fit.encoder.inputs == "osm"
            else f"{fit.config.task} needs maps of images, and {fit.encoder.name} has none"
        )
    if options.mixup > 0:
        raise GeoLinkError("mixup is for classes of whole images: set training.mixup to 0")
    held, hidden = hold(fit.data, "train", fit.rows), fit.data

    def run(lr: float) -> tuple[Trained, tuple[Encoder, Dense]]:
        encoder = own_copy(fit.encoder)
        with torch.random.fork_rng():
            torch.manual_seed(fit.seed)
            model = Dense(encoder, options.head, fit.classes, features).to(fit.device)
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
        keep_model(folder, model, fit, options.head)

    chosen = {
        "lr": lr, "epoch": trained.epoch, "head": options.head,
        "classes_learnt_from": _classes_in(held, fit.classes),
        "chosen_by": f"{MEASURES[kind][0]} on val",
    }  # fmt: skip
    return Fitted(
        lambda data, split: _predict(model, encoder, fit, data, split), chosen, trials,
        trained.curve, write,
    )  # fmt: skip


def _classes_in(held: Held, classes: int) -> str:
    """How many classes the masks hold: a small share of the labels may lack some."""
    assert held.mask is not None
    there = np.zeros(IGNORE + 1, bool)
    for mask in held.mask:
        there[mask] = True
    return f"{there[:classes].sum()} of {classes}"


def _loss(model: Dense, encoder: Encoder, fit: Fit) -> Callable[[TaskBatch], Tensor]:
    options = fit.config.training
    generator = torch.Generator(fit.device).manual_seed(fit.seed)
    patches = fit.data.patches or encoder.grid

    def loss(batch: TaskBatch) -> Tensor:
        if options.freeze:
            model.encoder.eval()
        assert batch.mask is not None
        x = given(encoder, batch, fit.device)
        mask: Tensor | None = batch.mask.to(fit.device)
        if options.flips:
            x, mask = turned(x, mask, patches=patches, generator=generator)
        assert mask is not None
        target = mask.long()
        logits = model(x, (target.shape[-2], target.shape[-1]))
        # The mean over what is scored; 0 where nothing of a batch is.
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp(min=1)

    return loss


def _predict(model: Dense, encoder: Encoder, fit: Fit, data: TaskData, split: str) -> Outcome:
    @torch.inference_mode()
    def say(batch: TaskBatch) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        size = (batch.image.shape[-2], batch.image.shape[-1])
        sure, guess = model(given(encoder, batch, fit.device), size).softmax(1).max(1)
        return sure.cpu().numpy(), guess.to(torch.uint8).cpu().numpy()

    return predict_masks(say, data, split, fit.config.batch_size)


def predict_masks(say: Say, data: TaskData, split: str, batch_size: int) -> Masks:
    """What `say` makes of the images of a split, counted image by image.

    Raises GeoLinkError if a mask holds a value that is no class.
    """
    part, classes = data.part(split), len(data.classes)
    counts = np.zeros((len(part), classes, classes), np.int64)
    bins = np.zeros((BINS, 3))
    shown = Shown(data)
    for batch in data.batches(split, batch_size=batch_size):
        assert batch.mask is not None
        truth = batch.mask.numpy()
        sure, guess = say(batch)
        here = mask_confusion(truth, guess, classes, part.ids[batch.rows])
        counts[batch.rows] = here
        scored = truth != IGNORE
        bins += confidence_bins(sure[scored], (guess == truth)[scored])
        shown.add(batch, part.ids[batch.rows], here, guess)
    return Masks(part.ids, counts, bins, shown.examples())


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
    """The best and the worst images of those that are added (`image_scores`)."""

    def __init__(self, data: TaskData) -> None:
        self._imagery, self._kind = data.imagery, data.kind
        self._best: list[tuple[float, str, Example]] = []
        self._worst: list[tuple[float, str, Example]] = []

    def add(
        self, batch: TaskBatch, ids: NDArray[np.str_], counts: NDArray[np.int64],
        guess: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        """Images of a batch with their confusions [B, class, class] and masks [B, y, x]."""
        assert batch.mask is not None
        values = image_scores(counts, self._kind)
        for n in np.flatnonzero(np.isfinite(values)).tolist():
            value = float(values[n])
            for kept, key in ((self._best, value), (self._worst, -value)):
                if len(kept) == EACH and key <= kept[0][0]:
                    continue
                dates = [d[n].numpy() for d in (batch.image, batch.second) if d is not None]
                # Both dates side by side in one picture, so that they are stretched alike.
                example = Example(
                    str(ids[n]), picture(np.concatenate(dates, 2), self._imagery), value,
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


def image_scores(counts: NDArray[np.int64], kind: Kind) -> NDArray[np.float64]:
    """Of each image's confusion [B, class, class] the share of pixels that are right; of `change`
    the IoU of change, since where nothing changes nearly all pixels are always right. NaN: nothing
    is scored, or nothing changed and nothing was said to."""
    if kind == "change":
        there = counts.sum((1, 2)) > counts[:, 0, 0]
        return np.where(there, scores_of(counts, kind)[:, 0], np.nan)
    total = counts.sum((1, 2))
    right = np.trace(counts, axis1=1, axis2=2) / np.maximum(total, 1)
    return np.where(total > 0, right, np.nan)
