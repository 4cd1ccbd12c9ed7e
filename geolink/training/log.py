"""What a run writes down: `log.jsonl` and TensorBoard, without making the device wait.

Losses stay on the device and are fetched together when a line is written. Kinds of lines:

- a line of figures: `step`, `epoch`; means since the last such line of `loss`, its parts and
  `grad_norm`; `lr`, `samples_per_s`, `data_wait` (share of the time spent waiting for data),
  `memory_mb`, `seconds`;
- a `message` for people: where a run went on, what was skipped, why it stopped.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import GeoLinkError
from schemas.grid import chip_name, unpack_chip

LOSSES = ("total", "reconstruction", "contrast", "consistency")
COLUMNS = ("loss", *LOSSES[1:], "grad_norm")


class Log:
    """The log of a run, from step `step` on (lines of later steps are removed).

    Args:
        run: the run's folder.
        step: steps done.
        rows: figures of the steps since the last line, as `rows` held them.
        scaled: gradients may overflow now and then (a gradient scaler skips such steps).
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int = 0,
        rows: Iterable[list[float]] = (),
        scaled: bool = False,
    ) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.rows = [list(row) for row in rows]
        """Fetched figures of the steps since the last line, by `COLUMNS`."""
        self._pending: list[tuple[int, Tensor, NDArray[np.uint64]]] = []
        self._must_be_finite = len(LOSSES) if scaled else len(COLUMNS)
        self._path = run / "log.jsonl"
        with _writing(run):
            _cut(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._start = self._since = time.perf_counter()
        self._waited = 0.0
        self._chips = 0

    def step(
        self,
        step: int,
        losses: dict[str, Tensor],
        grad_norm: Tensor,
        chip_id: NDArray[np.uint64],
        waited_s: float,
    ) -> None:
        """Take note of a step; does not wait for the device."""
        values = [losses[name].detach() for name in LOSSES]
        row = torch.stack([*values, grad_norm.detach()]).float()
        self._pending.append((step, row, chip_id))
        self._waited += waited_s
        self._chips += len(chip_id)

    def fetch(self) -> None:
        """Fetch the figures of the steps since the last time from the device.

        Raises GeoLinkError naming the first step whose loss or gradient is not finite, and its
        chips.
        """
        if not self._pending:
            return
        rows = torch.stack([row for _, row, _ in self._pending]).cpu()
        finite = torch.isfinite(rows[:, : self._must_be_finite]).all(1)
        if not bool(finite.all()):
            step, row, chip_id = self._pending[int(finite.long().argmin())]
            self._refuse(step, row, chip_id)
        self.rows += rows.double().tolist()
        self._pending.clear()

    def line(self, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """Write a line of figures and return it."""
        self.fetch()
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        means = [math.fsum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]
        figures = dict(zip(COLUMNS, means, strict=True)) | {
            "lr": lr,
            "samples_per_s": round(self._chips / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
            "memory_mb": memory_mb(),
        }
        with _writing(self._path.parent):
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        record = {"step": step, "epoch": epoch, **figures, "seconds": round(now - self._start, 2)}
        self._write(record)
        self.rows.clear()
        self._since, self._waited, self._chips = now, 0.0, 0
        return record

    def message(self, step: int, text: str, **more: object) -> None:
        """Write a line for people."""
        self._write({"step": step, "message": text, **more})

    def close(self) -> None:
        """Close the files."""
        with _writing(self._path.parent):
            self._file.close()
            self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        with _writing(self._path.parent):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _refuse(self, step: int, row: Tensor, chip_id: NDArray[np.uint64]) -> None:
        values = dict(zip(COLUMNS, row.tolist(), strict=True))
        wrong = next(name for name, value in values.items() if not math.isfinite(value))
        names = [printed_chip(chip) for chip in chip_id]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text = (
            f"{wrong} is {values[wrong]} at step {step}, with chips {shown}; look at these chips, "
            "or lower lr or clip and run again: it goes on from the last checkpoint"
        )
        self._write({"step": step, "message": text, "chips": names})
        raise GeoLinkError(text)


def printed_chip(chip_id: NDArray[np.uint64]) -> str:
    """A chip's packed id (uint64 [2]) as people read it; imported pairs have a hash."""
    if int(chip_id[0]) == 0:
        return f"pair-{int(chip_id[1]):016x}"
    return chip_name(unpack_chip(chip_id))


def memory_mb() -> float:
    """Peak memory of the GPU if one is in use, else of the process, in MB (10^6 bytes)."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return round(peak / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def read_log(run: Path) -> list[dict[str, Any]]:
    """Every line of a run's `log.jsonl`; a last one that was cut off is left out."""
    path = run / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    """Raises GeoLinkError where files of the run cannot be written."""
    try:
        yield
    except OSError as error:
        raise GeoLinkError(f"cannot write the log in {run}: {error}") from error


def _cut(path: Path, step: int) -> None:
    """Remove lines of steps that are done again."""
    kept = [line for line in read_log(path.parent) if line["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
