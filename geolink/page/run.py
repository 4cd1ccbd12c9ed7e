"""The page of a run: curves, pictures, checkpoints and config in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from geolink.checkpoint import CheckpointMeta, best_checkpoints, checkpoints, read_meta, step_of
from geolink.page.base import data_url, render, write
from geolink.page.charts import Curve, draw_curves
from geolink.training.log import read_log
from schemas.errors import GeoLinkError

PAGE = "index.html"
PICTURES = "pictures"

_MESSAGES = 30
_ABOUT_PICTURES = {
    "reconstruction": (
        "Reconstructions",
        "Chips of the validation split: the image, the quarter or so of it that the model is "
        "shown, and what it paints in the rest. It paints what stands out within a patch; how "
        "bright and how rich in contrast a patch is as a whole comes from the image, since "
        "the model is not asked for that.",
    ),
    "attention": (
        "Attention between patches and objects",
        "Left a chip with its OpenStreetMap objects; then, for three of them, how much each patch "
        "looks at the object (bright: much), with the most that any patch does, and what it would "
        "be if all objects were looked at evenly. White: the patches that the object really meets.",
    ),
    "map": (
        "Map of embeddings",
        "Chips where they lie, coloured by the first three principal components of their "
        "embeddings: alike in colour, alike to the encoder.",
    ),
}
_ABOUT_LOSSES = {
    "reconstruction": "Pixels of hidden patches.",
    "contrast": "Each chip's image told its own OpenStreetMap from others'.",
    "consistency": "Hidden tags of objects, from image and map.",
    "dense": "Classes that cover each visible patch.",
}


class Chart(NamedTuple):
    """Curves of the page."""

    title: str
    svg: Markup
    names: Sequence[str]
    caption: str


def write_run_page(run: Path, meta: CheckpointMeta) -> Path:
    """Write `<run>/index.html` from what the run's folder holds; returns its path.

    Raises GeoLinkError where it cannot be written.
    """
    log = read_log(run)
    lines = [line for line in log if "loss" in line]
    evaluated = [line for line in log if "validation" in line]
    messages = [line for line in log if "message" in line]
    severity, status = _status(log, meta)
    html = render(
        "geolink/page/run.html.j2",
        name=run.name, meta=meta, model=_model(meta), severity=severity, status=status,
        figures=_figures(lines, evaluated, meta),
        losses=_losses(lines), speed=_speed(lines),
        mfu_unknown=not any(line.get("mfu") for line in lines),
        validation=_validation(evaluated), validation_text=_validation_text(evaluated),
        not_evaluated=_not_evaluated(messages, meta),
        pictures=_pictures(run),
        messages=messages[-_MESSAGES:][::-1], messages_left_out=len(messages[:-_MESSAGES]),
        checkpoints=_checkpoints(run),
        config=yaml.safe_dump(meta.config.model_dump(mode="json"), sort_keys=False),
    )  # fmt: skip
    page = run / PAGE
    write(page, html)
    return page


def _model(meta: CheckpointMeta) -> str:
    c = meta.config.model
    return f"Variant {c.variant}, {c.depth} blocks of width {c.embed_dim}"


def _status(log: list[dict[str, Any]], meta: CheckpointMeta) -> tuple[str, str]:
    """How grave, and a sentence."""
    last: dict[str, Any] = log[-1] if log else {"step": 0}
    done = f"{last['step']:,} of {meta.steps:,} steps are done"
    text = f"{last['message'][0].upper()}{last['message'][1:]}." if "message" in last else ""
    if last.get("failed"):
        return "error", text
    if last.get("ended"):
        return ("", f"Finished: {done}.") if last["step"] == meta.steps else ("warning", text)
    return "", f"Under way when this page was written: {done}."


def _figures(
    lines: list[dict[str, Any]], evaluated: list[dict[str, Any]], meta: CheckpointMeta
) -> list[tuple[str, str]]:
    if not lines:
        return [("0", "steps")]
    last = lines[-1]
    found = [
        (f"{last['step']:,}", f"of {meta.steps:,} steps"),
        (f"{last['loss']:.4g}", "loss, last line"),
        (f"{_median(lines, 'samples_per_s'):,.0f}", "chips a second, median"),
        (f"{_median(lines, 'data_wait'):.1%}", "of the time waiting for data"),
    ]
    if any(line.get("mfu") for line in lines):
        found.append((f"{_median(lines, 'mfu'):.1%}", "MFU, median"))
    found.append((f"{max(line['memory_mb'] for line in lines) / 1000:,.2f} GB", "memory, peak"))
    if evaluated:
        figure = evaluated[-1]["validation"]["balanced_accuracy"]
        found.append((f"{figure:.1%}", "kNN balanced accuracy, last"))
    return found


def _median(lines: list[dict[str, Any]], name: str) -> float:
    values = sorted(line[name] for line in lines if line.get(name) is not None)
    return float(values[len(values) // 2]) if values else 0.0


def _chart(
    title: str, lines: list[dict[str, Any]], names: Sequence[str], caption: str,
    *, percent: bool = False, dots: bool = False,
) -> list[Chart]:  # fmt: skip
    """A chart of some figures over steps; none where there is nothing to show."""
    steps = [line["step"] for line in lines]
    curves = [
        Curve(
            name.replace("_", " "),
            steps,
            [float("nan") if (v := line.get(name)) is None else v for line in lines],
        )
        for name in names
    ]
    svg = draw_curves(curves, percent=percent, dots=dots)
    return [Chart(title, svg, [c.name for c in curves], caption)] if svg else []


def _losses(lines: list[dict[str, Any]]) -> list[Chart]:
    if not lines:
        return []
    known = list(lines[-1])
    parts = known[known.index("loss") + 1 : known.index("grad_norm")]
    found = _chart("Loss", lines, ["loss"], "Sum of the parts, weighted; mean since the last line.")
    for name in parts:
        title, about = name.replace("_", " ").capitalize(), _ABOUT_LOSSES.get(name, "")
        found += _chart(title, lines, [name], about)
    found += _chart("Gradient norm", lines, ["grad_norm"], "Before clipping.")
    found += _chart("Learning rate", lines, ["lr"], "")
    return found


def _speed(lines: list[dict[str, Any]]) -> list[Chart]:
    found = _chart("Chips a second", lines, ["samples_per_s"], "All devices together.")
    found += _chart(
        "Waiting for data", lines, ["data_wait"], "Share of the time.", percent=True
    )  # fmt: skip
    found += _chart(
        "MFU", lines, ["mfu"], "Share of the devices' peak that the model's arithmetic reaches.",
        percent=True,
    )  # fmt: skip
    return found + _chart("Memory", lines, ["memory_mb"], "Peak so far, in MB.")


def _validation(evaluated: list[dict[str, Any]]) -> list[Chart]:
    lines = [{"step": line["step"], **line["validation"]} for line in evaluated]
    return _chart(
        "kNN on the validation split", lines, ["accuracy", "balanced_accuracy", "macro_f1"],
        "Class that covers most of a chip, by its nearest neighbours of the training split.",
        percent=True, dots=True,
    )  # fmt: skip


def _validation_text(evaluated: list[dict[str, Any]]) -> str:
    if not evaluated:
        return ""
    best = max(evaluated, key=lambda line: line["validation"]["balanced_accuracy"])
    figures = evaluated[-1]["validation"]
    return (
        f"By {figures['fit']:,} chips of the training split, {figures['chips']:,} of the "
        f"validation split in {figures['classes']} classes. Best so far: balanced accuracy "
        f"{best['validation']['balanced_accuracy']:.1%} at step {best['step']:,}; one class for "
        f"all would have {1 / figures['classes']:.1%}."
    )


def _not_evaluated(messages: list[dict[str, Any]], meta: CheckpointMeta) -> str:
    """Why there is no evaluation though there was to be one."""
    why = [m["message"] for m in messages if m["message"].startswith("not evaluated")]
    if why:
        return f"{why[-1][0].upper()}{why[-1][1:]}."
    return "Not evaluated yet." if meta.config.evaluate_every is not None else ""


def _pictures(run: Path) -> list[dict[str, Any]]:
    """The last picture of each kind."""
    found = []
    for kind, (title, caption) in _ABOUT_PICTURES.items():
        files = sorted((run / PICTURES).glob(f"{kind}-*.png"))
        if files:
            step = int(files[-1].stem.rpartition("-")[2])
            src = data_url(files[-1].read_bytes(), "png")
            found.append({"title": title, "caption": caption, "src": src, "step": step})
    return found


def _checkpoints(run: Path) -> list[dict[str, Any]]:
    found = checkpoints(run)
    best = best_checkpoints(found)[:1]
    rows = []
    for folder in found:
        try:
            figure = read_meta(folder).validation
        except GeoLinkError:
            # The writer has removed it meanwhile, or it is damaged, which resuming tells.
            continue
        rows.append({
            "folder": folder.name, "step": step_of(folder), "validation": figure,
            "best": folder in best,
        })  # fmt: skip
    return rows
