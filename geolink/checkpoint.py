"""Checkpoints: a folder that is there whole or not at all.

    <run>/step-000123/
        model.safetensors       parameters by name, float32
        optimizer.safetensors   `<what>/<parameter>`, e.g. `exp_avg/cls_token`
        ema.safetensors         averaged parameters by name, if the run averages them
        config.json             `CheckpointMeta`: what the model is and what it learnt from
        trainer.json            where the run stands, to go on exactly from there

Nothing in them is executed when they are read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from schemas.errors import GeoLinkError
from schemas.licences import Licence
from schemas.storage_local import flush
from schemas.training import Keep, TrainConfig

MODEL, OPTIMIZER, EMA, META, TRAINER = (
    "model.safetensors", "optimizer.safetensors", "ema.safetensors", "config.json", "trainer.json",
)  # fmt: skip


class PublishedWeights(BaseModel):
    """The published file that a checkpoint was converted from (`geolink convert`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(description="Its name.")]
    sha256: Annotated[str, Field(description="Of its bytes.")]
    layout: Annotated[str, Field(description="Layout of its names.")]
    stated: Annotated[dict[str, Any], Field(description="Its own `model_config`.")]


class MixedPart(BaseModel):
    """Another dataset that a model learnt from, and its pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Annotated[str, Field(description="Its name.")]
    snapshot: Annotated[int, Field(ge=0, description="Of it.")]
    bands: Annotated[tuple[str, ...], Field(description="Names of its bands.")]
    nodata: Annotated[int, Field(description="Stored value of its pixels without data.")]
    mean: Annotated[tuple[float, ...], Field(description="Of each band's stored values.")]
    std: Annotated[tuple[float, ...], Field(description="Of each band's stored values.")]


class CheckpointMeta(BaseModel):
    """`config.json` of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    geolink: Annotated[str, Field(description="Version that wrote it.")]
    revision: Annotated[str | None, Field(description="Git revision of the code, if any.")]
    step: Annotated[int, Field(ge=0, description="Steps done.")]
    steps: Annotated[int, Field(ge=0, description="Steps of the whole run; 0: not trained here.")]
    dataset: Annotated[str, Field(description="Name of the dataset.")]
    snapshot: Annotated[
        int, Field(ge=0, description="Snapshot of the dataset; 0: there is none behind it.")
    ]
    tag_encoder: Annotated[str, Field(description="Text encoder of the tags.")]
    licences: Annotated[
        tuple[Licence, ...], Field(description="Terms of what it learnt from.")
    ] = ()
    bands: Annotated[tuple[str, ...], Field(description="Names of the bands.")]
    classes: Annotated[
        tuple[str, ...] | None, Field(description="Names of the classes of the dataset's taxonomy.")
    ] = None
    nodata: Annotated[
        int, Field(description="Stored value of pixels without data; -1: there are none.")
    ]
    mean: Annotated[tuple[float, ...], Field(description="Of each band's stored values.")]
    std: Annotated[tuple[float, ...], Field(description="Of each band's stored values.")]
    mixed: Annotated[
        tuple[MixedPart, ...],
        Field(description="Other datasets that it learnt from; all else here is of the first."),
    ] = ()
    validation: Annotated[
        float | None,
        Field(description="Balanced accuracy of kNN on the validation split, if evaluated."),
    ] = None
    published: Annotated[
        PublishedWeights | None, Field(description="Where converted weights come from.")
    ] = None
    config: TrainConfig

    def band_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`mean` and `std` as float32 [bands] on a device, for `geolink.device.normalise`."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=device)
        return mean, torch.tensor(self.std, dtype=torch.float32, device=device)


def code_version() -> tuple[str, str | None]:
    """GeoLink's version, and the git revision (`-dirty` if changed) if it runs from a checkout."""
    try:
        release = version("geolink-osm")
    except PackageNotFoundError:
        release = "unknown"
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return release, None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=root,
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return release, None
    return release, done.stdout.strip() or None


def save_checkpoint(
    run: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: CheckpointMeta,
    trainer: Mapping[str, Any],
    keep: Keep = Keep(),  # noqa: B008 - frozen
) -> Path:
    """Write `<run>/step-<step>` and remove the checkpoints that `keep` does not ask for.

    It is written under another name, brought to disk and renamed, so that a checkpoint that has
    its name is complete. Raises GeoLinkError if it cannot be written (disk full, read-only).

    Args:
        run: the run's folder.
        tensors: by name of the file (`MODEL`, `OPTIMIZER`, ...), its tensors, on the CPU.
        meta: `config.json`.
        trainer: `trainer.json`.
        keep: which checkpoints of the run stay.
    """
    target = run / f"step-{meta.step:06d}"
    partial = run / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, named in tensors.items():
            save_file(dict(named), partial / name)
        (partial / META).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n", encoding="utf-8")
        readable_alike(partial / META)
        for path in (*partial.iterdir(), partial):
            flush(path)
        # There is one of that name only if it was damaged and its steps were done again.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise GeoLinkError(f"cannot write checkpoint {target}: {error}") from error
    found = checkpoints(run)
    for old in set(found) - kept(found, keep):
        shutil.rmtree(old, ignore_errors=True)
    return target


def readable_alike(file: Path) -> None:
    """Let who may read a file read those beside it: safetensors leaves its own to their owner."""
    for path in file.parent.iterdir():
        path.chmod(file.stat().st_mode)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers as `MODEL` holds them: each under one name."""
    return {name: tensor.detach() for name, tensor in _unique(model).items()}


def host_copy(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the CPU, which later steps do not change."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()
    }


def kept(found: Sequence[Path], keep: Keep) -> set[Path]:
    """Those of a run's checkpoints, by rising step, that `keep` asks for."""
    chosen = set(found[-keep.last :])
    if keep.every is not None:
        chosen |= {path for path in found if step_of(path) % keep.every == 0}
    return chosen | set(best_checkpoints(found)[: keep.best])


def best_checkpoints(found: Sequence[Path]) -> list[Path]:
    """Checkpoints that were evaluated, the best first; of equals the earlier."""
    figures = [(figure, path) for path in found if (figure := _validation(path)) is not None]
    return [path for _, path in sorted(figures, key=lambda f: (-f[0], step_of(f[1])))]


def _validation(folder: Path) -> float | None:
    """A checkpoint's validation figure; none for one that is damaged, too."""
    try:
        return read_meta(folder).validation
    except GeoLinkError:
        return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run folder by rising step."""
    found = (p for p in run.glob("step-*") if p.name[5:].isdigit() and p.is_dir())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps done of a checkpoint folder, by its name."""
    return int(checkpoint.name[5:])


def load_model(path: Path) -> tuple[PretrainModel, CheckpointMeta]:
    """The model of a checkpoint folder, or of the last checkpoint of a run folder, on the CPU.

    It is in evaluation mode and has no tag table (`set_tag_table`). Its weights are the averaged
    ones if the run averages them.
    Raises GeoLinkError: nothing there, a file missing, truncated or not of its format, parameters
    that are not the model's.
    """
    folder = checkpoint_folder(path)
    meta = read_meta(folder)
    model = make_model(meta.config.model)
    load_weights(folder, model)
    model.load_state_dict(load_average(folder), strict=False)
    return model.eval(), meta


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's parameters into a model.

    Raises GeoLinkError naming the file, and the first parameters that differ.
    """
    path = folder / MODEL
    found, expected = _read_tensors(path), _unique(model)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not the model's" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise GeoLinkError(
            f"{path} is of another model: {'; '.join(problems[:3])}{more}; "
            f"it does not fit the model in {META} beside it"
        )
    model.load_state_dict(found, strict=False)


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's parameters as its files hold them, averaged ones in the place of the others.

    Raises GeoLinkError if they cannot be read.
    """
    return _read_tensors(folder / MODEL) | load_average(folder)


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's optimizer state. Raises GeoLinkError if it cannot be read."""
    return _read_tensors(folder / OPTIMIZER)


def load_average(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's averaged parameters; empty if its run averages none.

    Raises GeoLinkError if they cannot be read.
    """
    return _read_tensors(folder / EMA) if (folder / EMA).exists() else {}


def read_trainer(folder: Path) -> dict[str, Any]:
    """Where a checkpoint's run stands. Raises GeoLinkError if it cannot be read."""
    return _read_json(folder / TRAINER)


def read_meta(folder: Path) -> CheckpointMeta:
    """`config.json` of a checkpoint. Raises GeoLinkError if it cannot be read."""
    path = folder / META
    data = _read_json(path)
    try:
        return CheckpointMeta.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise GeoLinkError(f"{path} is no checkpoint's config: {field}: {first['msg']}") from None


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, or the last one of a run, in figures.

    Raises GeoLinkError as `load_model`.
    """
    folder = checkpoint_folder(path)
    model, meta = load_model(folder)
    parameters = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.img_encoder.parameters())
    c = meta.config.model
    return {
        "checkpoint": str(folder),
        "step": meta.step,
        "steps": meta.steps,
        "model": f"{c.variant}, {c.depth} blocks of width {c.embed_dim}",
        "parameters": parameters,
        "image_encoder_parameters": encoder,
        "images": f"{c.image_size} px, {c.bands} bands ({', '.join(meta.bands)}), "
        f"patches of {c.patch_size} px",
        "dataset": meta.dataset,
        "snapshot": meta.snapshot,
        "tag_encoder": meta.tag_encoder,
        "licences": "; ".join(f"{n.source}: {n.licence or 'not stated'}" for n in meta.licences),
        "seed": meta.config.seed,
        "geolink": meta.geolink,
        "revision": meta.revision or "none",
        "megabytes": sum(f.stat().st_size for f in folder.iterdir()) / 1e6,
    }


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint folder as it is, or the last checkpoint of a run folder.

    Raises GeoLinkError if it is neither.
    """
    if (path / MODEL).exists() or (path / META).exists():
        return path
    if not path.is_dir():
        what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
        raise GeoLinkError(f"{path} {what}; give a run folder or one of its step-... folders")
    found = checkpoints(path)
    if not found:
        raise GeoLinkError(f"{path} holds no checkpoint: it has no {MODEL} and no step-... folder")
    return found[-1]


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, each tensor under the first of its names."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise GeoLinkError(f"checkpoint file {path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise GeoLinkError(f"{path} is truncated or no safetensors file: {error}") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GeoLinkError(f"checkpoint file {path} is missing") from None
    except (OSError, ValueError) as error:
        raise GeoLinkError(f"{path} is truncated or no JSON file: {error}") from error
    if not isinstance(data, dict):
        raise GeoLinkError(f"{path} is no checkpoint's file: it holds no mapping")
    return data
