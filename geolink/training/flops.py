"""How much a step computes, and what share of the device's peak that is (MFU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from geolink.graph import GraphBatch
from geolink.models.base import PretrainModel

# Dense peaks of NVIDIA's data sheets in TFLOP/s: bfloat16 or float16, TF32, float32. The first
# name that is part of the device's counts.
_PEAKS = (
    ("H200", 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100 PCIe", 756.0, 378.0, 51.0),
    ("H100", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A10G", 70.0, 35.0, 31.2),
    ("A10", 125.0, 62.5, 31.2),
    ("L40S", 362.0, 183.0, 91.6),
    ("L4", 121.0, 60.0, 30.3),
    ("RTX 4090", 165.2, 82.6, 82.6),
)


@dataclass(frozen=True)
class Speed:
    """What is computed for a chip, and what the devices of a run could compute."""

    flops_per_chip: float
    """Floating-point operations of a step for each of its chips."""
    peak: float
    """Operations per second of all devices together."""

    def mfu(self, chips_per_s: float) -> float:
        """Model FLOPs utilisation at that rate (Chowdhery et al. 2022, PaLM, appendix B)."""
        return self.flops_per_chip * chips_per_s / self.peak


def step_flops(model: PretrainModel, images: Tensor, graph: GraphBatch, **known: Any) -> int:
    """Floating-point operations of a training step on a batch.

    Those of matrix products, convolutions and attention in one forward pass, as PyTorch's counter
    has them, times three: a backward pass takes twice a forward one. What is computed again to
    save memory does not count, as is usual. Draws from the global generator.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images, graph, **known)
    return 3 * int(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of one device in operations per second at `TrainConfig.precision`; none: not known.

    A CPU has none here: what it could do depends on its clock, its cores and who shares them.
    """
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device), precision)


def named_peak(name: str, precision: str) -> float | None:
    """`peak_flops` by the device's name."""
    for part, half, tf32, single in _PEAKS:
        if part in name:
            if precision != "32-true":
                return half * 1e12
            exact = torch.get_float32_matmul_precision() == "highest"
            return (single if exact else tf32) * 1e12
    return None
