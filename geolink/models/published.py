"""Reading checkpoints in the layout of the published model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geolink.models.paper import GeoLink
from schemas.errors import GeoLinkError
from schemas.training import ModelConfig

PAPER_VIT_LARGE = ModelConfig(
    image_size=224, patch_size=16, bands=3, embed_dim=1024, depth=24, num_heads=16,
    tag_dim=512, osm_dim=128, fusion_dim=256, fusion_depth=1, fusion_heads=16, projection_dim=64,
    decoder_dim=512, decoder_depth=2, decoder_heads=16, max_masked_nodes=10,
)  # fmt: skip
"""The published model: ViT-L/16 at 224 px, CLIP tag embeddings."""

_PATCH_EMBED = "patch_embed.proj."


def load_published(path: Path | str, config: ModelConfig = PAPER_VIT_LARGE) -> GeoLink:
    """Load a checkpoint of the published code, or a safetensors file of the same names.

    Accepts the multimodal layout (attention weights under `lin`, or stored twice as `lin_src` and
    `lin_dst`) and the unimodal one (a plain timm VisionTransformer), of which only the image
    encoder comes: the rest keeps its initial weights. Nothing in the file is executed.

    Raises GeoLinkError if the file cannot be read, or naming every parameter that is missing, is
    none of the model's, has another shape, or is stored twice with two values.
    """
    path = Path(path)
    state = _read(path)
    model = GeoLink(config)
    unimodal = "img_norm.weight" not in state and "norm.weight" in state
    state, problems = _from_unimodal(state) if unimodal else _from_multimodal(state)

    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if unimodal:
        expected = {k: v for k, v in expected.items() if k.startswith(_UNIMODAL_TARGETS)}
    problems += [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not the model's" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise GeoLinkError(
            f"{path} does not fit the model (check its config): {'; '.join(sorted(problems))}"
        )
    model.load_state_dict(state, strict=not unimodal)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file or a torch checkpoint (weights only, no code)."""
    if not path.is_file():
        raise GeoLinkError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise GeoLinkError(f"{path} is no readable checkpoint: {error}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise GeoLinkError(f"{path} holds no `model_state_dict` of named tensors")
    return dict(state)


def _from_multimodal(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Native names, and what is stored twice with two values."""
    native, problems = {}, []
    for name, value in state.items():
        if name.endswith(".lin_dst.weight"):
            twin = state.get(name.replace(".lin_dst.", ".lin_src."))
            if twin is None:
                problems.append(f"{name.replace('.lin_dst.', '.lin_src.')} is missing")
            elif not torch.equal(value, twin):
                problems.append(f"{name} differs from lin_src, so the two are no shared weight")
        else:
            native[name.replace(".lin_src.", ".lin.")] = value
    for name, value in native.items():
        twin = native.get("img_encoder." + name) if name.startswith(_PATCH_EMBED) else None
        if twin is not None and not torch.equal(value, twin):
            problems.append(f"{name} differs from img_encoder.{name}")
    return native, problems


_UNIMODAL_NAMES = {"cls_token": "cls_token", "pos_embed": "img_pos_embed",
                   "norm.weight": "img_norm.weight", "norm.bias": "img_norm.bias"}  # fmt: skip
_UNIMODAL_TARGETS = ("img_encoder.blocks.", "img_encoder.patch_embed.", *_UNIMODAL_NAMES.values())


def _from_unimodal(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A timm VisionTransformer's parameters under the model's names."""
    return {_UNIMODAL_NAMES.get(k, f"img_encoder.{k}"): v for k, v in state.items()}, []
