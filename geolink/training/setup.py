"""What a run is made of, ready for its next step; and keeping it, to go on exactly from there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from geolink.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    CheckpointMeta,
    MixedPart,
    checkpoints,
    code_version,
    load_average,
    load_optimizer,
    load_weights,
    model_tensors,
    read_meta,
    read_trainer,
    step_of,
)
from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from geolink.reader import Dataset, band_statistics
from geolink.stream import MixedStream, ShardStream
from geolink.training.average import begin_average
from geolink.training.distributed import Ranks, placed, whole, wrap
from geolink.training.lock import locked
from geolink.training.mix import (
    Pixels,
    check_mix,
    make_stream,
    open_datasets,
    pixels_of,
    tags_of,
)
from geolink.training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from geolink.training.run import begin_run, open_run, remove_partial
from geolink.training.start import check_same_data, start
from geolink.training.writer import CheckpointWriter
from schemas.errors import GeoLinkError
from schemas.storage import Location
from schemas.training import TrainConfig


@dataclass
class Training:
    """What a run is made of, and where it stands."""

    config: TrainConfig
    ranks: Ranks
    """This process among those of the run."""
    stream: ShardStream | MixedStream
    model: PretrainModel
    forward: nn.Module
    """The model as a step calls it (`geolink.training.distributed.wrap`)."""
    optimizer: Optimizer
    average: dict[str, Tensor] | None
    """Averaged weights by name, if the run averages them."""
    meta: CheckpointMeta
    pixels: list[Pixels]
    """Of each dataset; made beforehand, since making them in a step would make it wait for the
    device."""
    patches: int
    """Patches along a side of the dataset's chips."""
    steps: int
    """Steps of the whole run."""
    writer: CheckpointWriter
    stream_state: Mapping[str, Any]
    """Where the stream stood after the batch of the last step: it may be ahead of it."""
    step: int = 0
    """Steps done."""
    rows: list[list[float]] = field(default_factory=list)
    """Figures of the steps since the last log line (`Log.rows`)."""
    loss: float = math.nan
    """Mean loss of the last log line."""
    validation: float | None = None
    """Balanced accuracy of kNN on the validation split, if evaluated after the last step."""
    tell_at: float = 0.0
    """When the page is written next, by `time.monotonic`."""
    slow_to_stop: bool = False
    """Whether it was said that the run is."""
    notes: list[str] = field(default_factory=list)
    """What happened on the way, for people."""
    skipped: set[str] = field(default_factory=set)
    """Shards that could not be read, of which the log tells already."""

    @property
    def snapshots(self) -> list[tuple[Location, int]]:
        """The datasets that are learnt from, with their snapshots."""
        numbers = [self.meta.snapshot, *(part.snapshot for part in self.meta.mixed)]
        places = [self.config.dataset, *(part.dataset for part in self.config.mix)]
        return list(zip(places, numbers, strict=True))

    @property
    def fabric(self) -> Fabric:
        """Device and precision."""
        return self.ranks.fabric


def set_up(
    config: TrainConfig, ranks: Ranks, began_with: int | None, *, before: int | None = None
) -> Training:
    """Everything ready for the next step; a stopped run as it stood.

    Args:
        config: what to do.
        ranks: this process among those of the run.
        began_with: the snapshot that the run began with, None if it is new (`hold_run`).
        before: as it stood at the last checkpoint before this step. Default: at the last.

    Raises GeoLinkError as `geolink.training.loop.pretrain`.
    """
    notes: list[str] = []
    with ranks.all_or_none():
        datasets = open_datasets(config, began_with)
        check_mix(datasets)
        dataset, table = datasets[0], tags_of(datasets)
        pin = ranks.fabric.device.type == "cuda"
        stream = make_stream(config, datasets, ranks.number, ranks.size, pin=pin)
        if config.evaluate_every is not None:
            check_validation(dataset)
        check_fits(config, dataset, table.shape[1], stream.chips)
        torch.manual_seed(config.seed)
        model = make_model(config.model, table)
        if config.start is not None and began_with is None:
            notes.append(start(config.start, model, dataset))
        kept = last_kept(config.run, model, notes, before)
        if kept is not None:
            remedy = "put the dataset back that the run began with, or give a new folder as run"
            check_same_data(kept.meta, kept.folder, dataset, remedy)
    device = ranks.fabric.device
    model.to(device).train()
    if config.checkpoint_activations:
        model.checkpoint_activations()
    if config.compile:
        model.compile()
    forward = wrap(ranks, config, model)
    optimizer = ranks.fabric.setup_optimizers(make_optimizer(model, config))
    meta = describe(config, datasets, config.epochs * len(stream))
    t = Training(
        config, ranks, stream, model, forward, optimizer,
        None if config.ema is None else begin_average(model),
        meta, [pixels_of(each, config.split, device) for each in datasets],
        dataset.info.grid.patches, config.epochs * len(stream),
        CheckpointWriter(config.run, config.keep), stream.state_dict(), notes=notes,
    )  # fmt: skip
    if ranks.first and began_with is None:
        begin_run(config, dataset.snapshot, [other.snapshot for other in datasets[1:]])
    if kept is not None:
        put_back(t, kept)
    return t


def check_validation(dataset: Dataset) -> None:
    """Raises GeoLinkError if there is no validation split to evaluate on."""
    try:
        dataset.split_rows("val")
    except GeoLinkError as error:
        raise GeoLinkError(f"evaluate_every needs a validation split: {error}") from None


@contextmanager
def hold_run(config: TrainConfig, ranks: Ranks) -> Iterator[int | None]:
    """The run's folder for this run alone; the snapshot that it began with, None if it is new.

    Raises GeoLinkError: it cannot be made or is of something else (`open_run`); another process
    is at work in it.
    """
    with ExitStack() as stack:
        began_with = None
        with ranks.all_or_none():
            if ranks.first:
                open_run(config)
                stack.enter_context(locked(config.run))
                # Once more: the other process may have begun the run just now, and be done.
                began_with = open_run(config)
                remove_partial(config.run)
        yield ranks.tell(began_with)


@dataclass(frozen=True, eq=False)
class Kept:
    """A checkpoint whose weights are in the model, and what else goes on from it."""

    folder: Path
    meta: CheckpointMeta
    trainer: dict[str, Any]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]


def last_kept(
    run: Path, model: PretrainModel, notes: list[str], before: int | None = None
) -> Kept | None:
    """Put the last checkpoint (before a step) back into the model that is whole, if there is any.

    Checkpoints that are left out are told in the notes. Raises GeoLinkError if there are
    checkpoints but none is whole.
    """
    broken = []
    for folder in reversed(checkpoints(run)):
        if before is not None and step_of(folder) >= before:
            continue
        try:
            meta, trainer = read_meta(folder), read_trainer(folder)
            optimizer, average = load_optimizer(folder), load_average(folder)
            load_weights(folder, model)
        except GeoLinkError as error:
            broken.append(f"checkpoint {folder} cannot be used and is left out: {error}")
            continue
        notes += broken
        if meta.step < meta.steps:
            notes.append(f"going on after step {meta.step} of {meta.steps} from {folder}")
        return Kept(folder, meta, trainer, optimizer, average)
    if broken:
        raise GeoLinkError(
            f"no checkpoint of {run} is whole; remove its step-... folders to begin anew. "
            + "; ".join(broken)
        )
    return None


def put_back(t: Training, kept: Kept) -> None:
    """All but the weights, as a checkpoint has it."""
    load_optimizer_tensors(t.model, t.optimizer, kept.optimizer)
    for name, value in kept.average.items():
        if t.average is not None:
            t.average[name] = placed(value, t.average[name])
    t.stream.load_state_dict(kept.trainer["stream"])
    t.stream_state = kept.trainer["stream"]
    t.fabric.strategy.precision.load_state_dict(kept.trainer["scaler"])
    t.step, t.rows = kept.meta.step, kept.trainer["rows"]
    t.loss = kept.trainer["loss"] or math.nan


def save(t: Training) -> None:
    """Begin to write a checkpoint. Raises GeoLinkError if the last one could not be written."""
    trainer = {
        "stream": t.stream_state,
        "rows": [list(row) for row in t.rows],
        "loss": None if math.isnan(t.loss) else t.loss,
        "scaler": t.fabric.strategy.precision.state_dict(),
    }
    tensors = {
        MODEL: whole(model_tensors(t.model)),
        OPTIMIZER: whole(optimizer_tensors(t.model, t.optimizer)),
    }
    if t.average is not None:
        tensors[EMA] = whole(t.average)
    if t.ranks.first:
        known = {"step": t.step, "validation": t.validation}
        t.writer.write(tensors, t.meta.model_copy(update=known), trainer)
    t.validation = None


def newly_skipped(t: Training) -> list[str]:
    """Sentences on shards that any rank could not read, and that were not told of before."""
    if t.config.on_corrupt == "fail":
        return []
    found = {shard: why for each in t.ranks.hear(t.stream.skipped) for shard, why in each.items()}
    new = sorted(found.keys() - t.skipped)
    t.skipped |= found.keys()
    told = f"shards skipped so far: {len(t.skipped)}"
    return [f"{found[s]}; chips of other shards take its place ({told})" for s in new]


def describe(config: TrainConfig, datasets: list[Dataset], steps: int) -> CheckpointMeta:
    """What the checkpoints of a run say about it."""
    dataset = datasets[0]
    mean, std = band_statistics(dataset, config.split)
    release, revision = code_version()
    return CheckpointMeta(
        geolink=release, revision=revision, step=0, steps=steps, dataset=dataset.info.name,
        snapshot=dataset.snapshot, tag_encoder=dataset.tag_encoder,
        licences=tuple(dict.fromkeys(n for d in datasets for n in d.info.licences)),
        mixed=tuple(_mixed(config, other) for other in datasets[1:]),
        bands=tuple(band.name for band in dataset.info.sensor.bands),
        classes=dataset.info.taxonomy.names, nodata=dataset.info.sensor.nodata,
        mean=tuple(mean.tolist()), std=tuple(std.tolist()),
        config=config,
    )  # fmt: skip


def _mixed(config: TrainConfig, dataset: Dataset) -> MixedPart:
    mean, std = band_statistics(dataset, config.split)
    sensor = dataset.info.sensor
    return MixedPart(
        dataset=dataset.info.name, snapshot=dataset.snapshot,
        bands=tuple(band.name for band in sensor.bands), nodata=sensor.nodata,
        mean=tuple(mean.tolist()), std=tuple(std.tolist()),
    )  # fmt: skip


def check_fits(config: TrainConfig, dataset: Dataset, tag_dim: int, chips: int) -> None:
    """Raises GeoLinkError if model, batch and dataset do not fit one another."""
    info = dataset.info
    sizes = {
        "image_size": info.grid.size, "bands": len(info.sensor.bands), "tag_dim": tag_dim,
    }  # fmt: skip
    for name, size in sizes.items():
        given = getattr(config.model, name)
        if given != size:
            raise GeoLinkError(
                f"model.{name} is {given}, but {dataset.path} has {size}: write\n"
                f"model:\n  {name}: {size}"
            )
    if config.model.variant == "geolink2":
        _check_geolink2(config, dataset)
    if chips < config.batch_size:
        raise GeoLinkError(
            f"batch_size is {config.batch_size}, but split {config.split!r} of {dataset.path} has "
            f"only {chips} chips"
            + (" without the findings that quality drops" if config.quality.drop else "")
            + ": use a smaller batch_size"
        )
    if config.negatives.min_distance_m and config.accelerator == "mps":
        raise GeoLinkError("negatives.min_distance_m needs float64, which accelerator mps lacks")


def _check_geolink2(config: TrainConfig, dataset: Dataset) -> None:
    """geolink2 learns from the patches that objects meet, and from classes, as they are stored."""
    grid, classes = dataset.info.grid, len(dataset.info.taxonomy.classes)
    if config.model.patch_size != grid.patch:
        raise GeoLinkError(
            f"model.patch_size is {config.model.patch_size}, but {dataset.path} stores which "
            f"patches of {grid.patch} pixels an object meets, which geolink2 learns from: write\n"
            f"model:\n  patch_size: {grid.patch}"
        )
    if config.model.geolink2.classes < classes:
        raise GeoLinkError(
            f"model.geolink2.classes is {config.model.geolink2.classes}, but the taxonomy of "
            f"{dataset.path} has {classes} classes: write\n"
            f"model:\n  geolink2: {{classes: {classes}}}"
        )
