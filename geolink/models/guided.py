"""The fusion of `geolink2`: patches and objects attend to each other where they meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention with a bias on the logits; a query without a key gets zero."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """[B, Q, C], [B, K, C] twice, [B, heads or 1, Q, K] (-inf: not seen) -> [B, Q, C]."""
        q, k, v = (
            x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for x in (self.query(query), self.key(key), self.value(value))
        )
        some = (bias > -torch.inf).any(-1, keepdim=True)
        bias = torch.where(some, bias, 0.0).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, bias) * some.to(q.dtype)
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected

    def attention_map(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """How much each query looks at each key, mean over the heads: [B, Q, K], as `forward`."""
        q, k = (
            x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for x in (self.query(query), self.key(key))
        )
        logit = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias
        return torch.mean(logit.softmax(-1).nan_to_num(0.0), 1)


class GuidedBlock(nn.Module):
    """Objects attend to objects, patches to objects, objects to patches, each with an MLP.

    Args:
        dim, heads: width, heads.
        guided: the stored correspondence shifts the logits between an object and the patches that
            it meets, by a learnt amount for each head, so that fusion need not find out from
            positions what the dataset already knows.
    """

    def __init__(self, dim: int, heads: int, guided: bool) -> None:
        super().__init__()
        self.between, self.to_nodes, self.to_patches = (
            CrossAttention(dim, heads) for _ in range(3)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(7)])
        self.node_mlp, self.patch_mlp = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.meets = nn.Parameter(torch.ones(2, heads)) if guided else None

    def forward(
        self,
        patches: Tensor,
        nodes: Tensor,
        patch_position: Tensor,
        node_position: Tensor,
        valid: Tensor,
        shares: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Patches [B, V, C], nodes [B, K, C], their positions, bool [B, K] of real nodes, and what
        they share [B, K, V] (`correspondence`) -> patches, nodes.
        """
        real = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, -torch.inf)
        real = real[:, None, None]
        nodes_bias = patches_bias = torch.zeros_like(shares)[:, None]
        if self.meets is not None:
            met = (shares > 0).float() + shares
            nodes_bias = met[:, None] * self.meets[0, :, None, None]
            patches_bias = met[:, None] * self.meets[1, :, None, None]
        n = self.norms[0](nodes)
        placed = n + node_position
        nodes = nodes + self.between(placed, placed, n, real)
        n, p = self.norms[1](nodes), self.norms[2](patches)
        bias = nodes_bias.transpose(2, 3) + real
        patches = patches + self.to_nodes(p + patch_position, n + node_position, n, bias)
        patches = patches + self.patch_mlp(self.norms[3](patches))
        p = self.norms[4](patches)
        nodes = nodes + self.to_patches(n + node_position, p + patch_position, p, patches_bias)
        nodes = nodes + self.node_mlp(self.norms[5](nodes))
        return patches, self.norms[6](nodes)
