"""The folder of a run: which config and snapshot it belongs to, and where to go on.

<run>/run.json      config and pinned snapshot
      log.jsonl     see `log.py`
      tensorboard/
      step-000500/  checkpoints, see `geolink.checkpoint`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import GeoLinkError
from schemas.training import TrainConfig

FREE = {
    "run", "snapshot", "readers", "cache", "on_corrupt", "log_every", "checkpoint_every", "keep",
    "evaluate_every", "evaluate_chips", "stop_within_s", "wandb", "accelerator", "devices",
    "strategy", "compile", "checkpoint_activations",
}  # fmt: skip
"""Fields that may differ when a run goes on: nothing that is learnt depends on them, and the
snapshot is the one that the run began with."""


def open_run(config: TrainConfig) -> int | None:
    """Make the run's folder if need be; the snapshot that it began with, None if it is new.

    Raises GeoLinkError: the folder belongs to a run of another config, or to something else, or
    cannot be made.
    """
    path = config.run / "run.json"
    try:
        if path.exists():
            return _same_run(config, path)
        if config.run.exists() and any(p.name[0] != "." for p in config.run.iterdir()):
            raise GeoLinkError(
                f"{config.run} holds other things than a run; give an empty or new folder as run"
            )
        config.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GeoLinkError(f"cannot use {config.run} as run folder: {error}") from error
    return None


def begin_run(config: TrainConfig, snapshot: int, mix: Sequence[int] = ()) -> None:
    """Write down what the run belongs to; mix: snapshots of the other datasets.

    Raises GeoLinkError if it cannot.
    """
    record = {"snapshot": snapshot, "mix": list(mix), "config": config.model_dump(mode="json")}
    partial = config.run / ".run.json.partial"
    try:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, config.run / "run.json")
    except OSError as error:
        raise GeoLinkError(f"cannot write {config.run / 'run.json'}: {error}") from error


def remove_partial(run: Path) -> None:
    """Remove what a killed run left half written."""
    for path in run.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _same_run(config: TrainConfig, path: Path) -> int:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        snapshot = int(record["snapshot"])
        begun = TrainConfig.model_validate(record["config"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise GeoLinkError(
            f"{path} is damaged ({type(error).__name__}); give a new folder as run"
        ) from None
    if difference := first_difference(begun.model_dump(), config.model_dump()):
        field, then, now = difference
        raise GeoLinkError(
            f"{config.run} holds a run with {field} {then}, now it is {now}; "
            "give a new folder as run, or the old value"
        )
    if config.snapshot is not None and config.snapshot != snapshot:
        raise GeoLinkError(
            f"{config.run} holds a run on snapshot {snapshot}, now it is {config.snapshot}; "
            "give a new folder as run, or the old value"
        )
    return snapshot


def first_difference(
    then: dict[str, Any], now: dict[str, Any], free: Container[str] = FREE, at: str = ""
) -> tuple[str, object, object] | None:
    """The first field in which two configs differ, with both values; `free` ones may."""
    for name, old in then.items():
        if not at and name in free:
            continue
        new = now[name]
        if isinstance(old, dict):
            if inner := first_difference(old, new, (), f"{at}{name}."):
                return inner
        elif old != new:
            return f"{at}{name}", old, new
    return None
