"""Relations: the topology graph of every chip of a shard, exactly DE-9IM, in bulk.

Every ordered pair of objects of a chip has at most one relation, read from its DE-9IM matrix
(OGC 06-103r4, section 6.1.15) by the first line that applies:

======================  ==========================================================
the pair                relation of source to target
======================  ==========================================================
is one object           self
is disjoint             none; two points of a Delaunay edge: near
two equal points        equals
interiors do not meet   touches
object and point        contains_point (object to point), within (point to object)
same set                equals
target within source    covers
source within target    covered_by
interiors meet in less  crosses: a line that leaves a polygon, lines that cross
 than one of them        in points only
else                    overlaps
======================  ==========================================================

The matrix of a pair is that of the object of higher dimension to the other; the other direction is
its inverse. So a line that runs on a polygon's boundary touches it, and the boundary of a line is
its two ends (a closed line has none). Geometries must be valid, single-part and not empty.

Near: neighbours in the Delaunay triangulation of a chip's points where these stand at more than
three places. Points at one place equal one another and share their neighbours. Points within a
micrometre of one line are collinear: neighbours follow one another on it. Where four or more
points lie on one empty circle (up to rounding) several triangulations are Delaunay; GEOS picks one
that depends on the places alone, not on the order of the objects.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.ragged import ranks, run_starts
from pipelines.segments import check_kinds
from schemas.layout import Kind, Relation

_INVERSE = np.array(
    [
        {
            Relation.COVERS: Relation.COVERED_BY,
            Relation.COVERED_BY: Relation.COVERS,
            Relation.CONTAINS_POINT: Relation.WITHIN,
            Relation.WITHIN: Relation.CONTAINS_POINT,
        }.get(relation, relation)
        for relation in Relation
    ],
    np.uint8,
)
_COLLINEAR_M = 1e-6
_MIN_PLACES = 4

Index = NDArray[np.int64]
Codes = NDArray[np.uint8]


def build_relations(
    geometry: NDArray[np.object_], chip: Index, kind: Codes, chips: int
) -> dict[str, NDArray[np.generic]]:
    """Relations among the objects of each chip, as one CSR graph per chip.

    Parameters: `geometry` [M] objects clipped to their chip, metres in the chip's own UTM zone;
    `chip` [M] sorted, 0 .. `chips` - 1; `kind` [M] codes of `Kind`. Chips may overlap in
    coordinates: pairs are formed within a chip by index.

    Returns `edge_offset` int64 [chips + 1], `edge` int32 [E, 2] (source, target: positions within
    the chip's objects) and `relation` uint8 [E], ordered by (chip, source, target, relation).
    Both directions of every pair are there, as inverse relations; every object has a self edge.

    Raises ValueError where an object is not a single part of its kind.
    """
    check_kinds(geometry, kind)
    own = np.arange(len(geometry))
    a, b = _candidates(geometry, chip)
    a, b, code = _classify(geometry, kind, a, b)
    p, q = _near(geometry, chip, np.flatnonzero(kind == Kind.POINT))

    near = np.full(len(p), Relation.NEAR, np.uint8)
    source = np.concatenate([own, a, b, p, q])
    target = np.concatenate([own, b, a, q, p])
    relation = np.concatenate([np.zeros(len(own), np.uint8), code, _INVERSE[code], near, near])
    order = np.argsort(source * max(len(geometry), 1) + target)
    source, target = source[order], target[order]

    first = np.searchsorted(chip, np.arange(chips + 1))
    local = np.stack([source, target], axis=1) - first[chip[source], None]
    return {
        "edge_offset": np.searchsorted(source, first).astype(np.int64),
        "edge": local.astype(np.int32),
        "relation": relation[order],
    }


def _candidates(geometry: NDArray[np.object_], chip: Index) -> tuple[Index, Index]:
    """Pairs (a < b) of one chip whose bounds meet.

    The tree holds the diagonals of the bounds, each chip shifted to a place of its own, so that
    chips that overlap in coordinates cost nothing. Rounding the shifted bounds is monotone, so no
    pair is lost; the pairs it adds go by the exact bounds.
    """
    if not len(geometry):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    bounds = shapely.bounds(geometry)
    start = run_starts(chip)
    member = np.repeat(np.arange(len(start)), np.diff(start, append=len(chip)))
    origin = np.minimum.reduceat(bounds[:, :2], start)[member]
    corner = bounds.reshape(-1, 2, 2) - origin[:, None]
    corner[..., 0] += (member * (2 * corner[..., 0].max() + 1))[:, None]
    diagonal = shapely.linestrings(corner)
    a, b = shapely.STRtree(diagonal).query(diagonal)
    once = a < b
    a, b = a[once], b[once]
    disjoint = (bounds[a, :2] > bounds[b, 2:]) | (bounds[b, :2] > bounds[a, 2:])
    meet = ~disjoint.any(axis=1)
    return a[meet], b[meet]


def _classify(
    geometry: NDArray[np.object_], kind: Codes, a: Index, b: Index
) -> tuple[Index, Index, Codes]:
    """Those of the pairs that intersect, turned round at will, with the relation of a to b."""
    bounds = shapely.bounds(geometry)
    inside_a = _within(bounds[b], bounds[a])
    inside_b = _within(bounds[a], bounds[b])
    # The higher dimension comes first, then the one that may contain the other: only the first of
    # a predicate's two geometries is used in its prepared form.
    turn = (kind[a] < kind[b]) | ((kind[a] == kind[b]) & inside_b & ~inside_a)
    a, b = np.where(turn, b, a), np.where(turn, a, b)
    inside_a, inside_b = np.where(turn, inside_b, inside_a), inside_a & inside_b

    prepared = geometry[np.unique(a)]
    shapely.prepare(prepared)
    hit = np.flatnonzero(shapely.intersects(geometry[a], geometry[b]))
    a, b, inside_a, inside_b = a[hit], b[hit], inside_a[hit], inside_b[hit]
    first, second = geometry[a], geometry[b]
    line = (kind[a] == Kind.LINE) & (kind[b] == Kind.LINE)
    point = kind[b] == Kind.POINT
    points = point & (kind[a] == Kind.POINT)

    # As patterns: `shapely.contains` of a prepared polygon is another algorithm, which differs from
    # the matrix where a vertex lies on an edge up to rounding, as clipping leaves it.
    contains = _where(inside_a & ~points, partial(_matches, "T*****FF*"), first, second)
    contained = _where(inside_b & ~point, partial(_matches, "T*F**F***"), first, second)
    rest = ~(contains | contained | points)
    touches = _where(rest, shapely.touches, first, second)
    rest &= ~touches
    crosses = _where(rest & line, shapely.crosses, first, second) | (rest & (kind[a] != kind[b]))
    code = np.select(
        [points, touches, contains & point, contains & contained, contains, contained, crosses],
        [
            Relation.EQUALS,
            Relation.TOUCHES,
            Relation.CONTAINS_POINT,
            Relation.EQUALS,
            Relation.COVERS,
            Relation.COVERED_BY,
            Relation.CROSSES,
        ],
        Relation.OVERLAPS,
    )
    shapely.destroy_prepared(prepared)
    return a, b, code.astype(np.uint8)


def _within(inner: NDArray[np.float64], outer: NDArray[np.float64]) -> NDArray[np.bool_]:
    outside = (inner[:, :2] < outer[:, :2]) | (inner[:, 2:] > outer[:, 2:])
    return np.asarray(~outside.any(axis=1))


def _matches(
    pattern: str, first: NDArray[np.object_], second: NDArray[np.object_]
) -> NDArray[np.bool_]:
    return np.asarray(shapely.relate_pattern(first, second, pattern))


def _where(
    mask: NDArray[np.bool_],
    predicate: Callable[..., NDArray[np.bool_]],
    first: NDArray[np.object_],
    second: NDArray[np.object_],
) -> NDArray[np.bool_]:
    """`predicate` where `mask` holds, False elsewhere."""
    result = np.zeros(len(mask), bool)
    result[mask] = predicate(first[mask], second[mask])
    return result


def _near(geometry: NDArray[np.object_], chip: Index, point: Index) -> tuple[Index, Index]:
    """Pairs of objects that are neighbours among their chip's points, each pair once."""
    xy, member = shapely.get_coordinates(geometry[point]), chip[point]
    order = np.lexsort((xy[:, 1], xy[:, 0], member))
    xy, member, point = xy[order], member[order], point[order]

    same = (np.diff(xy, axis=0) == 0).all(axis=1) & (np.diff(member) == 0)
    place = np.flatnonzero(np.r_[True, ~same][: len(point)])
    copies = np.diff(place, append=len(point))
    places = np.diff(run_starts(member[place]), append=len(place))
    enough = np.flatnonzero(np.repeat(places, places) >= _MIN_PLACES)
    p, q = _neighbours(xy[place[enough]], member[place[enough]])
    p, q = enough[p], enough[q]

    # Every copy at one place is a neighbour of every copy at the other.
    pairs = copies[p] * copies[q]
    p, q, k = np.repeat(p, pairs), np.repeat(q, pairs), ranks(pairs)
    return point[place[p] + k // copies[q]], point[place[q] + k % copies[q]]


def _neighbours(xy: NDArray[np.float64], chip: Index) -> tuple[Index, Index]:
    """Pairs of Delaunay neighbours among places `xy` [n, 2], distinct and sorted within `chip`.

    All chips in one call to GEOS. Places that are collinear but for rounding would be triangulated
    by their rounding errors, so these are strung along their line here.
    """
    if not len(xy):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    start = run_starts(chip)
    run = np.repeat(np.arange(len(start)), np.diff(start, append=len(chip)))
    local = xy - np.minimum.reduceat(xy, start)[run]

    away = local - local[start][run]
    distance = np.hypot(away[:, 0], away[:, 1])
    longest = np.maximum.reduceat(distance, start)
    ends = np.flatnonzero(distance == longest[run])
    direction = away[ends[run_starts(run[ends])]] / longest[:, None]
    along = (away * direction[run]).sum(axis=1)
    off = np.abs(away[:, 0] * direction[run, 1] - away[:, 1] * direction[run, 0])
    straight = (np.maximum.reduceat(off, start) <= _COLLINEAR_M)[run]

    strung = np.flatnonzero(straight)
    strung = strung[np.lexsort((along[strung], run[strung]))]
    follows = run[strung[1:]] == run[strung[:-1]]

    # Each place carries its index as z, which the triangulation hands on to the ends of its edges.
    spread = np.flatnonzero(~straight)
    _, cloud = np.unique(run[spread], return_inverse=True)
    clouds = shapely.multipoints(np.column_stack([local[spread], spread]), indices=cloud)
    edges = shapely.delaunay_triangles(clouds, only_edges=True)
    ends = shapely.get_coordinates(edges, include_z=True)[:, 2].astype(np.int64)
    return (
        np.concatenate([strung[:-1][follows], ends[0::2]]),
        np.concatenate([strung[1:][follows], ends[1::2]]),
    )
