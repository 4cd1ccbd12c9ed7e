"""What processes do in the tests of several ranks; here, so that spawned ones can import it."""

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from geolink.cli.main import main
from geolink.models.fusion import Attention
from geolink.models.losses import (
    Pairs,
    consistency_loss,
    contrast_loss,
    reconstruction_loss,
    unit_vectors,
)
from geolink.models.osm import GraphLayerNorm
from geolink.models.ranks import one_batch
from geolink.training.loop import pretrain
from schemas.training import TrainConfig


def no_dropout() -> None:
    """Ranks draw dropout each for itself; nothing else tells several from one apart."""
    Attention.dropout = property(lambda _: 0.0, lambda *_: None)  # type: ignore[assignment]


def loss_inputs(seed: int = 0) -> dict[str, Tensor]:
    """Eight chips; of the first four one has a region, of the others three, one of no weight."""
    draw = torch.Generator().manual_seed(seed)
    lonlat = torch.rand(8, 2, generator=draw, dtype=torch.float64) * 0.02 + 11.0
    return {
        "image": torch.randn(8, 5, generator=draw),
        "region": torch.randn(8, 5, generator=draw),
        "has_region": torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool(),
        "weight": torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 0.25]),
        "lonlat": lonlat,
        "tags": torch.tensor([5, 7, 5, 0, 7, 1, 0, 2]),
        "patches": torch.randn(8, 6, 4, generator=draw),
        "prediction": torch.randn(8, 6, 4, generator=draw),
        "masked": torch.rand(8, 6, generator=draw) < 0.5,
    }


def all_losses(chips: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses of some of the chips, and its gradients."""
    given = {name: value[chips] for name, value in loss_inputs().items()}
    free = {n: given[n].clone().requires_grad_() for n in ("image", "region", "prediction")}
    pairs = Pairs(unit_vectors(given["lonlat"]), given["tags"], 500.0, True)
    region = GraphLayerNorm(5)(free["region"])
    total = contrast_loss(
        free["image"], region, 0.2, given["has_region"], given["weight"], pairs=pairs
    )
    for loss in (reconstruction_loss, consistency_loss):
        args = free["prediction"], given["patches"], given["masked"], given["weight"]
        total = total + loss(*args)
    total.backward()
    return total.detach(), {n: v.grad for n, v in free.items() if v.grad is not None}


def say(*arguments: str) -> dict[str, Any]:
    """What the command line ends with and prints in this process."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as end:
        main(arguments)
    return {"status": end.value.code, "out": out.getvalue(), "error": error.getvalue()}


def work(rank: int, folder: Path, configs: dict[str, dict[str, Any]]) -> None:
    """One of two ranks, begun as torchrun would: the losses of its half, some runs, what the
    command line says; writes to the folder.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    with one_batch():
        torch.save(all_losses(slice(rank * 4, rank * 4 + 4)), folder / f"losses-{rank}.pt")
    no_dropout()
    for values in configs.values():
        pretrain(TrainConfig(**values))
    said = [say("pretrain", str(folder / f"{n}.json"), "--json") for n in ("good", "bad")]
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()
