"""`variant: paper`: GeoLink (NeurIPS 2025, arXiv 2509.26016) as its checkpoints expect it.

Parameter names and shapes are those of the published checkpoints. Behaviour of the published code
that its weights depend on is kept, and marked "Quirk" where it is; those with a name can be put
right by naming them in `ModelConfig.fixes` (docs/model.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from geolink.graph import KINDS, GraphBatch
from geolink.models.base import PretrainModel
from geolink.models.context import ChipContext
from geolink.models.fusion import TwoWayBlock
from geolink.models.losses import (
    Pairs,
    consistency_loss,
    contrast_loss,
    reconstruction_loss,
)
from geolink.models.masking import mask_nodes, mask_patches, most_masked, node_slots
from geolink.models.ops import grid_sincos, rows, sincos, take, uniform
from geolink.models.osm import GraphLayerNorm, OsmEncoder, Set2Set, set2set
from schemas.training import ModelConfig

# Share of each of a node's four anchors in its position, by kind: a point's one, a line's first
# three (the fourth repeats the third), a polygon's four.
_ANCHOR_SHARE = ((1.0, 0.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3, 0.0), (0.25, 0.25, 0.25, 0.25))


class GeoLink(PretrainModel):
    """Image encoder, OSM encoder, fusion and the three pretraining tasks.

    Args:
        config: sizes and loss weights.
        tag_table: float [V, tag_dim], text embedding of every tag of the vocabulary; may be set
            later (`set_tag_table`). It is not trained and no part of the state dict.
    """

    losses = ("reconstruction", "contrast", "consistency")
    prefix = 1
    anchor_share: Tensor

    def __init__(self, config: ModelConfig, tag_table: Tensor | None = None) -> None:
        super().__init__(config)
        c = config
        width, fused = c.embed_dim, c.fusion_dim
        self.fixes = frozenset(c.fixes)

        self.img_encoder = VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, in_chans=c.bands, num_classes=0,
            global_pool="", embed_dim=width, depth=c.depth, num_heads=c.num_heads,
        )  # fmt: skip
        # Quirk: checkpoints store the patch embedding twice; here it is one tensor of two names.
        self.patch_embed = self.img_encoder.patch_embed
        # Quirk: these three are the trained ones; the encoder's own pos_embed, cls_token and norm
        # are never used (`image_encoder` puts these in their place).
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.img_pos_embed = _fixed(grid_sincos(self.grid, width))
        self.img_norm = nn.LayerNorm(width)

        self.osm_encoder = OsmEncoder(c.tag_dim, c.osm_dim, self.fixes)
        norm = nn.LayerNorm if "node_norm" in self.fixes else GraphLayerNorm
        self.osm_norm = _per_kind(lambda: norm(c.osm_dim))
        self.osm_mask_token = nn.ParameterDict(
            {k: nn.Parameter(torch.zeros(1, c.tag_dim)) for k in KINDS}
        )
        self.osm_read_out = _per_kind(lambda: Set2Set(c.osm_dim))
        self.osm_aggr_mlp = _per_kind(lambda: nn.Linear(2 * c.osm_dim, c.osm_dim))
        # Quirk `type_attention`: its softmax runs over a dimension of size 1, so it weights every
        # kind 1 and learns nothing. Held for the checkpoints only.
        self.type_attention = nn.Linear(c.osm_dim, 1)

        self.img_consistency_prj = nn.Linear(width, c.projection_dim)
        self.osm_graph_consistency_prj = nn.Linear(c.osm_dim, c.projection_dim)

        self.img_fusion_mlp = nn.Linear(width, fused)
        self.fusion_img_pos_embed = _fixed(grid_sincos(self.grid, fused))
        self.osm_node_fusion_mlp = _per_kind(lambda: nn.Linear(c.osm_dim, fused))
        self.osm_cross_modal_encoder = nn.ModuleList(
            [TwoWayBlock(fused, c.fusion_heads, self.fixes) for _ in range(c.fusion_depth)]
        )
        self.osm_node_pred = nn.Linear(fused, c.tag_dim)

        self.img_decoder_mlp = nn.Linear(width, c.decoder_dim)
        self.img_mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.rec_img_pos_embed = _fixed(grid_sincos(self.grid, c.decoder_dim))
        self.img_cross_modal_decoder = nn.ModuleList(
            [
                Block(c.decoder_dim, c.decoder_heads, qkv_bias=True, norm_layer=nn.LayerNorm)
                for _ in range(c.decoder_depth)
            ]
        )
        self.img_decoder_norm = nn.LayerNorm(c.decoder_dim)
        self.img_decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.bands)

        self.register_buffer("anchor_share", torch.tensor(_ANCHOR_SHARE), persistent=False)
        self._initialise((self.cls_token, self.img_mask_token, *self.osm_mask_token.values()))
        self.img_encoder.norm.requires_grad_(False)
        self.type_attention.requires_grad_("type_attention" in self.fixes)
        self.img_encoder.cls_token.requires_grad_(False)
        self.img_encoder.pos_embed.requires_grad_(False)
        self.set_tag_table(torch.zeros(0, c.tag_dim) if tag_table is None else tag_table)

    def forward(
        self,
        images: Tensor,
        graph: GraphBatch,
        *,
        weight: Tensor | None = None,
        pairs: Pairs | None = None,
        context: ChipContext | None = None,
        mask_noise: Tensor | None = None,
        node_noise: Tensor | None = None,
        node_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """See `PretrainModel.forward`.

        Returns besides: `node_masked` bool [M], `region` [B, osm_dim], `image_projection`,
        `region_projection` [B, projection_dim].
        """
        c = self.config
        patches = self._patches(images, graph)
        if mask_noise is None:
            mask_noise = uniform(patches.shape[:2], images.device, generator)
        visible, restore, masked = mask_patches(mask_noise, c.mask_ratio)
        tokens = self._encode(patches, visible)[-1]
        prediction = self._decode(
            tokens, restore, self.rec_img_pos_embed, self.img_cross_modal_decoder
        )

        noise = node_noise
        if noise is None:
            noise = uniform((graph.nodes,), images.device, generator)
        capacity = c.max_masked_nodes
        if node_mask is None:
            node_mask = mask_nodes(graph, noise, c.node_mask_ratio)
            if capacity is None and "all_nodes" not in self.fixes:
                capacity = most_masked(graph, c.node_mask_ratio)
        features = self._node_features(graph)
        nodes = self._encode_nodes(features, node_mask, graph)

        # Quirk `whole_region`: the contrast sees the graph as it is masked for the consistency,
        # which saves encoding it twice.
        seen = nodes
        if "whole_region" in self.fixes:
            seen = self._encode_nodes(features, torch.zeros_like(node_mask), graph)
        region, has_region = self._read_out(seen, graph)
        # Quirk `whole_image`: the contrast sees the mean of the visible patch tokens only.
        shown = tokens
        if "whole_image" in self.fixes:
            shown = self._encode(patches)[-1]
        image_projection = self.img_consistency_prj(shown[:, 1:].mean(1))
        region_projection = self.osm_graph_consistency_prj(region)

        # Quirk `all_nodes`: only masked nodes enter the fusion, in the paper at most ten of a
        # chip's; after pretraining it is given all of them.
        entering = node_mask
        if "all_nodes" in self.fixes:
            # Where they are capped, the masked ones come first.
            entering, noise = torch.ones_like(node_mask), noise - node_mask.float()
        slot, valid = node_slots(graph, entering, noise, capacity)
        position = take(self.fusion_img_pos_embed[:, 1:].expand(len(tokens), -1, -1), visible)
        _, fused = self._fuse(tokens[:, 1:], position, nodes, slot, valid, graph)

        target = rows(features, slot)
        hidden = valid & rows(node_mask, slot).bool()
        losses = {
            "reconstruction": reconstruction_loss(prediction, patches, masked, weight),
            "contrast": contrast_loss(
                image_projection,
                region_projection,
                c.temperature,
                has_region,
                weight,
                pairs=pairs,
            ),
            "consistency": consistency_loss(self.osm_node_pred(fused), target, hidden, weight),
        }
        total = (
            losses["reconstruction"]
            + c.contrast_weight * losses["contrast"]
            + c.consistency_weight * losses["consistency"]
        )
        return {
            "total": total, **losses, "prediction": prediction, "masked": masked, "tokens": tokens,
            "node_masked": node_mask, "region": region, "image_projection": image_projection,
            "region_projection": region_projection,
        }  # fmt: skip

    @property
    def projections(self) -> tuple[nn.Module, nn.Module]:
        """See `PretrainModel.projections`."""
        return self.img_consistency_prj, self.osm_graph_consistency_prj

    def region_of(self, nodes: Tensor, graph: GraphBatch) -> Tensor:
        """See `PretrainModel.region_of`."""
        return self._read_out(nodes, graph)[0]

    def image_encoder(self) -> VisionTransformer:
        """See `PretrainModel.image_encoder`."""
        encoder = copy.deepcopy(self.img_encoder)
        encoder.cls_token.data.copy_(self.cls_token.data)
        encoder.pos_embed.data.copy_(self.img_pos_embed.data)
        encoder.norm = copy.deepcopy(self.img_norm)
        return encoder.requires_grad_(True)

    def _encode(
        self, patches: Tensor, visible: Tensor | None = None, layers: Sequence[int] = ()
    ) -> list[Tensor]:
        position = self.img_pos_embed
        first = self.cls_token + position[:, :1]
        tokens = self._tokens(patches, position[:, 1:], visible, [first])
        return self._through(tokens, layers, self.img_norm)

    def _encode_nodes(self, features: Tensor, masked: Tensor, graph: GraphBatch) -> Tensor:
        token = torch.cat([self.osm_mask_token[k] for k in KINDS])
        encoded = self.osm_encoder(features, masked, token, graph)
        normed = []
        for i, k in enumerate(KINDS):
            nodes = graph.kind_slice(i)
            if graph.alive is None or "node_norm" in self.fixes:
                normed.append(self.osm_norm[k](encoded[nodes]))
            else:
                normed.append(self.osm_norm[k](encoded[nodes], graph.alive[nodes]))
        return torch.cat(normed)

    def _read_out(self, nodes: Tensor, graph: GraphBatch) -> tuple[Tensor, Tensor]:
        """Region embedding [B, osm_dim], and bool [B]: has the chip any node?

        Quirk `type_attention`: the plain sum over kinds. A kind without nodes adds zero.
        """
        star, some = set2set(self.osm_read_out, nodes, graph)
        kinds = torch.stack([self.osm_aggr_mlp[k](star[i]) for i, k in enumerate(KINDS)])
        if "type_attention" in self.fixes:
            logit = self.type_attention(kinds).float().masked_fill(~some[..., None], -1e9)
            kinds = kinds * logit.softmax(0)
        return torch.where(some[..., None], kinds, 0.0).sum(0), some.any(0)

    def _fuse_all(
        self, patches: Tensor, nodes: Tensor, slot: Tensor, valid: Tensor, graph: GraphBatch
    ) -> Tensor:
        position = self.fusion_img_pos_embed[:, 1:]
        return self._fuse(patches, position, nodes, slot, valid, graph)[0]

    def _fuse(
        self,
        patches: Tensor,
        patch_position: Tensor,
        nodes: Tensor,
        slot: Tensor,
        valid: Tensor,
        graph: GraphBatch,
    ) -> tuple[Tensor, Tensor]:
        """Patches [B, L, embed_dim] and the nodes in the slots (`node_slots`) -> both, fused."""
        patches = self.img_fusion_mlp(patches)
        projected = torch.cat(
            [self.osm_node_fusion_mlp[k](nodes[graph.kind_slice(i)]) for i, k in enumerate(KINDS)]
        )
        node_position = self._node_positions(rows(graph.anchor, slot), rows(graph.kind(), slot))
        tokens = rows(projected, slot)
        for block in self.osm_cross_modal_encoder:
            patches, tokens = block(patches, tokens, patch_position, node_position, valid)
        return patches, tokens

    def _node_positions(self, anchor: Tensor, kind: Tensor) -> Tensor:
        """Anchors [.., 4, 2] in [0, 1] -> mean of their sin-cos embeddings [.., fusion_dim]."""
        # Quirk `centred_positions`: the middle of patch i is at i + 1/2 here, while its own
        # position is the integer i: nodes sit half a patch off.
        half = 0.5 if "centred_positions" in self.fixes else 0.0
        embedded = sincos(anchor * self.grid - half, self.config.fusion_dim)
        return (embedded * self.anchor_share[kind][..., None]).sum(-2)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _per_kind(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({kind: make() for kind in KINDS})
