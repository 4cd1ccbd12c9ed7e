"""Looking at a run while it goes on: kNN on the validation split, and pictures.

Looked at is a copy of the model, with the averaged weights if the run averages them, and no draw is
made from the global generators: a run that is looked at and one that is not are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from geolink.checkpoint import model_tensors
from geolink.device import normalise
from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from geolink.page.run import PICTURES
from geolink.reader import Dataset, open_dataset, read_shard, tag_rows, tag_table
from geolink.stream import read_chips
from geolink.tasks.knn import feature_scale, knn_votes
from geolink.tasks.measures import MEASURES, confusion_matrix, scores_of
from geolink.training.distributed import whole
from geolink.training.log import Log, NoLog
from geolink.training.parts import take
from geolink.training.pictures import (
    Seen,
    Shown,
    draw_attention,
    draw_map,
    draw_reconstructions,
)
from geolink.training.setup import Training
from geolink.training.signals import StopRequest

_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_CHIPS_SHOWN = 4
_ENCODED = 256


def look_due(t: Training) -> bool:
    """Whether the run is to be looked at after this step."""
    every = t.config.evaluate_every
    return every is not None and (t.step % every == 0 or t.step == t.steps)


def look(t: Training, log: Log | NoLog, stop: StopRequest) -> None:
    """Evaluate by kNN and draw pictures; sets `t.validation`. All ranks call it, the first works.

    Given up where the run is told to stop meanwhile. Raises GeoLinkError if a shard cannot be read
    or a picture cannot be written.
    """
    weights = whole(model_tensors(t.model)) | whole(t.average or {})
    with t.ranks.all_or_none():
        if isinstance(log, Log):
            with log.paused():
                t.validation = _look(t, weights, log, stop)


def _look(t: Training, weights: Any, log: Log, stop: StopRequest) -> float | None:
    dataset = open_dataset(t.config.dataset, t.meta.snapshot)
    model = _copy(t, weights, dataset)

    def given_up() -> bool:
        if stop.name is not None:
            log.message(t.step, f"not evaluated after step {t.step}: told to stop by {stop.name}")
        return stop.name is not None

    fit = _features(t, _some(dataset, "train", t.config), "train", model, given_up)
    if fit is None:
        return None
    held_out = _features(t, _some(dataset, "val", t.config), "val", model, given_up)
    if held_out is None:
        return None
    figure = None
    if len(fit.label) and np.isin(held_out.label, fit.label).any():
        found = knn_scores(fit, held_out)
        log.validation(t.step, found)
        figure = float(found["balanced_accuracy"])
    else:
        log.message(
            t.step,
            "not evaluated: no chip of the validation split is of a class that the training "
            "split has",
        )
    folder = t.config.run / PICTURES
    shown = _shown(t, dataset, model)
    draw_reconstructions(shown, folder / f"reconstruction-{t.step:06d}.png")
    draw_attention(shown, folder / f"attention-{t.step:06d}.png")
    draw_map(fit, held_out, folder / f"map-{t.step:06d}.png")
    return figure


def knn_scores(fit: Seen, held_out: Seen) -> dict[str, Any]:
    """Scores of held-out chips by their neighbours among the fitted, and counts of both; chips of
    classes that no fitted chip has are left out."""
    found = np.unique(fit.label)
    kept = np.isin(held_out.label, found)
    truth, fitted = np.searchsorted(found, held_out.label[kept]), np.searchsorted(found, fit.label)
    known, rows = fit.features.numpy(), np.arange(len(fitted))
    votes = knn_votes(
        known, rows, np.eye(len(found), dtype=np.uint8)[fitted],
        held_out.features.numpy()[kept], feature_scale(known, rows),
        k=min(_NEIGHBOURS, len(fitted)), temperature=_TEMPERATURE, device=torch.device("cpu"),
    )  # fmt: skip
    values = scores_of(confusion_matrix(truth, votes.argmax(1), len(found)), "class")
    return {
        **dict(zip(MEASURES["class"], np.round(values, 6).tolist(), strict=True)),
        "chips": len(truth), "fit": len(fitted), "classes": len(found),
    }  # fmt: skip


def _copy(t: Training, weights: Any, dataset: Dataset) -> PretrainModel:
    """The model as it is now, to look at chips of a dataset."""
    table = torch.from_numpy(tag_table(dataset).astype(np.float32))
    with torch.random.fork_rng():
        model = make_model(t.config.model, table)
    model.load_state_dict(weights, strict=False)
    return model.to(t.fabric.device).eval()


def _some(dataset: Dataset, split: str, config: Any) -> Dataset:
    """The dataset with some shards of a split only, drawn by the run's seed: as many as
    `evaluate_chips` needs."""
    rows = dataset.split_rows(split)
    drawn = np.random.default_rng(config.seed).permutation(len(rows))
    chips = np.cumsum([rows[n].chips for n in drawn.tolist()])
    enough = int(np.searchsorted(chips, config.evaluate_chips)) + 1
    return replace(dataset, rows=[rows[n] for n in sorted(drawn[:enough].tolist())])


@torch.inference_mode()
def _features(
    t: Training, dataset: Dataset, split: str, model: PretrainModel, given_up: Callable[[], bool]
) -> Seen | None:
    """Embeddings and classes of chips that have one; none where it was given up on the way."""
    scale = t.meta.band_scale(t.fabric.device)
    parts: list[tuple[torch.Tensor, ...]] = []
    for row in dataset.rows:
        if given_up():
            return None
        for batch in read_chips(replace(dataset, rows=[row]), split, batch_size=_ENCODED):
            most, label = batch.label_region.max(1)
            there = most > 0
            images = normalise(batch.image[there].to(t.fabric.device), *scale, t.meta.nodata)
            features = model.embed_image(images).float().cpu()
            parts.append((features, label[there], batch.center_lonlat[there]))
    features, label, lonlat = (torch.cat(part) for part in zip(*parts, strict=True))
    return Seen(features, label.numpy(), lonlat.numpy())


def _shown(t: Training, dataset: Dataset, model: PretrainModel) -> Shown:
    """The chips of the pictures: those with most objects of a shard of the validation split."""
    rows = dataset.split_rows("val")
    row = max(rows, key=lambda r: (r.objects, r.shard))
    batch = next(read_chips(replace(dataset, rows=[row]), "val", batch_size=row.chips))
    objects = np.bincount(batch.graph.chip.numpy(), minlength=len(batch))
    best = np.argsort(-objects, kind="stable")[:_CHIPS_SHOWN]
    chips = [take(batch, n, n + 1) for n in best.tolist()]
    tags = read_shard(dataset, row, ("tag", "tag_text_offset", "tag_text"))
    ends, text = tags["tag_text_offset"].tolist(), tags["tag_text"].tobytes()
    texts = [text[a:b].decode(errors="replace") for a, b in pairwise(ends)]
    named = dict(zip(tag_rows(dataset, tags["tag"]).tolist(), texts, strict=True))
    return Shown(chips, model, t.meta, dataset.info, t.fabric.device, named)
