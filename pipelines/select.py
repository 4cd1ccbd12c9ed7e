"""Choosing the scenes of a block: by metadata when it is planned, by their masks when it is built.

A plan needs no pixels: `choose` gives a block's candidates. Whoever builds the block looks at their
masks (`Look`) and puts them in order (`ranked`). Both say of every scene why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.footprints import block_outline, coverage
from pipelines.items import Problem, Scene
from schemas.grid import Bounds
from schemas.sources import SceneSource


class Choice(NamedTuple):
    """A scene considered for a block when it was planned."""

    scene: Scene
    chosen: bool
    """It is a candidate."""
    reason: str


class Candidates(NamedTuple):
    """What `choose` found."""

    choices: list[Choice]
    """Candidates, best metadata first, then rejected scenes that meet the block."""
    elsewhere: int
    """Scenes that do not meet the block."""

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The candidates."""
        return tuple(c.scene for c in self.choices if c.chosen)


class Rules(NamedTuple):
    """What a worker needs to know of the config to choose and composite."""

    composite: str = "least-cloudy"
    resampling: str = "bilinear"
    max_block_cloud: float = 100.0
    """Percent."""
    min_coverage: float = 0.0
    """Share."""
    dates: int = 1

    @classmethod
    def of(cls, source: SceneSource) -> "Rules":
        """The rules of a config."""
        return cls(
            source.composite, source.resampling, source.max_block_cloud, source.min_coverage,
            source.dates,
        )  # fmt: skip


DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class SceneIndex:
    """Scenes, and a tree of their footprints."""

    scenes: tuple[Scene, ...]
    tree: shapely.STRtree

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> "SceneIndex":
        """Index of scenes in their order."""
        return cls(tuple(scenes), shapely.STRtree([s.footprint for s in scenes]))

    def near(self, outline: shapely.Polygon) -> list[tuple[Scene, float]]:
        """Scenes that meet an outline, whichever turn of 360° either is in, and the shares of it
        that they cover.
        """
        west, south, east, north = outline.bounds
        boxes = shapely.box([west - 360, west, west + 360], south, [east - 360, east, east + 360],
                            north)  # fmt: skip
        found = np.unique(self.tree.query(boxes)[1])
        shares = coverage(self.tree.geometries[found], outline)
        return [(self.scenes[i], share) for i, share in zip(found, shares.tolist()) if share > 0]


def choose(index: SceneIndex, epsg: int, bounds_utm: Bounds, source: SceneSource) -> Candidates:
    """Candidates of a block by metadata, at most `source.max_scenes`, and why others are none.

    Least cloudy first (unknown last), then by share of the block covered, time, id.
    """
    outline = block_outline(epsg, bounds_utm)
    candidates, rejected = [], []
    for scene, share in index.near(outline):
        if scene.problem:
            rejected.append(Choice(scene, False, scene.problem.text))
            continue
        if share < source.min_coverage:
            text = f"covers {share:.0%} of the block < {source.min_coverage:.0%}"
            rejected.append(Choice(scene, False, text))
            continue
        cloud = scene.cloud_cover
        shown = "cloud cover unknown" if cloud is None else f"cloud cover {cloud:g} %"
        key = (101.0 if cloud is None else cloud, -round(share, 6), scene.seconds, scene.id)
        reason = f"{shown}, covers {share:.0%} of the block"
        candidates.append((key, Choice(scene, True, reason)))
    candidates.sort(key=lambda pair: (pair[0], pair[1].scene.digest))
    kept = [c for _, c in candidates[: source.max_scenes]]
    rejected += [
        Choice(c.scene, False, f"{c.reason}; beyond the {source.max_scenes} scenes tried")
        for _, c in candidates[source.max_scenes :]
    ]
    rejected.sort(key=lambda c: (c.scene.id, c.scene.digest))
    choices = kept + rejected
    return Candidates(choices, len(index.scenes) - len(choices))


def mark_duplicates(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes, with a problem for each that is another one under a second id.

    The same: the same bytes; or the same grid and pass, within ten minutes (catalogs take the time
    of the granule, or of its whole datatake), with footprints that are nearly the same. Kept is
    the one that can be used, of the newest processing baseline, with the first id.
    """
    order = sorted(
        range(len(scenes)),
        key=lambda i: (
            scenes[i].problem is not None, -(scenes[i].baseline or 0), scenes[i].id,
            scenes[i].digest,
        ),
    )  # fmt: skip
    marked = list(scenes)
    groups: dict[object, list[Scene]] = {}
    digests: dict[str, Scene] = {}
    for i in order:
        scene = scenes[i]
        if scene.problem or not scene.bands:
            continue
        band = scene.bands[0]
        group = groups.setdefault((band.epsg, band.transform, band.shape), [])
        same = digests.get(scene.digest) or next((s for s in group if _same(s, scene)), None)
        if same is None:
            group.append(scene)
            digests[scene.digest] = scene
        else:
            text = f"is the same acquisition as {same.id}"
            marked[i] = replace(scene, problem=Problem("scene_duplicate", text))
    return marked


def _same(a: Scene, b: Scene) -> bool:
    """Whether two scenes on one grid are one acquisition."""
    if a.datetime is None or b.datetime is None or abs(a.datetime - b.datetime) > _ONE_PASS:
        return False
    platforms = {s.orbit.split(" ")[0] for s in (a, b)} - {""}
    if len(platforms) > 1:
        return False
    both = shapely.union(a.footprint, b.footprint).area
    return bool(shapely.intersection(a.footprint, b.footprint).area >= 0.9 * both)


_ONE_PASS = timedelta(minutes=10)


class Look(NamedTuple):
    """A scene's mask over a block, on a coarse lattice."""

    data: NDArray[np.bool_]
    """[y, x]: the scene has data."""
    clear: NDArray[np.bool_]
    """[y, x]: it has data that are not masked."""

    @property
    def coverage(self) -> float:
        """Share of the block with data."""
        return float(self.data.mean()) if self.data.size else 0.0

    @property
    def cloud(self) -> float:
        """Share of the data that is masked."""
        data = int(self.data.sum())
        return 1.0 - float(self.clear.sum()) / data if data else 0.0


@dataclass
class Considered:
    """A candidate when its block was built: its score, and what became of it."""

    scene: str
    cloud: float | None
    """Masked share of its data over the block; None: it has no mask."""
    coverage: float | None
    """Share of the block with data."""
    rank: int | None = None
    chosen: bool = False
    """It gave pixels."""
    reason: str = ""
    codes: list[str] = field(default_factory=list)
    """Findings to count it by."""

    def record(self) -> dict[str, object]:
        """As JSON, for the shard's attributes."""
        return {
            "scene": self.scene, "chosen": self.chosen, "rank": self.rank,
            "cloud": None if self.cloud is None else round(self.cloud, 4),
            "coverage": None if self.coverage is None else round(self.coverage, 4),
            "reason": self.reason,
        }  # fmt: skip


def ranked(
    scenes: Sequence[Scene],
    records: Sequence[Considered],
    looks: Mapping[int, Look],
    rules: Rules,
    longitude: float,
    date: int | None,
) -> list[int]:
    """Order in which candidates are composited: positions in `scenes`.

    records: of all candidates; those with a reason are out already, and others get one here.
    looks: by position; candidates without a mask have none. By whole percents of cloud over the
    block, then of coverage, then in the plan's order; those without a mask stay in the plan's
    order behind them. date: only scenes of the pass of that rank (`passes`), clearest first.
    """
    for record in records:
        if record.reason or record.cloud is None or record.coverage is None:
            continue
        if 100 * record.cloud > rules.max_block_cloud:
            record.codes.append("scene_too_cloudy_here")
            record.reason = (
                f"masked over {record.cloud:.1%} of its pixels here > {rules.max_block_cloud:g} %"
            )
        elif record.coverage < rules.min_coverage:
            record.codes.append("scene_covers_too_little")
            record.reason = (
                f"has data in {record.coverage:.1%} of the block < {rules.min_coverage:.1%}"
            )
    usable = [i for i, r in enumerate(records) if not r.reason]
    if date is not None:
        days = passes([scenes[i] for i in usable], longitude)
        by_day = [[usable[k] for k in day] for day in days]
        by_day.sort(key=lambda day: (-round(_clear(day, looks), 3), day[0]))
        usable = by_day[date] if date < len(by_day) else []
        for rank, day in enumerate(by_day):
            for i in day if rank != date else ():
                records[i].reason = f"is of date {rank} of the block"
    order = sorted(usable, key=lambda i: (*_score(looks.get(i)), i))
    for rank, i in enumerate(order):
        records[i].rank = rank
    return order


def _score(look: Look | None) -> tuple[float, float]:
    return (round(100 * look.cloud), -round(100 * look.coverage)) if look else (101, 0)


def _clear(day: Sequence[int], looks: Mapping[int, Look]) -> float:
    """Share of a block that the scenes of a day show clearly; 0 where they have no masks."""
    seen = [looks[i].clear for i in day if i in looks]
    return float(np.logical_or.reduce(seen).mean()) if seen else 0.0


def passes(scenes: Sequence[Scene], longitude: float) -> list[list[int]]:
    """Positions of scenes by pass: one day of local solar time, one platform and orbit.

    Local, so that no pass is cut in two by midnight UTC. Scenes without a time are one pass.
    """
    groups: dict[object, list[int]] = {}
    for i, scene in enumerate(scenes):
        local = scene.datetime and scene.datetime + timedelta(hours=longitude / 15.0)
        day = local.astimezone(UTC).date() if isinstance(local, datetime) else None
        groups.setdefault((day, scene.orbit), []).append(i)
    return list(groups.values())
