"""Evaluations beside one another, tested image by image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.calibration import BINS
from geolink.tasks.contracts import Kind, Labels, Masks, Outcome
from geolink.tasks.report import PREDICTIONS, RESULT
from geolink.tasks.significance import bootstrap, interval, paired_test, score
from schemas.errors import GeoLinkError

_CONFIG = ("task", "checkpoint", "inputs", "dataset", "step")


def compare_results(
    folders: Sequence[Path], *, resamples: int = 1000, seed: int = 0
) -> dict[str, list[Any]]:
    """By row of a table, the evaluations' values: what differs, scores of the encoders with most
    labels, their 95 % intervals, and of all but the first its lead over the first with interval
    and p, both paired by image.

    Raises GeoLinkError: a folder without a result, or results of other test images.
    """
    read = [_read(folder) for folder in folders]
    results, outcomes = [r for r, _ in read], [o for _, o in read]
    kind: Kind = results[0]["kind"]
    for folder, result, found in zip(folders[1:], results[1:], outcomes[1:], strict=True):
        if result["kind"] != kind or not _same_images(outcomes[0][0], found[0]):
            raise GeoLinkError(
                f"{folder} and {folders[0]} were not scored on the same test images, so they "
                "cannot be compared image by image"
            )
        if len(found) != len(outcomes[0]):
            raise GeoLinkError(
                f"{folder} has {len(found)} seeds and {folders[0]} has {len(outcomes[0])}: compare "
                "evaluations of equally many"
            )
    table: dict[str, list[Any]] = {"result": [str(folder) for folder in folders]}
    for name in _CONFIG:
        values = [result[name] for result in results]
        if any(value != values[0] for value in values):
            table[name] = values
    table["labels"] = [result["scores"]["encoder"]["labels"] for result in results]
    drawn = [bootstrap(o, kind, resamples=resamples, seed=seed) for o in outcomes]
    value = [np.mean([score(o, kind) for o in some], axis=0) for some in outcomes]
    p = [
        paired_test(some, outcomes[0], kind, permutations=resamples, seed=seed)
        for some in outcomes[1:]
    ]
    for n, name in enumerate(results[0]["measures"]):
        title = name.replace("_", " ")
        table[title] = [
            f"{v[n]:.1%} ({low:.1%} – {high:.1%})"
            for v, (low, high) in zip(value, (interval(d)[:, n] for d in drawn), strict=True)
        ]
        leads = [interval(d - drawn[0])[:, n] for d in drawn[1:]]
        table[f"{title}: lead over the first"] = [None, *(
            f"{100 * (v[n] - value[0][n]):+.1f} ({100 * low:+.1f} – {100 * high:+.1f}), "
            f"p {each[n]:.3f}"
            for v, (low, high), each in zip(value[1:], leads, p, strict=True)
        )]  # fmt: skip
    return table


def _read(folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """A result, and the predictions of its encoder with most labels, a seed each."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        with np.load(folder / PREDICTIONS, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        most = max(result["protocol"]["shares"])
        names = [n for n in arrays if n.startswith(f"encoder/{most:g}/")]
        return result, [_outcome(arrays, name) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise GeoLinkError(
            f"{folder} is no folder of an evaluation (`geolink evaluate ... --output`): {error}"
        ) from error


def _outcome(arrays: dict[str, NDArray[Any]], name: str) -> Outcome:
    if "truth" in arrays:
        return Labels(arrays["ids"], arrays["truth"], arrays[name])
    return Masks(arrays["ids"], arrays[name], np.zeros((BINS, 3)))


def _same_images(a: Outcome, b: Outcome) -> bool:
    if not np.array_equal(a.ids, b.ids):
        return False
    if isinstance(a, Labels) and isinstance(b, Labels):
        return np.array_equal(a.truth, b.truth)
    if isinstance(a, Masks) and isinstance(b, Masks):
        return np.array_equal(a.counts.sum(2), b.counts.sum(2))
    return False
