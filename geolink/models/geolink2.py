"""`variant: geolink2`: what the same data can teach beyond the paper; see docs/model.md.

The image half is the paper's masked autoencoder. Each idea beyond it is a switch of
`Geolink2Config`, measured alone by benchmarks/ablation.py; with all of them off, and without
contrast and consistency, what is left learns from images only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geolink.graph import GraphBatch
from geolink.models.context import ChipContext
from geolink.models.guided import GuidedBlock
from geolink.models.losses import (
    Pairs,
    consistency_loss,
    contrast_loss,
    not_negative,
    reconstruction_loss,
)
from geolink.models.masking import mask_nodes, mask_patches, node_slots
from geolink.models.ops import grid_sincos, patchify, sincos, take, weighted_rows
from geolink.models.relations import ReadOut, RelationLayer
from geolink.models.supervision import (
    class_loss,
    correspondence,
    cover,
    dense_loss,
    patch_object_loss,
    sigmoid_loss,
)
from schemas.errors import GeoLinkError
from schemas.training import ModelConfig

_PATCHES_PER_CHIP = 8
"""Visible patches of a chip that enter the contrast with objects."""

_OF_NODES = {"contrast", "consistency", "patch_object"}
"""Tasks for which objects are encoded."""


class GeoLink2(nn.Module):
    """Image encoder, OSM encoder, fusion, and the tasks that the config asks for.

    Args:
        config: sizes, loss weights, switches.
        tag_table: float [V, tag_dim], text embedding of every tag of the vocabulary; may be set
            later (`set_tag_table`). It is not trained and no part of the state dict.
    """

    tag_table: Tensor
    fusion_position: Tensor
    decoder_position: Tensor

    def __init__(self, config: ModelConfig, tag_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.options = o = config.geolink2
        self.grid = c.image_size // c.patch_size
        self._computed_again = False
        width, fused = c.embed_dim, c.fusion_dim
        weights = {
            "contrast": c.contrast_weight, "consistency": c.consistency_weight,
            "dense": o.dense_weight, "objects": o.object_weight,
            "patch_object": o.patch_object_weight,
        }  # fmt: skip
        self.weights = {"reconstruction": 1.0, **{k: w for k, w in weights.items() if w > 0}}
        self.losses = tuple(self.weights)
        """Names of the parts of the loss that `forward` returns beside `total`."""

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
        # Zhai et al. 2023, §3.1: most pairs do not match, and the bias says so from the start.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.match_bias = nn.Parameter(torch.tensor(-10.0))

        self.img_fusion = nn.Linear(width, fused)
        self.osm_fusion = nn.Linear(c.osm_dim, fused)
        self.fusion = nn.ModuleList(
            [GuidedBlock(fused, c.fusion_heads, o.correspondence) for _ in range(c.fusion_depth)]
        )
        self.osm_node_pred = nn.Linear(fused, c.tag_dim)

        self.dense_head = nn.Linear(width, o.classes)
        self.object_head = nn.Linear(width, o.classes)
        self.patch_projection = nn.Linear(width, c.projection_dim)
        self.object_projection = nn.Linear(c.osm_dim, c.projection_dim)

        # Parts without a task stay as they are: the model has one form whatever it learns from.
        for part, tasks in {
            (self.osm_embed, self.osm_kind, self.osm_extent, self.osm_encoder,
             self.osm_norm): _OF_NODES,
            (self.osm_read_out, self.img_projection, self.region_projection): {"contrast"},
            (self.img_fusion, self.osm_fusion, self.fusion, self.osm_node_pred): {"consistency"},
            (self.dense_head,): {"dense"},
            (self.object_head,): {"objects"},
            (self.patch_projection, self.object_projection): {"patch_object"},
        }.items():  # fmt: skip
            for module in part:
                module.requires_grad_(bool(self.weights.keys() & tasks))
        self.osm_mask_token.requires_grad_(bool(self.weights.keys() & _OF_NODES))
        for scalar in (self.log_scale, self.match_bias):
            scalar.requires_grad_(o.sigmoid and "contrast" in self.weights)
        self.register_buffer("fusion_position", grid_sincos(self.grid, fused)[:, 1:], False)
        self.register_buffer("decoder_position", grid_sincos(self.grid, c.decoder_dim), False)
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
        table = table.detach().to(self.img_mask_token.device, torch.float32)
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
        """One pretraining pass; arguments as those of `GeoLink.forward`.

        Returns:
            Scalars `total` and those of `losses`, and parts: `prediction`
            [B, L, patch_size² * bands], `masked` bool [B, L], `tokens` [B, prefix + visible,
            embed_dim] (class token and registers first, normed).
        """
        c, o = self.config, self.options
        patches = self._patches(images, graph)
        if mask_noise is None:
            mask_noise = torch.rand(patches.shape[:2], device=images.device, generator=generator)
        if node_noise is None:
            node_noise = torch.rand(graph.nodes, device=images.device, generator=generator)
        slot, valid = node_slots(
            graph, torch.ones_like(graph.living()), node_noise, c.max_masked_nodes
        )
        shares = correspondence(graph, slot, valid, self.grid**2)
        osm_class = _rows(graph.osm_class, slot) * valid
        covered = cover(graph, self.grid**2, o.classes)
        if o.guided_masking > 0:
            # What OSM says of a patch can be known without seeing it.
            mask_noise = mask_noise + o.guided_masking * covered.amax(-1)
        visible, restore, masked = mask_patches(mask_noise, c.mask_ratio)
        tokens = self._encode(images, visible)[-1]
        shown = tokens[:, self.prefix :]
        prediction = self._decode(tokens, restore)
        found = {"reconstruction": reconstruction_loss(prediction, patches, masked, weight)}

        seen = take(shares.transpose(1, 2), visible).transpose(1, 2)
        if "dense" in self.weights:
            found["dense"] = dense_loss(self.dense_head(shown), take(covered, visible), weight)
        if "objects" in self.weights:
            area = seen.sum(-1, keepdim=True)
            pooled = torch.bmm(seen.to(shown.dtype), shown) / area.clamp(min=1e-6)
            found["objects"] = class_loss(
                self.object_head(pooled), osm_class, area[..., 0] > 0, weight
            )
        if node_mask is None:
            node_mask = mask_nodes(graph, node_noise, c.node_mask_ratio)
        if self.weights.keys() & _OF_NODES:
            features = self._node_features(graph)
            nodes = self._encode_nodes(features, node_mask, graph)
        if "contrast" in self.weights:
            found["contrast"] = self._contrast(shown, nodes, graph, weight, pairs)
        if "consistency" in self.weights:
            position = take(self.fusion_position.expand(len(shown), -1, -1), visible)
            _, joined = self._fuse(shown, position, nodes, slot, valid, seen, graph)
            found["consistency"] = consistency_loss(
                self.osm_node_pred(joined), _rows(features, slot),
                valid & _rows(node_mask, slot), weight,
            )  # fmt: skip
        if "patch_object" in self.weights:
            found["patch_object"] = self._patch_object(shown, nodes, slot, seen, osm_class)
        total = sum((w * found[name] for name, w in self.weights.items()), images.new_zeros(()))
        return {
            "total": total, **found, "prediction": prediction, "masked": masked, "tokens": tokens,
        }  # fmt: skip

    def checkpoint_activations(self, on: bool = True) -> None:
        """See `GeoLink.checkpoint_activations`."""
        self._computed_again = on

    def encode_image(self, images: Tensor) -> Tensor:
        """All tokens of images [B, bands, H, W]: [B, prefix + L, embed_dim], normed, class first,
        then the registers.
        """
        return self.image_tokens(images)[-1]

    def image_tokens(self, images: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """See `GeoLink.image_tokens`; registers follow the class token."""
        self._patches(images)
        return self._encode(images, layers=layers)

    def embed_image(self, images: Tensor) -> Tensor:
        """Mean of the normed patch tokens: [B, embed_dim]."""
        return self.encode_image(images)[:, self.prefix :].mean(1)

    def encode_region(self, graph: GraphBatch) -> Tensor:
        """Embedding of the chips' OSM, nothing masked: [B, osm_dim]; zero for chips without nodes.

        A chip's does not depend on the other chips.
        """
        return self.region_of(self.encode_nodes(graph), graph)

    def region_of(self, nodes: Tensor, graph: GraphBatch) -> Tensor:
        """`encode_region` from the embeddings of the nodes."""
        region: Tensor = self.osm_read_out(nodes, graph)[0]
        return region

    def encode_nodes(self, graph: GraphBatch) -> Tensor:
        """Embeddings of all nodes, nothing masked: float32 [M, osm_dim]."""
        none = torch.zeros_like(graph.living())
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

        Patch tokens after the block, not normed; in the place of the last block's those of the
        fusion with OSM (C = fusion_dim), which all nodes of a chip enter, or a random `max_nodes`.
        Raises GeoLinkError if a layer does not exist.
        """
        last = self.config.depth - 1
        if wrong := [i for i in layers if not 0 <= i <= last]:
            raise GeoLinkError(f"layer {wrong[0]} does not exist: the encoder has 0 to {last}")
        self._patches(images, graph)
        *blocks, normed = self._encode(images, layers=layers)
        maps = {i: tokens[:, self.prefix :] for i, tokens in zip(sorted(set(layers)), blocks)}
        if last in maps:
            maps[last] = self.fuse(
                normed[:, self.prefix :], self.encode_nodes(graph), graph, max_nodes=max_nodes,
                generator=generator,
            )  # fmt: skip
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
        """See `GeoLink.fuse`."""
        noise = torch.rand(graph.nodes, device=patches.device, generator=generator)
        slot, valid = node_slots(graph, torch.ones_like(graph.living()), noise, max_nodes)
        shares = correspondence(graph, slot, valid, self.grid**2)
        return self._fuse(patches, self.fusion_position, nodes, slot, valid, shares, graph)[0]

    def image_encoder(self) -> VisionTransformer:
        """A copy of the image encoder that stands alone, for timm and what builds on it.

        `forward_features` of it equals `encode_image`.
        """
        return copy.deepcopy(self.img_encoder).requires_grad_(True)

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

    def _encode(
        self, images: Tensor, visible: Tensor | None = None, layers: Sequence[int] = ()
    ) -> list[Tensor]:
        """[..] outputs of the blocks in `layers`, rising, and the normed tokens, prefix first.

        Embeds only the visible patches (int64 [B, K]; default all).
        """
        encoder = self.img_encoder
        patches = patchify(images, self.config.patch_size)
        position = encoder.pos_embed.expand(len(patches), -1, -1)
        if visible is not None:
            patches, position = take(patches, visible), take(position, visible)
        project = encoder.patch_embed.proj
        weight = project.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as patchify
        tokens = F.linear(patches, weight, project.bias) + position
        prefix = [encoder.cls_token] + ([] if encoder.reg_token is None else [encoder.reg_token])
        tokens = torch.cat([*(t.expand(len(tokens), -1, -1) for t in prefix), tokens], 1)
        outputs = []
        for i, block in enumerate(encoder.blocks):
            tokens = self._run(block, tokens)
            if i in layers:
                outputs.append(tokens)
        return [*outputs, encoder.norm(tokens)]

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if not (self._computed_again and torch.is_grad_enabled()):
            plain: Tensor = block(tokens)
            return plain
        # The blocks draw nothing at random, so no state of generators has to be kept.
        done: Tensor = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
        return done

    def _decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Visible tokens -> predicted pixels of all patches [B, L, patch_size² * bands]."""
        tokens = self.img_decoder_mlp(tokens)
        first, shown = tokens[:, :1], tokens[:, self.prefix :]
        hidden = self.img_mask_token.expand(len(restore), restore.shape[1] - shown.shape[1], -1)
        patches = take(torch.cat([shown, hidden.to(shown.dtype)], 1), restore)
        tokens = torch.cat([first, patches], 1) + self.decoder_position
        for block in self.img_decoder:
            tokens = self._run(block, tokens)
        prediction: Tensor = self.img_decoder_pred(self.img_decoder_norm(tokens)[:, 1:])
        return prediction

    def _node_features(self, graph: GraphBatch) -> Tensor:
        """Weighted mean of each node's tag embeddings: float32 [M, tag_dim]; without tags zero."""
        return weighted_rows(self.tag_table, graph.tag, graph.tag_offset, graph.tag_weight)

    def _encode_nodes(self, features: Tensor, masked: Tensor, graph: GraphBatch) -> Tensor:
        kind = graph.kind()
        x = torch.where(masked[:, None], self.osm_mask_token[kind], self.osm_embed(features))
        extent = graph.size.log1p()[:, None] / 10
        x = x.float() + self.osm_kind(kind) + self.osm_extent(extent)
        encoded: Tensor = self.osm_norm(self.osm_encoder(x, graph)).float()
        return encoded

    def _contrast(
        self,
        shown: Tensor,
        nodes: Tensor,
        graph: GraphBatch,
        weight: Tensor | None,
        pairs: Pairs | None,
    ) -> Tensor:
        region, has_region = self.osm_read_out(nodes, graph)
        image, region = self.img_projection(shown.mean(1)), self.region_projection(region)
        if not self.options.sigmoid:
            return contrast_loss(
                image, region, self.config.temperature, has_region, weight, pairs=pairs
            )
        out = None if pairs is None else not_negative(pairs)
        return sigmoid_loss(
            image, region, self.log_scale, self.match_bias, has_region, weight, out
        )  # fmt: skip

    def _patch_object(
        self, shown: Tensor, nodes: Tensor, slot: Tensor, shares: Tensor, osm_class: Tensor
    ) -> Tensor:
        """Contrast between patches and the object that each has most of."""
        # Visible patches come in order of noise, so the first ones are a random choice.
        shares, shown = shares[..., :_PATCHES_PER_CHIP], shown[:, :_PATCHES_PER_CHIP]
        most, place = shares.max(1)
        node = slot.gather(1, place).flatten()
        kept = (most > 0.05).flatten()
        return patch_object_loss(
            self.patch_projection(shown).flatten(0, 1),
            self.object_projection(_rows(nodes, node)),
            osm_class.gather(1, place).flatten(),
            kept,
            self.config.temperature,
        )

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
        patches, tokens = self.img_fusion(patches), _rows(self.osm_fusion(nodes), slot)
        # The middle of patch i is at i + 1/2 in units of patches, its position is i.
        half = 0.5 if self.options.centred_positions else 0.0
        anchor = _rows(graph.anchor, slot) * self.grid - half
        position = sincos(anchor, self.config.fusion_dim).mean(-2)
        for block in self.fusion:
            patches, tokens = block(patches, tokens, patch_position, position, valid, shares)
        return patches, tokens

    def _initialise(self) -> None:
        """Weights as MAE's: Xavier for linear layers, normal (0.02) for tokens, fixed positions."""
        encoder = self.img_encoder
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.zeros_(encoder.patch_embed.proj.bias)
        tokens = (encoder.cls_token, encoder.reg_token, self.img_mask_token, self.osm_mask_token)
        for token in tokens:
            if token is not None:
                nn.init.normal_(token, std=0.02)
        encoder.pos_embed.data.copy_(grid_sincos(self.grid, self.config.embed_dim)[:, 1:])
        encoder.pos_embed.requires_grad_(False)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`; where there are no values at all (a batch without any node), zeros."""
    if len(values):
        return values[index]
    # The empty sum keeps the gradient's graph whole, so that no parameter is left without one.
    return values.sum(0, dtype=values.dtype).expand(*index.shape, *values.shape[1:])
