"""What the map can show: for every shard a class in each of several views."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from schemas.dataset import SnapshotRow
from schemas.findings import CHIP_FLAGS, FINDINGS
from schemas.splits import SPLITS

SEVERITIES = ("error", "warning", "note")
FINDING_VIEWS = 10

_LEVELS = ("q1", "q2", "q3", "q4", "q5")
"""Paint of five rising classes."""


@dataclass(frozen=True)
class Layer:
    """One view of the map."""

    name: str
    about: str
    legend: list[tuple[str, str]]
    """Paint (a CSS class of the page) and meaning, by class."""
    value: NDArray[np.int64]
    """Class of each shard, places as in the rows given, failed ones last; -1: nothing to say."""
    first_wins: bool = False
    """Shards drawn as one have the first class among theirs, not the commonest."""

    def counts(self) -> list[tuple[str, str, int]]:
        """Paint, meaning and shards of the classes that occur."""
        found = np.bincount(self.value[self.value >= 0], minlength=len(self.legend))
        shown = [(*entry, int(n)) for entry, n in zip(self.legend, found, strict=True) if n]
        without = int((self.value < 0).sum())
        return [*shown, ("empty", "nothing to show", without)] if without else shown


def layers(
    rows: Sequence[SnapshotRow],
    failed: Sequence[str],
    changed: set[str],
    scene_seconds: Mapping[str, float],
    snapshot: int,
) -> list[Layer]:
    """Views by split, state, age and findings; `failed` shards come after `rows`."""
    chips = np.array([row.chips for row in rows] + [0] * len(failed))
    lost = np.arange(len(chips)) >= len(rows)
    views = [
        _split(rows, chips, lost),
        _state(rows, chips, lost, changed, snapshot),
        _age(rows, lost, scene_seconds),
        _density(rows, lost),
        _severity(rows, lost),
    ]
    return views + [_finding(rows, lost, code) for code in _codes(rows)]


def _split(rows: Sequence[SnapshotRow], chips: NDArray[np.int64], lost: NDArray[np.bool_]) -> Layer:
    value = np.array([SPLITS.index(row.split) for row in rows] + [4] * int(lost.sum()))
    value[(chips == 0) & ~lost] = 3
    legend = [
        ("train", "training"), ("val", "validation"), ("test", "test"),
        ("empty", "no chip kept"), ("failed", "failed in the last build"),
    ]  # fmt: skip
    return Layer("split", "Which part of the dataset each shard belongs to.", legend, value)


def _state(
    rows: Sequence[SnapshotRow],
    chips: NDArray[np.int64],
    lost: NDArray[np.bool_],
    changed: set[str],
    snapshot: int,
) -> Layer:
    value = np.array([1 if r.shard in changed else 2 for r in rows] + [0] * int(lost.sum()))
    value[(chips == 0) & ~lost] = 3
    legend = [
        ("failed", "failed in the last build"), ("fresh", f"built for snapshot {snapshot}"),
        ("kept", "kept from an earlier snapshot"), ("empty", "no chip kept"),
    ]  # fmt: skip
    return Layer("state", "What became of each shard.", legend, value, first_wins=True)


def _age(
    rows: Sequence[SnapshotRow], lost: NDArray[np.bool_], scene_seconds: Mapping[str, float]
) -> Layer:
    times = [[scene_seconds[s] for s in row.scenes if s in scene_seconds] for row in rows]
    mean = np.array([np.mean(t) if t else np.nan for t in times] + [np.nan] * int(lost.sum()))
    about = "When the images were taken, on average over a shard's scenes."
    if not np.isfinite(mean).any():
        return Layer("age", about, [], np.full(len(mean), -1))
    low, high = float(np.nanmin(mean)), float(np.nanmax(mean))
    steps = 1 if _day(low) == _day(high) else 5
    edges = np.linspace(low, high, steps + 1)
    value = np.clip(np.searchsorted(edges, mean, "right") - 1, 0, steps - 1)
    value[~np.isfinite(mean)] = -1
    if steps == 1:
        return Layer("age", about, [("q3", _day(low))], value)
    legend = [
        (paint, f"{_day(a)} to {_day(b)}")
        for paint, a, b in zip(_LEVELS, edges[:-1], edges[1:], strict=True)
    ]
    there = sorted(set(value[value >= 0].tolist()))
    value = np.where(value >= 0, np.searchsorted(there, value), -1)
    return Layer("age", about, [legend[n] for n in there], value)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d")


def _density(rows: Sequence[SnapshotRow], lost: NDArray[np.bool_]) -> Layer:
    density = np.array([r.objects / r.chips if r.chips else np.nan for r in rows], float)
    density = np.concatenate([density, np.full(int(lost.sum()), np.nan)])
    known = density[np.isfinite(density)]
    edges = np.unique(np.round(np.quantile(known, np.linspace(0, 1, 6)))) if len(known) else known
    about = "Mapped OpenStreetMap objects in a chip, on average over the shard."
    if len(edges) < 2:
        text = f"{edges[0]:,.0f} objects" if len(edges) else ""
        value = np.where(np.isfinite(density), 0, -1)
        return Layer("objects", about, [("q3", text)] if text else [], value)
    value = np.clip(np.searchsorted(edges, density, "right") - 1, 0, len(edges) - 2)
    value[~np.isfinite(density)] = -1
    legend = [
        (paint, f"{a:,.0f} to {b:,.0f}")
        for paint, a, b in zip(_LEVELS, edges[:-1], edges[1:], strict=False)
    ]
    return Layer("objects", about, legend, value)


def _severity(rows: Sequence[SnapshotRow], lost: NDArray[np.bool_]) -> Layer:
    def worst(row: SnapshotRow) -> int:
        found = {FINDINGS[code].severity for code in row.qc if code in FINDINGS}
        return min((SEVERITIES.index(s) for s in found), default=3)

    value = np.array([worst(row) for row in rows] + [0] * int(lost.sum()))
    legend = [
        ("error", "error: something is wrong"), ("warning", "warning: look at it"),
        ("note", "note: worth knowing"), ("fine", "nothing found"),
    ]  # fmt: skip
    return Layer("any finding", "The gravest finding in each shard.", legend, value, True)


def _codes(rows: Sequence[SnapshotRow]) -> list[str]:
    """Codes worth a view: the gravest, then those of most shards."""
    shards = Counter(code for row in rows for code in row.qc if code in FINDINGS)
    seen = [c for c in shards if FINDINGS[c].severity != "note" or c in CHIP_FLAGS]
    seen.sort(key=lambda c: (SEVERITIES.index(FINDINGS[c].severity), -shards[c], c))
    return seen[:FINDING_VIEWS]


def _finding(rows: Sequence[SnapshotRow], lost: NDArray[np.bool_], code: str) -> Layer:
    name, none = code.replace("_", " "), np.full(int(lost.sum()), -1)
    if code not in CHIP_FLAGS:
        value = np.array([0 if row.qc.get(code) else 1 for row in rows])
        legend = [(FINDINGS[code].severity, "found"), ("fine", "not found")]
        return Layer(name, FINDINGS[code].meaning, legend, np.concatenate([value, none]), True)
    share = np.array([row.qc.get(code, 0) / row.chips if row.chips else np.nan for row in rows])
    value = np.searchsorted([0.0, 0.1, 0.25, 0.5, 0.75], share, "left").astype(np.int64)
    value[~np.isfinite(share)] = -1
    texts = ("up to 10 % of chips", "10 to 25 %", "25 to 50 %", "50 to 75 %", "over 75 %")
    legend = [("fine", "no chip"), *zip(_LEVELS, texts, strict=True)]
    return Layer(name, FINDINGS[code].meaning, legend, np.concatenate([value, none]))
