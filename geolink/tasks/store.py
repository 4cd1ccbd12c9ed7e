"""Features of images, made once: kept by encoder and data, read again as a memory map."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from geolink.tasks.contracts import Encoder, TaskBatch, TaskData
from schemas.errors import GeoLinkError


class FeatureStore:
    """Features [N, width] float32 of whole splits, in a folder or, for as long as it lives, in a
    temporary one; memory is bounded, whatever N.

    Args:
        folder: where they are kept; none: a temporary folder.
        device: where encoders run.
        batch_size: images encoded at once.
    """

    def __init__(self, folder: Path | None, device: torch.device, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self._folder = folder or Path(str(self._temporary and self._temporary.name))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GeoLinkError(f"cannot make the cache {self._folder}: {error}") from error

    def features(self, encoder: Encoder, data: TaskData, split: str) -> NDArray[np.float32]:
        """Features [N, width] of a split, made if they are not there.

        Raises GeoLinkError if an image cannot be read, a feature is not finite, or the folder
        cannot be written.
        """
        part = data.part(split)
        shape = (len(part), encoder.width)
        key = f"{data.key} {split} {encoder.key} {encoder.inputs} {shape}"
        if encoder.inputs != "image":
            # The published OSM encoder norms over all nodes of a batch.
            key += f" {self._batch_size}"
        path = self._folder / f"{xxhash.xxh3_128_hexdigest(key.encode())}.npy"
        if not path.exists():
            self._make(encoder, data, split, path, shape)
        found: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def _make(
        self, encoder: Encoder, data: TaskData, split: str, path: Path, shape: tuple[int, int]
    ) -> None:
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            out = open_memmap(partial, "w+", np.float32, shape)
            for batch in ahead(data.batches(split, batch_size=self._batch_size)):
                out[batch.rows] = encode(encoder, batch, self._device)
            out.flush()
            _check_finite(out, encoder, data.part(split).ids)
            del out
            partial.replace(path)
        except OSError as error:
            raise GeoLinkError(f"cannot write features to {self._folder}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def ahead(batches: Iterator[TaskBatch]) -> Iterator[TaskBatch]:
    """The batches, the next of which is read while one is at work."""
    with ThreadPoolExecutor(1, "geolink-ahead") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


@torch.inference_mode()
def encode(encoder: Encoder, batch: TaskBatch, device: torch.device) -> NDArray[np.float32]:
    """Features [B, width] of a batch."""
    images = encoder.prepare(batch.image.to(device, non_blocking=True))
    graph = None if batch.graph is None else batch.graph.to(device)
    found: NDArray[np.float32] = encoder.embed(images, graph).float().cpu().numpy()
    return found


def _check_finite(features: NDArray[np.float32], encoder: Encoder, ids: NDArray[np.str_]) -> None:
    for low in range(0, len(features), 1 << 14):
        wrong = ~np.isfinite(features[low : low + (1 << 14)]).all(1)
        if wrong.any():
            raise GeoLinkError(
                f"the features that {encoder.name} makes of image {ids[low + int(wrong.argmax())]} "
                "are not finite: its weights or the image's pixels are damaged"
            )
