"""Checkpoints are written beside the steps, in a thread, one at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from geolink.checkpoint import CheckpointMeta, host_copy, save_checkpoint
from schemas.training import Keep


class CheckpointWriter:
    """Writes the checkpoints of a run while its steps go on.

    `write` takes a copy of everything, so that later steps change nothing of it, and comes back;
    a thread writes the copy to disk. What goes wrong there is raised by the next call of any
    method. At most one checkpoint is in flight: memory for one copy is needed, no more.
    """

    def __init__(self, run: Path, keep: Keep) -> None:
        self.run, self.keep = run, keep
        self.seconds = 0.0
        """What the slowest checkpoint took, from its copy to its name on disk."""
        self._pool = ThreadPoolExecutor(1, "geolink-checkpoint")
        self._writing: Future[None] | None = None

    def write(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        meta: CheckpointMeta,
        trainer: Mapping[str, Any],
    ) -> None:
        """Begin to write a checkpoint (`geolink.checkpoint.save_checkpoint`), the last one done.

        `trainer` must not be changed afterwards. Raises GeoLinkError if the last one could not be
        written.
        """
        self.wait()
        begun = time.perf_counter()
        copies = {name: host_copy(named) for name, named in tensors.items()}
        self._writing = self._pool.submit(self._write, begun, copies, meta, trainer)

    def check(self) -> None:
        """Raises GeoLinkError if the last checkpoint could not be written; does not wait for it."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises GeoLinkError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """As `wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(
        self,
        begun: float,
        copies: Mapping[str, Mapping[str, Tensor]],
        meta: CheckpointMeta,
        trainer: Mapping[str, Any],
    ) -> None:
        save_checkpoint(self.run, copies, meta, trainer, self.keep)
        self.seconds = max(self.seconds, time.perf_counter() - begun)
