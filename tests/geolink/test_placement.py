"""Crops, turns and flips against geometry: shapely moves every object, rasterio draws it anew."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize
from shapely.affinity import affine_transform

from geolink.graph import GraphBatch, pack
from geolink.training.placement import (
    Placement,
    Window,
    draw_placement,
    place_graph,
    place_gsd_m,
    place_images,
    place_patches,
    place_pixels,
)
from pipelines.anchors import build_anchors
from pipelines.correspondence import build_correspondence
from schemas.training import Augment

SIZE, PATCHES, CHIPS = 112, 14, 3
SIDE_M = 112.0
CPU = torch.device("cpu")


def random_objects(rng: np.random.Generator) -> list[shapely.Geometry]:
    """Points, wandering lines and polygons, in metres from a chip's bottom-left corner."""

    def inside(points: Any) -> Any:
        return SIDE_M - abs(SIDE_M - abs(points))  # mirrored at the borders

    points = [shapely.Point(p) for p in rng.uniform(0, SIDE_M, (12, 2))]
    lines = [
        shapely.LineString(inside(rng.uniform(0, SIDE_M, 2) + rng.normal(0, 9, (5, 2)).cumsum(0)))
        for _ in range(12)
    ]
    polygons = []
    for _ in range(14):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(0.3, 1, 9) * rng.uniform(1, 40)
        ring = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
        shape = shapely.Polygon(inside(ring + rng.uniform(0, SIDE_M, 2))).buffer(0)
        polygons += [p for p in shapely.get_parts(shape) if p.area > 1e-6]
    return [*points, *lines, *polygons]


def build() -> tuple[list[list[shapely.Geometry]], GraphBatch, torch.Tensor, torch.Tensor]:
    """Objects of each chip (metres), their graph, the class of each pixel, shares by patch."""
    rng = np.random.default_rng(5)
    objects = [random_objects(rng) for _ in range(CHIPS)]
    flat = np.array([o for chip in objects for o in chip], dtype=object)
    counts = [len(chip) for chip in objects]
    kind = shapely.get_dimensions(flat).astype(np.uint8)
    chip = np.repeat(np.arange(CHIPS), counts)
    bounds = np.tile([0.0, 0.0, SIDE_M, SIDE_M], (CHIPS, 1))
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    local = np.concatenate([np.arange(n) for n in counts])
    size = np.select([kind == 1, kind == 2], [shapely.length(flat), shapely.area(flat)])
    graph = pack(
        object_offset=offset, kind=kind, osm_class=(np.arange(len(flat)) % 3).astype(np.uint8),
        osm_id=np.arange(len(flat)), size=size.astype(np.float32),
        anchor=build_anchors(flat, kind, chip, bounds),
        tag_offset=np.arange(len(flat) + 1), tag=np.zeros(len(flat), np.int64),
        tag_weight=np.ones(len(flat), np.float32), edge_offset=offset,
        edge=np.stack([local, local], 1), relation=np.zeros(len(flat), np.uint8),
        **build_correspondence(flat, kind, chip, bounds, PATCHES),
    )  # fmt: skip
    pixel = np.stack([drawn([down(o) for o in chip]) for chip in objects])
    share = torch.from_numpy(pixel).view(CHIPS, PATCHES, 8, PATCHES, 8)
    share = torch.stack([(share == c).float().mean((2, 4)) for c in range(1, 4)], -1)
    return objects, graph, torch.from_numpy(pixel), (share * 255).round().byte()


def down(shape: shapely.Geometry) -> shapely.Geometry:
    """Metres, y up -> shares of the chip, y down."""
    return affine_transform(shape, [1 / SIDE_M, 0, 0, -1 / SIDE_M, 0, 1])


def drawn(shapes: list[shapely.Geometry], size: int = SIZE) -> np.ndarray[Any, Any]:
    """Pixels of polygons (shares of the chip), later ones on top, their classes 1, 2, 3, 1, ..."""
    pairs = [
        (affine_transform(shape, [size, 0, 0, size, 0, 0]), n % 3 + 1)
        for n, shape in enumerate(shapes)
        if shape.geom_type.endswith("Polygon") and not shape.is_empty
    ]
    return rasterize(pairs, (size, size), dtype="uint8")


def without_edges(objects: list[list[shapely.Geometry]]) -> torch.Tensor:
    """Pixels that no edge comes near, by pixels an eighth as wide: bool [chip, y, x]."""
    fine = np.stack([drawn([down(o) for o in chip], SIZE * 8) for chip in objects])
    fine = fine.reshape(CHIPS, SIZE, 8, SIZE, 8)
    low, high = fine.min((2, 4)), fine.max((2, 4))
    for axis in (1, 2):
        low = np.minimum(low, np.minimum(np.roll(low, 1, axis), np.roll(low, -1, axis)))
        high = np.maximum(high, np.maximum(np.roll(high, 1, axis), np.roll(high, -1, axis)))
    return torch.from_numpy(low == high)


OBJECTS, GRAPH, PIXEL, SHARE = build()
EVEN = without_edges(OBJECTS)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """A window of a sixth of the area or more, turn and mirroring, of each chip its own."""
    low = draw(st.integers(6, PATCHES))
    side = [draw(st.integers(low, PATCHES)) for _ in range(CHIPS)]
    left, top = ([draw(st.integers(0, PATCHES - s)) for s in side] for _ in range(2))
    window = Window(*(torch.tensor(v) for v in (left, top, side)), smallest=low)
    coins = [torch.tensor([draw(st.booleans()) for _ in range(CHIPS)]) for _ in range(3)]
    flags = [c if draw(st.booleans()) else None for c in coins]
    return Placement(PATCHES, window if draw(st.booleans()) else None, *flags)


def moved(shape: shapely.Geometry, placement: Placement, chip: int) -> shapely.Geometry:
    """A shape (shares of the chip, y down) where the placement puts it, not cut."""
    if placement.window is not None:
        w = placement.window
        scale = PATCHES / int(w.side[chip])
        x, y = (-int(at[chip]) / int(w.side[chip]) for at in (w.left, w.top))
        shape = affine_transform(shape, [scale, 0, 0, scale, x, y])
    if placement.swapped is not None and placement.swapped[chip]:
        shape = affine_transform(shape, [0, 1, 1, 0, 0, 0])
    if placement.mirrored_x is not None and placement.mirrored_x[chip]:
        shape = affine_transform(shape, [-1, 0, 0, 1, 1, 0])
    if placement.mirrored_y is not None and placement.mirrored_y[chip]:
        shape = affine_transform(shape, [1, 0, 0, -1, 0, 1])
    return shape


def nodes() -> list[tuple[int, int, shapely.Geometry]]:
    """(node, chip, shape) in packed order; ids are the objects' numbers."""
    flat = [(chip, down(o)) for chip, chips in enumerate(OBJECTS) for o in chips]
    return [(n, *flat[i]) for n, i in enumerate(GRAPH.osm_id.tolist())]


NODES = nodes()
UNIT = shapely.box(0, 0, 1, 1)


@given(placement=placements())
@settings(max_examples=40, deadline=None)
def test_moved_objects_are_drawn_where_the_moved_labels_are(placement: Placement) -> None:
    found = place_pixels(PIXEL, placement).numpy()
    even = place_pixels(EVEN, placement).numpy()
    for chip, objects in enumerate(OBJECTS):
        expected = drawn([moved(down(o), placement, chip) for o in objects])
        assert (expected == found[chip])[even[chip]].all()
        assert (expected == found[chip]).mean() > 0.9
        assert even[chip].mean() > 0.5


@given(placement=placements())
@settings(max_examples=40, deadline=None)
def test_objects_live_exactly_where_something_of_them_is_seen(placement: Placement) -> None:
    graph = place_graph(GRAPH, placement)
    size = shapely.box(0, 0, 1, 1)
    alive = []
    for n, chip, shape in NODES:
        seen = moved(shape, placement, chip).intersection(size)
        left = (1.0 * (not seen.is_empty), seen.length, seen.area)[int(GRAPH.kind()[n])]
        whole = (1.0, shape.length, shape.area)[int(GRAPH.kind()[n])]
        alive.append(left > 1e-9 * whole)
        if alive[-1] and GRAPH.kind()[n]:
            scale = 1.0 if placement.window is None else int(placement.window.side[chip]) / PATCHES
            left *= scale ** int(GRAPH.kind()[n])
            # Shares are kept in bytes.
            tolerance = 0.51 / 255 * (whole + 1 / PATCHES**2) * int(GRAPH.patch_offset.diff()[n])
            tolerance += 0.51 / 255 * whole
            assert float(graph.size[n] / GRAPH.size[n]) * whole == pytest.approx(
                left, abs=2 * tolerance
            )
    assert graph.living().tolist() == alive


@given(placement=placements())
@settings(max_examples=40, deadline=None)
def test_anchors_follow_their_objects_and_stay_on_what_is_seen_of_them(
    placement: Placement,
) -> None:
    graph = place_graph(GRAPH, placement)
    assert bool(((graph.anchor >= 0) & (graph.anchor <= 1)).all())
    alive = graph.living().tolist()
    patch = 1.0 if placement.window is None else 1 / int(placement.window.side.min())
    for n, chip, shape in NODES:
        if not alive[n]:
            continue
        there = moved(shape, placement, chip)
        before = shapely.points(GRAPH.anchor[n].double().numpy())
        expected = [moved(p, placement, chip) for p in before]
        if UNIT.contains(there) or not GRAPH.kind()[n]:
            wanted = np.clip(shapely.get_coordinates(expected), 0, 1)
            np.testing.assert_allclose(graph.anchor[n].numpy(), wanted, atol=1e-5)
            continue
        # Cut by the window: near what is left of it, within the old patches that it meets.
        seen = there.intersection(UNIT)
        hull = seen.convex_hull.buffer(1.5 * patch)
        for point in shapely.points(graph.anchor[n].double().numpy()):
            assert hull.contains(point)


@given(placement=placements())
@settings(max_examples=40, deadline=None)
def test_shares_of_patches_add_up_and_miss_no_patch(placement: Placement) -> None:
    graph = place_graph(GRAPH, placement)
    owner = np.repeat(np.arange(graph.nodes), np.diff(graph.patch_offset.numpy()))
    share = np.zeros((graph.nodes, PATCHES**2))
    np.add.at(share, (owner, graph.patch.numpy()), graph.patch_weight.numpy())
    assert share[~graph.living().numpy()].sum() == 0
    old = np.zeros_like(share)
    owner = np.repeat(np.arange(graph.nodes), np.diff(GRAPH.patch_offset.numpy()))
    np.add.at(old, (owner, GRAPH.patch.numpy()), GRAPH.patch_weight.numpy())
    corner = np.arange(PATCHES) / PATCHES
    x, y = (c.ravel() for c in np.meshgrid(corner, corner))
    boxes = shapely.box(x, y, x + 1 / PATCHES, y + 1 / PATCHES)
    whole = placement.window is None
    for n, chip, shape in NODES:
        kind = int(GRAPH.kind()[n])
        seen = moved(shape, placement, chip).intersection(UNIT)
        if not graph.living()[n]:
            continue
        if kind == 0:
            x, y = np.minimum((graph.anchor[n, 0].numpy() * PATCHES).astype(int), PATCHES - 1)
            assert share[n, y * PATCHES + x] == 1 == share[n].sum()
            continue
        part = shapely.area(boxes & seen) * PATCHES**2 if kind == 2 else shapely.length(
            boxes & seen
        ) / max(seen.length, 1e-12)  # fmt: skip
        # Nothing is met that is not counted, and all of it is.
        assert share[n][part > 1e-4].min(initial=1) > 0
        assert share[n].max() <= 1 + 1e-5
        if kind == 1:
            assert share[n].sum() == pytest.approx(old[n].sum(), rel=1e-4)
        if whole:
            tolerance = 1.01 / 255 if kind == 2 else 1.01 / 255 + 1e-3
            np.testing.assert_allclose(share[n], part, atol=tolerance)


def test_patches_that_an_object_fills_are_filled_after_a_crop() -> None:
    window = Window(*(torch.full((CHIPS,), v) for v in (2, 3, 9)), smallest=9)
    graph = place_graph(GRAPH, Placement(PATCHES, window))
    errors, met = [], 0
    corner = np.arange(PATCHES) / PATCHES
    x, y = (c.ravel() for c in np.meshgrid(corner, corner))
    boxes = shapely.box(x, y, x + 1 / PATCHES, y + 1 / PATCHES)
    owner = np.repeat(np.arange(graph.nodes), np.diff(graph.patch_offset.numpy()))
    share = np.zeros((graph.nodes, PATCHES**2))
    np.add.at(share, (owner, graph.patch.numpy()), graph.patch_weight.numpy())
    for n, chip, shape in NODES:
        if GRAPH.kind()[n] == 2 and graph.living()[n]:
            there = moved(shape, Placement(PATCHES, window), chip)
            exact = shapely.area(boxes & there) * PATCHES**2
            errors.append(np.abs(share[n] - exact)[(share[n] > 0) | (exact > 0)])
            # A new patch with all the old ones that it lies in inside the object is filled.
            full = shapely.contains(there, shapely.buffer(boxes, 1 / 9, cap_style="square"))
            met += full.sum()
            np.testing.assert_allclose(share[n][full], 1, atol=0.005)
    assert met > 0
    # Spread evenly within an old patch: off by little in the mean.
    assert np.concatenate(errors).mean() < 0.12


@given(placement=placements())
@settings(max_examples=25, deadline=None)
def test_shares_of_classes_follow_the_pixels(placement: Placement) -> None:
    found = place_patches(SHARE, placement).float() / 255
    pixel = place_pixels(PIXEL, placement).view(CHIPS, PATCHES, 8, PATCHES, 8)
    counted = torch.stack([(pixel == c).float().mean((2, 4)) for c in range(1, 4)], -1)
    assert found.dtype == torch.float32
    assert float((found - counted).abs().mean()) < 0.05
    assert float((found.mean((1, 2)) - counted.mean((1, 2))).abs().max()) < 0.02
    if placement.window is None:
        assert float((found - counted).abs().max()) < 0.01


@given(placement=placements())
@settings(max_examples=25, deadline=None)
def test_pixels_follow_their_labels(placement: Placement) -> None:
    images = torch.stack([PIXEL.float(), 3 - PIXEL.float()], 1)
    found = place_images(images, placement)
    labels = place_pixels(PIXEL, placement).float()
    # Between pixels of two classes lies what lies between.
    near = (found[:, 0] - labels).abs() < 0.01
    assert near.float().mean() > 0.8
    torch.testing.assert_close(found.sum(1), torch.full_like(labels, 3), atol=1e-4, rtol=0)


def test_a_crop_of_everything_changes_nothing() -> None:
    placement = draw_placement(CHIPS, Augment(crop=(1, 1), flip=False), PATCHES, CPU)
    graph = place_graph(GRAPH, placement)
    assert graph.alive is not None
    assert bool(graph.alive.all())
    for field in fields(GraphBatch):
        value, before = getattr(graph, field.name), getattr(GRAPH, field.name)
        if field.name in ("anchor", "patch_weight", "size"):
            torch.testing.assert_close(value, before, atol=1e-6, rtol=1e-5)
        elif field.name != "alive":
            assert torch.equal(value, before) if torch.is_tensor(value) else value == before
    assert torch.equal(place_pixels(PIXEL, placement), PIXEL)
    assert torch.equal(place_patches(SHARE, placement), SHARE)
    images = torch.randn(CHIPS, 2, SIZE, SIZE)
    torch.testing.assert_close(place_images(images, placement), images, atol=1e-3, rtol=0)
    gsd_m = torch.tensor([1.0, 2.0, 10.0])
    assert torch.equal(place_gsd_m(gsd_m, placement), gsd_m)


def test_windows_have_the_asked_share_of_the_area_and_lie_anywhere_within() -> None:
    options = Augment(crop=(0.4, 0.9), rotate=True)
    generator = torch.Generator().manual_seed(0)
    placement = draw_placement(4000, options, PATCHES, CPU, generator)
    window = placement.window
    assert window is not None
    assert sorted(set(window.side.tolist())) == [9, 10, 11, 12, 13]
    assert window.smallest == 9
    area = (window.side / PATCHES) ** 2
    assert float(area.min()) > 0.38
    assert float(area.max()) < 0.9
    assert float(area.mean()) == pytest.approx(0.65, abs=0.01)
    for at in (window.left, window.top):
        assert int(at.min()) == 0
        assert int((at + window.side).max()) == PATCHES
        assert 0.45 < float((at / (PATCHES - window.side)).mean()) < 0.55
    gsd_m = place_gsd_m(torch.full((4000,), 2.0), placement)
    assert torch.allclose(gsd_m, 2 * window.side / PATCHES)
    flags = (placement.swapped, placement.mirrored_x, placement.mirrored_y)
    code = sum(flag.long() << n for n, flag in enumerate(flags) if flag is not None)
    assert torch.is_tensor(code)
    assert int(torch.bincount(code, minlength=8).min()) > 400


def test_without_a_flip_turns_keep_left_and_right() -> None:
    options = Augment(flip=False, rotate=True)
    placement = draw_placement(400, options, 1, CPU, torch.Generator().manual_seed(0))
    corners = torch.tensor([[0.0, 1.0], [3.0, 2.0]]).expand(400, 1, 2, 2)
    turned = place_images(corners, placement)[:, 0]
    # Clockwise from the top left they still rise by one, whatever the first.
    clockwise = turned.flatten(1)[:, [0, 1, 3, 2]]
    assert bool(((clockwise.diff(dim=1) % 4) == 1).all())
    assert torch.bincount(turned[:, 0, 0].long()).min() > 60


def test_the_dead_are_gone_from_a_compact_graph() -> None:
    window = Window(*(torch.full((CHIPS,), v) for v in (9, 9, 4)), smallest=4)
    graph = place_graph(GRAPH, Placement(PATCHES, window))
    compact = graph.compact()
    alive = graph.living()
    assert 0 < compact.nodes == int(alive.sum()) < graph.nodes
    assert torch.equal(compact.osm_id, graph.osm_id[alive])
    assert torch.equal(compact.kind(), graph.kind()[alive])
    assert compact.edge.shape[1] == compact.nodes
    assert torch.equal(compact.edge[0], compact.edge[1])
    assert compact.alive is None
    assert bool((compact.patch_weight > 0).all())
    assert int(compact.patch_offset[-1]) == len(compact.patch)
    total = graph.patch_weight.sum()
    torch.testing.assert_close(compact.patch_weight.sum(), total)
    assert torch.equal(
        replace(compact).to_pyg()["polygon"].osm_id, graph.to_pyg()["polygon"].osm_id
    )


def test_an_area_that_is_none_is_refused() -> None:
    for crop in ((0.0, 0.5), (0.9, 0.4), (0.5, 1.1)):
        with pytest.raises(ValueError, match="give a least and a largest share of the area"):
            Augment(crop=crop)
