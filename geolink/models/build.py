"""The model of a config."""

from __future__ import annotations

from torch import Tensor

from geolink.models.base import PretrainModel
from geolink.models.geolink2 import GeoLink2
from geolink.models.paper import GeoLink
from schemas.training import ModelConfig


def make_model(config: ModelConfig, tag_table: Tensor | None = None) -> PretrainModel:
    """The model of `config.variant`, with new weights of torch's global seed.

    Args:
        config: variant, sizes, loss weights.
        tag_table: float [V, tag_dim], text embeddings of the tags; may be set later.
    """
    variant = GeoLink2 if config.variant == "geolink2" else GeoLink
    return variant(config, tag_table)
