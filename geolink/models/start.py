"""Weights that a model starts from: of timm, of a published file, of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from geolink.checkpoint import load_model
from geolink.models.build import PretrainModel
from geolink.models.ops import grid_sincos
from geolink.models.published import (
    UNIMODAL,
    in_encoder,
    infer_config,
    native_state,
    read_published,
)
from schemas.errors import GeoLinkError

_HEADS = ("head.", "head_dist.", "fc_norm.", "pre_logits.")
"""What a classifier of timm has beyond the encoder, and is left out."""


def start_from(model: PretrainModel, what: str | Path) -> list[str]:
    """Put trained weights into a new model, brought to its bands and its grid of patches.

    Args:
        model: takes them in place.
        what: a file (.safetensors, .pth) of a timm VisionTransformer or in a published layout; a
            checkpoint or run folder of GeoLink; or the name of a timm model, with or without
            `timm:` before it, fetched where the network allows.

    The image encoder must fit: its width, depth, and parts. Bands are repeated and scaled, a
    patch embedding of another patch size is resized by pseudo-inverse (Beyer et al. 2023), sin-cos
    positions are computed for the grid, learnt ones interpolated. Everything else comes where its
    shape is the same, and keeps its new weights where not.

    Returns what came, what was adapted and what is new, as sentences. Raises GeoLinkError: no such
    weights; or naming what does not fit in the image encoder.
    """
    name, state = _find(what)
    ours = dict(model.named_parameters())
    problems = [
        f"{n} is not the model's" for n in state if n not in ours and n.startswith("img_encoder.")
    ]
    taken: dict[str, Tensor] = {}
    adapted: list[str] = []
    new: list[str] = []
    for target, parameter in ours.items():
        value = state.get(target)
        if value is not None and value.shape != parameter.shape and target in _ADAPT:
            value, how = _ADAPT[target](value.float(), parameter, model)
            adapted += [how] if how else []
        if value is not None and value.shape == parameter.shape:
            taken[target] = value
        elif not in_encoder(target):
            new.append(target)
        elif value is None:
            problems.append(f"{target} is missing")
        else:
            problems.append(f"{target} has shape {list(value.shape)}, not {list(parameter.shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise GeoLinkError(
            f"{name} does not fit the model's image encoder (vit, or embed_dim, depth): "
            f"{'; '.join(sorted(problems)[:3])}{more}"
        )
    with torch.no_grad():
        for target, value in taken.items():
            ours[target].copy_(value)
    notes = [f"{len(taken)} tensors of {name}", *adapted]
    if new and any(not in_encoder(target) for target in state):
        notes.append(f"new weights, as theirs have other shapes or are not there: {_groups(new)}")
    elif new:
        notes.append("new weights for everything but the image encoder")
    return notes


def _find(what: str | Path) -> tuple[str, dict[str, Tensor]]:
    """What weights are called, and they under the model's names."""
    path = Path(what)
    if path.is_dir():
        trained, meta = load_model(path)
        return f"{path} after step {meta.step}", dict(trained.named_parameters())
    if path.is_file():
        published = read_published(path)
        if any(name.startswith("blocks.") for name in published.state):
            return str(path), _from_timm(published.state)
        return str(path), native_state(published, infer_config(published, path), path)
    return str(what), _from_timm(_fetch(str(what).removeprefix("timm:")))


def _fetch(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name.partition(".")[0]):
        raise GeoLinkError(
            f"there are no weights {name} to start from: it is no file, no checkpoint folder and "
            "no model of timm"
        )
    try:
        found: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise GeoLinkError(
            f"the weights of timm's {name} cannot be fetched ({str(error).splitlines()[0]}): give "
            "a file that holds them"
        ) from error
    return found


def _from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm VisionTransformer's encoder under the model's names."""
    return {
        UNIMODAL.get(name, f"img_encoder.{name}"): value
        for name, value in state.items()
        if not name.startswith(_HEADS)
    }


def _positions(value: Tensor, ours: Tensor, model: PretrainModel) -> tuple[Tensor, str | None]:
    old = math.isqrt(value.shape[1] - 1)
    if value.shape[-1] != ours.shape[-1] or value.shape[1] != old**2 + 1:
        return value, None
    change = f"from {old} x {old} to {model.grid} x {model.grid} patches"
    if torch.allclose(value, grid_sincos(old, value.shape[-1]), atol=1e-4):
        return ours.detach(), f"sin-cos positions computed anew, {change}"
    resized: Tensor = resample_abs_pos_embed(value, [model.grid, model.grid])
    return resized, f"learnt positions interpolated {change}"


def _patch_embedding(
    value: Tensor, ours: Tensor, model: PretrainModel
) -> tuple[Tensor, str | None]:
    c, changes = model.config, []
    if value.shape[0] != ours.shape[0]:
        return value, None
    if value.shape[1] != c.bands:
        changes.append(f"from {value.shape[1]} to {c.bands} bands")
        value = adapt_input_conv(c.bands, value, base_chans=value.shape[1])
    if value.shape[-1] != c.patch_size:
        changes.append(f"from {value.shape[-1]} to {c.patch_size} pixels")
        value = resample_patch_embed(value, [c.patch_size, c.patch_size])
    return value, f"patch embedding brought {' and '.join(changes)}"


_ADAPT: dict[str, Callable[[Tensor, Tensor, PretrainModel], tuple[Tensor, str | None]]] = {
    "img_encoder.patch_embed.proj.weight": _patch_embedding,
    "img_pos_embed": _positions,
}


def _groups(names: list[str]) -> str:
    """Parameters by their first name."""
    return ", ".join(sorted({name.partition(".")[0] for name in names}))
