"""The page of an evaluation, and its figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from geolink.page.base import data_url, render, write
from geolink.tasks.contracts import IGNORE, Example, Labels, TaskData
from geolink.tasks.examples import examples_of, said
from geolink.tasks.report import TITLES

if TYPE_CHECKING:
    from geolink.tasks.evaluate import Run

PAGE = "index.html"

_OURS, _OTHER, _INK = "#2f7d3b", "#b0bec5", "#1c2430"
_COLORS = ("#2f7d3b", "#1f6f8b", "#c2557a", "#f2a33c", "#6d5aa8", "#8d6e63", "#607d8b", "#9e9d24")
_GAP = 6
"""White pixels between pictures that are side by side."""
_NAMED_CLASSES = 30
"""Most classes whose names stand beside a confusion matrix."""


def title(name: str) -> str:
    """A measure as people read it."""
    return TITLES.get(name, name.replace("_", " "))


def write_evaluation_page(
    result: Mapping[str, Any], runs: Sequence[Run], data: TaskData, folder: Path
) -> None:
    """Write `<folder>/index.html`, with pictures of the best and the worst images.

    Raises GeoLinkError where it cannot be written.
    """
    most = max(run.share for run in runs)
    run = next(r for r in runs if r.method == "encoder" and r.share == most)
    first = result["measures"][0]
    html = render(
        "geolink/page/evaluation.html.j2",
        result=result, title=title, measures=result["measures"], first=first,
        verdict=verdict(result),
        figures=_figures(result),
        figure=_embed(draw_figure(result)),
        rows=_rows(result),
        by_class=result["scores"]["encoder"]["by_class"],
        class_columns=[k for k in result["scores"]["encoder"]["by_class"][0]
                       if k not in ("class", "count")],
        examples=_examples(run, data),
        chosen=_chosen(result),
    )  # fmt: skip
    write(folder / PAGE, html)


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence: the encoder's score, and what it beats by how much."""
    name = result["measures"][0]
    ours = result["scores"]["encoder"]
    low, high = ours["interval"][name]
    parts = []
    for method, point in result["scores"].items():
        if method != "encoder":
            value, a, b = (100 * v for v in point["difference"][name])
            sure = "" if a > 0 or b < 0 else ", which may be chance"
            parts.append(f"{value:+.1f} against {method}{sure}")
    what = title(name)
    against = f" In points: {'; '.join(parts)}." if parts else ""
    return (
        f"{what[0].upper()}{what[1:]} {ours['score'][name]:.1%} (95 % interval {low:.1%} to "
        f"{high:.1%}) on {result['held_out']:,} test images.{against}"
    )


def _figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    ours = result["scores"]["encoder"]
    return [
        *((f"{ours['score'][n]:.1%}", title(n)) for n in result["measures"]),
        (f"{ours['calibration']['ece']:.3f}", "calibration error"),
        (f"{ours['labels']:,}", "labels used"),
        (f"{result['held_out']:,}", "test images"),
        (f"{result['classes']}", "classes"),
    ]


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a method and share of the labels, the most labels first."""
    first = result["measures"][0]
    found = []
    for method, points in result["curve"].items():
        for point in points:
            difference = point.get("difference", {}).get(first)
            found.append({
                "method": method, "share": point["share"], "labels": point["labels"],
                "ours": method == "encoder",
                "scores": [
                    "{:.1%} ({:.1%} – {:.1%})".format(point["score"][n], *point["interval"][n])
                    for n in result["measures"]
                ],
                "std": f"{100 * point['std_over_seeds'][first]:.1f}",
                "difference": "" if difference is None
                else "{:+.1f} ({:+.1f} – {:+.1f})".format(*(100 * v for v in difference)),
                "p": "" if difference is None else f"{point['p'][first]:.3f}",
            })  # fmt: skip
    return sorted(found, key=lambda row: -row["share"])


def _chosen(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{r['method']}, {100 * r['share']:g} % of the labels, seed {r['seed']}",
         ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in r["chosen"].items()))
        for r in result["runs"] if r["chosen"]
    ]  # fmt: skip


def _examples(run: Run, data: TaskData) -> list[dict[str, str]]:
    found = []
    for example in examples_of(run.outcome, data):
        about = f"{example.score:.0%}"
        if isinstance(run.outcome, Labels):
            true, guess = said(run.outcome, example, data.classes)
            about = f"{true}, given {example.score:.0%}" + (
                f"; taken for {guess}" if guess != true else ""
            )
        found.append({"src": _picture(example), "id": example.id, "about": about})
    return found


def _picture(example: Example) -> str:
    """The image, or both dates, with the mask and the predicted one beside it where there are
    masks."""
    masks = [m for m in (example.truth, example.predicted) if m is not None]
    wide = masks[0].shape[1] if masks else example.picture.shape[1]
    dates = np.split(example.picture, example.picture.shape[1] // wide, 1)
    times = max(1, round(160 / example.picture.shape[0]))
    parts = [
        np.pad(part.repeat(times, 0).repeat(times, 1), ((0, 0), (0, _GAP), (0, 0)),
               constant_values=255)
        for part in (*dates, *(mask_colors(mask) for mask in masks))
    ]  # fmt: skip
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts, 1)[:, :-_GAP]).save(buffer, "png")
    return data_url(buffer.getvalue(), "png")


def mask_colors(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask [y, x] in colours [y, x, 3], of which there are twenty, dark ones first; white where
    nothing is scored."""
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    table = np.rint(255 * colormaps["tab20"](order)[:, :3]).astype(np.uint8)
    found: NDArray[np.uint8] = np.where(
        (mask == IGNORE)[..., None], np.uint8(255), table[mask % len(table)]
    )
    return found


def draw_figure(result: Mapping[str, Any]) -> Figure:
    """Scores with intervals; few labels; the confusion matrix; how far confidence is right."""
    few = len(result["protocol"]["shares"]) > 1
    confusion = result["scores"]["encoder"]["confusion"]
    panels = 2 + few + (confusion is not None)
    wide = 2
    tall = -(-panels // wide)
    figure = Figure(figsize=(11.5, 4.4 * tall), facecolor="white", layout="constrained")
    axes = list(figure.subplots(tall, wide, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    _draw_scores(axes.pop(0), result)
    if few:
        _draw_shares(axes.pop(0), result)
    if confusion is not None:
        _draw_confusion(axes.pop(0), np.array(confusion), result["class_names"])
    _draw_calibration(axes.pop(0), result)
    return figure


def _draw_scores(axis: Axes, result: Mapping[str, Any]) -> None:
    name, scores = result["measures"][0], result["scores"]
    methods = list(scores)
    value = np.array([scores[m]["score"][name] for m in methods])
    bounds = np.array([scores[m]["interval"][name] for m in methods])
    y = np.arange(len(methods))[::-1]
    colors = [_OURS if m == "encoder" else _OTHER for m in methods]
    error = np.maximum(np.abs(bounds.T - value), 0)
    axis.barh(y, value, color=colors, xerr=error, ecolor="#37474f", capsize=4, height=0.62)
    for n, method in enumerate(methods):
        axis.annotate(
            f"{value[n]:.1%}", (0.008, y[n]), va="center", fontsize=9,
            color="white" if method == "encoder" and value[n] > 0.12 else _INK,
            xycoords=("axes fraction", "data"),
        )  # fmt: skip
    axis.set_yticks(y, methods)
    axis.set_title(f"{title(name)}, 95 % interval", fontsize=10, loc="left")
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_shares(axis: Axes, result: Mapping[str, Any]) -> None:
    name = result["measures"][0]
    for n, (method, points) in enumerate(result["curve"].items()):
        x = [p["labels"] for p in points]
        y = [p["score"][name] for p in points]
        low, high = np.array([p["interval"][name] for p in points]).T
        color = _COLORS[n % len(_COLORS)]
        axis.plot(x, y, "o-", color=color, lw=1.6, ms=4, label=method)
        axis.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    axis.set_xscale("log")
    ticks = [p["labels"] for p in result["curve"]["encoder"]]
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel("labels used")
    axis.set_title(f"{title(name)} by labels", fontsize=10, loc="left")
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_confusion(axis: Axes, confusion: NDArray[np.int64], names: Sequence[str]) -> None:
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Greens", vmin=0, vmax=1)
    if len(names) <= _NAMED_CLASSES:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                color = "white" if value > 0.55 else _INK
                axis.annotate(
                    f"{100 * value:.0f}", (column, row), ha="center", va="center", fontsize=7,
                    color=color,
                )  # fmt: skip
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title("Confusion of the encoder, % of each true class", fontsize=10, loc="left")


def _draw_calibration(axis: Axes, result: Mapping[str, Any]) -> None:
    found = result["scores"]["encoder"]["calibration"]
    there = [n for n, c in enumerate(found["count"]) if c]
    x = [found["confidence"][n] for n in there]
    y = [found["right"][n] for n in there]
    count = np.array([found["count"][n] for n in there])
    axis.plot([0, 1], [0, 1], color=_OTHER, lw=1)
    axis.plot(x, y, color=_OURS, lw=1.2)
    axis.scatter(x, y, s=12 + 120 * count / max(count.max(initial=1), 1), color=_OURS, zorder=3)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("confidence")
    axis.set_ylabel("share that is right")
    axis.set_title(f"Calibration of the encoder, error {found['ece']:.3f}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _embed(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return data_url(buffer.getvalue(), "png")
