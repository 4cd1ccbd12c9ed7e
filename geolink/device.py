"""The device of a run, and what is done there to whole batches before a model sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.errors import GeoLinkError


def pick_device(accelerator: str) -> torch.device:
    """The device of `auto` (a GPU where there is one), `cpu`, `cuda` or `mps`.

    Raises GeoLinkError if the accelerator that is asked for is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        accelerator = next(name for name, is_there in there.items() if is_there)
    if not there.get(accelerator, False):
        raise GeoLinkError(
            f"accelerator {accelerator!r} is asked for, but this machine has none that this "
            "PyTorch can use; set accelerator to auto or cpu"
        )
    return torch.device(accelerator)


def normalise(image: Tensor, mean: Tensor, std: Tensor, nodata: int) -> Tensor:
    """Stored pixels [B, bands, y, x] (any type) -> float32 with mean 0, deviation 1 in each band.

    `mean` and `std` are float32 [bands] of the stored values, on the device of the image. Pixels
    that are `nodata` in every band become 0, the mean. A band of deviation 0 is not scaled.
    """
    # Before any arithmetic: torch has few operations on uint16, and float32 holds it exactly.
    pixels = image.to(torch.float32)
    empty = (pixels == nodata).all(1, keepdim=True)
    scale = torch.where(std > 0, std, 1.0)
    return ((pixels - mean[:, None, None]) / scale[:, None, None]).masked_fill(empty, 0.0)
