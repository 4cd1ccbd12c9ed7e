"""What a step draws at random: the same for a chip however a batch is shared out.

The draws of a whole batch are made by every process, and each takes those of its part: few numbers,
next to what is computed from them. A batch in one part draws exactly what it would without parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.graph import GraphBatch


@dataclass(frozen=True, eq=False)
class Part:
    """The part `number` (from 0) of a batch whose parts have the same number of chips."""

    number: int
    nodes: NDArray[np.int64]
    """[parts, 3], nodes of each part by kind: of each rank in turn, of each its parts in turn."""

    def rand(
        self,
        shape: Sequence[int],
        device: torch.device,
        generator: torch.Generator | None = None,
        *,
        chips: int = 0,
    ) -> Tensor:
        """Uniform draws of this part, whose chips are dimension `chips` of `shape`."""
        whole = list(shape)
        whole[chips] *= len(self.nodes)
        drawn = torch.rand(whole, device=device, generator=generator)
        return drawn.narrow(chips, self.number * shape[chips], shape[chips])

    def node_rand(
        self, graph: GraphBatch, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform draws of this part's nodes: float32 [M]."""
        drawn = torch.rand(int(self.nodes.sum()), device=device, generator=generator)
        # Of the whole batch packed at once: by kind, in it part after part.
        kinds = np.concatenate([[0], np.cumsum(self.nodes.sum(0))])
        before = self.nodes[: self.number].sum(0)
        return torch.cat(
            [
                drawn.narrow(
                    0, int(kinds[k] + before[k]), graph.kind_ptr[k + 1] - graph.kind_ptr[k]
                )
                for k in range(3)
            ]
        )


def kinds(graph: GraphBatch) -> NDArray[np.int64]:
    """Nodes of a graph by kind: [3]."""
    return np.diff(graph.kind_ptr)


WHOLE = Part(0, np.zeros((1, 3), np.int64))
"""A batch in one part, whose nodes draw nothing."""
