"""What an evaluation found, as plain values and in files: JSON, Markdown, predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.calibration import calibration, outcome_bins
from geolink.tasks.contracts import Kind, Labels, Outcome, TaskData
from geolink.tasks.measures import MEASURES, class_scores, confusion_matrix
from geolink.tasks.significance import bootstrap, interval, paired_test, score
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

if TYPE_CHECKING:
    from geolink.tasks.evaluate import Run

TITLES = {
    "mean_iou": "mean IoU", "iou_change": "IoU of change", "f1_change": "F1 of change",
    "macro_f1": "macro F1", "micro_f1": "micro F1", "f1": "F1", "iou": "IoU",
}  # fmt: skip
"""Measures as people read them, where that is not their name."""

RESULT, TEXT, FIGURE, PREDICTIONS = "result.json", "result.md", "result.png", "predictions.npz"


def summarise(
    about: Mapping[str, Any], runs: Sequence[Run], data: TaskData, config: TaskConfig
) -> dict[str, Any]:
    """The result: `scores` by method with the most labels, `curve` by method and share, `runs`."""
    kind, names = data.kind, MEASURES[data.kind]
    methods = list(dict.fromkeys(run.method for run in runs))
    shares = sorted({run.share for run in runs})

    def of(method: str, share: float) -> list[Outcome]:
        return [r.outcome for r in runs if r.method == method and r.share == share]

    curve: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        curve[method] = []
        for share in shares:
            entry = _figures(of(method, share), kind, config)
            if method != "encoder":
                entry |= _difference(of("encoder", share), of(method, share), kind, config)
            labels = [r.labels for r in runs if r.method == method and r.share == share]
            curve[method].append({"share": share, "labels": labels[0], **entry})
    last = {method: points[-1] for method, points in curve.items()}
    return {
        **about,
        "held_out": len(data.part("test")),
        "measures": list(names),
        "protocol": {
            "bootstrap": config.bootstrap, "seeds": config.seeds, "seed": config.seed,
            "shares": shares, "interval": "95 %, percentile bootstrap over test images",
            "test": "two-sided approximate randomisation over test images",
            "validation": len(data.splits["val"]) if "val" in data.splits else 0,
        },
        "scores": {
            method: {**last[method], **_by_class(of(method, shares[-1]), kind, data.classes)}
            for method in methods
        },
        "curve": curve,
        "runs": [
            {
                "method": r.method, "share": r.share, "seed": r.seed, "labels": r.labels,
                "score": _named(names, score(r.outcome, kind)), "chosen": dict(r.fitted.chosen),
                "trials": [dict(t) for t in r.fitted.trials],
                "curve": [dict(c) for c in r.fitted.curve],
            }
            for r in runs
        ],
    }  # fmt: skip


def _figures(outcomes: Sequence[Outcome], kind: Kind, config: TaskConfig) -> dict[str, Any]:
    """Scores, their intervals over images, and their deviation over seeds."""
    names = MEASURES[kind]
    each = np.stack([score(outcome, kind) for outcome in outcomes])
    drawn = bootstrap(outcomes, kind, resamples=config.bootstrap, seed=config.seed)
    low, high = interval(drawn)
    std = each.std(0, ddof=1) if len(each) > 1 else np.zeros(len(names))
    bins = np.sum([outcome_bins(outcome) for outcome in outcomes], axis=0)
    return {
        "score": _named(names, each.mean(0)),
        "interval": {n: [float(a), float(b)] for n, a, b in zip(names, low, high, strict=True)},
        "std_over_seeds": _named(names, std),
        "calibration": calibration(bins),
    }


def _difference(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], kind: Kind, config: TaskConfig
) -> dict[str, Any]:
    """The encoder's scores less a baseline's, paired: value, low, high, and p."""
    names = MEASURES[kind]
    options = {"resamples": config.bootstrap, "seed": config.seed}
    drawn = bootstrap(ours, kind, **options) - bootstrap(theirs, kind, **options)
    value = np.mean([score(a, kind) - score(b, kind) for a, b in zip(ours, theirs)], axis=0)
    low, high = interval(drawn)
    p = paired_test(ours, theirs, kind, permutations=config.bootstrap, seed=config.seed)
    return {
        "difference": {
            n: [float(v), float(a), float(b)]
            for n, v, a, b in zip(names, value, low, high, strict=True)
        },
        "p": _named(names, p),
    }


def _by_class(outcomes: Sequence[Outcome], kind: Kind, names: Sequence[str]) -> dict[str, Any]:
    """Figures by class, and the confusion matrix, of all seeds together."""
    first = outcomes[0]
    if kind == "multilabel":
        assert isinstance(first, Labels)
        truth = first.truth > 0
        guess = [o.probability >= 0.5 for o in outcomes if isinstance(o, Labels)]
        pairs = [
            np.stack([confusion_matrix(truth[:, c].astype(int), g[:, c].astype(int), 2)
                      for c in range(len(names))])
            for g in guess
        ]  # fmt: skip
        found = {k: v[:, 1] for k, v in class_scores(np.sum(pairs, axis=0)).items()}
        return {"by_class": _rows(names, found, truth.sum(0)), "confusion": None}
    confusion = np.sum([_confusion(outcome, len(names)) for outcome in outcomes], axis=0)
    count = confusion.sum(1) // len(outcomes)
    return {
        "by_class": _rows(names, class_scores(confusion), count), "confusion": confusion.tolist(),
    }  # fmt: skip


def _confusion(outcome: Outcome, classes: int) -> NDArray[np.int64]:
    if isinstance(outcome, Labels):
        return confusion_matrix(outcome.truth, outcome.probability.argmax(1), classes)
    found: NDArray[np.int64] = outcome.counts.sum(0)
    return found


def _rows(
    names: Sequence[str], found: Mapping[str, NDArray[np.float64]], count: NDArray[Any]
) -> list[dict[str, Any]]:
    return [
        {"class": name, "count": int(count[n]), **{k: float(v[n]) for k, v in found.items()}}
        for n, name in enumerate(names)
    ]


def _named(names: Iterable[str], values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def write_results(
    result: Mapping[str, Any], runs: Sequence[Run], data: TaskData, folder: Path
) -> None:
    """Write everything into a folder. Raises GeoLinkError if it cannot be written."""
    from geolink.page.evaluation import draw_figure, write_evaluation_page
    from geolink.show import save

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / TEXT).write_text(markdown(result), encoding="utf-8")
        np.savez_compressed(folder / PREDICTIONS, **_predictions(runs))
    except OSError as error:
        raise GeoLinkError(f"cannot write results to {folder}: {error}") from error
    save(draw_figure(result), folder / FIGURE)
    write_evaluation_page(result, runs, data, folder)


def _predictions(runs: Sequence[Run]) -> dict[str, Any]:
    """`ids`, `truth`, and by `method/share/seed` probabilities or confusion matrices."""
    first = runs[0].outcome
    arrays: dict[str, NDArray[Any]] = {"ids": first.ids}
    if isinstance(first, Labels):
        arrays["truth"] = first.truth
    for run in runs:
        found = run.outcome
        values = found.probability if isinstance(found, Labels) else found.counts
        arrays[f"{run.method}/{run.share:g}/{run.seed}"] = values
    return arrays


def markdown(result: Mapping[str, Any]) -> str:
    """A result as Markdown: scores of every method, the curve over labels, classes, protocol."""
    names = result["measures"]
    images, protocol = result["images"], result["protocol"]
    lines = [
        f"# {result['task']} on {result['dataset']}",
        "",
        f"Checkpoint `{result['checkpoint']}`, inputs {result['inputs']}; "
        f"{result['held_out']:,} test images in {result['classes']} classes, "
        f"{images['train']:,} training images, {protocol['validation']:,} of validation; "
        f"{_times(protocol['seeds'])}.",
        "",
        "In brackets: 95 % interval over test images. p: of the difference to the encoder.",
        "",
    ]
    for share, points in _by_share(result["curve"]):
        if len(protocol["shares"]) > 1:
            lines += [f"## {100 * share:g} % of the labels ({points[0][1]['labels']:,})", ""]
        lines += _table(
            ["method", *(_title(n) for n in names), f"encoder better by ({_title(names[0])})", "p"],
            [[method, *(_cell(point, n) for n in names), *_against(point, names[0])]
             for method, point in points],
        )  # fmt: skip
    lines += ["## By class (encoder)", ""]
    by_class = result["scores"]["encoder"]["by_class"]
    columns = [k for k in by_class[0] if k not in ("class", "count")]
    lines += _table(
        ["class", "true", *columns],
        [
            [
                row["class"],
                f"{row['count']:,}",
                *(f"{row[k]:.1%}" if row["count"] else "–" for k in columns),
            ]
            for row in by_class
        ],
    )
    lines += ["## How it was done", ""]
    chosen = {
        (r["method"], r["share"]): r["chosen"] for r in result["runs"] if r["chosen"]
    }  # fmt: skip
    lines += [f"- {note}" for note in result["notes"]]
    lines += [
        f"- {method}, {100 * share:g} % of the labels: "
        + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items())
        for (method, share), values in chosen.items()
    ]
    for split, reasons in result["left_out"].items():
        lines += [f"- {n:,} images of {split} left out: {why}" for why, n in reasons.items()]
    if "certified" in result["data"]:
        proof = "has" if result["data"]["certified"] else "has no"
        lines.append(f"- the snapshot {proof} certificate of `geolink splits check`")
    lines += [
        f"- splits share no image (compared: {', '.join(result['leaks']['compared'])})",
        f"- {protocol['interval']} ({protocol['bootstrap']:,} resamples); {protocol['test']}",
        f"- expected calibration error of the encoder: "
        f"{result['scores']['encoder']['calibration']['ece']:.3f}",
    ]
    return "\n".join(lines) + "\n"


def _by_share(
    curve: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[tuple[float, list[tuple[str, Mapping[str, Any]]]]]:
    flat = sorted(
        ((p["share"], n, m, p) for n, (m, points) in enumerate(curve.items()) for p in points),
        key=lambda found: (-found[0], found[1]),
    )
    return [
        (share, [(method, point) for _, _, method, point in group])
        for share, group in groupby(flat, key=lambda found: found[0])
    ]


def _cell(point: Mapping[str, Any], name: str) -> str:
    low, high = point["interval"][name]
    return f"{point['score'][name]:.1%} ({low:.1%} – {high:.1%})"


def _against(point: Mapping[str, Any], name: str) -> list[str]:
    if "difference" not in point:
        return ["", ""]
    value, low, high = (100 * v for v in point["difference"][name])
    return [f"{value:+.1f} ({low:+.1f} – {high:+.1f})", f"{point['p'][name]:.3f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows), ""]


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def _times(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"mean of {seeds} seeds"
