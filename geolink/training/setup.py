"""What a run is made of, ready for its next step; and keeping it, to go on exactly from there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from geolink.checkpoint import (
    CheckpointMeta,
    checkpoints,
    code_version,
    load_optimizer,
    load_weights,
    read_meta,
    read_trainer,
    save_checkpoint,
)
from geolink.device import pick_device
from geolink.models.build import PretrainModel, make_model
from geolink.reader import Dataset, band_statistics, open_dataset, tag_table
from geolink.stream import ShardStream
from geolink.training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from geolink.training.run import begin_run, open_run, remove_partial
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig


@dataclass
class Training:
    """What a run is made of, and where it stands."""

    config: TrainConfig
    fabric: Fabric
    stream: ShardStream
    model: PretrainModel
    optimizer: Optimizer
    meta: CheckpointMeta
    band_scale: tuple[Tensor, Tensor]
    """Mean and deviation of the bands, on the device: made here, since making them in a step
    would make it wait for the device."""
    patches: int
    """Patches along a side of the dataset's chips."""
    steps: int
    """Steps of the whole run."""
    step: int = 0
    """Steps done."""
    rows: list[list[float]] = field(default_factory=list)
    """Figures of the steps since the last log line (`Log.rows`)."""
    loss: float = math.nan
    """Mean loss of the last log line."""
    notes: list[str] = field(default_factory=list)
    """What happened on the way, for people."""


def set_up(config: TrainConfig) -> Training:
    """Everything ready for the next step, in the run's folder; a stopped run as it stood.

    Raises GeoLinkError as `geolink.training.loop.pretrain`.
    """
    device = pick_device(config.accelerator)
    began_with = open_run(config)
    dataset = open_dataset(config.dataset, began_with or config.snapshot)
    table = tag_table(dataset).astype(np.float32)
    stream = ShardStream(
        dataset, split=config.split, batch_size=config.batch_size, seed=config.seed,
        window_shards=config.window_shards, readers=config.readers, quality=config.quality,
    )  # fmt: skip
    check_fits(config, dataset, table.shape[1], stream.chips, device)
    steps = config.epochs * len(stream)
    fabric = Fabric(accelerator=device.type, devices=1, precision=config.precision)
    torch.manual_seed(config.seed)
    model = fabric.to_device(make_model(config.model, torch.from_numpy(table))).train()
    optimizer = fabric.setup_optimizers(make_optimizer(model, config))
    meta = describe(config, dataset, steps)
    patches = dataset.info.grid.patches
    training = Training(
        config, fabric, stream, model, optimizer, meta, meta.band_scale(device), patches, steps
    )
    if began_with is None:
        begin_run(config, dataset.snapshot)
    remove_partial(config.run)
    resume(training)
    return training


def resume(t: Training) -> None:
    """Put the last checkpoint back that is whole, if there is any; say so in the notes.

    Raises GeoLinkError if there are checkpoints but none is whole.
    """
    run = t.config.run
    for folder in reversed(checkpoints(run)):
        try:
            meta, trainer = read_meta(folder), read_trainer(folder)
            load_weights(folder, t.model)
            load_optimizer_tensors(t.model, t.optimizer, load_optimizer(folder))
        except GeoLinkError as error:
            t.notes.append(f"checkpoint {folder} cannot be used and is left out: {error}")
            continue
        t.stream.load_state_dict(trainer["stream"])
        t.fabric.strategy.precision.load_state_dict(trainer["scaler"])
        t.step, t.rows, t.loss = meta.step, trainer["rows"], trainer["loss"] or math.nan
        if t.step < t.steps:
            t.notes.append(f"going on after step {t.step} of {t.steps} from {folder}")
        return
    if t.notes:
        raise GeoLinkError(
            f"no checkpoint of {run} is whole; remove its step-... folders to begin anew. "
            + "; ".join(t.notes)
        )


def save(t: Training) -> None:
    """Write a checkpoint. Raises GeoLinkError if it cannot be written."""
    trainer = {
        "stream": t.stream.state_dict(),
        "rows": t.rows,
        "loss": None if math.isnan(t.loss) else t.loss,
        "scaler": t.fabric.strategy.precision.state_dict(),
    }
    save_checkpoint(
        t.config.run, t.model, optimizer_tensors(t.model, t.optimizer),
        t.meta.model_copy(update={"step": t.step}), trainer,
    )  # fmt: skip


def describe(config: TrainConfig, dataset: Dataset, steps: int) -> CheckpointMeta:
    """What the checkpoints of a run say about it."""
    mean, std = band_statistics(dataset, config.split)
    release, revision = code_version()
    return CheckpointMeta(
        geolink=release, revision=revision, step=0, steps=steps, dataset=dataset.info.name,
        snapshot=dataset.snapshot, tag_encoder=dataset.tag_encoder,
        licences=dataset.info.licences,
        bands=tuple(band.name for band in dataset.info.sensor.bands),
        nodata=dataset.info.sensor.nodata, mean=tuple(mean.tolist()), std=tuple(std.tolist()),
        config=config,
    )  # fmt: skip


def check_fits(
    config: TrainConfig, dataset: Dataset, tag_dim: int, chips: int, device: torch.device
) -> None:
    """Raises GeoLinkError if model, batch, dataset and device do not fit one another."""
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
    if chips < config.batch_size:
        raise GeoLinkError(
            f"batch_size is {config.batch_size}, but split {config.split!r} of {dataset.path} has "
            f"only {chips} chips"
            + (" without the findings that quality drops" if config.quality.drop else "")
            + ": use a smaller batch_size"
        )
    if config.precision == "16-mixed" and device.type != "cuda":
        raise GeoLinkError("precision 16-mixed needs a CUDA GPU: use 32-true or bf16-mixed")
