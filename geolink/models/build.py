"""The model of a config."""

from __future__ import annotations

from torch import Tensor

from geolink.models.paper import GeoLink
from schemas.training import ModelConfig

PretrainModel = GeoLink
"""What is trained, saved and evaluated: any model that `make_model` makes."""


def make_model(config: ModelConfig, tag_table: Tensor | None = None) -> PretrainModel:
    """The model of `config.variant`, with new weights of torch's global seed.

    Args:
        config: variant, sizes, loss weights.
        tag_table: float [V, tag_dim], text embeddings of the tags; may be set later.
    """
    return GeoLink(config, tag_table)
