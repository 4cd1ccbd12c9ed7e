"""Encoders of tasks: checkpoints of ours, published ones, those of timm, new weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import xxhash
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geolink.checkpoint import load_model
from geolink.graph import GraphBatch
from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from geolink.models.geolink2 import GeoLink2
from geolink.models.published import infer_config, load_published, read_published
from geolink.tasks.adapt import at_size, band_values, check_values, match_bands, preparer
from geolink.tasks.contracts import Encoder, TaskData
from schemas.errors import GeoLinkError
from schemas.evaluation import Inputs

RGB = ("red", "green", "blue")
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and deviation of RGB in 8 bits; the published model's too."""

TIMM, RANDOM = "timm:", "random:"


def levels_of(depth: int) -> tuple[int, int, int, int]:
    """Blocks whose patch tokens dense tasks use: of 24 blocks 7, 11, 15 and the last."""
    first, second, third = (max(round(depth * n / 24) - 1, 0) for n in (8, 12, 16))
    return first, second, third, depth - 1


def open_encoder(
    what: Path | str,
    inputs: Inputs,
    data: TaskData,
    *,
    device: torch.device,
    size: int | None = None,
    normalise: str = "checkpoint",
    seed: int = 0,
) -> Encoder:
    """An encoder for a data set.

    Args:
        what: a checkpoint or run folder; a published file (.pth, .safetensors); `timm:NAME`, or
            `timm:NAME@FILE` where its weights lie in a file; or `random:` before any of these, for
            new weights of `seed`.
        inputs: what it is given. `osm`: the region embedding. `image+osm`: image, fused patches
            and region.
        data: what it is for; its tags and the values of its bands.
        device: where it runs.
        size: side that images are resized to; default: the checkpoint's.
        normalise: `checkpoint`, or `data`: by the training images' mean and deviation.
        seed: of new weights.

    Raises GeoLinkError: no such weights; no OSM encoder, or no graphs in the data; bands that none
    can stand for; values on another scale.
    """
    name = str(what)
    random = name.startswith(RANDOM)
    source = name.removeprefix(RANDOM)
    if source.startswith(TIMM):
        return _of_timm(
            source.removeprefix(TIMM), inputs, data, device=device, size=size,
            normalise=normalise, random=random, seed=seed,
        )  # fmt: skip
    path = Path(source)
    model, about, has_osm = _read_file(path) if path.is_file() else _read_folder(path)
    if random:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make_model(model.config).eval()
        about |= {"weights": f"new, seed {seed}"}
    if inputs != "image":
        _check_osm(name, model, about, has_osm or random, data)
        assert data.tag_table is not None
        model.set_tag_table(torch.from_numpy(data.tag_table))
    model = at_size(model, size or model.config.image_size)
    if inputs == "image+osm" and isinstance(model, GeoLink2):
        _check_lattice(model, data, name)
    index, mean, std, nodata = _scale(about, data, normalise, name)
    prepare = preparer(index, mean, std, nodata, model.config.image_size, device)
    about |= {"image_size": model.config.image_size, "normalised_by": normalise}
    return _ours(model.to(device), inputs, prepare, name, {"mean": mean, "std": std, **about})


def _read_folder(path: Path) -> tuple[PretrainModel, dict[str, Any], bool]:
    model, meta = load_model(path)
    about = {
        "step": meta.step, "bands": meta.bands, "mean": meta.mean, "std": meta.std,
        "nodata": meta.nodata, "tag_encoder": meta.tag_encoder, "dataset": meta.dataset,
        "variant": meta.config.model.variant, "pretrained_on": meta.config.split,
    }  # fmt: skip
    whole = meta.published is None or meta.published.layout != "unimodal"
    return model, about, whole


def _read_file(path: Path) -> tuple[PretrainModel, dict[str, Any], bool]:
    published = read_published(path)
    model = load_published(path, infer_config(published, path)).eval()
    mean, std = _IMAGENET
    about = {
        "step": None, "bands": RGB, "mean": mean, "std": std, "nodata": -1, "variant": "paper",
    }  # fmt: skip
    return model, about, published.layout != "unimodal"


def _check_osm(
    name: str, model: PretrainModel, about: Mapping[str, Any], has_osm: bool, data: TaskData
) -> None:
    if not has_osm:
        raise GeoLinkError(
            f"{name} has no OSM encoder (it holds the image encoder alone): use inputs: image"
        )
    if not data.has_graphs or data.tag_table is None:
        raise GeoLinkError(
            f"{data.name} has no OSM objects: use inputs: image, or give its images their objects "
            "with `geolink pair`"
        )
    encoder = about.get("tag_encoder")
    if encoder and data.tag_encoder and encoder != data.tag_encoder:
        raise GeoLinkError(
            f"{name} learnt tags as {encoder} encodes them, the tags of {data.name} are encoded by "
            f"{data.tag_encoder}: encode them with {encoder} (tag_encoder of the dataset's config)"
        )


def _check_lattice(model: PretrainModel, data: TaskData, name: str) -> None:
    if data.patches and data.patches != model.grid:
        raise GeoLinkError(
            f"{name} sees {model.grid} x {model.grid} patches, the objects of {data.name} are told "
            f"by {data.patches} x {data.patches}: choose size so that they agree, or build the "
            "dataset with such patches"
        )


def _scale(
    about: Mapping[str, Any], data: TaskData, by: str, name: str
) -> tuple[list[int], list[float], list[float], int]:
    """Bands, their mean and deviation, and the value without data."""
    index = match_bands(data.imagery, about["bands"], name)
    if by == "data":
        mean, std = band_values(data, index)
        return index, mean.tolist(), std.tolist(), data.imagery.nodata
    check_values(data, index, about["mean"], about["std"], name)
    return index, list(about["mean"]), list(about["std"]), data.imagery.nodata


def _ours(
    model: PretrainModel, inputs: Inputs, prepare: Any, name: str, about: Mapping[str, Any]
) -> Encoder:
    c, levels = model.config, levels_of(model.config.depth)
    prefix, grid = model.prefix, model.grid
    width = {
        "image": c.embed_dim, "osm": c.osm_dim,
        "image+osm": c.embed_dim + c.fusion_dim + c.osm_dim,
    }[inputs]  # fmt: skip

    def embed(images: Tensor, graph: GraphBatch | None) -> Tensor:
        if inputs == "image":
            return model.embed_image(images)
        assert graph is not None
        nodes = model.encode_nodes(graph)
        region = model.region_of(nodes, graph)
        if inputs == "osm":
            return region
        patches = model.image_tokens(images)[-1][:, prefix:]
        parts = (patches.mean(1), model.fuse(patches, nodes, graph).mean(1), region)
        return torch.cat([F.normalize(part.float(), dim=1) for part in parts], 1)

    def maps(images: Tensor, graph: GraphBatch | None) -> list[Tensor]:
        *blocks, normed = model.image_tokens(images, levels[:3])
        by_level = dict(zip(sorted(set(levels[:3])), blocks))
        found = [by_level[level][:, prefix:] for level in levels[:3]]
        last = normed[:, prefix:]
        if inputs == "image+osm":
            assert graph is not None
            last = model.fuse(last, model.encode_nodes(graph), graph)
        return [t.transpose(1, 2).reshape(len(t), -1, grid, grid) for t in (*found, last)]

    fused = c.fusion_dim if inputs == "image+osm" else c.embed_dim
    return Encoder(
        name=name,
        key=_key(model, about),
        inputs=inputs,
        prepare=prepare,
        embed=embed,
        width=width,
        module=model,
        maps=None if inputs == "osm" else maps,
        widths=(c.embed_dim,) * 3 + (fused,),
        levels=levels,
        grid=grid,
        size=c.image_size,
        about=about,
        rebuild=lambda module: _ours(module, inputs, prepare, name, about),
    )


def _of_timm(
    name: str, inputs: Inputs, data: TaskData, *, device: torch.device, size: int | None,
    normalise: str, random: bool, seed: int,
) -> Encoder:  # fmt: skip
    if inputs != "image":
        raise GeoLinkError(f"{TIMM}{name} has no OSM encoder: use inputs: image")
    model_name, _, file = name.partition("@")
    model = _load_timm(model_name, file, size, random, seed)
    spread = model.default_cfg
    about: dict[str, Any] = {
        "step": None, "bands": RGB, "nodata": -1,
        "mean": tuple(255 * v for v in spread["mean"]),
        "std": tuple(255 * v for v in spread["std"]),
    }  # fmt: skip
    index, mean, std, nodata = _scale(about, data, normalise, TIMM + name)
    side = model.patch_embed.img_size[0]
    prepare = preparer(index, mean, std, nodata, side, device)
    about |= {"mean": mean, "std": std, "image_size": side, "normalised_by": normalise}
    return _timm_encoder(model.eval().to(device), prepare, TIMM + name, about)


def _load_timm(name: str, file: str, size: int | None, random: bool, seed: int) -> Any:
    if not timm.is_model(name.partition(".")[0]):
        raise GeoLinkError(f"timm has no model {name}")
    if file and not Path(file).is_file():
        raise GeoLinkError(f"there is no file {file} of weights for timm's {name}")
    options: dict[str, Any] = {"num_classes": 0} | ({} if size is None else {"img_size": size})
    if file and not random:
        options["pretrained_cfg_overlay"] = {"file": file}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=not random, **options)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GeoLinkError(
            f"the weights of timm's {name} cannot be had ({first}): give a file that holds them, "
            f"{TIMM}{name}@FILE"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise GeoLinkError(f"timm's {name} is no VisionTransformer, which tasks need")
    return model


def _timm_encoder(model: Any, prepare: Any, name: str, about: Mapping[str, Any]) -> Encoder:
    grid, prefix = model.patch_embed.grid_size[0], model.num_prefix_tokens
    levels = levels_of(len(model.blocks))

    def embed(images: Tensor, graph: GraphBatch | None) -> Tensor:
        tokens: Tensor = model.forward_features(images)
        return tokens[:, prefix:].mean(1)

    def maps(images: Tensor, graph: GraphBatch | None) -> list[Tensor]:
        wanted = sorted(set(levels[:3]))
        last, found = model.forward_intermediates(images, indices=wanted)
        by_level = dict(zip(wanted, found))
        last = last[:, prefix:].transpose(1, 2).reshape(len(images), -1, grid, grid)
        return [*(by_level[level] for level in levels[:3]), last]

    return Encoder(
        name=name,
        key=_key(model, about),
        inputs="image",
        prepare=prepare,
        embed=embed,
        width=model.embed_dim,
        module=model,
        maps=maps,
        widths=(model.embed_dim,) * 4,
        levels=levels,
        grid=grid,
        size=model.patch_embed.img_size[0],
        about=about,
        rebuild=lambda module: _timm_encoder(module, prepare, name, about),
    )


def own_copy(encoder: Encoder) -> Encoder:
    """The encoder with weights of its own, to be trained. Raises GeoLinkError if it has none."""
    if encoder.module is None or encoder.rebuild is None:
        raise GeoLinkError(f"{encoder.name} has no weights that could be trained")
    return encoder.rebuild(copy.deepcopy(encoder.module))


def _key(module: nn.Module, about: Mapping[str, Any]) -> str:
    """Hash of weights, tags and what is done to images."""
    digest = xxhash.xxh3_128()
    state = dict(module.state_dict())
    if isinstance(module, PretrainModel):
        state["tag_table"] = module.tag_table
    for tensor_name, tensor in sorted(state.items()):
        digest.update(f"{tensor_name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(repr(sorted((k, str(v)) for k, v in about.items())).encode())
    return digest.hexdigest()
