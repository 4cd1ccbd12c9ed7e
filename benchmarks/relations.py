"""Relations of one chip, N polygons + N lines + N points; and the vector stages of one shard.

Sparse: objects shrink as N grows, so that each meets one other on average. Dense: objects span a
twelfth of the chip, crowded: a third, so that the pairs that meet grow with the square of N; with a
third of all pairs meeting, no method can gain much on the loop. CPU seconds, one core. Baselines:

- `all_pairs_s`: a plain loop over all pairs that tries shapely's predicates in turn until one
  holds, and scipy's Delaunay; `all_pairs_intersects_first_s`: the same with `intersects` tried
  first, which spares disjoint pairs the others. Above N = 200 both are estimated from a random
  sample of the pairs;
- `floor_s`: STRtree and bulk predicates that settle every pair, and one triangulation of the
  points, without candidate filters, codes, directions or CSR; the faster of `relate` and of
  prepared predicates one after the other.

    python benchmarks/relations.py [--repeat 5]

Prints JSON. The relations found are compared with the loops', where these run in full.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import shapely
from _common import best_of, growth, report
from numpy.typing import NDArray
from scipy.spatial import Delaunay

from pipelines.anchors import build_anchors
from pipelines.correspondence import build_correspondence
from pipelines.relations import build_relations
from schemas.layout import Kind, Relation

CHIP_M = 2240.0
SIZES = (50, 200, 800)
# Metres: how far an object of N reaches.
DENSITIES: dict[str, Callable[[int], float]] = {
    "sparse": lambda n: CHIP_M * 0.4 / n**0.5,
    "dense": lambda n: CHIP_M / 12,
    "crowded": lambda n: CHIP_M / 3,
}
SAMPLED_PAIRS = 100_000
ORIGIN = np.array([500_000.0, 5_000_000.0])
INVERSE = {
    Relation.COVERS: Relation.COVERED_BY,
    Relation.COVERED_BY: Relation.COVERS,
    Relation.CONTAINS_POINT: Relation.WITHIN,
}
Objects = NDArray[np.object_]
cpu_best_of = partial(best_of, clock=time.process_time)


def make_chip(n: int, reach: float, seed: int = 0) -> tuple[Objects, NDArray[np.uint8]]:
    """n points, n lines of 8 segments, n six-cornered houses, in pairs that share a wall."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(reach, CHIP_M - reach, (n, 1, 2))
    centre[1::2] = centre[: n // 2 * 2 : 2] + np.array([reach, 0.0])
    corner = np.array([[-1, -1], [1, -1], [1, 0], [0.5, 0], [0.5, 1], [-1, 1]]) * reach / 2
    polygons = shapely.polygons(centre + corner + ORIGIN)
    walk = np.cumsum(rng.normal(0, reach / 6, (n, 9, 2)), axis=1)
    lines = shapely.linestrings(rng.uniform(0, CHIP_M, (n, 1, 2)) + walk + ORIGIN)
    points = shapely.points(rng.uniform(0, CHIP_M, (n, 2)) + ORIGIN)
    kind = np.repeat([Kind.POINT, Kind.LINE, Kind.POLYGON], n).astype(np.uint8)
    return np.concatenate([points, lines, polygons]), kind


def relation_of(a: Any, b: Any, i: int, j: int) -> Relation | None:
    """The relation of a (of kind i) to b (of kind j <= i) by shapely's predicates in turn."""
    if i == Kind.POINT:
        return Relation.EQUALS if a.equals(b) else None
    if a.touches(b):
        return Relation.TOUCHES
    if j == Kind.POINT:
        return Relation.CONTAINS_POINT if a.contains(b) else None
    if i == j and a.equals(b):
        return Relation.EQUALS
    if a.covers(b):
        return Relation.COVERS
    if i == j and a.covered_by(b):
        return Relation.COVERED_BY
    if (i != j or i == Kind.LINE) and a.crosses(b):
        return Relation.CROSSES
    return Relation.OVERLAPS if i == j and a.overlaps(b) else None


def relation_if_meeting(a: Any, b: Any, i: int, j: int) -> Relation | None:
    """As `relation_of`, disjoint pairs sorted out first."""
    return relation_of(a, b, i, j) if a.intersects(b) else None


def all_pairs(
    geometry: Objects, kind: NDArray[np.uint8], decide: Callable[..., Relation | None]
) -> tuple[float, NDArray[np.int64] | None]:
    """Seconds of a loop over all pairs, and the edges of each relation if every pair was tried."""
    pairs = list(itertools.combinations(range(len(geometry) - 1, -1, -1), 2))
    total = len(pairs)
    if total > 2 * SAMPLED_PAIRS:
        chosen = np.random.default_rng(0).choice(total, SAMPLED_PAIRS, replace=False)
        pairs = [pairs[n] for n in chosen]
    objects, kinds = geometry.tolist(), kind.tolist()

    def loop() -> NDArray[np.int64]:
        counts = np.zeros(len(Relation), np.int64)
        for a, b in pairs:
            relation = decide(objects[a], objects[b], kinds[a], kinds[b])
            if relation is not None:
                counts[relation] += 1
                counts[INVERSE.get(relation, relation)] += 1
        return counts

    def neighbours() -> int:
        xy = shapely.get_coordinates(geometry[kind == Kind.POINT]) - ORIGIN
        corners = Delaunay(xy).simplices[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        return len({tuple(sorted(edge)) for edge in corners.tolist()})

    pairs_s, counts = cpu_best_of(2, loop)
    near_s, near = cpu_best_of(2, neighbours)
    if len(pairs) < total:
        return pairs_s * total / len(pairs) + near_s, None
    counts[Relation.SELF], counts[Relation.NEAR] = len(geometry), 2 * near
    return pairs_s + near_s, counts


def floor(geometry: Objects, kind: NDArray[np.uint8], repeat: int) -> dict[str, float]:
    """Seconds of finding the pairs that meet and of what settles them, in bulk."""

    def meeting() -> tuple[Objects, Objects]:
        a, b = shapely.STRtree(geometry).query(geometry, predicate="intersects")
        once = a < b
        return geometry[b[once]], geometry[a[once]]

    def by_predicates() -> None:
        first, second = meeting()
        shapely.prepare(first)
        for predicate in (shapely.touches, shapely.covers, shapely.covered_by, shapely.crosses):
            predicate(first, second)
        shapely.destroy_prepared(geometry)

    points = shapely.multipoints(geometry[kind == Kind.POINT])
    triangulation = cpu_best_of(
        repeat, lambda: shapely.delaunay_triangles(points, only_edges=True)
    )[0]
    relate = cpu_best_of(repeat, lambda: shapely.relate(*meeting()))[0]
    predicates = cpu_best_of(repeat, by_predicates)[0]
    return {
        "floor_relate_s": relate + triangulation,
        "floor_predicates_s": predicates + triangulation,
    }


def measure_chip(n: int, reach: float, repeat: int) -> dict[str, Any]:
    """Ours and the baselines for one chip."""
    geometry, kind = make_chip(n, reach)
    chip = np.zeros(len(geometry), np.int64)
    ours, graph = cpu_best_of(4 * repeat, lambda: build_relations(geometry, chip, kind, 1))
    floors = floor(geometry, kind, repeat)
    slow, counts = all_pairs(geometry, kind, relation_of)
    quicker, same = all_pairs(geometry, kind, relation_if_meeting)
    found = np.bincount(graph["relation"], minlength=len(Relation)).tolist()
    for loop in (counts, same):
        if loop is not None and found != loop.tolist():
            raise SystemExit(f"N={n}: relations {found}, by the loop {loop.tolist()}")
    floor_s = min(floors.values())
    return {
        "n": n,
        "edges": len(graph["relation"]),
        "ours_s": ours,
        "all_pairs_s": slow,
        "all_pairs_intersects_first_s": quicker,
        "all_pairs_estimated_from_pairs": SAMPLED_PAIRS if counts is None else None,
        **floors,
        "times_faster_than_all_pairs": round(slow / ours, 1),
        "times_faster_than_intersects_first": round(quicker / ours, 1),
        "floor_times_faster_than_all_pairs": round(slow / floor_s, 1),
        "times_the_floor": round(ours / floor_s, 2),
    }


def measure_shard(repeat: int) -> dict[str, Any]:
    """Seconds of each vector stage for 256 chips of about 100 objects."""
    side = 16
    parts = []
    for n in range(side**2):
        geometry, kind = make_chip(33, DENSITIES["sparse"](33), seed=n)
        low = ORIGIN + np.array([n % side, n // side]) * CHIP_M
        moved = shapely.transform(geometry, lambda xy, low=low: xy - ORIGIN + low)
        cut, owner = shapely.get_parts(
            shapely.intersection(moved, shapely.box(*low, *(low + CHIP_M))), return_index=True
        )
        whole = (shapely.get_dimensions(cut) == kind[owner]) & ~shapely.is_empty(cut)
        parts.append((cut[whole], kind[owner[whole]], np.full(whole.sum(), n), low))
    geometry, kind, chip = (np.concatenate(part) for part in list(zip(*parts, strict=True))[:3])
    low = np.array([part[3] for part in parts])
    bounds = np.hstack([low, low + CHIP_M])
    stages = {
        "relations_s": lambda: build_relations(geometry, chip, kind, len(bounds)),
        "anchors_s": lambda: build_anchors(geometry, kind, chip, bounds),
        "correspondence_s": lambda: build_correspondence(geometry, kind, chip, bounds, 14),
    }
    seconds = {name: cpu_best_of(repeat, stage)[0] for name, stage in stages.items()}
    total = sum(seconds.values())
    return {
        "chips": len(bounds),
        "objects": len(geometry),
        **seconds,
        "total_s": total,
        "chips_per_s": round(len(bounds) / total, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the fastest counts")
    repeat = parser.parse_args().repeat
    figures: dict[str, Any] = {"goal": "N=200: >= 100x (sparse), >= 60x (dense); <= 2x the floor"}
    for name, reach in DENSITIES.items():
        chips = [measure_chip(n, reach(n), repeat) for n in SIZES]
        figures[name] = {
            "chips": chips,
            "growth_exponent": growth(list(SIZES), [chip["ours_s"] for chip in chips]),
            "growth_exponent_all_pairs": growth(
                list(SIZES), [chip["all_pairs_s"] for chip in chips]
            ),
        }
    figures["shard"] = measure_shard(repeat)
    report(figures)


if __name__ == "__main__":
    main()
