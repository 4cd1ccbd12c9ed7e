"""Weights & Biases, for those who ask for it (`TrainConfig.wandb`)."""

from __future__ import annotations

import hashlib
from typing import Any

from schemas.errors import GeoLinkError
from schemas.training import TrainConfig


def open_wandb(config: TrainConfig) -> Any:
    """A run of the project `config.wandb`, named after the run's folder; none if not asked for.

    A run that goes on is the same one there. What W&B's own environment variables say holds:
    `WANDB_MODE=offline` writes to the run's folder only (https://docs.wandb.ai).

    Raises GeoLinkError if the package is not installed, or W&B refuses.
    """
    if config.wandb is None:
        return None
    try:
        import wandb
    except ImportError:
        raise GeoLinkError(
            f"wandb is {config.wandb!r}, but the package wandb is not installed: "
            "pip install wandb, or leave wandb out of the config"
        ) from None
    place = hashlib.blake2b(str(config.run.resolve()).encode(), digest_size=8).hexdigest()
    try:
        return wandb.init(
            project=config.wandb, name=config.run.name, id=place, resume="allow",
            dir=str(config.run), config=config.model_dump(mode="json"),
        )  # fmt: skip
    except (wandb.Error, OSError) as error:
        raise GeoLinkError(f"Weights & Biases cannot be used: {error}") from error
