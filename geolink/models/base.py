"""What the variants share: an image encoder as a plain ViT, nodes with tags, a fusion of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geolink.graph import GraphBatch
from geolink.models.context import ChipContext
from geolink.models.losses import Pairs
from geolink.models.masking import node_slots
from geolink.models.ops import patchify, take, uniform, weighted_rows
from schemas.errors import GeoLinkError
from schemas.training import ModelConfig


class PretrainModel(nn.Module, ABC):
    """What is trained, saved and evaluated.

    Args:
        config: sizes and loss weights.
    """

    losses: tuple[str, ...]
    """Names of the parts of the loss that `forward` returns beside `total`."""
    prefix: int
    """Tokens before those of the patches: the class token, then registers."""
    tag_table: Tensor
    img_encoder: VisionTransformer
    img_decoder_mlp: nn.Linear
    img_mask_token: nn.Parameter
    img_decoder_norm: nn.LayerNorm
    img_decoder_pred: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch_size
        self._computed_again = False

    @abstractmethod
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
            context: where and when the chips were taken; used by no variant yet.
            mask_noise: float [B, L]; the patches with the least noise stay visible. Default: drawn.
            node_noise: float [M]; by it masked nodes are chosen, those with the least first.
                Default: drawn.
            node_mask: bool [M], nodes whose tags are hidden. Default: drawn.
            generator: of what is drawn, on the images' device. Attention dropout (training mode)
                uses the global generator.

        Returns:
            Scalars `total` and those of `losses`, and parts: `prediction` [B, L, patch_size² *
            bands], `masked` bool [B, L], `tokens` [B, prefix + visible, embed_dim] (class token
            and registers first, normed).
        """

    @abstractmethod
    def image_encoder(self) -> VisionTransformer:
        """A copy of the image encoder that stands alone, for timm and what builds on it.

        `forward_features` of it equals `encode_image`.
        """

    @property
    @abstractmethod
    def projections(self) -> tuple[nn.Module, nn.Module]:
        """Of image and region embeddings, into the space that the contrast aligns."""

    @abstractmethod
    def region_of(self, nodes: Tensor, graph: GraphBatch) -> Tensor:
        """`encode_region` from the embeddings of the nodes."""

    @abstractmethod
    def _encode(
        self, patches: Tensor, visible: Tensor | None = None, layers: Sequence[int] = ()
    ) -> list[Tensor]:
        """[..] outputs of the blocks in `layers`, rising, and the normed tokens, prefix first.

        Embeds only the visible patches (int64 [B, K]; default all).
        """

    @abstractmethod
    def _encode_nodes(self, features: Tensor, masked: Tensor, graph: GraphBatch) -> Tensor:
        """Embeddings float32 [M, osm_dim] of nodes, the tags of some hidden (bool [M])."""

    @abstractmethod
    def _fuse_all(
        self, patches: Tensor, nodes: Tensor, slot: Tensor, valid: Tensor, graph: GraphBatch
    ) -> Tensor:
        """All patches, fused with the nodes in the slots (`node_slots`): [B, L, fusion_dim]."""

    def set_tag_table(self, table: Tensor) -> None:
        """Set the text embeddings of the tags: float [V, tag_dim], kept as float32, not trained.

        Raises GeoLinkError if its width is not the config's.
        """
        if table.ndim != 2 or table.shape[1] != self.config.tag_dim:
            raise GeoLinkError(
                f"the tag table has shape {list(table.shape)}, not [tags, {self.config.tag_dim}]: "
                "set the model's tag_dim to the width of the dataset's tag embeddings"
            )
        device = next(self.parameters()).device
        table = table.detach().to(device, torch.float32)
        self.register_buffer("tag_table", table, persistent=False)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Whether a block of the image encoder or decoder keeps its input only, and is computed
        again on the way back: the same gradients for less memory and more time.
        """
        self._computed_again = on

    def encode_image(self, images: Tensor) -> Tensor:
        """All tokens of images [B, bands, H, W]: [B, prefix + L, embed_dim], normed, class first,
        then the registers.
        """
        return self.image_tokens(images)[-1]

    def image_tokens(self, images: Tensor, layers: Sequence[int] = ()) -> list[Tensor]:
        """[.., B, prefix + L, embed_dim]: outputs of the blocks in `layers`, each once, rising,
        not normed; and last the normed tokens."""
        return self._encode(self._patches(images), layers=layers)

    def embed_image(self, images: Tensor) -> Tensor:
        """Mean of the normed patch tokens, the class token left out: [B, embed_dim].

        What the contrast trains, so the image embedding to use.
        """
        return self.encode_image(images)[:, self.prefix :].mean(1)

    def encode_region(self, graph: GraphBatch) -> Tensor:
        """Embedding of the chips' OSM, nothing masked: [B, osm_dim]; zero for chips without nodes.

        Quirk of `paper`: depends on the other chips of the batch (`GraphLayerNorm`).
        """
        return self.region_of(self.encode_nodes(graph), graph)

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

        Patch tokens after the block, not normed. As in the published code, in the place of the
        last block's come those of the fusion with OSM (C = fusion_dim). All nodes of a chip enter
        the fusion, or a random `max_nodes` (published code: 50).
        Raises GeoLinkError if a layer does not exist.
        """
        last = self.config.depth - 1
        if wrong := [i for i in layers if not 0 <= i <= last]:
            raise GeoLinkError(f"layer {wrong[0]} does not exist: the encoder has 0 to {last}")
        *blocks, normed = self._encode(self._patches(images, graph), layers=layers)
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
        """Normed patch tokens [B, L, embed_dim] that have looked at the nodes: [B, L, fusion_dim].

        nodes: their embeddings [M, osm_dim]; all of a chip's, or a random `max_nodes`, are seen.
        """
        every = torch.ones_like(graph.chip, dtype=torch.bool)
        noise = uniform((graph.nodes,), patches.device, generator)
        slot, valid = node_slots(graph, every, noise, max_nodes)
        return self._fuse_all(patches, nodes, slot, valid, graph)

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

    def _tokens(
        self,
        patches: Tensor,
        position: Tensor,
        visible: Tensor | None,
        first: Sequence[Tensor],
    ) -> Tensor:
        """Embedded visible patches behind the tokens that come `first` ([1, n, embed_dim] each).

        position: [1, L, embed_dim], of the patches.
        """
        project = self.img_encoder.patch_embed.proj
        position = position.expand(len(patches), -1, -1)
        if visible is not None:
            patches, position = take(patches, visible), take(position, visible)
        weight = project.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as patchify
        tokens = F.linear(patches, weight, project.bias) + position
        return torch.cat([*(t.expand(len(tokens), -1, -1) for t in first), tokens], 1)

    def _through(self, tokens: Tensor, layers: Sequence[int], norm: nn.Module) -> list[Tensor]:
        """The blocks of the image encoder, and a norm; returns as `_encode`."""
        outputs = []
        for i, block in enumerate(self.img_encoder.blocks):
            tokens = self._run(block, tokens)
            if i in layers:
                outputs.append(tokens)
        return [*outputs, norm(tokens)]

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        again = self._computed_again and torch.is_grad_enabled()
        # The blocks draw nothing at random, so no state of generators has to be kept.
        done: Tensor = (
            checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
            if again
            else block(tokens)
        )
        return done

    def _decode(
        self, tokens: Tensor, restore: Tensor, position: Tensor, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Visible tokens -> predicted pixels of all patches [B, L, patch_size² * bands].

        position: [1, 1 + L, decoder_dim], of the class token and the patches.
        """
        tokens = self.img_decoder_mlp(tokens)
        first, shown = tokens[:, :1], tokens[:, self.prefix :]
        hidden = self.img_mask_token.expand(len(restore), restore.shape[1] - shown.shape[1], -1)
        patches = take(torch.cat([shown, hidden.to(shown.dtype)], 1), restore)
        tokens = torch.cat([first, patches], 1) + position
        for block in blocks:
            tokens = self._run(block, tokens)
        prediction: Tensor = self.img_decoder_pred(self.img_decoder_norm(tokens)[:, 1:])
        return prediction

    def _node_features(self, graph: GraphBatch) -> Tensor:
        """Weighted mean of each node's tag embeddings: float32 [M, tag_dim]; without tags zero."""
        return weighted_rows(self.tag_table, graph.tag, graph.tag_offset, graph.tag_weight)

    def _initialise(self, tokens: Iterable[Tensor]) -> None:
        """Weights as MAE's: Xavier for linear layers and patches, normal (0.02) for tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        project = self.img_encoder.patch_embed.proj
        nn.init.xavier_uniform_(project.weight.view(self.config.embed_dim, -1))
        nn.init.zeros_(project.bias)
        for token in tokens:
            nn.init.normal_(token, std=0.02)
