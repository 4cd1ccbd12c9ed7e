"""Every chip of a dataset in the aligned space, on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from geolink.device import pick_device
from geolink.models.base import PretrainModel
from geolink.reader import Dataset, tag_table
from geolink.stream import read_chips
from geolink.tasks.baselines import band_features
from geolink.tasks.contracts import Encoder, Imagery, Part, TaskBatch, TaskData
from geolink.tasks.encoders import open_encoder
from schemas.dataset import read_arrays
from schemas.errors import GeoLinkError

_LOOKED_AT = 8
"""Shards whose first chips are compared with what a checkpoint learnt from."""

Progress = Callable[[int, int], None]
"""Called with chips done and chips in all."""


@dataclass(frozen=True, eq=False)
class Index:
    """N chips by shard and place in it; arrays are memory maps."""

    dataset: Dataset
    image: NDArray[np.float32]
    """[N, P], unit length: projections of the images."""
    region: NDArray[np.float32]
    """[N, P], unit length: projections of the chips' OSM; zero where a chip has no object."""
    bands: NDArray[np.float32]
    """[N, F], statistics of the bands (the baseline `bands`)."""
    lonlat: NDArray[np.float64]
    """[N, 2], degrees."""
    start: NDArray[np.int64]
    """[shards + 1], first chip of each shard of `dataset.split_rows(None)`."""
    split: NDArray[np.str_]
    """[N]."""

    def __len__(self) -> int:
        return len(self.image)

    def place(self, chip: int) -> tuple[int, int]:
        """Shard of a chip, and its place in it."""
        shard = int(np.searchsorted(self.start, chip, side="right")) - 1
        return shard, chip - int(self.start[shard])


def open_aligned(
    dataset: Dataset, checkpoint: Path | str, accelerator: str, normalise: str
) -> Encoder:
    """The encoder of a checkpoint that has learnt to align images and OSM.

    Raises GeoLinkError: it has not; or as `open_encoder`.
    """
    encoder = open_encoder(
        checkpoint, "osm", _as_data(dataset), device=pick_device(accelerator), normalise=normalise
    )
    model = encoder.module
    assert isinstance(model, PretrainModel)
    if model.config.contrast_weight == 0:
        raise GeoLinkError(
            f"{checkpoint} was trained without contrast between images and OSM (contrast_weight "
            "is 0), so it has no space in which a tag finds an image: use another checkpoint"
        )
    return encoder


def project_images(model: PretrainModel, images: Tensor) -> Tensor:
    """Unit projections [B, P] of prepared images."""
    return F.normalize(model.projections[0](model.embed_image(images)).float(), dim=1)


def project_regions(model: PretrainModel, graph: Any) -> Tensor:
    """Unit projections [B, P] of the OSM of chips."""
    return F.normalize(model.projections[1](model.encode_region(graph)).float(), dim=1)


def make_index(
    dataset: Dataset, encoder: Encoder, folder: Path, *, batch_size: int = 128,
    progress: Progress | None = None,
) -> Index:  # fmt: skip
    """Project every chip of a dataset; what lies in `folder` already is used.

    Raises GeoLinkError: a shard is missing or damaged, the folder cannot be written.
    """
    rows = dataset.split_rows(None)
    checksums = "".join(r.checksum for r in rows)
    key = xxhash.xxh3_128_hexdigest(f"{encoder.key} {checksums}".encode())
    home = folder / key
    if not home.exists():
        partial = folder / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _fill(dataset, encoder, partial, sum(r.chips for r in rows), batch_size, progress)
            partial.rename(home)
        except OSError as error:
            raise GeoLinkError(f"cannot write the index to {folder}: {error}") from error
    names = ("image", "region", "bands", "lonlat")
    image, region, bands, lonlat = (
        np.load(home / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names
    )
    return Index(
        dataset, image, region, bands, lonlat, np.cumsum([0, *(r.chips for r in rows)]),
        np.repeat([r.split for r in rows], [r.chips for r in rows]),
    )  # fmt: skip


@torch.inference_mode()
def _fill(
    dataset: Dataset, encoder: Encoder, folder: Path, count: int, batch_size: int,
    progress: Progress | None,
) -> None:  # fmt: skip
    model = encoder.module
    assert isinstance(model, PretrainModel)
    device = model.tag_table.device
    arrays: dict[str, NDArray[Any]] = {}
    done = 0
    for batch in read_chips(dataset, None, batch_size=batch_size):
        images = encoder.prepare(batch.image.to(device))
        graph = batch.graph.to(device)
        some = torch.zeros(len(batch), 1, device=device)
        some[graph.chip] = 1
        found = {
            "image": project_images(model, images).cpu().numpy(),
            "region": (project_regions(model, graph) * some).cpu().numpy(),
            "bands": band_features(images).float().cpu().numpy(),
            "lonlat": batch.center_lonlat.numpy(),
        }
        for name, values in found.items():
            if name not in arrays:
                shape = (count, values.shape[1])
                arrays[name] = open_memmap(folder / f"{name}.npy", "w+", values.dtype, shape)
            arrays[name][done : done + len(values)] = values
        done += len(batch)
        if progress:
            progress(done, count)
    (folder / "about.json").write_text(json.dumps({"encoder": encoder.name, "chips": count}))


def _as_data(dataset: Dataset) -> TaskData:
    """Some chips as images without labels, for the checks of bands and values."""
    info, sensor = dataset.info, dataset.info.sensor
    rows = dataset.split_rows(None)
    at = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT)).round().astype(int))
    images = np.concatenate([
        read_arrays(dataset.path, rows[n].path, ["image"], (0, min(rows[n].chips, 8)))[0]["image"]
        for n in at.tolist()
    ])  # fmt: skip

    def read(split: str, chosen: NDArray[np.int64] | None, size: int) -> Iterator[TaskBatch]:
        own = np.arange(len(images)) if chosen is None else chosen
        yield TaskBatch(own, torch.from_numpy(images[own]))

    part = Part(
        np.arange(len(images)).astype(str), np.zeros(len(images), np.int64),
        np.full((len(images), 4), np.nan),
    )  # fmt: skip
    plain = TaskData(
        name=info.name, key="", kind="class", classes=(), splits={"train": part}, read=read,
        imagery=Imagery(
            tuple(b.name for b in sensor.bands), tuple(b.wavelength_nm for b in sensor.bands),
            sensor.dtype, sensor.nodata, (info.grid.size, info.grid.size), info.grid.gsd_m,
        ),
    )  # fmt: skip
    return replace(
        plain, has_graphs=True, patches=info.grid.patches,
        tag_table=tag_table(dataset).astype(np.float32), tag_encoder=dataset.tag_encoder,
    )  # fmt: skip
