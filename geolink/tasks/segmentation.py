"""Segmentation: a head on the encoder's maps says the class of every pixel."""

from __future__ import annotations

from torch import Tensor

from geolink.tasks.contracts import Encoder, Fit, Fitted
from geolink.tasks.dense import fit_dense
from geolink.tasks.train import Given


def fit_segmentation(fit: Fit) -> Fitted:
    """A head on the maps of an image. Raises GeoLinkError as `fit_dense`."""
    return fit_dense(fit, image_maps)


def image_maps(encoder: Encoder, x: Given) -> list[Tensor]:
    """[B, widths[i], grid, grid] of an image and its objects."""
    assert encoder.maps is not None
    return encoder.maps(x.images, x.graph)
