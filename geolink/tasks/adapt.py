"""Images brought to what a checkpoint takes: its bands, its size, its scale of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from geolink.device import normalise
from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from geolink.tasks.contracts import Imagery, TaskData
from schemas.errors import GeoLinkError
from schemas.sensor import SENSORS

_SAME = 0.05
"""Bands whose wavelengths differ by a smaller share are taken for one another."""

_LOOKED_AT = 256
"""Images whose values are compared with those that a checkpoint learnt from."""

_FAR = 6.0
"""Deviations that the mean of a band may lie off."""

_NARROW = 20.0
"""Factor by which the deviation of a band may differ."""


def wavelength_nm(band: str) -> float | None:
    """Centre of a band by its name, as the known sensors have it; none: not known."""
    found = [b.wavelength_nm for sensor in SENSORS.values() for b in sensor.bands
             if b.name == band.lower() and b.wavelength_nm is not None]  # fmt: skip
    return found[0] if found else None


def match_bands(have: Imagery, wanted: Sequence[str], who: str) -> list[int]:
    """Which of an image's bands stand for those that a checkpoint wants, by name or wavelength.

    Raises GeoLinkError naming the first band that no other can stand for.
    """
    names = [name.lower() for name in have.bands]
    known = np.array([np.nan if w is None else w for w in have.wavelength_nm], np.float64)
    chosen = []
    for band in wanted:
        if names.count(band.lower()) == 1:
            chosen.append(names.index(band.lower()))
            continue
        centre = wavelength_nm(band)
        if centre is not None and not np.isnan(known).all():
            nearest = int(np.nanargmin(np.abs(known - centre)))
            if abs(known[nearest] - centre) <= _SAME * centre:
                chosen.append(nearest)
                continue
        about = f" ({centre:g} nm)" if centre is not None else ""
        raise GeoLinkError(
            f"{who} takes band {band}{about}, and none of the images' bands "
            f"({', '.join(_told(have))}) can stand for it: name the bands (bands: [...]) or use "
            "a checkpoint that takes these"
        )
    return chosen


def _told(have: Imagery) -> list[str]:
    return [
        f"{name} {w:g} nm" if w else name
        for name, w in zip(have.bands, have.wavelength_nm, strict=True)
    ]


def preparer(
    index: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    nodata: int,
    size: int,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """A function from stored images [B, band, y, x] on the device to what an encoder takes.

    Args:
        index: which bands, in the encoder's order.
        mean, std: of these bands' stored values.
        nodata: stored value of pixels without data, which become the mean; -1: none.
        size: side in pixels; images of another are resized (bilinear, antialiased).
        device: of the images.
    """
    middle = torch.tensor(list(mean), dtype=torch.float32, device=device)
    spread = torch.tensor(list(std), dtype=torch.float32, device=device)
    place = torch.tensor(list(index), device=device)

    def prepare(images: Tensor) -> Tensor:
        pixels = images.to(torch.float32)
        if list(index) != list(range(pixels.shape[1])):
            pixels = pixels.index_select(1, place)
        done = normalise(pixels, middle, spread, nodata)
        if done.shape[-2:] == (size, size):
            return done
        return F.interpolate(done, (size, size), mode="bilinear", antialias=True)

    return prepare


def band_values(
    data: TaskData, index: Sequence[int], split: str = "train", most: int = 2048
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of bands [len(index)] over the pixels with data of a split's images, of
    pairs those of both dates.

    Of more than `most` images, that many at even distances are read.
    Raises GeoLinkError if there is no pixel with data.
    """
    count = len(data.part(split))
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
    total, squares, pixels = np.zeros(len(index)), np.zeros(len(index)), 0
    for batch in data.batches(split, rows):
        for images in (batch.image, batch.second):
            if images is None:
                continue
            values = images.numpy()[:, list(index)].astype(np.float64)
            there = ~(values == data.imagery.nodata).all(1)
            values = values.transpose(1, 0, 2, 3)[:, there]
            total += values.sum(1)
            squares += (values**2).sum(1)
            pixels += values.shape[1]
    if pixels == 0:
        raise GeoLinkError(f"no image of split {split} of {data.name} has a pixel with data")
    mean = total / pixels
    return mean, np.sqrt(np.maximum(squares / pixels - mean**2, 0.0))


def check_values(
    data: TaskData, index: Sequence[int], mean: Sequence[float], std: Sequence[float], who: str,
    remedy: str = "use `normalise: data` to scale them by the training images",
) -> None:  # fmt: skip
    """Raises GeoLinkError if pixels are of another scale than those that a checkpoint learnt from:
    8 bits against 16, reflectance against digital numbers."""
    found, spread = band_values(data, index, most=_LOOKED_AT)
    scale = np.where(np.array(std) > 0, std, 1.0)
    off = np.abs(found - np.array(mean)) / scale
    ratio = np.maximum(spread, 1e-9) / scale
    far = (off > _FAR) | (ratio > _NARROW) | (ratio < 1 / _NARROW)
    if far.any():
        n = int(np.argmax(far))
        raise GeoLinkError(
            f"the values of band {data.imagery.bands[index[n]]} of {data.name} (mean "
            f"{found[n]:.4g}, deviation {spread[n]:.3g}) are not on the scale that {who} learnt "
            f"from (mean {mean[n]:.4g}, deviation {std[n]:.3g}): {remedy}"
        )


def at_size(model: PretrainModel, size: int) -> PretrainModel:
    """The model for images of another size, with positions of patches interpolated.

    Positions of the fusion and of the decoder are those of the new grid. Raises GeoLinkError if
    `size` is not a multiple of the patch size.
    """
    c = model.config
    if size == c.image_size:
        return model
    if size % c.patch_size:
        raise GeoLinkError(
            f"size is {size}, which the model's patches of {c.patch_size} pixels do not divide"
        )
    with torch.random.fork_rng():
        other = make_model(c.model_copy(update={"image_size": size}), model.tag_table)
    state, new = model.state_dict(), other.state_dict()
    grid = size // c.patch_size
    for name, value in new.items():
        old = state[name]
        if old.shape != value.shape:
            prefix = old.shape[1] - model.grid**2
            state[name] = (
                resample_abs_pos_embed(old, [grid, grid], num_prefix_tokens=prefix)
                if name in ("img_pos_embed", "img_encoder.pos_embed")
                else value
            )
    other.load_state_dict(state)
    return other.train(model.training)
