"""The processes of a run: their devices, what they tell one another, how they share the model.

A *rank* is a process with a device of its own. `torchrun` and `srun` begin them from outside;
`geolink.training.launch` does so for `devices` of the config.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from signal import Signals
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import ModelParallelStrategy
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from geolink.device import pick_device
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among those of its run."""

    fabric: Fabric
    number: int
    """Of this rank, from 0."""
    size: int
    group: Any
    """Process group of the CPUs, for what the hosts tell one another; none: there is one rank."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.number == 0

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Rows [b, ..] of 64-bit numbers of all ranks [b * ranks, ..]; b is the same on all."""
        if self.size == 1:
            return values
        mine = torch.from_numpy(np.ascontiguousarray(values).view(np.int64))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._talk(dist.all_gather, found, mine)
        return torch.cat(found).numpy().view(values.dtype)

    def tell(self, value: Any) -> Any:
        """What rank 0 says: plain values for JSON."""
        return self.hear(value)[0]

    def hear(self, value: Any) -> list[Any]:
        """What every rank says, in their order: plain values for JSON."""
        if self.size == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        length = self.rows(np.array([len(text)]))
        padded = np.zeros(-(-int(length.max()) // 8) * 8, np.uint8)
        padded[: len(text)] = text
        every = self.rows(padded.view(np.int64)[None])
        return [
            json.loads(row.view(np.uint8)[:n].tobytes())
            for row, n in zip(every, length.tolist(), strict=True)
        ]

    def stop(self, signal: str | None) -> str | None:
        """The signal that any of the ranks has got; the same answer on all of them."""
        number = int(self.rows(np.array([Signals[signal] if signal else 0])).max())
        return Signals(number).name if number else None

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the ranks, on their devices."""
        if self.size == 1:
            return values
        mean = values.detach().clone()
        dist.all_reduce(mean)
        return mean / self.size

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A user's mistake that any rank finds within it is all ranks', and is told by one."""
        error = None
        try:
            yield
        except GeoLinkError as found:
            error = found
        said = self.hear(None if error is None else str(error))
        teller = next((n for n, text in enumerate(said) if text), None)
        if teller is None:
            return
        if teller == self.number and error is not None:
            raise error
        raise OtherRankFailed(said[teller])

    def _talk(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments, group=self.group)
        except RuntimeError as error:
            raise OtherRankFailed(
                f"another process of this run has ended ({str(error).splitlines()[0]}); "
                "run again to go on from the last checkpoint"
            ) from error


class OtherRankFailed(GeoLinkError):
    """What went wrong is told by another rank."""


@contextmanager
def open_ranks(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks of a run, connected; they part at the end.

    Raises GeoLinkError: no such device, fewer than are asked for, a batch that cannot be shared
    evenly, another number of processes than the config says.
    """
    device = pick_device(config.accelerator)
    size, local = launched() or (config.devices, config.devices)
    check_devices(config, device, size, local)
    connected = dist.is_available() and dist.is_initialized()
    fabric = make_fabric(config, device, size, local)
    fabric.launch()
    group = None
    if size > 1:
        group = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
    try:
        yield Ranks(fabric, fabric.global_rank, size, group)
    finally:
        if dist.is_available() and dist.is_initialized() and not connected:
            dist.destroy_process_group()


def launched() -> tuple[int, int] | None:
    """Processes of the run and of this machine, if torchrun, srun or `launch` began this one."""
    if TorchElasticEnvironment.detect():
        size = int(os.environ["WORLD_SIZE"])
        return size, int(os.environ.get("LOCAL_WORLD_SIZE", size))
    size = int(os.environ.get("SLURM_NTASKS", 1))
    if size > 1 and "SLURM_PROCID" in os.environ:
        return size, size // int(os.environ.get("SLURM_NNODES", 1))
    return None


def launched_rank() -> int:
    """The rank of this process as its launcher says, before the ranks are connected."""
    if launched() is None:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def check_devices(config: TrainConfig, device: torch.device, size: int, local: int) -> None:
    """Raises GeoLinkError if the devices asked for are not there or cannot share the batch."""
    if config.devices not in (1, size):
        raise GeoLinkError(
            f"devices is {config.devices}, but {size} processes were begun: leave devices out, "
            "or begin as many"
        )
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type)
    if there is not None and local > there:
        raise GeoLinkError(
            f"{local} devices are asked for, but this machine has {there} of accelerator "
            f"{device.type!r}: set devices to {there} at most"
        )
    parts = size * config.accumulate
    if config.batch_size % parts:
        raise GeoLinkError(
            f"batch_size {config.batch_size} cannot be shared evenly by {size} processes in "
            f"accumulate {config.accumulate} parts: make it a multiple of {parts}"
        )
    if config.precision == "16-mixed" and device.type != "cuda":
        raise GeoLinkError("precision 16-mixed needs a CUDA GPU: use 32-true or bf16-mixed")


def make_fabric(config: TrainConfig, device: torch.device, size: int, local: int) -> Fabric:
    """Lightning Fabric for this rank's device."""
    # It tells every run how it is set up; a run says so itself.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if size == 1 and config.strategy == "auto":
        return Fabric(accelerator=device.type, devices=1, precision=config.precision)
    strategy: Any = "ddp"
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=size, tensor_parallel_size=1)
    return Fabric(
        accelerator=device.type, devices=local, num_nodes=size // local, strategy=strategy,
        precision=config.precision, plugins=[_environment()],
    )  # fmt: skip


def _environment() -> ClusterEnvironment:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return LightningEnvironment() if launched() is None else SLURMEnvironment()


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Share out the model's weights (FSDP2): each block of the transformers is a unit of its own,
    all the rest another."""
    data = mesh["data_parallel"]
    names = ("img_encoder.blocks", "img_cross_modal_decoder", "osm_cross_modal_encoder")
    for name in names:
        for block in model.get_submodule(name).children():
            fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    return model


def wrap(ranks: Ranks, config: TrainConfig, model: nn.Module) -> nn.Module:
    """What a step calls in the model's place: it brings the ranks' gradients together."""
    strategy = ranks.fabric.strategy
    if ranks.size == 1 and config.strategy == "auto":
        return model
    if config.strategy == "fsdp":
        strategy.setup_module(model)
        return model
    # Buffers are the same everywhere and stay so: the tag table is large.
    strategy._ddp_kwargs.update(broadcast_buffers=False, gradient_as_bucket_view=True)
    with warnings.catch_warnings():
        # Newer releases name that option otherwise, older ones do not know the new name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
        wrapped: nn.Module = strategy.setup_module(model)
    return wrapped


def gathering(wrapped: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether the ranks' gradients come together in this backward pass, or in a later one."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
    elif not now and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    return nullcontext()


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the parts that other ranks hold; all ranks must ask for the same."""
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in named.items()}


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another is held: on its device, this rank's part of it."""
    value = value.to(like.device, torch.float32)
    if isinstance(like, DTensor) and value.shape == like.shape:
        held: Tensor = distribute_tensor(value, like.device_mesh, like.placements)
        return held
    return value


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
