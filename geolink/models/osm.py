"""The OSM side: nine graph attentions between kinds, graph-mode LayerNorm, Set2Set read-out.

All on the packed batch: no loop over graphs, nodes or edges, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Container
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geolink.graph import KINDS, GraphBatch
from geolink.models.ops import run_offsets, segment_softmax, weighted_rows
from geolink.models.ranks import mean_over_ranks
from schemas.layout import Relation


class GatParameters(nn.Module):
    """Parameters of one single-head graph attention (Veličković et al. 2018)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_dim, out_dim, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, 1, out_dim))
        self.att_dst = nn.Parameter(torch.empty(1, 1, out_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))
        nn.init.xavier_uniform_(self.att_src)
        nn.init.xavier_uniform_(self.att_dst)


class OsmLayer(nn.Module):
    """Nine graph attentions (source kind -> target kind), mean over source kinds, ReLU.

    `fixes`: `relation_codes` and `present_kinds` (docs/model.md) are looked at.
    """

    def __init__(self, in_dim: int, out_dim: int, fixes: Container[str] = ()) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.present_kinds = "present_kinds" in fixes
        # Quirk `relation_codes`: published attention does not know what relation an edge stands
        # for. Put right, each (source kind, target kind, relation) has a bias of its logit.
        self.relation_bias = (
            nn.Parameter(torch.zeros(3, 3, len(Relation))) if "relation_codes" in fixes else None
        )
        self.convs = nn.ModuleDict(
            {f"<{s}___to___{t}>": GatParameters(in_dim, out_dim) for s in KINDS for t in KINDS}
        )

    def forward(self, x: Tensor, masked: Tensor, mask_token: Tensor, graph: GraphBatch) -> Tensor:
        """Features [M, in_dim], those of masked nodes (bool [M]) replaced by their kind's token
        ([3, in_dim]) -> float32 [M, out_dim].
        """
        x = x.masked_fill(masked[:, None], 0.0)
        weight, att_src, att_dst, bias = self._stacked()
        # Logits are linear in features: as source towards each target kind, as target of each
        # source kind.
        as_source = torch.einsum("stoi,sto->sti", weight, att_src)
        as_target = torch.einsum("stoi,sto->tsi", weight, att_dst)
        message = project_per_kind(x, weight.flatten(1, 2), masked, mask_token, graph)
        logits = project_per_kind(
            x, torch.cat([as_source, as_target], 1), masked, mask_token, graph
        )

        # One softmax per (target node, source kind), one weighted sum per target node.
        kind, source, target = graph.kind(), graph.edge[0], graph.edge[1]
        from_kind, to_kind = kind[source], kind[target]
        logit = logits.flatten().index_select(0, source * 6 + to_kind)
        logit = logit + logits.flatten().index_select(0, target * 6 + 3 + from_kind)
        if self.relation_bias is not None:
            triple = (from_kind * 3 + to_kind) * len(Relation) + graph.relation
            logit = logit + self.relation_bias.flatten().index_select(0, triple)
        logit = F.leaky_relu(logit, 0.2)
        kept = None if graph.alive is None else graph.alive[source]
        attention = segment_softmax(logit, target * 3 + from_kind, 3 * graph.nodes, kept)
        message = message.view(-1, self.out_dim)
        offset = run_offsets(target, graph.nodes)
        summed = weighted_rows(message, source * 3 + to_kind, offset, attention)
        if self.present_kinds:
            there = torch.ones_like(logit) if kept is None else kept.to(logit.dtype)
            present = summed.new_zeros(3 * graph.nodes)
            present = present.scatter_reduce(0, target * 3 + from_kind, there, "amax").view(-1, 3)
            biases = [present[graph.kind_slice(k)] @ bias[:, k] for k in range(3)]
            summed = summed + torch.cat(biases).float()
            return (summed / present.sum(1, keepdim=True).clamp(min=1)).relu()
        # Quirk `present_kinds`: the mean runs over all three source kinds, also over those without
        # an edge to the node, which contribute their bias.
        return ((summed + rows_per_kind(bias.sum(0), graph)) / 3).relu()

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights [3, 3, out, in], attention vectors and biases [3, 3, out] by (source, target)."""
        convs = cast(list[GatParameters], list(self.convs.values()))
        shape = (3, 3, self.out_dim)
        return (
            torch.stack([c.lin.weight for c in convs]).view(*shape, -1),
            torch.stack([c.att_src for c in convs]).view(shape),
            torch.stack([c.att_dst for c in convs]).view(shape),
            torch.stack([c.bias for c in convs]).view(shape),
        )


class OsmEncoder(nn.Module):
    """One `OsmLayer`, held as the published checkpoints name it."""

    def __init__(self, in_dim: int, out_dim: int, fixes: Container[str] = ()) -> None:
        super().__init__()
        self.convs = nn.ModuleList([OsmLayer(in_dim, out_dim, fixes)])

    def forward(self, x: Tensor, masked: Tensor, mask_token: Tensor, graph: GraphBatch) -> Tensor:
        """See `OsmLayer.forward`."""
        encoded: Tensor = self.convs[0](x, masked, mask_token, graph)
        return encoded


def project_per_kind(
    x: Tensor, weight: Tensor, masked: Tensor, mask_token: Tensor, graph: GraphBatch
) -> Tensor:
    """Features [M, D] times their kind's weight [3, C, D] -> float32 [M, C].

    Features of masked nodes (bool [M]) must be zero: they get the product of their kind's mask
    token [3, D], as a term of rank one, which keeps `x` out of the backward pass.
    """
    token = torch.einsum("kd,kcd->kc", mask_token, weight)
    parts = []
    for k in range(3):
        nodes = graph.kind_slice(k)
        is_masked = masked[nodes, None].to(x.dtype)
        parts.append(torch.addmm(is_masked @ token[k : k + 1], x[nodes], weight[k].t()))
    return torch.cat(parts).float()


def rows_per_kind(values: Tensor, graph: GraphBatch) -> Tensor:
    """One row per kind [3, C] -> one per node [M, C]."""
    ptr = graph.kind_ptr
    return torch.cat([values[k].expand(ptr[k + 1] - ptr[k], -1) for k in range(3)])


class GraphLayerNorm(nn.Module):
    """LayerNorm over all nodes and channels of what it is given, eps added to the deviation.

    Quirk `node_norm`: it is given all nodes of a kind in the *minibatch*, so that a chip's output
    depends on the other chips. Put right by an ordinary LayerNorm, node by node.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """[n, dim] -> [n, dim], n may be 0; only living rows (bool [n]) count."""
        centred = x - mean_over_ranks(x, alive)
        # The tiny number keeps the gradient finite where all are equal.
        deviation = (mean_over_ranks(centred.square(), alive) + 1e-20).sqrt()
        return centred / (deviation + self.eps) * self.weight + self.bias


class Set2Set(nn.Module):
    """Parameters of one read-out (Vinyals et al. 2016), held as the checkpoints name them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lstm = LstmParameters(2 * dim, dim)


class LstmParameters(nn.Module):
    """Parameters of one layer of an LSTM, as `torch.nn.LSTM` names and draws them.

    Not itself one, because compiled code cannot look into that.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * out_dim, in_dim))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * out_dim, out_dim))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * out_dim))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * out_dim))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(out_dim**-0.5), out_dim**-0.5)


def set2set(
    readouts: nn.ModuleDict, nodes: Tensor, graph: GraphBatch, steps: int = 5
) -> tuple[Tensor, Tensor]:
    """Read all nodes of each (kind, chip) out: float [M, C] -> [3, B, 2C], and bool [3, B]: any?

    The three kinds' LSTMs run as one batched product; a (kind, chip) is one run of the packed
    nodes. Where it has no node the attention part is zero. Dead nodes are not read.
    """
    chips, dim = graph.chips, nodes.shape[1]
    lstms = [cast(Set2Set, readouts[k]).lstm for k in KINDS]
    # The LSTM's hidden state is also the first half of its input: their weights add up.
    weight = torch.stack([(m.weight_ih_l0 + F.pad(m.weight_hh_l0, (0, dim))).t() for m in lstms])
    bias = torch.stack([m.bias_ih_l0 + m.bias_hh_l0 for m in lstms])[:, None]
    run = graph.kind() * chips + graph.chip
    offset = run_offsets(run, 3 * chips)
    every = torch.arange(graph.nodes, device=nodes.device)

    cell = nodes.new_zeros(3, chips, dim)
    star = nodes.new_zeros(3, chips, 2 * dim)
    for step in range(steps):
        # The first input is zero.
        gates = torch.baddbmm(bias, star, weight) if step else bias.expand(3, chips, -1)
        i, f, g, o = gates.float().chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        query = F.embedding(run, hidden.flatten(0, 1))
        attention = segment_softmax((nodes * query).sum(-1), run, 3 * chips, graph.alive)
        read = weighted_rows(nodes, every, offset, attention).view(3, chips, dim)
        star = torch.cat([hidden, read], -1)
    if graph.alive is None:
        return star, (offset.diff() > 0).view(3, chips)
    living = star.new_zeros(3 * chips).index_add(0, run, graph.alive.to(star.dtype))
    return star, (living > 0).view(3, chips)
