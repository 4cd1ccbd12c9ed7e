"""Weights that a run starts from (`TrainConfig.start`)."""

from __future__ import annotations

from pathlib import Path

from geolink.checkpoint import CheckpointMeta, load_model
from geolink.models.base import PretrainModel
from geolink.models.start import start_from
from geolink.reader import Dataset
from schemas.errors import GeoLinkError


def start(what: str, model: PretrainModel, dataset: Dataset) -> str:
    """Put weights into a new model; returns what came and what did not, for people.

    A checkpoint of GeoLink must be of the same bands, patch size, tag encoder and classes as the
    dataset: what it learnt of them would mean something else. Other weights are brought to the
    model as far as can be (`geolink.models.start.start_from`).

    Raises GeoLinkError: as that; a checkpoint of other data, naming what differs.
    """
    if Path(what).is_dir():
        _, meta = load_model(Path(what))
        other = f"start from other weights than those of {what}"
        check_same_data(meta, what, dataset, other)
        theirs, ours = meta.config.model.patch_size, model.config.patch_size
        if theirs != ours:
            raise GeoLinkError(
                f"{what} has patches of {theirs} pixels, but model.patch_size is {ours}: {other}, "
                f"or write\nmodel:\n  patch_size: {theirs}"
            )
    return "started from " + "; ".join(start_from(model, what))


def check_same_data(meta: CheckpointMeta, path: object, dataset: Dataset, remedy: str) -> None:
    """Raises GeoLinkError if a checkpoint at `path` learnt of other bands, tags or classes."""
    info = dataset.info
    bands = tuple(band.name for band in info.sensor.bands)
    if meta.bands != bands:
        raise GeoLinkError(
            f"{path} was trained on bands {', '.join(meta.bands)}, but {dataset.path} has "
            f"{', '.join(bands)}: {remedy}"
        )
    if meta.tag_encoder != dataset.tag_encoder:
        raise GeoLinkError(
            f"{path} was trained with tags encoded by {meta.tag_encoder}, but those of "
            f"{dataset.path} are encoded by {dataset.tag_encoder}: {remedy}"
        )
    classes = info.taxonomy.names
    if meta.classes is not None and meta.classes != classes:
        differing = next((c for c in (*meta.classes, *classes)
                          if (c in meta.classes) != (c in classes)), None)  # fmt: skip
        raise GeoLinkError(
            f"{path} was trained with another taxonomy than that of {dataset.path} ("
            + (f"{differing!r} is a class of one only" if differing else "another order")
            + f"): {remedy}"
        )
