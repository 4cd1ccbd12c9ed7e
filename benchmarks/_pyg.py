"""The OSM side of `variant: paper` as one writes it with PyTorch Geometric: a baseline.

One `HeteroConv` of nine `GATConv`, a `LayerNorm` in graph mode and a `Set2Set` per kind,
`torch.nn.MultiheadAttention` between nodes and patches; masked nodes chosen, and their rows padded,
graph by graph. What the published code does by `../shared/reference/README.md`'s facts, in words of
our own, and equal to `geolink.models` in what it computes: `benchmarks/step.py` compares the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import GATConv, HeteroConv, LayerNorm
from torch_geometric.nn.aggr import Set2Set

from geolink.graph import KINDS, GraphBatch
from geolink.models.ops import sincos
from geolink.models.paper import GeoLink

_ANCHORS = {"point": (0,), "line": (0, 1, 2), "polygon": (0, 1, 2, 3)}
EDGES = [(s, "to", t) for s in KINDS for t in KINDS]


def to_hetero(graph: GraphBatch, features: Tensor) -> HeteroData:
    """The batch as PyG holds it: features, anchors, chip (`batch`) per kind, edges per pair."""
    data, kind = HeteroData(), graph.kind()
    start = torch.tensor(graph.kind_ptr[:3], device=kind.device)
    local = graph.edge - start[kind[graph.edge]]
    for i, name in enumerate(KINDS):
        nodes = graph.kind_slice(i)
        data[name].x = features[nodes]
        data[name].anchor = graph.anchor[nodes]
        data[name].batch = graph.chip[nodes]
    for i, s in enumerate(KINDS):
        for j, t in enumerate(KINDS):
            among = (kind[graph.edge[0]] == i) & (kind[graph.edge[1]] == j)
            data[s, "to", t].edge_index = local[:, among]
    return data


class PygOsm(nn.Module):
    """Parameters of the OSM side of a `GeoLink`, copied from one."""

    def __init__(self, model: GeoLink, chips: int) -> None:
        super().__init__()
        c = model.config
        self.config, self.chips, self.grid = c, chips, model.grid
        self.conv = HeteroConv(
            {edge: GATConv(c.tag_dim, c.osm_dim, add_self_loops=False) for edge in EDGES},
            aggr="mean",
        )
        convs = model.osm_encoder.convs[0].convs
        for s, to, t in EDGES:
            self.conv.convs[s, to, t].load_state_dict(convs[f"<{s}___to___{t}>"].state_dict())
        self.norm = nn.ModuleDict({k: LayerNorm(c.osm_dim, mode="graph") for k in KINDS})
        self.read_out = nn.ModuleDict({k: Set2Set(c.osm_dim, processing_steps=5) for k in KINDS})
        self.aggr = nn.ModuleDict({k: nn.Linear(2 * c.osm_dim, c.osm_dim) for k in KINDS})
        self.node_in = nn.ModuleDict({k: nn.Linear(c.osm_dim, c.fusion_dim) for k in KINDS})
        self.mask_token = nn.ParameterDict({k: nn.Parameter(torch.zeros(1)) for k in KINDS})
        for k in KINDS:
            self.norm[k].load_state_dict(model.osm_norm[k].state_dict())
            self.read_out[k].lstm.load_state_dict(model.osm_read_out[k].lstm.state_dict())
            self.aggr[k].load_state_dict(model.osm_aggr_mlp[k].state_dict())
            self.node_in[k].load_state_dict(model.osm_node_fusion_mlp[k].state_dict())
            self.mask_token[k] = nn.Parameter(model.osm_mask_token[k].detach().clone())
        self.patch_in = nn.Linear(c.embed_dim, c.fusion_dim)
        self.patch_in.load_state_dict(model.img_fusion_mlp.state_dict())
        self.predict = nn.Linear(c.fusion_dim, c.tag_dim)
        self.predict.load_state_dict(model.osm_node_pred.state_dict())
        self.project = nn.Linear(c.osm_dim, c.projection_dim)
        self.project.load_state_dict(model.osm_graph_consistency_prj.state_dict())
        block = model.osm_cross_modal_encoder[0]
        names = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        self.attention = nn.ModuleList()
        for name in names:
            made = nn.MultiheadAttention(c.fusion_dim, c.fusion_heads, 0.1, batch_first=True)
            made.load_state_dict(getattr(block, name).state_dict())
            self.attention.append(made)
        self.norms = nn.ModuleList(nn.LayerNorm(c.fusion_dim) for _ in range(4))
        for n, norm in enumerate(self.norms):
            norm.load_state_dict(getattr(block, f"norm{n + 1}").state_dict())
        self.mlp = nn.Linear(c.fusion_dim, c.fusion_dim)
        self.mlp.load_state_dict(block.mlp.state_dict())

    def choose(self, data: HeteroData) -> dict[str, Tensor]:
        """Masked nodes of each kind, drawn graph by graph: bool [n]."""
        masked = {k: torch.zeros_like(data[k].batch, dtype=torch.bool) for k in KINDS}
        for chip in range(self.chips):
            for k in KINDS:
                mine = torch.nonzero(data[k].batch == chip)[:, 0]
                drawn = torch.randperm(len(mine), device=mine.device)
                masked[k][mine[drawn[: round(len(mine) * self.config.node_mask_ratio)]]] = True
        return masked

    def encode(self, data: HeteroData, masked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encoded nodes of each kind: [n, osm_dim]."""
        x = {}
        for k in KINDS:
            x[k] = torch.where(masked[k][:, None], self.mask_token[k], data[k].x)
        encoded = self.conv(x, data.edge_index_dict)
        return {k: self.norm[k](F.relu(encoded[k])) for k in KINDS}

    def positions(self, data: HeteroData) -> dict[str, Tensor]:
        """Position of each node: [n, fusion_dim]."""
        return {
            k: torch.stack(
                [sincos(data[k].anchor[:, a] * self.grid, self.config.fusion_dim)
                 for a in _ANCHORS[k]]
            ).mean(0)
            for k in KINDS
        }  # fmt: skip

    def region(self, data: HeteroData, nodes: dict[str, Tensor]) -> Tensor:
        """Projected region embedding of each chip."""
        read = [
            self.aggr[k](self.read_out[k](nodes[k], data[k].batch, dim_size=self.chips))
            for k in KINDS
        ]
        return self.project(torch.stack(read).sum(0))

    def pad(
        self, data: HeteroData, masked: dict[str, Tensor], values: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], Tensor]:
        """Rows of masked nodes, at most so many of a graph, graph by graph; which are padding."""
        most = self.config.max_masked_nodes or 10
        rows: list[list[Tensor]] = [[] for _ in values]
        padding = torch.ones(self.chips, most, dtype=torch.bool, device=data["point"].x.device)
        for chip in range(self.chips):
            mine = {k: masked[k] & (data[k].batch == chip) for k in KINDS}
            for n, value in enumerate(values):
                taken = torch.cat([value[k][mine[k]] for k in KINDS])[:most]
                rows[n].append(F.pad(taken, (0, 0, 0, most - len(taken))))
            padding[chip, : len(taken)] = False
        return [torch.stack(r) for r in rows], padding

    def fuse(
        self, patches: Tensor, patch_position: Tensor, nodes: Tensor, place: Tensor, padding: Tensor
    ) -> Tensor:
        """Predicted text of the masked nodes: [B, most, tag_dim]."""
        to_nodes, to_image, to_patches = self.attention
        # Attention over padding alone is no number.
        padding = padding & ~padding.all(1, keepdim=True)
        patches = self.patch_in(patches)
        q = nodes + place
        nodes = self.norms[0](nodes + to_nodes(q, q, nodes, padding, need_weights=False)[0])
        key = nodes + place
        seen = to_image(patches + patch_position, key, nodes, padding, need_weights=False)[0]
        patches = self.norms[1](patches + seen)
        key = patches + patch_position
        seen = to_patches(nodes + place, key, patches, need_weights=False)[0]
        return self.predict(self.norms[3](self.mlp(self.norms[2](nodes + seen))))

    def forward(
        self,
        data: HeteroData,
        patches: Tensor,
        patch_position: Tensor,
        masked: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Projected regions [B, projection_dim], and the consistency loss."""
        masked = self.choose(data) if masked is None else masked
        nodes = self.encode(data, masked)
        region = self.region(data, nodes)
        nodes = {k: self.node_in[k](nodes[k]) for k in KINDS}
        (tokens, place, target), padding = self.pad(
            data, masked, [nodes, self.positions(data), {k: data[k].x for k in KINDS}]
        )
        predicted = self.fuse(patches, patch_position, tokens, place, padding)
        error = (predicted - target).square().mean(-1)
        return region, error[~padding].mean()
