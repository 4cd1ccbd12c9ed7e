"""`variant: geolink2`: what the same data can teach beyond the paper; see docs/model.md.

The image half is the paper's masked autoencoder. Each idea beyond it is a switch of
`Geolink2Config`, measured alone by benchmarks/ablation.py; with all of them off, and without
contrast and consistency, what is left learns from images only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from geolink.graph import GraphBatch
from geolink.models.base import PretrainModel
from geolink.models.context import ChipContext
from geolink.models.guided import GuidedBlock
from geolink.models.losses import Pairs, consistency_loss, contrast_loss, reconstruction_loss
from geolink.models.masking import mask_nodes, mask_patches, node_slots
from geolink.models.ops import grid_sincos, rows, sincos, take, uniform
from geolink.models.relations import ReadOut, RelationLayer
from geolink.models.supervision import correspondence, cover, dense_loss
from schemas.training import ModelConfig

_OF_NODES = {"contrast", "consistency"}
"""Tasks for which objects are encoded."""


class GeoLink2(PretrainModel):
    """Image encoder, OSM encoder, fusion, and the tasks that the config asks for.

    Args:
        config: sizes, loss weights, switches.
        tag_table: float [V, tag_dim], text embedding of every tag of the vocabulary; may be set
            later (`set_tag_table`). It is not trained and no part of the state dict.
    """

    fusion_position: Tensor
    decoder_position: Tensor

    def __init__(self, config: ModelConfig, tag_table: Tensor | None = None) -> None:
        super().__init__(config)
        c = config
        self.options = o = config.geolink2
        width, fused = c.embed_dim, c.fusion_dim
        weights = {
            "contrast": c.contrast_weight, "consistency": c.consistency_weight,
            "dense": o.dense_weight,
        }  # fmt: skip
        self.weights = {"reconstruction": 1.0, **{k: w for k, w in weights.items() if w > 0}}
        self.losses = tuple(self.weights)

        norm = partial(nn.LayerNorm, eps=1e-6)  # timm's, so that the encoder alone is the same
        self.img_encoder = VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, in_chans=c.bands, num_classes=0,
            global_pool="", embed_dim=width, depth=c.depth, num_heads=c.num_heads,
            reg_tokens=o.registers, no_embed_class=True, norm_layer=norm,
        )  # fmt: skip
        self.prefix = self.img_encoder.num_prefix_tokens
        self.img_decoder_mlp = nn.Linear(width, c.decoder_dim)
        self.img_mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.img_decoder = nn.ModuleList(
            [
                Block(c.decoder_dim, c.decoder_heads, qkv_bias=True, norm_layer=norm)
                for _ in range(c.decoder_depth)
            ]
        )
        self.img_decoder_norm = nn.LayerNorm(c.decoder_dim)
        self.img_decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.bands)

        self.osm_embed = nn.Linear(c.tag_dim, c.osm_dim)
        self.osm_kind = nn.Embedding(3, c.osm_dim)
        self.osm_extent = nn.Linear(1, c.osm_dim)
        self.osm_mask_token = nn.Parameter(torch.zeros(3, c.osm_dim))
        self.osm_encoder = RelationLayer(c.osm_dim, max(1, c.osm_dim // 32), o.relations)
        self.osm_norm = nn.LayerNorm(c.osm_dim)
        self.osm_read_out = ReadOut(c.osm_dim, o.kind_attention)

        self.img_projection = nn.Linear(width, c.projection_dim)
        self.region_projection = nn.Linear(c.osm_dim, c.projection_dim)

        self.img_fusion = nn.Linear(width, fused)
        self.osm_fusion = nn.Linear(c.osm_dim, fused)
        self.fusion = nn.ModuleList(
            [GuidedBlock(fused, c.fusion_heads, o.correspondence) for _ in range(c.fusion_depth)]
        )
        self.osm_node_pred = nn.Linear(fused, c.tag_dim)

        self.dense_head = nn.Linear(width, o.classes)

        # Parts without a task stay as they are: the model has one form whatever it learns from.
        for part, tasks in {
            (self.osm_embed, self.osm_kind, self.osm_extent, self.osm_encoder,
             self.osm_norm): _OF_NODES,
            (self.osm_read_out, self.img_projection, self.region_projection): {"contrast"},
            (self.img_fusion, self.osm_fusion, self.fusion, self.osm_node_pred): {"consistency"},
            (self.dense_head,): {"dense"},
        }.items():  # fmt: skip
            for module in part:
                module.requires_grad_(bool(self.weights.keys() & tasks))
        self.osm_mask_token.requires_grad_(bool(self.weights.keys() & _OF_NODES))
        self.register_buffer("fusion_position", grid_sincos(self.grid, fused)[:, 1:], False)
        self.register_buffer("decoder_position", grid_sincos(self.grid, c.decoder_dim), False)
        encoder = self.img_encoder
        tokens = (encoder.cls_token, encoder.reg_token, self.img_mask_token, self.osm_mask_token)
        self._initialise(token for token in tokens if token is not None)
        encoder.pos_embed.data.copy_(grid_sincos(self.grid, width)[:, 1:])
        encoder.pos_embed.requires_grad_(False)
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
        """See `PretrainModel.forward`."""
        c, o = self.config, self.options
        patches = self._patches(images, graph)
        if mask_noise is None:
            mask_noise = uniform(patches.shape[:2], images.device, generator)
        if node_noise is None:
            node_noise = uniform((graph.nodes,), images.device, generator)
        if node_mask is None:
            node_mask = mask_nodes(graph, node_noise, c.node_mask_ratio)
        visible, restore, masked = mask_patches(mask_noise, c.mask_ratio)
        tokens = self._encode(patches, visible)[-1]
        shown = tokens[:, self.prefix :]
        prediction = self._decode(tokens, restore, self.decoder_position, self.img_decoder)
        found = {"reconstruction": reconstruction_loss(prediction, patches, masked, weight)}

        if "dense" in self.weights:
            covered = take(cover(graph, patches.shape[1], o.classes), visible)
            found["dense"] = dense_loss(self.dense_head(shown), covered, weight)
        if self.weights.keys() & _OF_NODES:
            features = self._node_features(graph)
            nodes = self._encode_nodes(features, node_mask, graph)
        if "contrast" in self.weights:
            region, has_region = self.osm_read_out(nodes, graph)
            found["contrast"] = contrast_loss(
                self.img_projection(shown.mean(1)), self.region_projection(region), c.temperature,
                has_region, weight, pairs=pairs,
            )  # fmt: skip
        if "consistency" in self.weights:
            every = torch.ones_like(node_mask)
            slot, valid = node_slots(graph, every, node_noise, c.max_masked_nodes)
            shares = correspondence(graph, slot, valid, patches.shape[1])
            seen = take(shares.transpose(1, 2), visible).transpose(1, 2)
            position = take(self.fusion_position.expand(len(shown), -1, -1), visible)
            _, joined = self._fuse(shown, position, nodes, slot, valid, seen, graph)
            found["consistency"] = consistency_loss(
                self.osm_node_pred(joined), rows(features, slot), valid & rows(node_mask, slot),
                weight,
            )  # fmt: skip
        total = sum((w * found[name] for name, w in self.weights.items()), images.new_zeros(()))
        return {
            "total": total, **found, "prediction": prediction, "masked": masked, "tokens": tokens,
        }  # fmt: skip

    @property
    def projections(self) -> tuple[nn.Module, nn.Module]:
        """See `PretrainModel.projections`."""
        return self.img_projection, self.region_projection

    def region_of(self, nodes: Tensor, graph: GraphBatch) -> Tensor:
        """See `PretrainModel.region_of`; a chip's does not depend on the other chips."""
        region: Tensor = self.osm_read_out(nodes, graph)[0]
        return region

    def image_encoder(self) -> VisionTransformer:
        """See `PretrainModel.image_encoder`."""
        return copy.deepcopy(self.img_encoder).requires_grad_(True)

    def _encode(
        self, patches: Tensor, visible: Tensor | None = None, layers: Sequence[int] = ()
    ) -> list[Tensor]:
        encoder = self.img_encoder
        first = [encoder.cls_token] + ([] if encoder.reg_token is None else [encoder.reg_token])
        tokens = self._tokens(patches, encoder.pos_embed, visible, first)
        return self._through(tokens, layers, encoder.norm)

    def _encode_nodes(self, features: Tensor, masked: Tensor, graph: GraphBatch) -> Tensor:
        kind = graph.kind()
        x = torch.where(masked[:, None], self.osm_mask_token[kind], self.osm_embed(features))
        extent = graph.size.log1p()[:, None] / 10
        x = x.float() + self.osm_kind(kind) + self.osm_extent(extent)
        encoded: Tensor = self.osm_norm(self.osm_encoder(x, graph)).float()
        return encoded

    def _fuse_all(
        self, patches: Tensor, nodes: Tensor, slot: Tensor, valid: Tensor, graph: GraphBatch
    ) -> Tensor:
        shares = correspondence(graph, slot, valid, patches.shape[1])
        return self._fuse(patches, self.fusion_position, nodes, slot, valid, shares, graph)[0]

    def _fuse(
        self,
        patches: Tensor,
        patch_position: Tensor,
        nodes: Tensor,
        slot: Tensor,
        valid: Tensor,
        shares: Tensor,
        graph: GraphBatch,
    ) -> tuple[Tensor, Tensor]:
        """Patches [B, V, embed_dim] and the nodes in the slots -> both, fused."""
        patches, tokens = self.img_fusion(patches), rows(self.osm_fusion(nodes), slot)
        # The middle of patch i is at i + 1/2 in units of patches, its position is i.
        half = 0.5 if self.options.centred_positions else 0.0
        anchor = rows(graph.anchor, slot) * self.grid - half
        position = sincos(anchor, self.config.fusion_dim).mean(-2)
        for block in self.fusion:
            patches, tokens = block(patches, tokens, patch_position, position, valid, shares)
        return patches, tokens
