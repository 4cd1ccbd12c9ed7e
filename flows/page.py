"""The demo's report: one self-contained HTML page."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from geolink.page.base import data_url, render, write
from geolink.reader import Dataset
from geolink.show import draw_chips, draw_map, pick_chips
from pipelines.build import BuildResult

_LOSSES = ("loss", "reconstruction", "contrast", "consistency")
_NAMES = {
    "encoder": "GeoLink encoder",
    "random": "same encoder, random weights",
    "pixels": "raw pixels",
    "bands": "band statistics",
    "majority": "most frequent class",
}


def write_page(
    page: Path,
    place: str,
    datasets: dict[str, Dataset],
    builds: dict[str, BuildResult],
    runs: list[Path],
    scores: list[dict[str, Any]],
    seconds: dict[str, float],
) -> Path:
    """Write the report of a demo run over `place` (in words); returns its path.

    Raises GeoLinkError where the page cannot be written.
    """
    chips = sum(r.chips for b in builds.values() for r in b.rows)
    objects = sum(r.objects for b in builds.values() for r in b.rows)
    edges = sum(r.edges for b in builds.values() for r in b.rows)
    html = render(
        "flows/page.html.j2",
        title=place,
        headline="From an OSM extract and satellite scenes to a trained encoder",
        subtitle=f"GeoLink's whole path, run offline over {place}.",
        figures=[
            {"name": "chips", "value": f"{chips:,}"},
            {"name": "OSM objects in chips", "value": f"{objects:,}"},
            {"name": "spatial relations", "value": f"{edges:,}"},
            {"name": "kNN accuracy of the encoder", "value": f"{_mean(scores, 'encoder'):.1%}"},
            {"name": "minutes in all", "value": f"{sum(seconds.values()) / 60:.1f}"},
        ],
        sheets=[_sheet(name, dataset) for name, dataset in datasets.items()],
        verdict=verdict(scores),
        knn=_embed(draw_scores(scores)),
        losses=_embed(draw_losses(runs)),
        seeds=len(scores),
        scores=_score_rows(scores),
        maps=[
            {"src": _embed(draw_map(d)), "caption": f"Shards of the {name} dataset by split."}
            for name, d in datasets.items()
        ],
        builds=[_build_row(name, result) for name, result in builds.items()],
        finding_names=list(builds),
        findings=_findings(builds),
        seconds=[{"name": k, "value": f"{v:.1f}"} for k, v in seconds.items()],
        licence="; ".join({d.info.licence: None for d in datasets.values()})
        + ". "
        + "; ".join({a: None for d in datasets.values() for a in d.info.attribution})
        + ".",
    )
    write(page, html)
    return page


def verdict(scores: list[dict[str, Any]]) -> str:
    """One sentence: what the encoder beats, and by how much, over all seeds."""
    names = [n for n in scores[0]["scores"] if n != "encoder"]
    held_out, classes = scores[0]["held_out"], scores[0]["classes"]
    parts = []
    for name in names:
        wins = sum(s["scores"][name]["difference"]["accuracy"][1] > 0 for s in scores)
        gain = 100 * (_mean(scores, "encoder") - _mean(scores, name))
        proof = f"interval above zero in {wins} of {len(scores)} seeds"
        parts.append(f"{_NAMES[name]} {gain:+.1f} ({proof})")
    return (
        f"The frozen encoder is right on {_mean(scores, 'encoder'):.1%} of {held_out:,} held-out "
        f"chips in {classes} classes. Its lead in points: over {'; '.join(parts)}."
    )


def _mean(scores: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([s["scores"][name]["score"]["accuracy"] for s in scores]))


def _score_rows(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name in scores[0]["scores"]:
        of = [s["scores"][name] for s in scores]
        low, high = np.mean([s["interval"]["accuracy"] for s in of], axis=0)
        lead = [s["difference"]["accuracy"] for s in of if "difference" in s]
        difference = np.mean(lead, axis=0) if lead else None
        rows.append(
            {
                "name": _NAMES[name], "ours": name == "encoder",
                "accuracy": f"{_mean(scores, name):.1%}", "interval": f"{low:.1%} – {high:.1%}",
                "balanced": f"{np.mean([s['score']['balanced_accuracy'] for s in of]):.1%}",
                "difference": "" if difference is None else
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * difference)),
            }
        )  # fmt: skip
    return rows


def draw_scores(scores: list[dict[str, Any]]) -> Figure:
    """Bars of accuracy by kind of features, with intervals and seeds."""
    names = list(scores[0]["scores"])
    mean = [_mean(scores, n) for n in names]
    interval = np.array(
        [np.mean([s["scores"][n]["interval"]["accuracy"] for s in scores], axis=0) for n in names]
    )
    figure = Figure(figsize=(6, 4), facecolor="white", layout="constrained")
    axis = figure.subplots()
    colors = ["#2f7d3b" if n == "encoder" else "#b0bec5" for n in names]
    y = np.arange(len(names))[::-1]
    error = np.abs(interval.T - np.array(mean))
    axis.barh(y, mean, color=colors, xerr=error, ecolor="#37474f", capsize=4, height=0.62)
    for n, name in enumerate(names):
        dots = [s["scores"][name]["score"]["accuracy"] for s in scores]
        axis.scatter(dots, np.full(len(dots), y[n]), s=12, color="#1c2430", zorder=3)
        axis.annotate(
            f"{mean[n]:.1%}",
            (0.01, y[n]),
            va="center",
            fontsize=9,
            color="white" if n == 0 else "#1c2430",
        )
    axis.set_yticks(y, [_NAMES[n] for n in names])
    axis.set_xlabel("kNN accuracy")
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_losses(runs: list[Path]) -> Figure:
    """Curves of the losses over steps, one line a run."""
    figure = Figure(figsize=(6, 4), facecolor="white", layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for run in runs:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
        log = [entry for entry in log if "loss" in entry]
        for axis, name in zip(axes.flat, _LOSSES, strict=True):
            axis.plot([e["step"] for e in log], [e[name] for e in log], lw=1.2, label=run.name)
            axis.set_title(name, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _sheet(name: str, dataset: Dataset) -> dict[str, str]:
    grid, sensor = dataset.info.grid, dataset.info.sensor
    return {
        "src": _embed(draw_chips(pick_chips(dataset, 5), dataset.info)),
        "alt": f"Contact sheet of chips of the {name} dataset",
        "caption": f"{name.capitalize()} dataset: {sensor.name}, {len(sensor.bands)} bands, "
        f"{grid.size} px at {grid.gsd_m:g} m, patches of {grid.patch} px.",
    }


def _build_row(name: str, result: BuildResult) -> dict[str, str]:
    rows = [r for r in result.rows if r.chips]
    return {
        "name": name, "shards": f"{len(rows):,}",
        "chips": f"{sum(r.chips for r in rows):,}", "objects": f"{sum(r.objects for r in rows):,}",
        "edges": f"{sum(r.edges for r in rows):,}",
        "mb": f"{sum(r.bytes for r in rows) / 1e6:,.1f}",
        "seconds": f"{result.seconds:.1f}",
    }  # fmt: skip


def _findings(builds: dict[str, BuildResult]) -> list[dict[str, Any]]:
    codes = sorted({code for b in builds.values() for code in b.qc})
    return [
        {"code": code, "counts": [f"{b.qc.get(code, 0):,}" for b in builds.values()]}
        for code in codes
    ]


def _embed(figure: Figure) -> str:
    """A figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return data_url(buffer.getvalue(), "png")
