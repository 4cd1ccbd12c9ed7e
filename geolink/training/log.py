"""What a run writes down: `log.jsonl`, TensorBoard and, if asked, Weights & Biases.

The device is not made to wait: losses stay there and are fetched together when a line is written.
Kinds of lines:

- a line of figures: `step`, `epoch`; means since the last such line of `loss`, its parts (the
  model names them) and `grad_norm`; `lr`, `samples_per_s`, `data_wait` (share of the time spent
  waiting for data), `mfu` (`geolink.training.flops`; null where the device's peak is not known,
  as a CPU's), `memory_mb`, `seconds`. Evaluations count in none of these but `seconds`;
- a line of `validation`: figures of kNN (`geolink.training.look`);
- a `message` for people: where a run went on, what was skipped, why it stopped.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.training.board import Board
from geolink.training.flops import Speed
from geolink.training.wandb import open_wandb
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip
from schemas.training import TrainConfig

State = Mapping[str, Any]
"""Where the stream of batches stood before a step (`ShardStream.state_dict`)."""


class Log:
    """The log of a run, from step `step` on (lines of later steps are removed).

    Args:
        config: the run's; its `run` is the folder.
        losses: names of the parts of the loss.
        step: steps done.
        rows: figures of the steps since the last line, as `rows` held them.
        speed: what a step computes, and what the devices could.
        keep_batch: called with a step that is not finite and where the stream stood before it;
            keeps its batch and returns the path.
    """

    def __init__(
        self,
        config: TrainConfig,
        losses: Sequence[str],
        *,
        step: int = 0,
        rows: Sequence[Sequence[float]] = (),
        speed: Speed | None = None,
        keep_batch: Callable[[int, State], Path] | None = None,
    ) -> None:
        self.rows = [list(row) for row in rows]
        """Fetched figures of the steps since the last line, by `columns`."""
        self.columns = ("loss", *losses, "grad_norm")
        self._losses = ("total", *losses)
        self._pending: list[tuple[int, Tensor, NDArray[np.uint64], State]] = []
        # Gradients may overflow now and then where a gradient scaler skips such steps.
        scaled = config.precision == "16-mixed"
        self._must_be_finite = len(self._losses) if scaled else len(self.columns)
        self._batch_size, self._speed, self._keep_batch = config.batch_size, speed, keep_batch
        run = config.run
        self._path = run / "log.jsonl"
        with _writing(run):
            _cut(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = Board(run / "tensorboard", step + 1)
        self._wandb = open_wandb(config)
        self._start = self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self.step_s = 0.0
        """What a step took, mean of those of the last line."""

    def step(
        self,
        step: int,
        losses: dict[str, Tensor],
        grad_norm: Tensor,
        chip_id: NDArray[np.uint64],
        waited_s: float,
        before: State,
    ) -> None:
        """Take note of a step; does not wait for the device."""
        values = [losses[name].detach() for name in self._losses]
        row = torch.stack([*values, grad_norm.detach()]).float()
        self._pending.append((step, row, chip_id, before))
        self._waited += waited_s
        self._steps += 1

    def fetch(self) -> None:
        """Fetch the figures of the steps since the last time from the device.

        Raises GeoLinkError naming the first step whose loss or gradient is not finite, and its
        chips.
        """
        if not self._pending:
            return
        rows = torch.stack([row for _, row, *_ in self._pending]).cpu()
        finite = torch.isfinite(rows[:, : self._must_be_finite]).all(1)
        if not bool(finite.all()):
            self._refuse(*self._pending[int(finite.long().argmin())])
        self.rows += rows.double().tolist()
        self._pending.clear()

    def line(self, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """Write a line of figures and return it."""
        self.fetch()
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        means = [math.fsum(column) / len(self.rows) for column in zip(*self.rows, strict=True)]
        rate = self._steps * self._batch_size / elapsed
        figures = dict(zip(self.columns, means, strict=True)) | {
            "lr": lr,
            "samples_per_s": round(rate, 1),
            "data_wait": round(self._waited / elapsed, 4),
            "mfu": self._speed and round(self._speed.mfu(rate), 4),
            "memory_mb": memory_mb(),
        }
        record = {"step": step, "epoch": epoch, **figures, "seconds": round(now - self._start, 2)}
        self._write(record)
        self._show(step, figures)
        self.rows.clear()
        self.step_s = elapsed / max(self._steps, 1)
        self._since, self._waited, self._steps = now, 0.0, 0
        return record

    def validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write a line of figures of an evaluation."""
        self._write({"step": step, "validation": dict(figures)})
        self._show(step, {f"validation/{name}": value for name, value in figures.items()})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no part of the steps' time."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def message(self, step: int, text: str, **more: object) -> None:
        """Write a line for people."""
        self._write({"step": step, "message": text, **more})

    def close(self) -> None:
        """Close the files."""
        with _writing(self._path.parent):
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _show(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send figures to TensorBoard and Weights & Biases."""
        known = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        with _writing(self._path.parent):
            self._board.show(step, known)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def _write(self, record: dict[str, Any]) -> None:
        with _writing(self._path.parent):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _refuse(
        self, step: int, row: Tensor, chip_id: NDArray[np.uint64], before: State
    ) -> NoReturn:
        values = dict(zip(self.columns, row.tolist(), strict=True))
        wrong = next(name for name, value in values.items() if not math.isfinite(value))
        names = [printed_chip(chip) for chip in chip_id]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text = f"{wrong} is {values[wrong]} at step {step}, with chips {shown}"
        self._write({"step": step, "message": text, "chips": names})
        if self._keep_batch is not None:
            kept = self._keep_batch(step, before)
            text += f"; `geolink pretrain --replay {kept}` tells which of them and what makes it so"
        raise GeoLinkError(
            f"{text}; with a lower lr or clip in a new run folder it may not come to this"
        )


class NoLog:
    """The log of the ranks that write none."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def step(self, *_: object) -> None:
        """See `Log`."""

    def fetch(self) -> None:
        """See `Log`."""

    def line(self, *_: object) -> dict[str, Any]:
        """See `Log`; nothing is known here."""
        return {"loss": math.nan}

    def message(self, *_: object, **__: object) -> None:
        """See `Log`."""

    def close(self) -> None:
        """See `Log`."""


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
