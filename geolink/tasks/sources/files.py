"""Image files that pillow and numpy read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import GeoLinkError
from schemas.pixels import Pixels

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
"""Endings of files that are taken for images."""


def read_pixels(path: Path) -> Pixels:
    """Read a PNG, JPEG or plain TIFF file, or an array [band, y, x] or [y, x] of a .npy file.

    Raises GeoLinkError if it is no image of 8 or 16 bits or float32.
    """
    try:
        if path.suffix == ".npy":
            return Pixels(_checked(np.load(path, allow_pickle=False), path))
        with Image.open(path) as image:
            plain = image.mode not in ("P", "1", "CMYK", "LA", "PA")
            array = np.asarray(image if plain else image.convert("RGB"))
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise GeoLinkError(f"{path} cannot be read as an image: {error}") from error
    return Pixels(_checked(array if array.ndim == 2 else array.transpose(2, 0, 1), path))


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask [y, x] of class numbers: a file of one band, or of a palette.

    Raises GeoLinkError if it is none.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                array = np.asarray(image)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise GeoLinkError(f"{path} cannot be read as a mask: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise GeoLinkError(
            f"mask {path} is {array.dtype} {list(array.shape)}: it takes one band of class numbers"
        )
    if array.size and (array.min() < 0 or array.max() > 255):
        raise GeoLinkError(f"mask {path} holds {array.max()}: class numbers go from 0 to 255")
    mask: NDArray[np.uint8] = array.astype(np.uint8)
    return mask


def _checked(array: NDArray[np.generic], path: Path) -> NDArray[np.generic]:
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise GeoLinkError(f"{path} is an array {list(array.shape)}, not [band, y, x]")
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise GeoLinkError(f"{path} holds {array.dtype}: images are uint8, uint16 or float32")
    return np.ascontiguousarray(array)
