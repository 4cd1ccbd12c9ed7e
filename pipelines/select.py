"""Choosing the scenes of a block."""

from collections.abc import Iterable
from typing import NamedTuple

from pipelines.footprints import block_outline, coverage
from pipelines.items import Scene
from schemas.grid import Bounds


class Choice(NamedTuple):
    """A scene considered for a block."""

    scene: Scene
    chosen: bool
    reason: str


def choose(scenes: Iterable[Scene], epsg: int, bounds_utm: Bounds) -> list[Choice]:
    """Scenes for a block in the order in which they are composited, then the rejected ones.

    Least cloudy first (unknown last), then by share of the block covered, time, id.
    """
    block = block_outline(epsg, bounds_utm)
    chosen, rejected = [], []
    for scene in scenes:
        if scene.problem:
            rejected.append(Choice(scene, False, scene.problem.text))
            continue
        share = coverage(scene.footprint, block)
        if share == 0.0:
            rejected.append(Choice(scene, False, "does not cover the block"))
            continue
        cloud = scene.cloud_cover
        shown = "cloud cover unknown" if cloud is None else f"cloud cover {cloud:g} %"
        key = (101.0 if cloud is None else cloud, -round(share, 6), scene.seconds, scene.id)
        reason = f"{shown}, covers {share:.0%} of the block"
        chosen.append((key, Choice(scene, True, reason)))
    chosen.sort(key=lambda pair: (pair[0], pair[1].scene.digest))
    return [c for _, c in chosen] + sorted(rejected, key=lambda c: (c.scene.id, c.scene.digest))
