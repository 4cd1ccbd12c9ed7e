"""Weights that a model starts from: of timm, of a published file, of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from geolink.checkpoint import load_model
from geolink.models.base import PretrainModel
from geolink.models.ops import grid_sincos
from geolink.models.paper import GeoLink
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

_MAY_BE_NEW = {"reg_token"}
"""What an encoder may have and the weights that it starts from not."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Named tensors of a model: its trained image encoder as timm names it, and the rest."""

    encoder: dict[str, Tensor]
    rest: dict[str, Tensor]


def start_from(model: PretrainModel, what: str | Path) -> list[str]:
    """Put trained weights into a new model, brought to its bands and its grid of patches.

    Args:
        model: takes them in place.
        what: a file (.safetensors, .pth) of a timm VisionTransformer or in a published layout; a
            checkpoint or run folder of GeoLink; or the name of a timm model, with or without
            `timm:` before it, fetched where the network allows.

    The image encoder must fit: its width, depth, and parts. Bands are repeated and scaled, a
    patch embedding of another patch size is resized by pseudo-inverse (Beyer et al. 2023), sin-cos
    positions are computed for the grid, learnt ones interpolated. From weights of the same variant
    everything else comes too where its shape is the same, and keeps its new weights where not.

    Returns what came, what was adapted and what is new, as sentences. Raises GeoLinkError: no such
    weights; or naming what does not fit in the image encoder.
    """
    name, source = _find(what, model)
    ours = _split(dict(model.named_parameters()), paper=isinstance(model, GeoLink))
    theirs, adapted = _adapted(source.encoder, ours.encoder, model)
    _check_encoder(name, theirs, ours.encoder)
    came = {n: v for n, v in source.rest.items() if n in ours.rest and _same(v, ours.rest[n])}
    new = [n for n in ours.rest if n not in came and not n.startswith("img_encoder.")]
    with torch.no_grad():
        for taken, targets in ((theirs, ours.encoder), (came, ours.rest)):
            for target, value in taken.items():
                targets[target].copy_(value)
    notes = [f"{len(theirs) + len(came)} tensors of {name}", *adapted]
    if new and came:
        groups = ", ".join(sorted({target.partition(".")[0] for target in new}))
        notes.append(f"new weights, as theirs have other shapes or are not there: {groups}")
    elif new:
        notes.append("new weights for everything but the image encoder")
    return notes


def _find(what: str | Path, model: PretrainModel) -> tuple[str, Weights]:
    """What weights are called, and they; without a rest that is of another variant."""
    path = Path(what)
    is_paper = isinstance(model, GeoLink)
    if path.is_dir():
        trained, meta = load_model(path)
        found = _split(dict(trained.named_parameters()), paper=isinstance(trained, GeoLink))
        same = type(trained) is type(model)
        name = f"{path} after step {meta.step}"
        return name, found if same else Weights(found.encoder, {})
    if path.is_file():
        published = read_published(path)
        if any(name.startswith("blocks.") for name in published.state):
            return str(path), _of_timm(published.state)
        native = native_state(published, infer_config(published, path), path)
        found = _split(native, paper=True)
        return str(path), found if is_paper else Weights(found.encoder, {})
    return str(what), _of_timm(_fetch(str(what).removeprefix("timm:")))


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


def _of_timm(state: Mapping[str, Tensor]) -> Weights:
    return Weights({n: v for n, v in state.items() if not n.startswith(_HEADS)}, {})


def _split(named: Mapping[str, Tensor], *, paper: bool) -> Weights:
    """A model's tensors; in the paper variant the trained parts have names of their own."""
    names = {ours: theirs for theirs, ours in UNIMODAL.items()}
    found = Weights({}, {})
    for name, value in named.items():
        if in_encoder(name) if paper else name.startswith("img_encoder."):
            found.encoder[names.get(name, name.removeprefix("img_encoder."))] = value
        else:
            found.rest[name] = value
    return found


def _check_encoder(name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    problems = [f"{n} is not the model's" for n in theirs if n not in ours]
    problems += [f"{n} is missing" for n in ours if n not in theirs and n not in _MAY_BE_NEW]
    problems += [
        f"{n} has shape {list(v.shape)}, not {list(ours[n].shape)}"
        for n, v in theirs.items()
        if n in ours and not _same(v, ours[n])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise GeoLinkError(
            f"{name} does not fit the model's image encoder (vit, or embed_dim, depth): "
            f"{'; '.join(sorted(problems)[:3])}{more}"
        )


def _adapted(
    theirs: dict[str, Tensor], ours: dict[str, Tensor], model: PretrainModel
) -> tuple[dict[str, Tensor], list[str]]:
    """An image encoder's tensors brought to the model, and what was done."""
    result, done = dict(theirs), []
    patch, c = "patch_embed.proj.weight", model.config
    weight = theirs.get(patch)
    if weight is not None and weight.ndim == 4 and weight.shape[0] == ours[patch].shape[0]:
        changes = []
        if weight.shape[1] != c.bands:
            changes.append(f"from {weight.shape[1]} to {c.bands} bands")
            weight = adapt_input_conv(c.bands, weight, base_chans=weight.shape[1])
        if weight.shape[-1] != c.patch_size:
            changes.append(f"from {weight.shape[-1]} to {c.patch_size} pixels")
            weight = resample_patch_embed(weight, [c.patch_size, c.patch_size])
        result[patch] = weight
        done += [f"patch embedding brought {' and '.join(changes)}"] if changes else []

    position, token = theirs.get("pos_embed"), theirs.get("cls_token")
    if position is None or token is None or position.shape[-1] != ours["pos_embed"].shape[-1]:
        return result, done
    # Where the class token's position is not stored, it is part of the token.
    grid = math.isqrt(position.shape[1])
    if position.shape[1] == grid**2:
        position = torch.cat([torch.zeros_like(position[:, :1]), position], 1)
    if position.shape[1] != grid**2 + 1:
        return result, done
    if grid != model.grid:
        change = f"from {grid} x {grid} to {model.grid} x {model.grid} patches"
        if torch.allclose(position.cpu(), grid_sincos(grid, position.shape[-1]), atol=1e-4):
            position = grid_sincos(model.grid, position.shape[-1])
            done.append(f"sin-cos positions computed anew, {change}")
        else:
            position = resample_abs_pos_embed(position.detach(), [model.grid, model.grid])
            done.append(f"learnt positions interpolated {change}")
    if ours["pos_embed"].shape[1] == model.grid**2:
        result["cls_token"] = token + position[:, :1]
        position = position[:, 1:]
    result["pos_embed"] = position
    return result, done


def _same(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape
