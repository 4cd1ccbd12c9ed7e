"""Random and degenerate geometries from clipping to correspondence, against the plain oracle.

Coordinates lie on a half-metre lattice most of the time, so that geometries meet borders of chips
and patches, one another and themselves exactly; sometimes they are moved off it by a nanometre or
at will. Chips are 8 m, patches 2 m. The examples are the same on every run; with the environment
variable GEOLINK_CHECK_ALL=1 they are new ones, and many more.
"""

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely import LineString, Point, Polygon

from pipelines.anchors import build_anchors
from pipelines.correspondence import build_correspondence
from pipelines.features import make_features
from pipelines.objects import Objects, clip
from pipelines.relations import build_relations
from pipelines.tags import tag_arrays
from schemas.config import ObjectOptions
from schemas.taxonomy import default_taxonomy
from tests import comparison, independent
from tests.comparison import Differences

CHECK_ALL = os.environ.get("GEOLINK_CHECK_ALL") == "1"
HOW = settings(
    deadline=None, derandomize=not CHECK_ALL, suppress_health_check=[HealthCheck.too_slow]
)
TAXONOMY = default_taxonomy()
CHIP_M, PATCHES = 8.0, 4
EAST, NORTH = 373_120.0, 4_843_520.0
CHIPS = [
    (EAST + x, NORTH + y, EAST + x + CHIP_M, NORTH + y + CHIP_M)
    for y in (CHIP_M, 0.0)
    for x in (0.0, CHIP_M)
]

SQUARE = [(0.0, 0.0), (8.0, 0.0), (8.0, 8.0), (0.0, 8.0)]

Places = list[tuple[float, float]]

steps = st.integers(-2, 34)
lattice = st.builds(lambda x, y: (x / 2, y / 2), steps, steps)
shift = st.sampled_from([0.0, 0.0, 0.0, 0.0, 1e-9, -1e-9, 1e-4])
anywhere = st.builds(lambda p, dx, dy: (p[0] + dx, p[1] + dy), lattice, shift, shift) | st.builds(
    lambda x, y: (x, y), st.floats(-1, 17), st.floats(-1, 17)
)
places = lattice | lattice | anywhere


def _at(*xy: tuple[float, float]) -> Places:
    return [(EAST + x, NORTH + y) for x, y in xy]


def _line(xy: Places) -> LineString | None:
    return LineString(_at(*xy)) if len(set(xy)) > 1 else None


def _ring(xy: Places) -> Polygon | None:
    """A polygon as mapped: it may cross or touch itself, or have no area."""
    return Polygon(_at(*xy)) if len(set(xy)) > 2 else None


def _rectangle(a: tuple[float, float], b: tuple[float, float], inset: float) -> Polygon:
    """An upright rectangle between two places, perhaps with a hole that touches its west side.

    They touch in a vertex of both, as shared nodes do: where a hole touches the middle of an edge,
    GEOS 3.14 gives wrong matrices (`box.covers` of such a polygon within the box is false).
    """
    (x0, x1), (y0, y1) = sorted((a[0], b[0])), sorted((a[1], b[1]))
    x1, y1 = max(x1, x0 + 0.5), max(y1, y0 + 0.5)
    middle = (y0 + y1) / 2
    shell = _at((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, middle))
    hole = _at((x0, middle), (x0 + inset, middle - inset / 2), (x0 + inset, middle + inset / 2))
    holes = [hole] if 0 < inset < min(x1 - x0, y1 - y0) else []
    return Polygon(shell, holes)


def _sliver(a: tuple[float, float], b: tuple[float, float], width: float) -> Polygon:
    """A triangle as thin as `width`."""
    return Polygon(_at(a, (b[0] + 1.0, b[1]), (b[0] + 1.0, b[1] + width)))


shapes = st.one_of(
    st.builds(lambda p: Point(_at(p)), places),
    st.builds(_line, st.lists(places, min_size=2, max_size=7)),
    # Along borders of chips and patches, there and back.
    st.builds(
        lambda a, n, back: _line([a, (a[0] + n, a[1]), *([(a[0] + n / 2, a[1])] if back else [])]),
        lattice, st.integers(1, 12), st.booleans(),
    ),
    st.builds(_ring, st.lists(places, min_size=3, max_size=7)),
    st.builds(_rectangle, lattice, lattice, st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(_sliver, lattice, lattice, st.sampled_from([1e-7, 1e-5, 1e-3])),
)  # fmt: skip


@st.composite
def scenes(draw: st.DrawFn) -> list[shapely.Geometry]:
    """Some shapes, and copies of some, whole, turned round or as their own border."""
    drawn = draw(st.lists(shapes, min_size=1, max_size=9))
    for g in list(drawn):
        change = draw(st.sampled_from(["none", "none", "same", "turned", "border", "corner"]))
        if g is None or change == "none":
            continue
        if change == "same":
            drawn.append(g)
        elif change == "turned":
            drawn.append(g.reverse())
        elif change == "border" and g.geom_type == "Polygon":
            drawn.append(LineString(g.exterior.coords))
        elif change == "corner":
            drawn.append(Point(shapely.get_coordinates(g)[0]))
    return [g for g in drawn if g is not None]


def _indices(
    geometry: list[shapely.Geometry], options: ObjectOptions
) -> tuple[list[independent.Feature], Objects, dict[str, Any]]:
    """Geometries through the builder's own stages, and the oracle's features of the same."""
    n = len(geometry)
    tag, ids = "highway=path", np.arange(1, n + 1) * 4
    features = make_features(
        np.array(geometry, object), ids, np.arange(n + 1), [tag] * n, TAXONOMY, np.arange(n),
        Counter(),
    )  # fmt: skip
    bounds = np.array(CHIPS)
    objects = clip(features, bounds, options)
    relations = build_relations(objects.geometry, objects.chip, objects.kind, len(CHIPS))
    kinds = (objects.geometry, objects.kind, objects.chip, bounds)
    arrays = {
        **objects.arrays(),
        **tag_arrays(features, objects),
        **relations,
        "object_anchor": build_anchors(*kinds),
        **build_correspondence(*kinds, PATCHES),
    }
    own = [
        f
        for g, osm in zip(geometry, ids.tolist(), strict=True)
        for f in independent.feature_parts(g, osm, {"highway": "path"}, TAXONOMY)
    ]
    return own, objects, arrays


def check(geometry: list[shapely.Geometry], options: ObjectOptions | None = None) -> Differences:
    """Everything of four chips against the oracle; fails on the first kind of difference."""
    options = options or ObjectOptions()
    features, built, arrays = _indices(geometry, options)
    d = Differences()
    for n, chip in enumerate(CHIPS):
        objects = independent.clip_chip(features, chip, options)
        comparison.compare_objects(objects, chip, PATCHES, arrays, n, d)
        first, last = arrays["object_offset"][n : n + 2]
        if len(objects) == last - first:
            for o, g in zip(objects, built.geometry[first:last], strict=True):
                d.check("geometry", shapely.equals_exact(o.geometry, g), (chip, o.geometry, g))
            comparison.compare_relations(objects, chip, arrays, n, d)
        comparison.check_pieces_by_walking(features, chip, d)
    assert not d.found, (d.examples, [g.wkt for g in geometry])
    return d


OPTIONS = (
    ObjectOptions(),
    ObjectOptions(),
    ObjectOptions(min_polygon_fraction=0.01, min_line_fraction=0.05),
    ObjectOptions(max_per_chip=3),
)


@settings(HOW, max_examples=2000 if CHECK_ALL else 50)
@given(scenes(), st.sampled_from(OPTIONS))
def test_any_geometries_agree_with_one_pair_at_a_time(
    geometry: list[shapely.Geometry], options: ObjectOptions
) -> None:
    check(geometry, options)


@settings(HOW, max_examples=1000 if CHECK_ALL else 25)
@given(st.lists(lattice | st.tuples(st.floats(0, 16), st.floats(0, 16)), max_size=40))
def test_any_points_are_near_by_the_empty_circle(xy: Places) -> None:
    check([Point(p) for p in _at(*(tuple(np.round(p, 4)) for p in xy))])


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(
            [LineString(_at((0.5, 0), (0, 0.5), (0, 1), (-0.5, 0), (0, 0)))],
            id="a line along the border that comes back to the corner alone",
        ),
        pytest.param(
            [LineString(_at((5, 5), (8, 4), (9, 4), (9, 9), (7, 9), (7, 7), (8, 4), (9, 3)))],
            id="a line that leaves a chip twice at one place",
        ),
        pytest.param(
            [Polygon(_at((5.5, 8), (8, 8), (10.5, 1e-9)))],
            id="a vertex half-way up",
        ),
        pytest.param(
            [Polygon(_at((12, 5.5), (0, 0), (10, 4.5), (10 + 1e-9, 0), (1, -1)))],
            id="two vertices of a polygon a nanometre apart on the line of an anchor",
        ),
        pytest.param(
            [LineString(_at((10, 12.5), (9.999999999, 0), (0, 14), (13.5, 10.5)))],
            id="a line within a nanometre of a border between patches",
        ),
        pytest.param(
            [Point(_at((8.0, 8.0))), Point(_at((8.0, 8.0))), LineString(_at((8, 0), (8, 16)))],
            id="points and a line on the corner and border of four chips",
        ),
        pytest.param(
            [
                Polygon(_at((0, 0), (8, 0), (8, 8), (0, 8))),
                Polygon(_at((0, 0), (0, 8), (8, 8), (8, 0))),
            ],
            id="a chip covered twice, exactly",
        ),
        pytest.param(
            [LineString(_at((1, 1), (5, 1), (3, 1))), LineString(_at((2, 1), (9, 1)))],
            id="a line there and back, and one along it",
        ),
        pytest.param(
            [LineString(_at((1, 1), (1, 1))), Polygon(_at((1, 1), (3, 1), (5, 1)))],
            id="a line without length and a polygon without area",
        ),
        pytest.param([Point(), LineString(), Polygon()], id="nothing at all"),
    ],
)
def test_degenerate_geometries_agree_with_one_pair_at_a_time(
    geometry: list[shapely.Geometry],
) -> None:
    check(geometry)
