"""The model that an evaluation trained, kept beside its result: weights, and what they are.

<folder>/model.safetensors   the head, and the encoder unless it was frozen
<folder>/model.json          `KeptModel`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geolink.checkpoint import MODEL, host_copy, model_tensors
from geolink.tasks.contracts import Encoder, Fit, Kind
from schemas.errors import GeoLinkError
from schemas.evaluation import Inputs, TaskName

ABOUT, RESULT = "model.json", "result.json"
MAPPED: tuple[TaskName, ...] = ("segmentation", "finetune", "zones", "villages")
"""Tasks whose models make maps."""
ENCODER = "encoder."


class KeptModel(BaseModel):
    """A trained encoder and head, and the images that they are for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: TaskName
    kind: Kind
    classes: tuple[str, ...]
    checkpoint: str
    """What the encoder was before; absolute if it is a path."""
    seed: int
    """Of new weights, if the checkpoint says `random:`."""
    inputs: Inputs
    size: int
    """Side that images are resized to."""
    encoder_checksum: str
    """Of the checkpoint's weights (`weights_checksum`)."""
    head: str
    """`linear`, `fpn`, `upernet`, or `classifier`: of whole images."""
    frozen: bool
    """Whether the encoder's weights are the checkpoint's."""
    bands: tuple[str, ...]
    """That the encoder takes, in its order."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of these bands, by which pixels are scaled."""
    image_px: tuple[int, int]
    """(y, x) of the images before they are resized."""
    gsd_m: float | None
    """Of these."""
    dtype: str
    tag_encoder: str | None
    data: str
    """Name of what it was trained with."""
    labels: int
    """Images it was trained with."""
    checksum: str
    """Of the weights kept here."""


def keep_model(folder: Path, module: nn.Module, fit: Fit, head: str) -> None:
    """Write the weights of a module `encoder` and `head`, and what they are.

    Raises GeoLinkError if they cannot be written.
    """
    original, frozen = fit.encoder, fit.config.training.freeze
    tensors = host_copy(model_tensors(module))
    if frozen:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(ENCODER)}
    imagery, about = fit.data.imagery, original.about
    kept = KeptModel(
        task=fit.config.task, kind=fit.data.kind, classes=fit.data.classes,
        checkpoint=_absolute(fit.config.checkpoint), seed=fit.config.seed, inputs=original.inputs,
        size=original.size, encoder_checksum=encoder_checksum(original), head=head, frozen=frozen,
        bands=about["bands"], mean=about["mean"], std=about["std"], image_px=imagery.size,
        gsd_m=imagery.gsd_m, dtype=imagery.dtype, tag_encoder=fit.data.tag_encoder,
        data=fit.data.name, labels=len(fit.rows), checksum=weights_checksum(tensors),
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / MODEL)
        (folder / ABOUT).write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise GeoLinkError(f"cannot write {folder}: {error}") from error


def read_model(folder: Path) -> tuple[KeptModel, dict[str, Tensor]]:
    """What `keep_model` wrote.

    Raises GeoLinkError: no folder of an evaluation; one of a task that makes no maps; damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise GeoLinkError(_why_none(folder))
    try:
        kept = KeptModel.model_validate_json(path.read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load_file(folder / MODEL)
    except (OSError, ValidationError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise GeoLinkError(f"the model in {folder} is damaged: {first}; evaluate again") from error
    if weights_checksum(tensors) != kept.checksum:
        raise GeoLinkError(
            f"{folder / MODEL} is not the file that {ABOUT} tells of: evaluate again"
        )
    return kept, tensors


def _why_none(folder: Path) -> str:
    maps = ", ".join(MAPPED)
    if not (folder / RESULT).is_file():
        return (
            f"{folder} is no folder of an evaluation: give the one that `geolink evaluate TASK "
            f"--output FOLDER` wrote (task {maps})"
        )
    try:
        task = json.loads((folder / RESULT).read_text(encoding="utf-8"))["task"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeoLinkError(f"{folder / RESULT} is damaged: evaluate again") from error
    if task in MAPPED:
        return f"{folder} was evaluated before models were kept: evaluate again"
    return f"task {task} in {folder} keeps no model that makes maps: evaluate {maps}"


def encoder_checksum(encoder: Encoder) -> str:
    """Of an encoder's weights."""
    assert encoder.module is not None
    return weights_checksum(model_tensors(encoder.module))


def weights_checksum(tensors: dict[str, Tensor]) -> str:
    """Hash of tensors by name: their values as float32 and their shapes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _absolute(checkpoint: Any) -> str:
    return str(checkpoint.resolve()) if isinstance(checkpoint, Path) else str(checkpoint)
