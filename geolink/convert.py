"""Published files into checkpoint folders, and back, without loss.

Tensors go from file to file as they are, in the type they have; no model is made of them.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from geolink.checkpoint import (
    META,
    MODEL,
    CheckpointMeta,
    PublishedWeights,
    checkpoint_folder,
    checkpoint_tensors,
    code_version,
    model_tensors,
    read_meta,
    readable_alike,
)
from geolink.models.paper import GeoLink
from geolink.models.published import (
    Layout,
    infer_config,
    native_state,
    published_state,
    read_published,
)
from schemas.errors import GeoLinkError
from schemas.storage_local import flush
from schemas.training import ModelConfig, TrainConfig

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""What the published model's images, of 8 bits, are normalised by (paper, implementation)."""


def to_checkpoint(source: Path, folder: Path, config: ModelConfig | None = None) -> CheckpointMeta:
    """Write a published file as a checkpoint folder.

    Args:
        source: a file in any published layout. Of `unimodal` only the image encoder comes: the
            rest gets new weights of seed 0, and the checkpoint's `published.layout` says so.
        folder: is made; must not hold anything.
        config: the model. Default: as the shapes say (`infer_config`).

    Raises GeoLinkError: as `load_published`; the folder holds something or cannot be written.
    """
    published = read_published(source)
    config = config or infer_config(published, source)
    tensors = native_state(published, config, source)
    if published.layout == "unimodal":
        tensors = _new_tensors(config) | tensors
    release, revision = code_version()
    known_bands = config.bands == 3
    meta = CheckpointMeta(
        geolink=release, revision=revision, step=0, steps=0, dataset=f"published: {source.name}",
        snapshot=0, tag_encoder="clip-vit-b-16" if config.tag_dim == 512 else "not stated",
        bands=("red", "green", "blue") if known_bands
        else tuple(f"band {n}" for n in range(1, config.bands + 1)),
        nodata=-1,
        mean=IMAGENET_MEAN if known_bands else (0.0,) * config.bands,
        std=IMAGENET_STD if known_bands else (1.0,) * config.bands,
        published=PublishedWeights(
            file=source.name, sha256=_sha256(source), layout=published.layout,
            stated=published.config,
        ),
        config=TrainConfig(dataset=source, run=folder, model=config),
    )  # fmt: skip
    _write_folder(folder, tensors, meta)
    return meta


def to_published(checkpoint: Path, file: Path, layout: Layout | None = None) -> Layout:
    """Write a checkpoint's weights (averaged ones, if it has them) as a published file.

    Args:
        checkpoint: a checkpoint folder, or a run folder: its last checkpoint.
        file: .pth, .pt or .safetensors, overwritten. What a layout stores twice is one tensor of
            two names in a .pth, and twice in a .safetensors.
        layout: default: the one that it was converted from, else `pyg281`.

    Returns the layout. Raises GeoLinkError: another suffix; a model that the layout cannot hold;
    the file cannot be written.
    """
    folder = checkpoint_folder(checkpoint)
    meta = read_meta(folder)
    layout = layout or _layout(meta)
    if file.suffix not in (".pth", ".pt", ".safetensors"):
        raise GeoLinkError(f"{file} is no .pth, .pt or .safetensors: give one as target")
    model = meta.config.model
    if model.variant != "paper":
        raise GeoLinkError(
            f"{folder} is of variant {model.variant}, which no published layout can hold; "
            "`geolink export --to timm` writes its image encoder"
        )
    if layout != "unimodal" and model.fixes:
        what = ", ".join(model.fixes)
        raise GeoLinkError(
            f"{folder} differs from the published model ({what}), which its layouts cannot say; "
            "--layout unimodal writes its image encoder"
        )
    state = published_state(checkpoint_tensors(folder), layout)
    stated = meta.published.stated if meta.published else {}
    stated = stated or {
        "architecture": _architecture(model), "num_classes": 0, "global_pool": "",
    }  # fmt: skip
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            save_file({name: value.clone() for name, value in state.items()}, partial)
        else:
            torch.save({"model_config": stated, "model_state_dict": state}, partial)
        flush(partial)
        partial.replace(file)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise GeoLinkError(f"cannot write {file}: {error}") from error
    return layout


def _layout(meta: CheckpointMeta) -> Layout:
    known = {name: name for name in get_args(Layout)}
    return known[meta.published.layout] if meta.published else "pyg281"


def _architecture(model: ModelConfig) -> str:
    from geolink.export.encoder import timm_name

    return timm_name(model)


def _new_tensors(config: ModelConfig) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_tensors(GeoLink(config))


def _write_folder(folder: Path, tensors: dict[str, Tensor], meta: CheckpointMeta) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise GeoLinkError(f"{folder} is there already; give a new folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial / MODEL)
        (partial / META).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
        readable_alike(partial / META)
        for path in (*partial.iterdir(), partial):
            flush(path)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise GeoLinkError(f"cannot write {folder}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
