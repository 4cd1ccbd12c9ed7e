"""What is known of chips beside their pixels and objects."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChipContext:
    """Where, when and by what sensor B chips were taken."""

    time: Tensor
    """int64 [B], acquisition, seconds since 1970 UTC; `schemas.layout.UNKNOWN_TIME`: unknown."""
    gsd_m: Tensor
    """float32 [B], metres of a pixel."""
    lonlat: Tensor
    """float64 [B, 2], degrees: longitude, latitude of the centre."""
    wavelength_um: Tensor | None = None
    """float32 [bands], centre wavelength of each band in micrometres; none: not stated."""
