"""Urban function zones and urban villages: places that images and the map tell together."""

from __future__ import annotations

from geolink.tasks.contracts import Fit, Fitted
from geolink.tasks.finetune import fit_finetune
from geolink.tasks.segmentation import fit_segmentation
from schemas.errors import GeoLinkError


def fit_zones(fit: Fit) -> Fitted:
    """The zone of an image by `fit_finetune`; of its pixels or patches by `fit_segmentation`.

    Raises GeoLinkError as they do.
    """
    return fit_segmentation(fit) if fit.data.kind == "mask" else fit_finetune(fit)


def fit_villages(fit: Fit) -> Fitted:
    """Whether an image is of an urban village, by `fit_finetune`.

    Raises GeoLinkError as it does, or if there are other than two classes.
    """
    if fit.classes != 2:
        raise GeoLinkError(
            f"task villages tells two classes apart, {fit.data.name} has {fit.classes}: "
            f"{', '.join(fit.data.classes)}"
        )
    return fit_finetune(fit)
