"""What `evidence.py` found: scores with intervals, leads with tests, a table, a figure, a page.

Scores are the tasks' own (`geolink.tasks.measures`), of predictions that `geolink evaluate` wrote.
What is drawn for intervals and swapped for tests is not a chip but a block: chips of a block are
neighbours under one flight's light, and no samples of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from geolink.show import save
from geolink.tasks.contracts import Kind, Masks
from geolink.tasks.measures import MEASURES
from geolink.tasks.report import PREDICTIONS
from geolink.tasks.significance import bootstrap, interval, paired_test, score

Cell = tuple[str, str, str, float]
"""Model or baseline, inputs, task, share of the labels."""

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TITLES = {
    "knn": "kNN", "linear": "linear probe", "finetune": "fine-tuning", "zones": "zones",
    "segmentation": "segmentation",
}  # fmt: skip
BASELINES = {
    "random": ("random weights", "image"), "bands": ("statistics of bands", "image"),
    "osm": ("the map's classes", "osm"), "majority": ("majority", "–"),
}  # fmt: skip
MAP = ("the map as it is", "osm")
COMPARED = {
    "OSM in pretraining (images alone against images alone)":
        (("{}", "image"), ("image-only", "image")),
    "objects as input (image+osm against image)": (("{}", "image+osm"), ("{}", "image")),
    "both (image+osm against image-only's image)": (("{}", "image+osm"), ("image-only", "image")),
    "pretraining of what reads objects (image+osm against image-only's image+osm)":
        (("{}", "image+osm"), ("image-only", "image+osm")),
    "above reading the map (image+osm against the map's classes)":
        (("{}", "image+osm"), BASELINES["osm"]),
}  # fmt: skip
INPUTS = ("image", "image+osm", "osm")
OURS = ("paper", "geolink2")
COLORS = {"image-only": "#8d8d8d", "paper": "#1f6f8b", "geolink2": "#2f7d3b"}
GOAL = 5.0
"""Points of kNN that OSM in pretraining shall give."""


@dataclass(frozen=True)
class Result:
    """Where the predictions of an evaluation lie."""

    model: str
    seed: int
    task: str
    inputs: str
    shares: tuple[float, ...]
    folder: Path


@dataclass(frozen=True)
class Found:
    """Predictions of a cell, a seed each, counted by block."""

    kind: Kind
    seeds: list[Masks]


def summarise(
    results: Sequence[Result], costs: Mapping[str, Mapping[str, Any]], block: Mapping[str, str],
    mapped: Masks | None, shares: Sequence[float], seeds: int, resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """Scores of every cell that has all seeds, leads, goals and costs, as plain values.

    `mapped`: the map's own masks against the truth, by chip.
    """
    cells: dict[Cell, Found] = {}
    for result in results:
        for (method, share), (kind, outcome) in _read(result, block).items():
            if method == "encoder" and result.inputs not in INPUTS:
                continue
            model, inputs = (
                (result.model, result.inputs) if method == "encoder" else BASELINES[method]
            )
            key = (model, inputs, result.task, share)
            cells.setdefault(key, Found(kind, [])).seeds.append(outcome)
    if mapped is not None:
        names, place = _places(mapped.ids, block)
        whole = Found("mask", [_summed(names, place, mapped.counts)] * seeds)
        cells |= {(*MAP, "segmentation", share): whole for share in shares}
    cells = {key: found for key, found in cells.items() if len(found.seeds) == seeds}
    drawn = {k: bootstrap(f.seeds, f.kind, resamples=resamples, seed=0) for k, f in cells.items()}
    scores = [
        {"model": k[0], "inputs": k[1], "task": k[2], "share": k[3], **_scores(f, drawn[k])}
        for k, f in cells.items()
    ]
    leads = [
        {"what": what, "model": model, "task": task, "share": share,
         **_lead(cells[a], cells[b], drawn[a] - drawn[b], resamples)}
        for what, model, task, share, a, b in _pairs(cells)
    ]  # fmt: skip
    return {
        "scores": scores, "leads": leads, "goals": _goals(scores, leads), "costs": _costs(costs),
        "blocks": len(next(iter(cells.values())).seeds[0].ids),
        "seeds": seeds, "tasks": [task for task in TITLES if any(c[2] == task for c in cells)],
        "labels": {
            str(share): max(c["labels"] for n, c in costs.items() if n.endswith(end))
            for share, end in ((0.1, "-10"), (1.0, "-100"))
        },
    }  # fmt: skip


def _read(result: Result, block: Mapping[str, str]) -> dict[tuple[str, float], tuple[Kind, Masks]]:
    """By method and share what was predicted, counted by block."""
    with np.load(result.folder / PREDICTIONS, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    ids = arrays.pop("ids")
    truth = arrays.pop("truth", None)
    names, place = _places(ids, block)
    shares = dict(zip(
        sorted({float(name.split("/")[1]) for name in arrays}), sorted(result.shares), strict=True
    ))  # fmt: skip
    found: dict[tuple[str, float], tuple[Kind, Masks]] = {}
    for name, values in arrays.items():
        method, share, _ = name.split("/")
        if truth is None:
            outcome = _summed(names, place, values)
        else:
            counts = np.zeros((len(names), values.shape[1], values.shape[1]), np.int64)
            np.add.at(counts, (place, truth, values.argmax(1)), 1)
            outcome = Masks(names, counts, np.zeros((1, 3)))
        found[method, shares[float(share)]] = ("mask" if truth is None else "class", outcome)
    return found


def _places(
    ids: NDArray[np.str_], block: Mapping[str, str]
) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Blocks, and the place of each chip's among them."""
    names, place = np.unique([block[name] for name in ids.tolist()], return_inverse=True)
    return names, place


def _summed(names: NDArray[np.str_], place: NDArray[np.int64], counts: NDArray[np.int64]) -> Masks:
    """Confusions of chips, added up by block."""
    total = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(total, place, counts)
    return Masks(names, total, np.zeros((1, 3)))


def _scores(found: Found, drawn: NDArray[np.float64]) -> dict[str, Any]:
    """By measure, in %: mean over the seeds, its interval over blocks, lowest and highest seed."""
    each = 100 * np.stack([score(outcome, found.kind) for outcome in found.seeds])
    low, high = 100 * interval(drawn)
    return {
        "measures": {
            name: {
                "mean": round(float(each[:, n].mean()), 2),
                "interval": [round(float(low[n]), 2), round(float(high[n]), 2)],
                "seeds": [round(float(each[:, n].min()), 2), round(float(each[:, n].max()), 2)],
            }
            for n, name in enumerate(MEASURES[found.kind])
        }
    }


def _pairs(
    cells: Mapping[Cell, Found],
) -> Iterable[tuple[str, str, str, float, Cell, Cell]]:
    """What is compared with what: a question, a model, a task, a share, both cells."""
    for _, _, task, share in dict.fromkeys(("", "", c[2], c[3]) for c in cells):
        for what, (first, second) in COMPARED.items():
            for model in OURS:
                a = (first[0].format(model), first[1], task, share)
                b = (second[0].format(model), second[1], task, share)
                if a in cells and b in cells:
                    yield what, model, task, share, a, b
        for inputs in ("image", "image+osm"):
            a, b = ((model, inputs, task, share) for model in ("geolink2", "paper"))
            if a in cells and b in cells:
                yield f"beyond the paper ({inputs}, against paper)", "geolink2", task, share, a, b


def _lead(ours: Found, theirs: Found, drawn: NDArray[np.float64], resamples: int) -> dict[str, Any]:
    """By measure: points by which the first is better, interval, p."""
    pairs = zip(ours.seeds, theirs.seeds, strict=True)
    value = 100 * np.mean([score(a, ours.kind) - score(b, ours.kind) for a, b in pairs], axis=0)
    low, high = 100 * interval(drawn)
    p = paired_test(ours.seeds, theirs.seeds, ours.kind, permutations=resamples, seed=0)
    return {
        "measures": {
            name: {
                "points": round(float(value[n]), 2),
                "interval": [round(float(low[n]), 2), round(float(high[n]), 2)],
                "p": round(float(p[n]), 4),
            }
            for n, name in enumerate(MEASURES[ours.kind])
        }
    }


def _goals(
    scores: Sequence[Mapping[str, Any]], leads: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each goal by model, share and measure: what was found, and whether it is met."""
    found = []
    for lead in leads:
        first = next(iter(COMPARED))
        if lead["task"] != "knn" or lead["what"] != first:
            continue
        for name in ("accuracy", "balanced_accuracy"):
            m = lead["measures"][name]
            found.append({
                "goal": f"OSM in pretraining gives {GOAL:g} points of kNN", "measure": name,
                "model": lead["model"], "share": lead["share"], **m, "met": m["points"] >= GOAL,
            })  # fmt: skip
    by = {(s["model"], s["inputs"], s["task"], s["share"]): s["measures"] for s in scores}
    for model, inputs, task, share in by:
        if task != "zones" or model not in OURS or inputs != "image+osm":
            continue
        for name in ("accuracy", "balanced_accuracy"):
            ours = by[model, inputs, task, share][name]
            theirs = by["image-only", "image", task, share][name]
            found.append({
                "goal": "zones: image+osm above image-only, intervals apart", "measure": name,
                "model": model, "share": share,
                "points": round(ours["mean"] - theirs["mean"], 2),
                "intervals": [ours["interval"], theirs["interval"]],
                "met": ours["interval"][0] > theirs["interval"][1],
            })  # fmt: skip
    return found


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By model steps and CPU seconds of a pretraining (mean), and CPU seconds of everything."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for name, cost in costs.items():
        if "steps" in cost:
            runs.setdefault(name.rsplit("-", 1)[0], []).append(cost)
    return {
        "pretraining": {
            model: {
                "steps": some[0]["steps"],
                "cpu_s": round(float(np.mean([c["cpu_s"] for c in some])), 1),
            }
            for model, some in runs.items()
        },
        "cpu_s": round(sum(c["cpu_s"] for c in costs.values())),
    }


def write_docs(result: Mapping[str, Any], docs: Path) -> None:
    """Draw `evidence.png`, and put the figures between the marks of `evidence.md`."""
    docs.mkdir(parents=True, exist_ok=True)
    save(draw(result), docs / "evidence.png")
    page = docs / "evidence.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}", encoding="utf-8")


def markdown(result: Mapping[str, Any]) -> str:
    """Goals, scores, leads and costs as Markdown."""
    tasks = result["tasks"]
    lines = ["### Goals", "", *_goal_table(result["goals"]), ""]
    lines += [
        f"### Scores in %, mean of {result['seeds']} seeds", "",
        "Accuracy, of segmentation mean IoU. In brackets the 95 % interval over "
        f"{result['blocks']} test blocks, then the lowest and the highest seed. Models under zones "
        "and fine-tuning are trained further; baselines under zones are linear probes. The map as "
        "it is: its own pixel labels, nothing learnt.", "",
        *_score_table(result["scores"], tasks, 0), "",
        "Balanced accuracy (mean over classes, the rare ones as much as the common), of "
        "segmentation the accuracy of pixels:", "",
        *_score_table(result["scores"], tasks, 1), "",
        "![Scores of every model, input and task](evidence.png)", "",
        "### Leads in points", "",
        "Of accuracy, of segmentation of mean IoU; 95 % interval over blocks, and p of a "
        "two-sided randomisation test that swaps blocks.", "",
        *_lead_table(result["leads"], tasks), "",
        "### Cost", "",
        "| pretraining | steps | CPU s, mean of the seeds |", "|---|---|---|",
        *(f"| {m} | {c['steps']:,} | {c['cpu_s']:.0f} |"
          for m, c in result["costs"]["pretraining"].items()), "",
        f"All pretrainings and {result['evaluations']['done']} evaluations: "
        f"{result['costs']['cpu_s'] / 60:.0f} minutes of one CPU core. "
        f"{result['evaluations']['left']} more evaluations, which come last in the order, were not "
        "run in that time; their cells are empty.",
    ]  # fmt: skip
    return "\n".join(lines)


def _goal_table(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| goal | model | labels | measure | found | |", "|---|---|---|---|---|---|"]
    for g in goals:
        found = f"{g['points']:+.1f}"
        if "interval" in g:
            found += f" ({g['interval'][0]:+.1f} – {g['interval'][1]:+.1f}), p {g['p']:.3f}"
        else:
            (a, b), (c, d) = g["intervals"]
            found += f"; {a:.1f} – {b:.1f} against {c:.1f} – {d:.1f}"
        met = "met" if g["met"] else "**not met**"
        name = g["measure"].replace("_", " ")
        lines.append(
            f"| {g['goal']} | {g['model']} | {100 * g['share']:g} % | {name} | {found} | {met} |"
        )
    return lines


def _score_table(
    scores: Sequence[Mapping[str, Any]], tasks: Sequence[str], measure: int
) -> list[str]:
    rows: dict[tuple[str, str, float], dict[str, str]] = {}
    order = [*COLORS, *(name for name, _ in BASELINES.values()), MAP[0]]
    for s in sorted(scores, key=lambda s: (s["share"], order.index(s["model"]), s["inputs"])):
        m = list(s["measures"].values())[measure]
        (low, high), (least, most) = m["interval"], m["seeds"]
        text = f"{m['mean']:.1f} ({low:.1f} – {high:.1f}; {least:.1f} – {most:.1f})"
        rows.setdefault((s["model"], s["inputs"], s["share"]), {})[s["task"]] = text
    head = ["model", "inputs", "labels", *(TITLES[t] for t in tasks)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (model, inputs, share), found in rows.items():
        cells = [model, inputs, f"{100 * share:g} %", *(found.get(t, "") for t in tasks)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _lead_table(leads: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    rows: dict[tuple[str, str, float], dict[str, str]] = {}
    for lead in sorted(leads, key=lambda each: each["share"]):
        m = next(iter(lead["measures"].values()))
        low, high = m["interval"]
        text = f"{m['points']:+.1f} ({low:+.1f} – {high:+.1f}), p {m['p']:.3f}"
        rows.setdefault((lead["what"], lead["model"], lead["share"]), {})[lead["task"]] = text
    head = ["what", "model", "labels", *(TITLES[t] for t in tasks)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = [*COMPARED, *(w for w, _, _ in rows if w not in COMPARED)]
    for what, model, share in sorted(rows, key=lambda row: (order.index(row[0]), row[1:])):
        found = rows[what, model, share]
        cells = [what, model, f"{100 * share:g} %", *(found.get(t, "") for t in tasks)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(result: Mapping[str, Any]) -> Figure:
    """A panel for each task: score by model and inputs, intervals over blocks, a dot line of the
    seeds; hollow: a tenth of the labels."""
    tasks, there = result["tasks"], {(s["model"], s["inputs"]) for s in result["scores"]}
    rows = [row for row in product(COLORS, INPUTS) if row in there]
    figure = Figure(figsize=(1.6 + 2.5 * len(tasks), 5.0), layout="constrained")
    for axis, task in zip(
        np.ravel(figure.subplots(1, len(tasks), sharey=True)), tasks, strict=True
    ):
        for s in result["scores"]:
            if s["task"] != task or s["model"] not in COLORS:
                continue
            m = next(iter(s["measures"].values()))
            few = s["share"] < 1
            y = rows.index((s["model"], s["inputs"])) + (0.15 if few else -0.15)
            color = COLORS[s["model"]]
            axis.hlines(y, *m["interval"], color=color, lw=1.5)
            axis.hlines(y, *m["seeds"], color=color, lw=5, alpha=0.35)
            axis.plot(m["mean"], y, "o", ms=6, mec=color, mfc="white" if few else color)
        axis.set_yticks(range(len(rows)), [f"{model}\n{given}" for model, given in rows])
        axis.tick_params(labelsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(TITLES[task], fontsize=10)
        axis.set_xlabel("mean IoU, %" if task == "segmentation" else "accuracy, %", fontsize=9)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "filled: all labels, hollow: a tenth; thin: 95 % over blocks, thick: lowest to highest "
        "seed", fontsize=9,
    )  # fmt: skip
    return figure
