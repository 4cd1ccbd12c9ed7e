"""The OSM side of `geolink2`: attention that knows relations, and a read-out that weighs kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolink.graph import KINDS, GraphBatch
from geolink.models.ops import segment_softmax
from schemas.layout import Relation

_KINDS = len(KINDS)


class RelationLayer(nn.Module):
    """Objects attend to those that they have a relation with, then an MLP; both added.

    Args:
        dim: width.
        heads: heads of the attention.
        relations: what an edge means (`schemas.layout.Relation`) shifts its logit and adds to its
            message; without it only the kinds of its ends do. That a road touches a house says
            something else than that it crosses a field; the published model ignores it.
    """

    def __init__(self, dim: int, heads: int, relations: bool) -> None:
        super().__init__()
        self.heads, self.relations = heads, relations
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        codes = _KINDS**2 * (len(Relation) if relations else 1)
        self.logit = nn.Embedding(codes, heads)
        self.message = nn.Embedding(codes, dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        nn.init.zeros_(self.logit.weight)
        nn.init.normal_(self.message.weight, std=0.02)

    def forward(self, x: Tensor, graph: GraphBatch) -> Tensor:
        """Nodes float32 [M, dim] -> [M, dim]; a node's output depends on its own chip only."""
        source, target = graph.edge[0], graph.edge[1]
        kind = graph.kind()
        code = kind[source] * _KINDS + kind[target]
        if self.relations:
            code = code + graph.relation.long() * _KINDS**2
        heads = torch.arange(self.heads, device=x.device)

        query, key, value = self.query_key_value(self.norm(x)).float().chunk(3, -1)
        split = (len(code), self.heads, x.shape[1] // self.heads)
        logit = (query[target] * key[source]).view(split).sum(-1) / (x.shape[1] / self.heads) ** 0.5
        logit = logit + self.logit(code)
        kept = None
        if graph.alive is not None:
            kept = graph.alive[graph.edge].all(0)[:, None].expand(-1, self.heads).flatten()
        run = (target[:, None] * self.heads + heads).flatten()
        share = segment_softmax(logit.flatten(), run, len(x) * self.heads, kept)
        message = (value[source] + self.message(code)).view(split) * share.view(-1, self.heads, 1)
        gathered = torch.zeros_like(value).index_add(0, target, message.flatten(1))
        x = x + self.out(gathered)
        added: Tensor = x + self.mlp(self.mlp_norm(x))
        return added.float()


class ReadOut(nn.Module):
    """Nodes of each (kind, chip) pooled by a learnt weight, then kinds weighed against each other.

    Args:
        dim: width.
        kind_attention: the weights of the kinds are learnt (a softmax over those that a chip has);
            without it each counts alike. The published model's softmax runs over one element.
    """

    def __init__(self, dim: int, kind_attention: bool) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, 1)
        self.per_kind = nn.ModuleDict({kind: nn.Linear(dim, dim) for kind in KINDS})
        self.kind_weight = (
            nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1))
            if kind_attention
            else None
        )

    def forward(self, nodes: Tensor, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        """Nodes [M, dim] -> region [B, dim] (zero without nodes), and bool [B]: has it any node?"""
        run = graph.kind() * graph.chips + graph.chip
        runs = _KINDS * graph.chips
        share = segment_softmax(self.weight(nodes).squeeze(-1).float(), run, runs, graph.alive)
        pooled = nodes.new_zeros(runs, nodes.shape[1]).index_add(0, run, nodes * share[:, None])
        pooled = pooled.view(_KINDS, graph.chips, -1)
        count = share.new_zeros(runs).index_add(0, run, graph.living().float())
        some = (count > 0).view(_KINDS, graph.chips)
        kinds = torch.stack([self.per_kind[k](pooled[i]) for i, k in enumerate(KINDS)])
        kinds = F.gelu(kinds).float()
        logit = torch.zeros_like(kinds[..., :1])
        if self.kind_weight is not None:
            logit = self.kind_weight(kinds).float()
        weight = logit.masked_fill(~some[..., None], -1e9).softmax(0) * some[..., None]
        return (kinds * weight).sum(0), some.any(0)
