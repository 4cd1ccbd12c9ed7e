"""Prefect flows that pretrain and evaluate; each task is one call into `geolink`."""

from pathlib import Path
from typing import Any

from prefect import flow, task

from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.load import load_config
from schemas.training import TrainConfig


@task
def train(config: Path) -> dict[str, Any]:
    """Pretrain, or resume, the run of a config; fails if it was stopped before its end."""
    from dataclasses import asdict

    from geolink.training.loop import pretrain as run

    result = run(load_config(config, TrainConfig))
    if not result.finished:
        raise GeoLinkError(result.message)
    return asdict(result)


@task
def score(config: Path) -> dict[str, Any]:
    """Evaluate the checkpoint of a config."""
    from geolink.tasks.evaluate import evaluate as run

    return run(load_config(config, TaskConfig))


@flow(name="pretrain")
def pretrain(config: Path) -> dict[str, Any]:
    """Pretrain from a config file; a run that was interrupted goes on."""
    return train(config)


@flow(name="evaluate")
def evaluate(config: Path) -> dict[str, Any]:
    """Evaluate a checkpoint from a config file."""
    return score(config)
