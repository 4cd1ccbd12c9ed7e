"""Labels: drawn once per block, counted four ways."""

import numpy as np
import pytest
import shapely
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.labels import cut_labels, densities, rasterise
from pipelines.plan import STAGES
from schemas.layout import Kind

ORIGIN = (399_360.0, 4_843_520.0)
CLASSES = 20

Features = tuple[NDArray[np.object_], NDArray[np.uint8], NDArray[np.float32]]


def _features(side_m: float, count: int, seed: int) -> Features:
    """Polygons (some with holes), lines, points and collapsed lines in and around a square."""
    rng = np.random.default_rng(seed)
    at = rng.uniform(-0.1 * side_m, 1.1 * side_m, (count, 1, 2)) + ORIGIN
    angle = np.sort(rng.uniform(0, 2 * np.pi, (count, 7)), axis=1)
    star = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    radius = rng.uniform(0.02, 0.2, (count, 1, 1)) * side_m
    solid = shapely.polygons(at + star * radius)
    holed = shapely.difference(solid, shapely.buffer(shapely.centroid(solid), radius[:, 0, 0] / 3))
    line = shapely.linestrings(at + np.cumsum(rng.normal(0, 0.05 * side_m, (count, 9, 2)), axis=1))
    flat = shapely.linestrings(np.repeat(at, 2, axis=1))
    geometry = np.concatenate([solid, holed, line, shapely.points(at[:, 0]), flat])
    osm_class = rng.integers(0, CLASSES + 1, len(geometry)).astype(np.uint8)
    is_line = shapely.get_dimensions(geometry) == 1
    width = np.where(is_line, rng.choice([0, 0.01, 0.04, 0.1], len(geometry)) * side_m, 0)
    return geometry, osm_class, width.astype(np.float32)


def _square(side_m: float) -> tuple[float, float, float, float]:
    return (*ORIGIN, ORIGIN[0] + side_m, ORIGIN[1] + side_m)


def _centres(bounds: tuple[float, ...], cells: int) -> tuple[NDArray[np.float64], ...]:
    step = (bounds[2] - bounds[0]) / cells
    x = bounds[0] + (np.arange(cells) + 0.5) * step
    y = bounds[3] - (np.arange(cells) + 0.5) * step
    grid_x, grid_y = np.meshgrid(x, y)
    return grid_x, grid_y


@pytest.mark.parametrize(("gsd_m", "seed"), [(1.0, 0), (10.0, 1), (0.3, 2)])
def test_a_half_pixel_has_the_last_drawn_class_that_covers_its_centre(
    gsd_m: float, seed: int
) -> None:
    size = 48
    bounds = _square(size * gsd_m)
    geometry, osm_class, width = _features(size * gsd_m, 12, seed)
    x, y = _centres(bounds, 2 * size)
    expected = np.zeros(x.shape, np.uint8)
    doubtful = np.zeros(x.shape, bool)
    for i in np.argsort(osm_class, kind="stable"):
        shape = geometry[i]
        if shape.geom_type == "LineString":
            shape = shape.buffer(width[i] / 2, quad_segs=64, cap_style="flat")
            # Bends are drawn as polygons of 16 sides.
            near = shapely.distance(shapely.points(x, y), shape.boundary) < 0.02 * width[i] / 2
            doubtful |= near & (osm_class[i] > 0)
        if osm_class[i] and shape.geom_type == "Polygon" and not shape.is_empty:
            expected[shapely.contains_xy(shape, x, y)] = osm_class[i]
    drawn = rasterise(geometry, osm_class, width, bounds, 2 * size)
    assert drawn.shape == (2 * size, 2 * size)
    assert drawn.dtype == np.uint8
    assert len(np.unique(drawn)) > 5
    assert doubtful.mean() < 0.05
    np.testing.assert_array_equal(drawn[~doubtful], expected[~doubtful])


def test_labels_of_a_real_pair_are_those_of_its_polygons_centre_by_centre(shared) -> None:
    geopandas = pytest.importorskip("geopandas")
    folder = sorted((shared / "data" / "pairs").glob("*/meta.json"))[0].parent
    table = geopandas.read_file(next(folder.glob("*_polygon.geojson")))
    table = table.to_crs(table.estimate_utm_crs())
    geometry = shapely.make_valid(np.asarray(table.geometry.values, object))
    geometry = shapely.get_parts(geometry)
    geometry = geometry[shapely.get_dimensions(geometry) == 2]
    osm_class = (np.arange(len(geometry)) % CLASSES + 1).astype(np.uint8)
    west, south, east, north = shapely.total_bounds(geometry)
    side = min(east - west, north - south, 600.0)
    bounds = (west, north - side, west + side, north)
    drawn = rasterise(geometry, osm_class, np.zeros(len(geometry), np.float32), bounds, 256)
    x, y = _centres(bounds, 256)
    expected = np.zeros(x.shape, np.uint8)
    for i in np.argsort(osm_class, kind="stable"):
        expected[shapely.contains_xy(geometry[i], x, y)] = osm_class[i]
    assert (expected > 0).any()
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("corner", [(0, 0), (0, 3), (3, 0), (3, 3), (1, 2)])
def test_a_chip_looks_the_same_alone_and_in_its_block(corner: tuple[int, int]) -> None:
    size, side, gsd_m = 20, 4, 0.5
    geometry, osm_class, width = _features(size * side * gsd_m, 40, 5)
    # Vertices on the centres of half pixels: the rule for ties must not depend on the frame.
    geometry = shapely.transform(geometry, lambda xy: np.round(xy * 8) / 8)
    block = rasterise(geometry, osm_class, width, _square(40.0), 160)
    row, column = corner
    chip_m = size * gsd_m
    x, y = ORIGIN[0] + column * chip_m, ORIGIN[1] + (side - 1 - row) * chip_m
    chip = rasterise(geometry, osm_class, width, (x, y, x + chip_m, y + chip_m), 2 * size)
    cut = block[2 * size * row :, 2 * size * column :][: 2 * size, : 2 * size]
    np.testing.assert_array_equal(chip, cut)
    of_block = cut_labels(block, side, side, size, 5, CLASSES)
    alone = cut_labels(chip, 1, 1, size, 5, CLASSES)
    for name, labels in alone.items():
        np.testing.assert_array_equal(labels[0], of_block[name][row * side + column])


def test_the_order_of_features_does_not_matter() -> None:
    geometry, osm_class, width = _features(64.0, 30, 7)
    order = np.random.default_rng(0).permutation(len(geometry))
    np.testing.assert_array_equal(
        rasterise(geometry, osm_class, width, _square(64.0), 128),
        rasterise(geometry[order], osm_class[order], width[order], _square(64.0), 128),
    )


def test_points_unclassed_features_and_lines_without_width_are_not_drawn() -> None:
    box = shapely.box(0, 0, 8, 8)
    line = shapely.linestrings([[0, 4], [8, 4]])
    geometry = np.array([box, line, shapely.points(4, 4), shapely.Polygon()], object)
    osm_class = np.array([0, 3, 4, 5], np.uint8)
    assert not rasterise(geometry, osm_class, np.zeros(4, np.float32), (0, 0, 8, 8), 16).any()


def test_a_frame_without_features_is_empty() -> None:
    nothing = np.empty(0, object), np.empty(0, np.uint8), np.empty(0, np.float32)
    raster = rasterise(*nothing, (0, 0, 6, 6), 12)
    assert raster.shape == (12, 12)
    labels = cut_labels(raster, 1, 1, 6, 3, 2)
    assert not any(array.any() for array in labels.values())


def test_a_line_drawn_from_beyond_the_frame_covers_what_lies_inside() -> None:
    line = np.array([shapely.linestrings([[-5000, 4], [5000, 4]])], object)
    one = np.ones(1, np.uint8)
    raster = rasterise(line, one, np.full(1, 2, np.float32), (0, 0, 8, 8), 16)
    assert raster[6:10].all()
    assert raster.sum() == 4 * 16
    beside = shapely.transform(line, lambda xy: xy + np.array([0, 4.5]))
    assert rasterise(beside, one, np.full(1, 2, np.float32), (0, 0, 8, 8), 16)[0].all()


def test_a_line_cut_in_two_covers_what_it_covered_before() -> None:
    whole = np.array([shapely.linestrings([[1.3, 2.1], [30.2, 21.7]])], object)
    parts = shapely.linestrings([[[1.3, 2.1], [15.75, 11.9]], [[15.75, 11.9], [30.2, 21.7]]])
    frame = (0.0, 0.0, 32.0, 32.0), 128
    np.testing.assert_array_equal(
        rasterise(whole, np.full(1, 3, np.uint8), np.full(1, 4, np.float32), *frame),
        rasterise(parts, np.full(2, 3, np.uint8), np.full(2, 4, np.float32), *frame),
    )


@pytest.mark.parametrize("width_px", [0.2, 0.45, 0.8, 1.7])
def test_the_area_of_thin_roads_is_unbiased(width_px: float) -> None:
    rng = np.random.default_rng(3)
    size, roads = 64, 1500
    length = 24.0
    drawn = patches = 0.0
    for _ in range(roads // 50):
        angle = rng.uniform(0, np.pi, 50)
        half = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length / 2
        centre = np.stack(np.divmod(np.arange(50), 8), axis=-1) * 32 + rng.uniform(16, 17, (50, 2))
        roads_here = shapely.linestrings(np.stack([centre - half, centre + half], axis=1))
        raster = rasterise(
            roads_here, np.ones(50, np.uint8), np.full(50, width_px, np.float32),
            (0, 0, 256, 256), 512,
        )  # fmt: skip
        labels = cut_labels(raster, 4, 4, size, 16, 1)
        drawn += raster.sum() / 4
        patches += labels["label_region"].sum() * size * size
    assert drawn == pytest.approx(roads * length * width_px, rel=0.02)
    assert patches == pytest.approx(drawn)


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("width_px", [0.3, 0.6, 1.3])
def test_pixels_of_roads_along_an_axis_are_unbiased_in_area_and_place(
    width_px: float, vertical: bool
) -> None:
    size = 64
    area, place = [], []
    for offset in np.linspace(0, 1, 40, endpoint=False) + 0.0123:
        across = 32 + offset
        ends = [[across, 0], [across, size]]
        xy = ends if vertical else [[size - y, size - x] for x, y in ends]
        road = np.array([shapely.linestrings(xy)], object)
        raster = rasterise(
            road, np.ones(1, np.uint8), np.full(1, width_px, np.float32),
            (0, 0, size, size), 2 * size,
        )  # fmt: skip
        pixel = cut_labels(raster, 1, 1, size, 8, 1)["label_pixel"][0]
        profile = pixel.sum(axis=0 if vertical else 1, dtype=float)
        area.append(profile.sum() / size)
        place.append((profile * (np.arange(size) + 0.5 - across)).sum() / size)
    assert np.mean(area) == pytest.approx(width_px, rel=0.02)
    assert np.mean(place) == pytest.approx(0, abs=0.03)


def _naive(raster, side_y, side_x, size, patch, classes):
    """Chip by chip, patch by patch, pixel by pixel."""
    p = size // patch
    counts = np.zeros((side_y * side_x, p, p, classes), np.int64)
    pixels = np.zeros((side_y * side_x, size, size), np.uint8)
    for n in range(side_y * side_x):
        top, left = 2 * size * (n // side_x), 2 * size * (n % side_x)
        chip = raster[top : top + 2 * size, left : left + 2 * size]
        for i in range(p):
            for j in range(p):
                square = chip[2 * patch * i : 2 * patch * (i + 1), 2 * patch * j :][:, : 2 * patch]
                for c in range(classes):
                    counts[n, i, j, c] = np.count_nonzero(square == c + 1)
        for i in range(size):
            for j in range(size):
                four = chip[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].ravel().tolist()
                most = max(map(four.count, four))
                common = {v for v in four if four.count(v) == most}
                pixels[n, i, j] = max(common) if (i + 2 * j) % 4 < 2 else min(common)
    return pixels, counts


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_labels_are_the_counts_of_their_half_pixels(data: st.DataObject) -> None:
    patch, p = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    side_y, side_x = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    classes, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 999))
    size = patch * p
    rng = np.random.default_rng(seed)
    raster = rng.integers(0, classes + 1, (2 * size * side_y, 2 * size * side_x)).astype(np.uint8)
    pixels, expected = _naive(raster, side_y, side_x, size, patch, classes)
    labels = cut_labels(raster, side_y, side_x, size, patch, classes)
    np.testing.assert_array_equal(labels["label_pixel"], pixels)
    share = expected / (4 * patch * patch)
    np.testing.assert_array_equal(labels["patch_fraction"], share.astype(np.float32))
    np.testing.assert_array_equal(labels["label_patch"], np.floor(share * 255 + 0.5))
    np.testing.assert_allclose(labels["label_region"], share.mean(axis=(1, 2)), rtol=1e-6)
    dtypes = {name: str(array.dtype) for name, array in labels.items()}
    assert dtypes == {
        "label_pixel": "uint8",
        "label_patch": "uint8",
        "label_region": "float32",
        "patch_fraction": "float32",
    }


@pytest.mark.parametrize("patch", [127, 128, 251, 256])
def test_counts_of_large_patches_do_not_overflow(patch: int) -> None:
    raster = np.full((4 * patch, 4 * patch), 2, np.uint8)
    labels = cut_labels(raster, 1, 1, 2 * patch, patch, 3)
    assert labels["patch_fraction"].tolist() == [[[[0.0, 1.0, 0.0]] * 2] * 2]
    assert labels["label_region"].tolist() == [[0.0, 1.0, 0.0]]


def test_a_pixel_is_the_commonest_of_its_half_pixels() -> None:
    quarters = [
        ([1, 1, 1, 2], {1}), ([0, 3, 3, 3], {3}), ([5, 1, 5, 2], {5}), ([0, 0, 4, 2], {0}),
        ([7, 2, 3, 3], {3}), ([2, 0, 2, 0], {0, 2}), ([1, 4, 1, 4], {1, 4}),
        ([6, 2, 4, 0], {0, 6}),
    ]  # fmt: skip
    for quarter, allowed in quarters:
        for turn in range(4):
            square = np.rot90(np.array(quarter, np.uint8).reshape(2, 2), turn)
            labels = cut_labels(np.tile(square, (8, 8)), 1, 1, 8, 4, 7)
            pixel = labels["label_pixel"][0]
            assert set(np.unique(pixel).tolist()) == allowed
            if len(allowed) == 2:
                assert np.count_nonzero(pixel == max(allowed)) == 32


def test_the_granularities_agree() -> None:
    size, patch = 64, 16
    geometry, osm_class, width = _features(128.0, 60, 11)
    raster = rasterise(geometry, osm_class, width, _square(128.0), 256)
    labels = cut_labels(raster, 2, 2, size, patch, CLASSES)
    share = labels["patch_fraction"]
    assert np.abs(labels["label_patch"] / 255 - share).max() <= 0.5 / 255 + 1e-12
    np.testing.assert_allclose(labels["label_region"], share.mean(axis=(1, 2)), rtol=1e-5)
    pixel = labels["label_pixel"]
    whole = np.stack([(pixel == c + 1).mean(axis=(1, 2)) for c in range(CLASSES)], axis=1)
    assert np.abs(whole - labels["label_region"]).max() < 0.01
    for n, i, j, c in np.argwhere(share == 1):
        assert (pixel[n, patch * i :, patch * j :][:patch, :patch] == c + 1).all()
    # The pixels well inside a polygon are its class, or one drawn later.
    x, y = _centres(_square(128.0), 128)
    mosaic = pixel.reshape(2, 2, size, size).swapaxes(1, 2).reshape(128, 128)
    for shape, c in zip(geometry, osm_class, strict=True):
        inside = shapely.contains_xy(shapely.buffer(shape, -1.0), x, y)
        assert (mosaic[inside] >= c).all()


def test_densities_are_metres_and_points_per_hectare() -> None:
    bounds = np.array([[0, 0, 100, 100], [100, 0, 300, 200], [0, 100, 100, 200]], float)
    kind = [Kind.POINT, Kind.POINT, Kind.LINE, Kind.LINE, Kind.POLYGON, Kind.POINT, Kind.LINE]
    osm_class = np.array([2, 2, 1, 1, 1, 0, 3])
    size = np.array([0, 0, 30.5, 12, 5000, 0, 200], np.float32)
    chip = np.array([0, 0, 0, 0, 0, 1, 1])
    lines, points = densities(
        np.array(kind, np.uint8), osm_class.astype(np.uint8), size, chip, bounds, 3
    )
    assert lines.dtype == points.dtype == np.float32
    assert lines.tolist() == [[42.5, 0, 0], [0, 0, 50], [0, 0, 0]]
    assert points.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 0]]
    empty = densities(
        np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, np.float32),
        np.empty(0, np.int64), bounds, 3,
    )  # fmt: skip
    assert not np.any(empty)


def test_the_bytes_of_labels_change_only_with_the_version_of_their_stage() -> None:
    raster = rasterise(*_features(128.0, 60, 11), _square(128.0), 256)
    labels = cut_labels(raster, 2, 2, 64, 16, CLASSES)
    digest = xxhash.xxh3_64()
    for name in sorted(labels):
        digest.update(labels[name].tobytes())
    assert (STAGES["labels"], digest.hexdigest()) == (1, "25101fb71e58e4ce")
