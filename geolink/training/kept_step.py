"""The batch of a step as a file, to run the step again (`replay.py`).

A safetensors file with JSON in its header: nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.stream import Batch
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip
from schemas.training import TrainConfig

_FORMAT = "geolink-step-1"


def write_step(path: Path, config: TrainConfig, snapshot: int, step: int, batch: Batch) -> None:
    """Write the batch of a step, all ranks' parts of it. Raises GeoLinkError if it cannot be."""
    record = {
        "format": _FORMAT, "step": step, "snapshot": snapshot,
        "config": config.model_dump(mode="json"), "batch": _plain(batch),
        "chips": [printed_chip(chip) for chip in batch.chip_id],
    }  # fmt: skip
    tensors = {name: value.contiguous() for name, value in _tensors(batch)}
    try:
        save_file(tensors, path, {"geolink": json.dumps(record)})
    except (OSError, SafetensorError) as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def read_step(path: Path) -> tuple[dict[str, Any], Batch]:
    """The record and batch of a file of `write_step`. Raises GeoLinkError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["geolink"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if record["format"] != _FORMAT:
            raise KeyError("format")
        return record, _batch(tensors, record["batch"])
    except FileNotFoundError:
        raise GeoLinkError(f"{path} does not exist; give the file that a run has named") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise GeoLinkError(
            f"{path} is no step that a run has kept ({type(error).__name__}); "
            "give a nonfinite-….safetensors of a run's folder"
        ) from None


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Every array of a batch by name; ids as int64, which have the same bits."""
    for part, prefix in ((batch, ""), (batch.graph, "graph.")):
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value.view(np.int64))
            if isinstance(value, Tensor):
                yield prefix + field.name, value


def _plain(batch: Batch) -> dict[str, dict[str, Any]]:
    """The plain values of a batch and its graph by name."""
    return {
        name: {
            f.name: value for f in fields(part)
            if isinstance(value := getattr(part, f.name), int | tuple)
        }
        for name, part in (("batch", batch), ("graph", batch.graph))
    }  # fmt: skip


def _batch(tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]) -> Batch:
    graph_tensors = {n[6:]: v for n, v in tensors.items() if n.startswith("graph.")}
    values: dict[str, Any] = {n: v for n, v in tensors.items() if not n.startswith("graph.")}
    values["chip_id"] = values["chip_id"].numpy().view(np.uint64)
    known = {n: tuple(v) if isinstance(v, list) else v for n, v in plain["graph"].items()}
    parts: dict[str, Any] = {**graph_tensors, **known}
    graph = GraphBatch(**parts)
    return replace(Batch(graph=graph, **values), **plain["batch"])
