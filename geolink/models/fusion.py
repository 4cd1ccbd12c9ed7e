"""The two-way block that fuses image patches and OSM nodes."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with the parameter names of `torch.nn.MultiheadAttention`.

    Unlike it, a query that may see no key gets zero attention (so the output projection's bias)
    instead of NaN.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        """[B, Q, C], [B, K, C], [B, K, C], bool [B, K] (which keys are real) -> [B, Q, C]."""
        q, k, v = (
            F.linear(x, weight, bias).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for x, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            )
        )
        some = mask = None
        if valid is not None:
            some = valid.any(1)[:, None]
            mask = (valid | ~some)[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
        attended = attended.transpose(1, 2).flatten(2)
        if some is not None:
            attended = attended * some[..., None]
        projected: Tensor = self.out_proj(attended)
        return projected

    def attention_map(self, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor:
        """How much each query looks at each key, mean over the heads: [B, Q, K], as `forward`."""
        q, k = (
            F.linear(x, weight, bias).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for x, weight, bias in zip(
                (query, key), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            )
        )
        logit = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if valid is None:
            seen = logit.softmax(-1)
        else:
            hidden = ~valid[:, None, None, :]
            seen = logit.masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0)
        return torch.mean(seen, 1)


class TwoWayBlock(nn.Module):
    """Nodes attend to nodes, patches to nodes, nodes to patches; each added and normed.

    `fixes`: `patch_mlp` and `node_residual` (docs/model.md) are looked at.
    """

    def __init__(
        self, dim: int, heads: int, fixes: Container[str] = (), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.node_residual = "node_residual" in fixes
        # Quirk `patch_mlp`: the patch side ends in its attention, without an MLP.
        self.patch_mlp = self.patch_norm = None
        if "patch_mlp" in fixes:
            self.patch_mlp = nn.Sequential(
                nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
            self.patch_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        # "Token" in the checkpoints' names is the query side of the block: the image's tokens
        # attend to nodes here, nodes to the image's tokens in `image_to_token`.
        self.cross_attn_token_to_image = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, heads, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = nn.Linear(dim, dim)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self,
        patches: Tensor,
        nodes: Tensor,
        patch_position: Tensor,
        node_position: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Patches [B, L, C], nodes [B, K, C], their positions (same shapes; L side may broadcast),
        bool [B, K] of real nodes -> patches, nodes. Nodes that are not real come out undefined.
        """
        placed = nodes + node_position
        nodes = self.norm1(nodes + self.self_attn(placed, placed, nodes, valid))
        query = patches + patch_position
        key = nodes + node_position
        patches = self.norm2(patches + self.cross_attn_token_to_image(query, key, nodes, valid))
        if self.patch_mlp is not None and self.patch_norm is not None:
            patches = self.patch_norm(patches + self.patch_mlp(patches))
        key = patches + patch_position
        query = nodes + node_position
        nodes = self.norm3(nodes + self.cross_attn_image_to_token(query, key, patches, None))
        # Quirk `node_residual`: what the node knew before the linear layer is not added to it.
        mixed = self.mlp(nodes) + nodes if self.node_residual else self.mlp(nodes)
        return patches, self.norm4(mixed)
