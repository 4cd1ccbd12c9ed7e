"""`variant: paper`: GeoLink (NeurIPS 2025, arXiv 2509.26016) as its checkpoints expect it.

Parameter names and shapes are those of the published checkpoints. Behaviour of the published code
that its weights depend on is kept, and marked "Quirk" where it is; those with a name can be put
right by naming them in `ModelConfig.fixes` (docs/model.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geolink.graph import KINDS, GraphBatch
from geolink.models.context import ChipContext
from geolink.models.fusion import TwoWayBlock
from geolink.models.losses import (
    Pairs,
    consistency_loss,
    contrast_loss,
    reconstruction_loss,
)
from geolink.models.masking import mask_nodes, mask_patches, most_masked, node_slots
from geolink.models.ops import grid_sincos, patchify, sincos, take, uniform, weighted_rows
from geolink.models.osm import GraphLayerNorm, OsmEncoder, Set2Set, set2set
from schemas.errors import GeoLinkError
from schemas.training import ModelConfig

# Share of each of a node's four anchors in its position, by kind: a point's one, a line's first
# three (the fourth repeats the third), a polygon's four.
_ANCHOR_SHARE = ((1.0, 0.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3, 0.0), (0.25, 0.25, 0.25, 0.25))


class GeoLink(nn.Module):
    """Image encoder, OSM encoder, fusion and the three pretraining tasks.

    Args:
        config: sizes and loss weights.
        tag_table: float [V, tag_dim], text embedding of every tag of the vocabulary; may be set
            later (`set_tag_table`). It is not trained and no part of the state dict.
    """

    losses: ClassVar[tuple[str, ...]] = ("reconstruction", "contrast", "consistency")
    """Names of the parts of the loss that `forward` returns beside `total`."""

    prefix: ClassVar[int] = 1
    """Tokens before those of the patches."""

    tag_table: Tensor
    anchor_share: Tensor

    def __init__(self, config: ModelConfig, tag_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.grid = c.image_size // c.patch_size
        width, fused = c.embed_dim, c.fusion_dim
        self.fixes = frozenset(c.fixes)
        self._computed_again = False

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
        self._initialise()
        self.set_tag_table(torch.zeros(0, c.tag_dim) if tag_table is None else tag_table)

    def set_tag_table(self, table: Tensor) -> None:
        """Set the text embeddings of the tags: float [V, tag_dim], kept as float32, not trained.

        Raises GeoLinkError if its width is not the config's.
        """
        if table.ndim != 2 or table.shape[1] != self.config.tag_dim:
            raise GeoLinkError(
                f"the tag table has shape {list(table.shape)}, not [tags, {self.config.tag_dim}]: "
                "set the model's tag_dim to the width of the dataset's tag embeddings"
            )
        table = table.detach().to(self.cls_token.device, torch.float32)
        self.register_buffer("tag_table", table, persistent=False)

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
        """One pretraining pass.

        Args:
            images: float [B, bands, image_size, image_size], normalised.
            graph: the chips' OSM graphs.
            weight: float32 [B], how much each chip counts in the losses. Default: 1.
            pairs: chips that the contrast does not tell apart. Default: it tells all apart.
            context: not used by this variant.
            mask_noise: float [B, L]; the patches with the least noise stay visible. Default: drawn.
            node_noise: float [M]; by it masked nodes are chosen, those with the least first.
                Default: drawn.
            node_mask: bool [M], nodes whose tags are hidden. Default: drawn.
            generator: of what is drawn, on the images' device. Attention dropout (training mode)
                uses the global generator.

        Returns:
            Scalars `total`, `reconstruction`, `contrast`, `consistency`, and parts: `prediction`
            [B, L, patch_size² * bands], `masked` bool [B, L], `tokens` [B, 1 + visible, embed_dim]
            (class token first, normed), `node_masked` bool [M], `region` [B, osm_dim],
            `image_projection`, `region_projection` [B, projection_dim].
        """
        c = self.config
        patches = self._patches(images, graph)
        if mask_noise is None:
            mask_noise = uniform(patches.shape[:2], images.device, generator)
        visible, restore, masked = mask_patches(mask_noise, c.mask_ratio)
        tokens = self._encode_patches(patches, visible)[-1]
        prediction = self._decode(tokens, restore)

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
            shown = self._encode_patches(patches)[-1]
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

        target = _rows(features, slot)
        hidden = valid & _rows(node_mask, slot).bool()
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

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether a block of the image encoder or decoder keeps its input only, and is computed
        again on the way back: the same gradients for less memory and more time.
        """
        self._computed_again = on

    def encode_image(self, images: Tensor) -> Tensor:
        """All tokens of images [B, bands, H, W]: [B, 1 + L, embed_dim], normed, class first."""
        return self.image_tokens(images)[-1]

    def image_tokens(self, images: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """[.., B, 1 + L, embed_dim]: outputs of the blocks in `layers`, each once, rising, not
        normed; and last the normed tokens, class first."""
        return self._encode_patches(self._patches(images), layers=layers)

    def embed_image(self, images: Tensor) -> Tensor:
        """Mean of the normed patch tokens, the class token left out: [B, embed_dim].

        What the contrast trains, so the image embedding to use.
        """
        return self.encode_image(images)[:, 1:].mean(1)

    def encode_region(self, graph: GraphBatch) -> Tensor:
        """Embedding of the chips' OSM, nothing masked: [B, osm_dim]; zero for chips without nodes.

        Quirk: depends on the other chips of the batch (`GraphLayerNorm`).
        """
        return self.region_of(self.encode_nodes(graph), graph)

    def region_of(self, nodes: Tensor, graph: GraphBatch) -> Tensor:
        """`encode_region` from the embeddings of the nodes."""
        return self._read_out(nodes, graph)[0]

    def encode_nodes(self, graph: GraphBatch) -> Tensor:
        """Embeddings of all nodes, nothing masked: float32 [M, osm_dim]."""
        none = torch.zeros_like(graph.chip, dtype=torch.bool)
        return self._encode_nodes(self._node_features(graph), none, graph)

    def fusion_embedding(
        self,
        images: Tensor,
        graph: GraphBatch,
        layers: Sequence[int],
        *,
        max_nodes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Feature maps for dense tasks: for each block in `layers`, [B, C, grid, grid].

        Patch tokens after the block, not normed. Quirk: in the place of the last block's come
        those of the fusion with OSM (C = fusion_dim). All nodes of a chip enter the fusion, or a
        random `max_nodes` (published code: 50).
        Raises GeoLinkError if a layer does not exist.
        """
        last = self.config.depth - 1
        if wrong := [i for i in layers if not 0 <= i <= last]:
            raise GeoLinkError(f"layer {wrong[0]} does not exist: the encoder has 0 to {last}")
        *blocks, normed = self._encode_patches(self._patches(images, graph), layers=layers)
        maps = {i: tokens[:, 1:] for i, tokens in zip(sorted(set(layers)), blocks)}
        if last in maps:
            nodes = self.encode_nodes(graph)
            maps[last] = self.fuse(
                normed[:, 1:], nodes, graph, max_nodes=max_nodes, generator=generator
            )
        return [
            maps[i].transpose(1, 2).reshape(len(images), -1, self.grid, self.grid) for i in layers
        ]

    def fuse(
        self,
        patches: Tensor,
        nodes: Tensor,
        graph: GraphBatch,
        *,
        max_nodes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normed patch tokens [B, L, embed_dim] that have looked at the nodes: [B, L, fusion_dim].

        nodes: their embeddings [M, osm_dim]; all of a chip's, or a random `max_nodes`, are seen.
        """
        every = torch.ones_like(graph.chip, dtype=torch.bool)
        noise = uniform((graph.nodes,), patches.device, generator)
        slot, valid = node_slots(graph, every, noise, max_nodes)
        return self._fuse(
            patches, self.fusion_img_pos_embed[:, 1:], nodes, slot, valid, graph
        )[0]  # fmt: skip

    def image_encoder(self) -> VisionTransformer:
        """A copy of the image encoder that stands alone, for timm and what builds on it.

        `forward_features` of it equals `encode_image`.
        """
        encoder = copy.deepcopy(self.img_encoder)
        encoder.cls_token.data.copy_(self.cls_token.data)
        encoder.pos_embed.data.copy_(self.img_pos_embed.data)
        encoder.norm = copy.deepcopy(self.img_norm)
        return encoder.requires_grad_(True)

    def _patches(self, images: Tensor, graph: GraphBatch | None = None) -> Tensor:
        c = self.config
        expected = (c.bands, c.image_size, c.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise GeoLinkError(
                f"images have shape {list(images.shape)}, the model takes "
                f"[batch, {', '.join(map(str, expected))}]"
            )
        if graph is not None and graph.chips != len(images):
            raise GeoLinkError(f"{len(images)} images came with graphs of {graph.chips} chips")
        return patchify(images, c.patch_size)

    def _encode_patches(
        self, patches: Tensor, visible: Tensor | None = None, layers: Sequence[int] = ()
    ) -> list[Tensor]:
        """[..] outputs of the blocks in `layers`, rising, and the normed tokens, class first.

        Embeds only the visible patches (int64 [B, K]; default all).
        """
        position = self.img_pos_embed[:, 1:].expand(len(patches), -1, -1)
        if visible is not None:
            patches, position = take(patches, visible), take(position, visible)
        project = self.patch_embed.proj
        weight = project.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as patchify
        tokens = F.linear(patches, weight, project.bias) + position
        first = (self.cls_token + self.img_pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens = torch.cat([first, tokens], 1)
        outputs = []
        for i, block in enumerate(self.img_encoder.blocks):
            tokens = self._run(block, tokens)
            if i in layers:
                outputs.append(tokens)
        return [*outputs, self.img_norm(tokens)]

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        again = self._computed_again and torch.is_grad_enabled()
        # The blocks draw nothing at random, so no state of generators has to be kept.
        done: Tensor = (
            checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
            if again
            else block(tokens)
        )
        return done

    def _decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Visible tokens -> predicted pixels of all patches [B, L, patch_size² * bands]."""
        tokens = self.img_decoder_mlp(tokens)
        batch, length = restore.shape
        hidden = self.img_mask_token.expand(batch, length + 1 - tokens.shape[1], -1)
        patches = take(torch.cat([tokens[:, 1:], hidden.to(tokens.dtype)], 1), restore)
        tokens = torch.cat([tokens[:, :1], patches], 1) + self.rec_img_pos_embed
        for block in self.img_cross_modal_decoder:
            tokens = self._run(block, tokens)
        prediction: Tensor = self.img_decoder_pred(self.img_decoder_norm(tokens)[:, 1:])
        return prediction

    def _node_features(self, graph: GraphBatch) -> Tensor:
        """Weighted mean of each node's tag embeddings: float32 [M, tag_dim]; without tags zero."""
        return weighted_rows(self.tag_table, graph.tag, graph.tag_offset, graph.tag_weight)

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
        node_position = self._node_positions(_rows(graph.anchor, slot), _rows(graph.kind(), slot))
        tokens = _rows(projected, slot)
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

    def _initialise(self) -> None:
        """Weights as MAE's: Xavier for linear layers, normal (0.02) for tokens, fixed positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        tokens = (self.cls_token, self.img_mask_token, *self.osm_mask_token.values())
        for token in tokens:
            nn.init.normal_(token, std=0.02)
        self.img_encoder.norm.requires_grad_(False)
        self.type_attention.requires_grad_("type_attention" in self.fixes)
        self.img_encoder.cls_token.requires_grad_(False)
        self.img_encoder.pos_embed.requires_grad_(False)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`; where there are no values at all (a batch without any node), zeros."""
    if len(values):
        return values[index]
    # The empty sum keeps the gradient's graph whole, so that no parameter is left without one.
    return values.sum(0).expand(*index.shape, *values.shape[1:])


def _per_kind(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({kind: make() for kind in KINDS})
