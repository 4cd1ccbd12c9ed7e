"""Runs beside one another: what differs in their configs, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from geolink.checkpoint import best_checkpoints, checkpoints
from geolink.show import save
from geolink.training.log import read_log
from schemas.errors import GeoLinkError

_LEFT_OUT = {"run"}
"""Fields of a config that always differ."""


def compare_runs(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """By row of a table, the runs' values: their names, fields of the config that differ, then
    steps, final losses, the best validation figure, throughput, memory.

    Raises GeoLinkError: a folder that is no run, or one without a line of figures.
    """
    configs = [_flat(_read(run)["config"]) for run in runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    fields = list(dict.fromkeys(name for config in configs for name in config))
    table: dict[str, list[Any]] = {"run": names}
    for name in fields:
        values = [config.get(name) for config in configs]
        if name not in _LEFT_OUT and any(value != values[0] for value in values):
            table[name] = values
    snapshots = [_read(run)["snapshot"] for run in runs]
    if len(set(snapshots)) > 1:
        table["snapshot"] = snapshots
    figures = [_figures(run) for run in runs]
    for name in _merged(figures):
        table[name] = [figure.get(name) for figure in figures]
    return table


def _merged(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Names of all, each behind the one that it follows, so that losses stand together."""
    names: list[str] = []
    for figure in figures:
        at = 0
        for name in figure:
            if name not in names:
                names.insert(at, name)
            at = names.index(name) + 1
    return names


def draw_comparison(runs: Sequence[Path], names: Sequence[str], picture: Path) -> None:
    """Losses and validation figures of runs over their steps, to a picture.

    Raises GeoLinkError if it cannot be written.
    """
    logs = [read_log(run) for run in runs]
    evaluated = any("validation" in line for log in logs for line in log)
    figure = Figure(figsize=(11 if evaluated else 6.5, 4), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
    for name, log in zip(names, logs, strict=True):
        lines = [line for line in log if "loss" in line]
        axes[0].plot(*_columns(lines, lambda line: line["loss"]), lw=1.3, label=name)
        if evaluated:
            lines = [line for line in log if "validation" in line]
            values = _columns(lines, lambda line: line["validation"]["balanced_accuracy"])
            axes[1].plot(*values, lw=1.3, marker="o", ms=3, label=name)
    axes[0].set_title("loss", fontsize=10, loc="left")
    if evaluated:
        axes[1].set_title("kNN on the validation split, balanced accuracy", fontsize=10, loc="left")
        axes[1].yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    for axis in axes:
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e3e0d8", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, picture)


def _columns(lines: Sequence[dict[str, Any]], value: Any) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [value(line) for line in lines]


def _read(run: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
        dict(record["config"])
    except FileNotFoundError:
        raise GeoLinkError(f"{run} is no run folder: it has no run.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeoLinkError(f"{run / 'run.json'} is damaged ({type(error).__name__})") from None
    return record


def _flat(config: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {at + name: value}
    return found


def _figures(run: Path) -> dict[str, Any]:
    log = read_log(run)
    lines = [line for line in log if "loss" in line]
    if not lines:
        raise GeoLinkError(f"{run} has no line of figures yet; let it run longer")
    last = lines[-1]
    names = list(last)
    found = {"steps": last["step"], "epochs": last["epoch"] + 1}
    found |= {name: last[name] for name in names[names.index("loss") : names.index("grad_norm")]}
    best = best_checkpoints(checkpoints(run))
    evaluated = [line for line in log if "validation" in line]
    if evaluated:
        top = max(evaluated, key=lambda line: line["validation"]["balanced_accuracy"])
        found["kNN balanced accuracy, last"] = evaluated[-1]["validation"]["balanced_accuracy"]
        found["kNN balanced accuracy, best"] = top["validation"]["balanced_accuracy"]
        found["best checkpoint"] = best[0].name if best else None
    for name in ("samples_per_s", "data_wait", "mfu"):
        values = sorted(line[name] for line in lines if line.get(name) is not None)
        if values:
            found[f"{name}, median"] = values[len(values) // 2]
    return found | {"memory_mb": max(line["memory_mb"] for line in lines)}
