"""Augmentation changes image and graph by the same parameters."""

import numpy as np
import torch

from geolink.device import normalise
from geolink.graph import GraphBatch, pack
from geolink.training.augment import augment, jitter
from geolink.training.placement import Placement, place_graph, place_images
from schemas.training import Augment

SIZE, PATCH = 64, 8
PATCHES = SIZE // PATCH


def marked_chips(chips: int = 6) -> tuple[torch.Tensor, GraphBatch]:
    """Chips whose objects are single bright pixels, at their anchors and nowhere else."""
    rng = np.random.default_rng(0)
    objects = rng.integers(1, 6, chips)
    total = int(objects.sum())
    pixel = np.stack([rng.integers(0, SIZE, total), rng.integers(0, SIZE, total)], 1)  # x, y
    anchor = np.repeat((pixel[:, None] + 0.5) / SIZE, 4, axis=1).astype(np.float32)
    patch = pixel[:, 1] // PATCH * PATCHES + pixel[:, 0] // PATCH
    image = torch.zeros(chips, 3, SIZE, SIZE)
    image[np.repeat(np.arange(chips), objects), :, pixel[:, 1], pixel[:, 0]] = 1.0
    one_each = np.arange(total + 1)
    offset = np.concatenate([[0], objects.cumsum()])
    local = np.concatenate([np.arange(n) for n in objects])
    graph = pack(
        object_offset=offset, kind=rng.integers(0, 3, total).astype(np.uint8),
        osm_class=np.zeros(total, np.uint8), osm_id=np.arange(total),
        size=np.zeros(total, np.float32), anchor=anchor,
        tag_offset=one_each, tag=np.zeros(total, np.int64), tag_weight=np.ones(total, np.float32),
        edge_offset=offset, edge=np.stack([local, local], 1), relation=np.zeros(total, np.uint8),
        patch_offset=one_each, patch=patch, patch_weight=np.full(total, 255, np.uint8),
    )  # fmt: skip
    return image, graph


def mirror(
    image: torch.Tensor, graph: GraphBatch, chosen: torch.Tensor
) -> tuple[torch.Tensor, GraphBatch]:
    placement = Placement(PATCHES, mirrored_x=chosen)
    return place_images(image, placement), place_graph(graph, placement)


def drawn(graph: GraphBatch) -> torch.Tensor:
    """The image that the anchors say there is."""
    image = torch.zeros(graph.chips, 3, SIZE, SIZE)
    column, row = (graph.anchor[:, 0] * SIZE).long().unbind(1)
    image[graph.chip, :, row, column] = 1.0
    return image


def test_flipped_anchors_lie_on_the_flipped_pixels() -> None:
    image, graph = marked_chips()
    assert torch.equal(drawn(graph), image)
    chosen = torch.tensor([True, False, True, False, False, True])
    flipped, moved = mirror(image, graph, chosen)
    assert torch.equal(drawn(moved), flipped)
    assert torch.equal(flipped[chosen], image[chosen].flip(-1))
    assert torch.equal(flipped[~chosen], image[~chosen])


def test_flipped_objects_meet_the_patches_that_hold_their_pixels() -> None:
    image, graph = marked_chips()
    chosen = torch.tensor([True, True, False, True, False, False])
    flipped, moved = mirror(image, graph, chosen)
    chip = torch.repeat_interleave(moved.chip, moved.patch_offset.diff())
    bright = flipped.amax(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).amax((-1, -2))
    expected = {tuple(i) for i in bright.flatten(1).nonzero().tolist()}
    assert set(zip(chip.tolist(), moved.patch.tolist(), strict=True)) == expected
    assert moved.patch.dtype == graph.patch.dtype


def test_flipping_twice_changes_nothing_and_the_input_is_left_alone() -> None:
    image, graph = marked_chips()
    before = image.clone(), graph.anchor.clone(), graph.patch.clone()
    every = torch.ones(len(image), dtype=torch.bool)
    twice, back = mirror(*mirror(image, graph, every), every)
    assert torch.equal(twice, image)
    assert torch.allclose(back.anchor, graph.anchor, atol=1e-6)
    assert torch.equal(back.patch, graph.patch)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (image, graph.anchor, graph.patch), strict=True)
    )


def test_about_half_of_the_chips_are_flipped_by_the_seed_alone() -> None:
    image, graph = marked_chips(200)
    options = Augment(flip=True, jitter=0.0)

    def flipped(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        out, moved, _ = augment(image, graph, options, patches=PATCHES, generator=generator)
        assert torch.equal(drawn(moved), out)
        return (out != image).flatten(1).any(1)

    assert 70 < int(flipped(0).sum()) < 130
    assert torch.equal(flipped(0), flipped(0))
    assert not torch.equal(flipped(0), flipped(1))


def test_jitter_is_one_linear_change_per_band_and_chip_within_its_amount() -> None:
    image = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = jitter(image, 0.2, torch.Generator().manual_seed(1))
    x, y = image.flatten(2).double(), changed.flatten(2).double()
    mean_x, mean_y = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
    slope = ((x - mean_x) * (y - mean_y)).sum(2) / (x - mean_x).square().sum(2)
    offset = mean_y[..., 0] - slope * mean_x[..., 0]
    assert torch.allclose(slope[..., None] * x + offset[..., None], y, atol=1e-5)
    for change in (slope - 1, offset):
        assert change.abs().max() <= 0.2
        assert change.min() < -0.15
        assert change.max() > 0.15
        assert len(change.unique()) == change.numel()


def test_stored_pixels_become_standard_scores_and_empty_ones_the_mean() -> None:
    rng = np.random.default_rng(0)
    for dtype, limit in ((np.uint8, 255), (np.uint16, 60_000)):
        stored = rng.integers(1, limit, (3, 2, 8, 8)).astype(dtype)
        stored[0, :, 0, 0] = 0
        stored[1, 0, 0, 0] = 0
        mean, std = [limit / 2, limit / 3], [limit / 5, limit / 4]
        found = normalise(
            torch.from_numpy(stored), torch.tensor(mean), torch.tensor(std), nodata=0
        ).numpy()
        expected = (stored - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
        expected[0, :, 0, 0] = 0
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    seven = torch.full((1, 1, 2, 2), 7, dtype=torch.uint8)
    constant = normalise(seven, torch.tensor([7.0]), torch.tensor([0.0]), nodata=0)
    assert torch.equal(constant, torch.zeros(1, 1, 2, 2))
