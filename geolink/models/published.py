"""Checkpoints in the layouts of the published model: reading, writing, and what size they are.

A file holds `model_state_dict` (tensors by name) and `model_config` (a few plain values) beside it.
Three layouts of names:

- `pyg281`: the names of `GeoLink.state_dict()`, the patch embedding under two names;
- `pyg240`: the same, every attention weight twice (`lin_src.weight`, `lin_dst.weight`);
- `unimodal`: the image encoder alone, named as a timm VisionTransformer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from geolink.models.paper import GeoLink
from schemas.errors import GeoLinkError
from schemas.training import VIT_SIZES, ModelConfig

PAPER_VIT_LARGE = ModelConfig(
    image_size=224, patch_size=16, bands=3, embed_dim=1024, depth=24, num_heads=16,
    tag_dim=512, osm_dim=128, fusion_dim=256, fusion_depth=1, fusion_heads=16, projection_dim=64,
    decoder_dim=512, decoder_depth=2, decoder_heads=16, max_masked_nodes=10,
)  # fmt: skip
"""The published model: ViT-L/16 at 224 px, CLIP tag embeddings."""

Layout = Literal["pyg240", "pyg281", "unimodal"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_TWICE = "patch_embed."
"""Names that stand for `img_encoder.` and the same name as well."""
UNIMODAL = {"cls_token": "cls_token", "pos_embed": "img_pos_embed",
             "norm.weight": "img_norm.weight", "norm.bias": "img_norm.bias"}  # fmt: skip
"""Where the model holds what a timm VisionTransformer names otherwise than `img_encoder.`."""


@dataclass(frozen=True, eq=False)
class Published:
    """A published file as it is."""

    layout: Layout
    state: dict[str, Tensor]
    """Tensors under the file's own names."""
    config: dict[str, Any]
    """Its `model_config`; empty if it has none."""


def load_published(path: Path | str, config: ModelConfig | None = None) -> GeoLink:
    """Load a checkpoint of the published code, or a safetensors file of the same names.

    Args:
        path: any of the layouts. Of `unimodal` only the image encoder comes; the rest keeps its
            initial weights.
        config: the model. Default: as its shapes say (`infer_config`).

    Nothing in the file is executed. Raises GeoLinkError if the file cannot be read, or naming every
    parameter that is missing, is none of the model's, has another shape, or is stored twice with
    two values.
    """
    published = read_published(path)
    model = GeoLink(config or infer_config(published, Path(path)))
    state = native_state(published, model.config, Path(path))
    model.load_state_dict(state, strict=False)
    return model


def read_published(path: Path | str) -> Published:
    """Read a .safetensors file or a torch checkpoint (weights only: no code in it is run).

    Raises GeoLinkError if it cannot be read or holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise GeoLinkError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's text is a page, and advises to run the code that is in the file.
        raise GeoLinkError(
            f"{path} is no readable checkpoint ({type(error).__name__}): damaged, or it holds more "
            "than named tensors and numbers; files are read without running the code in them"
        ) from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise GeoLinkError(f"{path} holds no `model_state_dict` of named tensors")
    stated = content.get("model_config") if state is not content else None
    return Published(layout_of(state), dict(state), dict(stated or {}))


def layout_of(names: Iterable[str]) -> Layout:
    """Which layout tensors of these names are in."""
    names = set(names)
    if "norm.weight" in names and "img_norm.weight" not in names:
        return "unimodal"
    return "pyg240" if any(".lin_src." in name for name in names) else "pyg281"


def native_state(published: Published, config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """A file's tensors under the model's names, each once where it is stored twice.

    Of the layout `unimodal` those of the image encoder.

    Raises GeoLinkError naming every parameter that does not fit the model of the config.
    """
    with torch.device("meta"):
        expected = {n: tuple(v.shape) for n, v in GeoLink(config).state_dict().items()}
    if published.layout == "unimodal":
        state = {UNIMODAL.get(k, f"img_encoder.{k}"): v for k, v in published.state.items()}
        problems: list[str] = []
        expected = {n: shape for n, shape in expected.items() if in_encoder(n)}
    else:
        state, problems = _stored_once(published.state)
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
    return {name: value for name, value in state.items() if not name.startswith(_TWICE)}


def published_state(native: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of `native_state`: the model's tensors under the names of a layout.

    Those that a layout stores twice are one tensor under two names.
    """
    state: dict[str, Tensor] = {}
    if layout == "unimodal":
        names = {ours: theirs for theirs, ours in UNIMODAL.items()}
        for name, value in native.items():
            if in_encoder(name):
                state[names.get(name, name.removeprefix("img_encoder."))] = value
        return state
    for name, value in native.items():
        if layout == "pyg240" and name.endswith(".lin.weight"):
            state[name.replace(".lin.", ".lin_src.")] = value
            state[name.replace(".lin.", ".lin_dst.")] = value
        else:
            state[name] = value
        if name.startswith(f"img_encoder.{_TWICE}"):
            state[name.removeprefix("img_encoder.")] = value
    return state


def in_encoder(name: str) -> bool:
    """Whether a parameter of the model is a trained one of its image encoder."""
    return name in UNIMODAL.values() or name.startswith(
        ("img_encoder.blocks.", "img_encoder.patch_embed.")
    )


def infer_config(published: Published, path: Path) -> ModelConfig:
    """The model that the shapes in a file are of.

    What shapes do not tell is as in the published model: the heads (64 channels each in the image
    encoder, or those of the ViT of that width; 16 in the fusion, 32 in the decoder), the caps, the
    loss weights; and of the layout `unimodal` everything but the image encoder.

    Raises GeoLinkError: a shape that it takes is missing, or the shapes are of no such model.
    """
    image, patches = "img_encoder.patch_embed.proj.weight", "img_pos_embed"
    found = {
        name: tuple(value.shape)
        for name, value in (
            {UNIMODAL.get(k, f"img_encoder.{k}"): v for k, v in published.state.items()}
            if published.layout == "unimodal"
            else published.state
        ).items()
    }
    needed = {image: 4, patches: 3}
    if published.layout != "unimodal":
        needed |= {
            "osm_node_pred.weight": 2, "osm_graph_consistency_prj.weight": 2,
            "img_fusion_mlp.weight": 2, "img_decoder_mlp.weight": 2,
        }  # fmt: skip
    wrong = [n for n, dimensions in needed.items() if len(found.get(n, ())) != dimensions]
    if wrong:
        raise GeoLinkError(
            f"{path} is no GeoLink checkpoint, or a damaged one: it has no {', '.join(wrong)}"
        )
    width, bands, patch, _ = found[image]
    grid = math.isqrt(found[patches][1] - 1)
    heads = {embed: heads for embed, _, heads in VIT_SIZES.values()}
    sizes = {
        "image_size": grid * patch, "patch_size": patch, "bands": bands, "embed_dim": width,
        "depth": _count(found, "img_encoder.blocks"), "num_heads": heads.get(width) or width // 64,
    }  # fmt: skip
    if published.layout != "unimodal":
        tags, osm = found["osm_node_pred.weight"][0], found["osm_graph_consistency_prj.weight"]
        fused, decoded = found["img_fusion_mlp.weight"][0], found["img_decoder_mlp.weight"][0]
        sizes |= {
            "tag_dim": tags, "osm_dim": osm[1], "projection_dim": osm[0], "fusion_dim": fused,
            "fusion_depth": _count(found, "osm_cross_modal_encoder"), "fusion_heads": fused // 16,
            "decoder_dim": decoded, "decoder_heads": decoded // 32,
            "decoder_depth": _count(found, "img_cross_modal_decoder"),
        }  # fmt: skip
    try:
        return ModelConfig.model_validate(PAPER_VIT_LARGE.model_dump() | sizes)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
        raise GeoLinkError(
            f"the shapes in {path} do not tell which model it is of ({reason}): give its config"
        ) from None


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({m[1] for name in names if (m := pattern.match(name))})


def _stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names of `pyg281`, and what is stored twice with two values."""
    once, problems = {}, []
    for name, value in state.items():
        if name.endswith(".lin_dst.weight"):
            twin = state.get(name.replace(".lin_dst.", ".lin_src."))
            if twin is None:
                problems.append(f"{name.replace('.lin_dst.', '.lin_src.')} is missing")
            elif not torch.equal(value, twin):
                problems.append(f"{name} differs from lin_src, so the two are no shared weight")
        else:
            once[name.replace(".lin_src.", ".lin.")] = value
            twin_name = name.replace(".lin_src.", ".lin_dst.")
            if twin_name != name and twin_name not in state:
                problems.append(f"{twin_name} is missing")
    for name, value in once.items():
        twin = once.get("img_encoder." + name) if name.startswith(_TWICE) else None
        if twin is not None and twin.shape == value.shape and not torch.equal(value, twin):
            problems.append(f"{name} differs from img_encoder.{name}")
    return once, problems
