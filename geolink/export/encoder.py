"""The image encoder of a checkpoint for other libraries, with a model card.

The trained class token, positions and norm stand where a timm VisionTransformer has its own
(`GeoLink.image_encoder`). What is written is read back as its users read it, and compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geolink.checkpoint import CheckpointMeta, checkpoint_folder, load_model, readable_alike
from geolink.export.card import model_card, read_results
from geolink.models.base import PretrainModel
from schemas.errors import GeoLinkError
from schemas.training import VIT_SIZES, ModelConfig

Target = Literal["timm", "hf", "torchgeo", "onnx"]
TARGETS: tuple[Target, ...] = get_args(Target)

TORCHGEO = {("small", 16): "ViTSmall16", ("base", 16): "ViTBase16", ("large", 16): "ViTLarge16",
            ("huge", 14): "ViTHuge14"}  # fmt: skip
"""By size and patch: the encoders that TorchGeo has, by the names of their weights."""

TASK_SIZE = 224
"""Pixels along a side of the images that TorchGeo's tasks make encoders for."""

_ONNX_LIMIT = 1_500_000_000
"""Bytes of weights that are kept inside the .onnx file, which must stay below 2 GiB."""


@dataclass(frozen=True)
class EncoderExport:
    """What was written."""

    folder: Path
    format: str
    files: tuple[str, ...]
    parameters: int
    megabytes: float
    largest_difference: float | None
    """Of what the library gives from `encode_image`, on two random images; none: not compared."""
    load: str
    """How it is loaded."""


def export_encoder(checkpoint: Path, folder: Path, to: Target) -> EncoderExport:
    """Write the image encoder of a checkpoint, or of a run's last one, to a new folder.

    - `timm`, `hf`: `model.safetensors` and `config.json`, which `timm.create_model` loads from the
      folder (`local-dir:`), transformers' `AutoModel` through its timm wrapper, and either from
      the Hugging Face hub; `hf` heads the model card with the hub's metadata.
    - `torchgeo`: `geolink-<hash>.pth`, for TorchGeo's constructors, and for images of 224 pixels
      `backbone.ckpt`, for its tasks.
    - `onnx`: `encoder.onnx`, images to tokens, any batch size.

    Raises GeoLinkError: no such checkpoint; the folder holds something; the library has no such
    encoder; what is read back differs; the folder cannot be written.
    """
    model, meta = load_model(checkpoint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GeoLinkError(f"{folder} is there already; give a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        encoder = model.image_encoder().eval()
        if to == "onnx":
            difference = _write_onnx(encoder, model, partial / "encoder.onnx")
        elif to == "torchgeo":
            difference = _write_torchgeo(encoder, model, partial)
        else:
            difference = _write_timm(encoder, model, meta, partial)
        load = how_to_load(meta.config.model, to)
        written = sorted(p.name for p in partial.iterdir())
        card = model_card(
            meta, to, load, difference, read_results(checkpoint_folder(checkpoint).parent, meta),
            sum(p.numel() for p in encoder.parameters()), prefix_tokens(model.config),
        )  # fmt: skip
        (partial / "README.md").write_text(card, encoding="utf-8")
        readable_alike(partial / "README.md")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise GeoLinkError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return EncoderExport(
        folder, to, ("README.md", *written), sum(p.numel() for p in encoder.parameters()),
        sum(p.stat().st_size for p in folder.iterdir()) / 1e6, difference, load,
    )  # fmt: skip


def size_name(model: ModelConfig) -> str | None:
    """Name of the image encoder's size, if it has one."""
    size = model.embed_dim, model.depth, model.num_heads
    return next((name for name, known in VIT_SIZES.items() if known == size), None)


def timm_name(model: ModelConfig) -> str:
    """timm's name of the image encoder; where it has none, the one that it is a variation of."""
    name = f"vit_{size_name(model)}_patch{model.patch_size}_{model.image_size}"
    return name if timm.is_model(name) else "vit_base_patch16_224"


def prefix_tokens(model: ModelConfig) -> int:
    """Tokens before those of the patches: the class token, and registers where there are any."""
    return 1 + (model.geolink2.registers if model.variant == "geolink2" else 0)


def how_to_load(model: ModelConfig, to: Target) -> str:
    """A few lines of Python that load an export from its folder `FOLDER`."""
    size = size_name(model)
    if to == "onnx":
        return (
            'session = onnxruntime.InferenceSession("FOLDER/encoder.onnx")\n'
            '(tokens,) = session.run(None, {"images": images})  # float32, normalised'
        )
    if to == "torchgeo":
        constructor = f"vit_{size}_patch{model.patch_size}_224"
        return (
            "class Weights(torchvision.models.WeightsEnum):\n"
            "    GEOLINK = torchvision.models.Weights(\n"
            '        url=next(Path("FOLDER").resolve().glob("geolink-*.pth")).as_uri(),\n'
            "        transforms=None,\n"
            f'        meta={{"in_chans": {model.bands}}},\n'
            "    )\n\n"
            f"encoder = torchgeo.models.{constructor}(\n"
            f'    Weights.GEOLINK, num_classes=0, global_pool="", img_size={model.image_size}\n'
            ")\n"
            "tokens = encoder.forward_features(images)"
        ) + (
            "\n\ntask = torchgeo.trainers.ClassificationTask(\n"
            f'    model="{constructor}", weights="FOLDER/backbone.ckpt",\n'
            f"    in_channels={model.bands}, num_classes=10,\n"
            ")"
            if model.image_size == TASK_SIZE
            else ""
        )
    lines = (
        'encoder = timm.create_model("local-dir:FOLDER", pretrained=True)\n'
        "tokens = encoder.forward_features(images)  # normalised; class token first\n"
        f"embedding = tokens[:, {prefix_tokens(model)}:].mean(1)"
    )
    if to == "hf":
        lines += '\n\nmodel = transformers.AutoModel.from_pretrained("FOLDER")'
    return lines


def _write_timm(
    encoder: VisionTransformer, model: PretrainModel, meta: CheckpointMeta, folder: Path
) -> float:
    c = model.config
    arguments = {
        "img_size": c.image_size, "patch_size": c.patch_size, "in_chans": c.bands,
        "embed_dim": c.embed_dim, "depth": c.depth, "num_heads": c.num_heads, "global_pool": "",
    }  # fmt: skip
    if encoder.no_embed_class:
        arguments |= {"reg_tokens": encoder.num_reg_tokens, "no_embed_class": True}
    # timm's transforms divide pixels by 255 first; ours are of stored values.
    config: dict[str, Any] = {
        "architecture": timm_name(c),
        "num_classes": 0,
        "num_features": c.embed_dim,
        "global_pool": "",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "geolink", "custom_load": False, "num_classes": 0, "crop_pct": 1.0,
            "input_size": [c.bands, c.image_size, c.image_size], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_mode": "center",
            "mean": [v / 255 for v in meta.mean], "std": [v / 255 for v in meta.std],
            "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    save_file(_state(encoder), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _compare(timm.create_model(f"local-dir:{folder}", pretrained=True), encoder, model)


def _write_torchgeo(encoder: VisionTransformer, model: PretrainModel, folder: Path) -> float:
    c = model.config
    if encoder.no_embed_class:
        raise GeoLinkError(
            f"TorchGeo's encoders have no registers, as variant {c.variant} has; "
            "--to timm writes it"
        )
    if (size_name(c) or "", c.patch_size) not in TORCHGEO:
        known = ", ".join(f"{size} with patches of {patch}" for size, patch in TORCHGEO)
        raise GeoLinkError(
            f"TorchGeo has no encoder of width {c.embed_dim}, depth {c.depth} with patches of "
            f"{c.patch_size} pixels (it has {known}); --to timm writes any"
        )
    name, state = f"vit_{size_name(c)}_patch{c.patch_size}_224", _state(encoder)
    torch.save(state, folder / "encoder.pth")
    # Weights that come by an address are kept by their file's name for good, so every file has one.
    with (folder / "encoder.pth").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    weights = (folder / "encoder.pth").rename(folder / f"geolink-{digest[:12]}.pth")
    task = {
        "hyper_parameters": {"model": name},
        "state_dict": {f"model.{key}": value for key, value in state.items()},
    }
    if c.image_size == TASK_SIZE:
        torch.save(task, folder / "backbone.ckpt")
    loaded = timm.create_model(
        name, num_classes=0, global_pool="", img_size=c.image_size, in_chans=c.bands
    )
    loaded.load_state_dict(torch.load(weights, weights_only=True))
    return _compare(loaded, encoder, model)


class _Features(nn.Module):
    """Images to tokens, as `encode_image`."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.encoder.forward_features(images))


def _write_onnx(encoder: VisionTransformer, model: PretrainModel, path: Path) -> float | None:
    if missing := [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]:
        raise GeoLinkError(f"--to onnx needs {' and '.join(missing)}; install geolink-osm[onnx]")
    images = _images(model)
    size = sum(p.numel() * 4 for p in encoder.parameters())
    torch.onnx.export(
        _Features(encoder).eval(), (images,), str(path), input_names=["images"],
        output_names=["tokens"], dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        external_data=size > _ONNX_LIMIT, dynamo=True, verbose=False,
    )  # fmt: skip
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # Another batch size than that it was exported with.
    images = torch.cat([images, images[:1]])
    (tokens,) = session.run(None, {"images": images.numpy()})
    return _largest(torch.from_numpy(np.asarray(tokens)), model, images)


def _state(encoder: VisionTransformer) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}


@torch.no_grad()
def _compare(loaded: nn.Module, encoder: VisionTransformer, model: PretrainModel) -> float:
    """Largest difference of a loaded encoder from ours, as it is loaded.

    Its norms have timm's eps of 1e-6, which nothing in its files can change; the last one of the
    published model has 1e-5. With ours put in, it must be the same but for rounding.
    """
    loaded = loaded.eval()
    images = _images(model)
    difference = _largest(cast(VisionTransformer, loaded).forward_features(images), model, images)
    norms = ([m for m in e.modules() if isinstance(m, nn.LayerNorm)] for e in (loaded, encoder))
    for theirs, ours in zip(*norms, strict=True):
        theirs.eps = ours.eps
    exact = _largest(cast(VisionTransformer, loaded).forward_features(images), model, images)
    if not exact < 1e-3:
        raise GeoLinkError(f"the exported encoder comes back different, by {exact:.1e}")
    return difference


@torch.no_grad()
def _largest(tokens: Tensor, model: PretrainModel, images: Tensor) -> float:
    return float((tokens - model.encode_image(images)).abs().max())


def _images(model: PretrainModel) -> Tensor:
    c = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, c.bands, c.image_size, c.image_size, generator=generator)
