"""Fine-tuning: encoder and a linear classifier on its embedding are trained together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.graph import GraphBatch
from geolink.tasks.contracts import (
    Encoder,
    Fit,
    Fitted,
    Kind,
    Labels,
    Outcome,
    TaskBatch,
    TaskData,
)
from geolink.tasks.encoders import own_copy
from geolink.tasks.held import hold
from geolink.tasks.kept import keep_model
from geolink.tasks.measures import MEASURES
from geolink.tasks.significance import score
from geolink.tasks.train import Trained, best_of, given, parameter_groups, train, turned
from schemas.errors import GeoLinkError


class Classifier(nn.Module):
    """An encoder's embedding, normed, and a linear layer."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        assert encoder.module is not None
        self.encoder = encoder.module
        linear = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.LayerNorm(encoder.width), linear)
        self._embed = encoder.embed

    def forward(self, images: Tensor, graph: GraphBatch | None) -> Tensor:
        """Logits [B, class] of prepared images and graphs."""
        logits: Tensor = self.head(self._embed(images, graph))
        return logits


def fit_finetune(fit: Fit) -> Fitted:
    """The classifier whose rate and epoch validation chooses.

    Raises GeoLinkError: the encoder has no weights; a loss is not finite; mixup with objects.
    """
    if fit.config.training.mixup > 0 and fit.encoder.inputs != "image":
        raise GeoLinkError(
            "mixup mixes pixels, and OSM objects cannot follow: set training.mixup to 0, or use "
            "inputs: image"
        )
    held = hold(fit.data, "train", fit.rows)
    validation = hold(fit.data, "val")
    kind = fit.data.kind

    def run(lr: float) -> tuple[Trained, tuple[Encoder, Classifier]]:
        encoder = own_copy(fit.encoder)
        with torch.random.fork_rng():
            torch.manual_seed(fit.seed)
            model = Classifier(encoder, fit.classes).to(fit.device)
        if fit.config.training.freeze:
            model.encoder.requires_grad_(False)

        def validate() -> float:
            spans = np.array_split(
                np.arange(len(validation)), max(1, len(validation) // fit.config.batch_size)
            )
            p = [
                predict_batch(model, encoder, validation.take(span), fit.device, kind)
                for span in spans
            ]
            part = fit.data.part("val")
            assert part.label is not None
            return float(score(Labels(part.ids, part.label, np.concatenate(p)), kind)[0])

        with torch.random.fork_rng():
            torch.manual_seed(fit.seed)
            trained = train(
                model, parameter_groups(encoder, model.head, fit.config.training), held,
                _loss(model, encoder, fit), validate, fit.config.training, lr=lr, seed=fit.seed,
            )  # fmt: skip
        return trained, (encoder, model)

    (encoder, model), lr, trained, trials = best_of(fit.config.training.lr, run)

    def predict(data: TaskData, split: str) -> Outcome:
        part = data.part(split)
        assert part.label is not None
        p = np.empty((len(part), fit.classes), np.float32)
        for batch in data.batches(split, batch_size=fit.config.batch_size):
            p[batch.rows] = predict_batch(model, encoder, batch, fit.device, data.kind)
        return Labels(part.ids, part.label, p)

    def write(folder: Path) -> None:
        keep_model(folder, model, fit, "classifier")

    chosen = {
        "lr": lr, "epoch": trained.epoch, "chosen_by": f"{MEASURES[kind][0]} on val",
    }  # fmt: skip
    return Fitted(predict, chosen, trials, trained.curve, write)


def _loss(model: Classifier, encoder: Encoder, fit: Fit) -> Callable[[TaskBatch], Tensor]:
    options = fit.config.training
    generator = torch.Generator(fit.device).manual_seed(fit.seed)
    patches = fit.data.patches or encoder.grid

    def loss(batch: TaskBatch) -> Tensor:
        if options.freeze:
            model.encoder.eval()
        x = given(encoder, batch, fit.device)
        if options.flips:
            x, _ = turned(x, None, patches=patches, generator=generator)
        assert batch.label is not None
        target = torch.from_numpy(batch.label).to(fit.device)
        if target.ndim == 1:
            target = F.one_hot(target, fit.classes)
        target, images = target.float(), x.images
        if options.mixup > 0:
            images, target = mixed(images, target, options.mixup, generator)
        logits = model(images, x.graph)
        if fit.data.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, target)
        return F.cross_entropy(logits, target)

    return loss


def mixed(
    images: Tensor, target: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images and targets [B, class], each with a share of another's: one Beta(alpha, alpha) draw a
    batch (Zhang et al. 2018)."""
    seed = int(torch.randint(1 << 31, (1,), generator=generator, device=generator.device))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(images), generator=generator, device=generator.device)
    return torch.lerp(images[other], images, share), torch.lerp(target[other], target, share)


@torch.inference_mode()
def predict_batch(
    model: Classifier, encoder: Encoder, batch: TaskBatch, device: torch.device, kind: Kind
) -> NDArray[np.float32]:
    """Probabilities [B, class] of a batch."""
    x = given(encoder, batch, device)
    logits = model(x.images, x.graph).float()
    p = logits.sigmoid() if kind == "multilabel" else logits.softmax(1)
    found: NDArray[np.float32] = p.cpu().numpy()
    return found
