"""Heads that make a mask of an encoder's maps, all of which are of one grid of patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128
"""Channels of FPN and UPerNet."""

_BINS = (1, 2, 3, 6)
"""Sides of the grids that UPerNet's last level is pooled to (Zhao et al. 2017)."""


def make_head(kind: str, widths: Sequence[int], classes: int) -> nn.Module:
    """`linear`, `fpn` or `upernet`: maps [B, widths[i], g, g] -> logits [B, class, s, s] with s no
    less than g."""
    if kind == "linear":
        return LinearHead(widths, classes)
    return PyramidHead(widths, classes, pooled=kind == "upernet")


class LinearHead(nn.Module):
    """One linear layer on the last map, normed channel by channel."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(widths[-1])
        self.classify = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, class, g, g]."""
        logits: Tensor = self.classify(self.norm(maps[-1]))
        return logits


class PyramidHead(nn.Module):
    """Feature pyramid over four maps (Lin et al. 2017), and UPerNet (Xiao et al. 2018), which pools
    the last one over the whole image besides.

    A plain ViT has one grid of patches: the maps are brought to 4, 2, 1 and half times its side
    (Li et al. 2022, ViTDet; the way of MMSegmentation's and the paper's heads).
    """

    def __init__(self, widths: Sequence[int], classes: int, *, pooled: bool) -> None:
        super().__init__()
        first, second, third, last = widths
        self.scale = nn.ModuleList([
            nn.Sequential(_twice(first), nn.GELU(), _twice(first)), _twice(second), nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])  # fmt: skip
        self.side = nn.ModuleList([_conv(width, WIDTH, 1) for width in (first, second, third)])
        self.pool = nn.ModuleList([_conv(last, WIDTH, 1) for _ in _BINS]) if pooled else None
        self.top = _conv(last + len(_BINS) * WIDTH * pooled, WIDTH, 3 if pooled else 1)
        self.smooth = nn.ModuleList([_conv(WIDTH, WIDTH, 3) for _ in range(3)])
        self.join = _conv(4 * WIDTH, WIDTH, 3)
        self.classify = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, class, 4 g, 4 g]."""
        *sides, last = (scale(m) for scale, m in zip(self.scale, maps, strict=True))
        pooled = [last]
        for conv, side in zip(self.pool or (), _BINS):
            pooled.append(_to(conv(F.adaptive_avg_pool2d(last, side)), last))
        levels = [self.top(torch.cat(pooled, 1))]
        for conv, side_map in zip(reversed(self.side), reversed(sides), strict=True):
            here = conv(side_map)
            levels.insert(0, here + _to(levels[0], here))
        levels = [conv(m) for conv, m in zip(self.smooth, levels)] + levels[3:]
        joined = torch.cat([_to(level, levels[0]) for level in levels], 1)
        logits: Tensor = self.classify(self.join(joined))
        return logits


def _twice(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, 2, stride=2)


def _conv(inputs: int, outputs: int, side: int) -> nn.Module:
    # Groups rather than batches: maps pooled to one pixel have no statistics of their own.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.GroupNorm(16, outputs), nn.ReLU(),
    )  # fmt: skip


def _to(small: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(small, like.shape[-2:], mode="bilinear", align_corners=False)
