"""The datasets of a run: one, or several that are mixed."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geolink.reader import Dataset, band_statistics, open_dataset
from geolink.stream import MixedStream, ShardStream, mixed_vocabulary
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig


class Pixels(NamedTuple):
    """What is known of a dataset's pixels, on the device."""

    mean: Tensor
    """float32 [bands], in stored units, as `std`."""
    std: Tensor
    nodata: int
    wavelength_um: Tensor | None
    """float32 [bands], centre of each; none: not stated."""


def open_datasets(config: TrainConfig, began_with: int | None) -> list[Dataset]:
    """The datasets of a run, that of `dataset` first.

    began_with: the snapshot of `dataset` that the run began with, None if it is new.

    Raises GeoLinkError: a dataset that cannot be opened.
    """
    first = open_dataset(config.dataset, began_with or config.snapshot)
    begun: list[int | None] = [None] * len(config.mix)
    if began_with is not None and config.mix:
        record = json.loads((config.run / "run.json").read_text(encoding="utf-8"))
        begun = record.get("mix", begun)
    others = [
        open_dataset(part.dataset, then or part.snapshot)
        for part, then in zip(config.mix, begun, strict=True)
    ]
    return [first, *others]


def make_stream(
    config: TrainConfig, datasets: list[Dataset], rank: int, world_size: int, *, pin: bool = False
) -> ShardStream | MixedStream:
    """The run's batches, or a rank's part of each."""
    memory_mb = None if config.memory_mb is None else max(config.memory_mb // len(datasets), 1)
    _, vocabulary = mixed_vocabulary(datasets) if len(datasets) > 1 else (None, [None])
    streams = [
        ShardStream(
            dataset, split=config.split, batch_size=config.batch_size, seed=config.seed,
            window_shards=config.window_shards, memory_mb=memory_mb, lanes=config.lanes,
            readers=config.readers, quality=config.quality, balance=config.balance,
            on_corrupt=config.on_corrupt, cache=config.cache, rank=rank, world_size=world_size,
            pin=pin, number=number, vocabulary=rows,
        )
        for number, (dataset, rows) in enumerate(zip(datasets, vocabulary, strict=True))
    ]  # fmt: skip
    if len(streams) == 1:
        return streams[0]
    return MixedStream(streams, [part.weight for part in config.mix], config.seed)


def tags_of(datasets: list[Dataset]) -> Tensor:
    """Text embeddings float32 [V, D] of the tags of some datasets, those of the first one first."""
    return torch.from_numpy(mixed_vocabulary(datasets)[0])


def pixels_of(dataset: Dataset, split: str, device: torch.device) -> Pixels:
    """What is known of a dataset's pixels. Raises GeoLinkError if the split has no valid pixel."""
    sensor = dataset.info.sensor
    mean, std = (
        torch.tensor(v.astype(np.float32), device=device) for v in band_statistics(dataset, split)
    )
    found = [band.wavelength_nm for band in sensor.bands]
    stated = [value for value in found if value is not None]
    wavelength = torch.tensor(stated, dtype=torch.float32, device=device) / 1000
    return Pixels(mean, std, sensor.nodata, wavelength if len(stated) == len(found) else None)


def check_mix(datasets: list[Dataset]) -> None:
    """Raises GeoLinkError if the others of a mix do not fit the first dataset."""
    first = datasets[0].info
    for other in datasets[1:]:
        info = other.info
        for what, ours, theirs in (
            ("pixels a side", first.grid.size, info.grid.size),
            ("pixels a side of a patch", first.grid.patch, info.grid.patch),
            ("bands", len(first.sensor.bands), len(info.sensor.bands)),
            ("classes", first.taxonomy.names, info.taxonomy.names),
        ):
            if ours != theirs:
                raise GeoLinkError(
                    f"{datasets[0].path} and {other.path} cannot be mixed: {what} differ "
                    f"({ours} and {theirs})"
                )
