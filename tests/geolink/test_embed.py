"""Embeddings of areas: windows that fade into each other, values that are kept, colours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from geolink.embed.area import Area, Block, cut_blocks, dataset_areas
from geolink.embed.colours import fit_colours
from geolink.embed.store import to_int8
from geolink.embed.windows import Lattice, embed_block, read_block
from geolink.reader import open_dataset, read_shard
from geolink.tasks.contracts import Imagery
from schemas.errors import GeoLinkError
from schemas.grid import unpack_chip
from tests.shards import make_dataset

CPU = torch.device("cpu")
P = 4


def area_of(pixels: Any, side: int = 100, nodata: int = 0) -> Area:
    imagery = Imagery(("a", "b", "c"), (None,) * 3, "uint8", nodata, pixels.shape[1:], 1.0)
    return Area(
        "raster", {}, 0.0, 0.0, (1.0, 1.0), pixels.shape[1:], P, imagery,
        cut_blocks(pixels.shape[1:], P, side), side,
        lambda y, x, height, width: pixels[:, y : y + height, x : x + width],
    )  # fmt: skip


def looks_around(images: torch.Tensor) -> torch.Tensor:
    """Tokens that depend on the patch, on its place in the window and on the whole window."""
    patches = torch.nn.functional.avg_pool2d(images.float(), P)
    n = patches.shape[-1]
    place = torch.arange(n * n).view(1, n * n, 1).expand(len(images), -1, 1).float()
    whole = patches.flatten(1).std(1)[:, None, None].expand(-1, n * n, 1)
    return torch.cat([patches.flatten(2).transpose(1, 2), place, whole], 2)


def embed_all(area: Area, lattice: Lattice) -> tuple[Any, Any]:
    rows, columns = area.patches
    out, there = np.zeros((rows, columns, 5)), np.zeros((rows, columns), bool)
    for block in area.blocks:
        part = np.s_[
            block.row : block.row + block.rows, block.column : block.column + block.columns
        ]
        pixels = read_block(area, block, lattice)
        out[part], there[part] = embed_block(pixels, area, block, lattice, looks_around, CPU)
    return out, there


@pytest.fixture(scope="module")
def pixels() -> Any:
    return np.random.default_rng(0).integers(1, 255, (3, 101, 83), np.uint8)


@pytest.mark.parametrize("overlap", [0, 1, 3, 4])
def test_how_an_area_is_cut_into_blocks_leaves_no_trace(pixels: Any, overlap: int) -> None:
    lattice = Lattice(8, overlap, 3)
    whole, _ = embed_all(area_of(pixels), lattice)
    for side in (5, 8, 13):
        cut, _ = embed_all(area_of(pixels, side), lattice)
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-4)


def test_a_token_is_the_mean_of_its_windows_weighted_by_their_edges(pixels: Any) -> None:
    lattice = Lattice(8, 4, 64)
    found, _ = embed_all(area_of(pixels[:, :48, :48]), lattice)
    total, weight = np.zeros((12, 12, 5)), np.zeros((12, 12, 1))
    ramp = np.array([0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125])
    for y in (0, 4):
        for x in (0, 4):
            window = pixels[None, :, y * P : (y + 8) * P, x * P : (x + 8) * P]
            tokens = looks_around(torch.from_numpy(window)).view(8, 8, 5).numpy()
            own = np.outer(ramp, ramp)[..., None]
            total[y : y + 8, x : x + 8] += tokens * own
            weight[y : y + 8, x : x + 8] += own
    np.testing.assert_allclose(found, total / weight, rtol=1e-5)
    assert np.allclose(weight[4:8, 4:8], 1)


@given(st.integers(2, 30).flatmap(lambda g: st.tuples(st.just(g), st.integers(0, g // 2))),
       st.integers(1, 200), st.data())  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_every_patch_lies_in_a_window_of_its_block(
    sizes: tuple[int, int], count: int, data: Any
) -> None:
    lattice = Lattice(*sizes, 1)
    patch = data.draw(st.integers(0, count - 1))
    mine = [n for n in range(300) if n * lattice.stride <= patch < n * lattice.stride + sizes[0]]
    last = -(-max(count - sizes[0], 0) // lattice.stride)
    assert list(lattice.over(patch, patch + 1, count)) == [n for n in mine if n <= last]
    assert [n for n in mine if n <= last]


def test_no_seam_shows_where_windows_meet() -> None:
    """A smooth scene: neighbouring patches differ no more across a window's border than within."""
    y, x = np.mgrid[:256, :256]
    scene = np.stack([120 + 100 * np.sin((x + n * y) / 60) for n in (0, 1, 2)]).astype(np.uint8)

    def centred(images: torch.Tensor) -> torch.Tensor:
        """A patch relative to its window's mean: what differs from window to window."""
        patches = torch.nn.functional.avg_pool2d(images.float(), P)
        mean = patches.mean((2, 3), keepdim=True)
        return (patches - mean).flatten(2).transpose(1, 2)

    def steps(overlap: int) -> tuple[float, float]:
        """Largest step between neighbours where a window begins, and anywhere else."""
        lattice = Lattice(16, overlap, 64)
        area = area_of(scene)
        block = area.blocks[0]
        found, _ = embed_block(read_block(area, block, lattice), area, block, lattice, centred, CPU)
        step = np.abs(np.diff(found, axis=1)).mean((0, 2))
        at = np.arange(lattice.stride, 64, lattice.stride) - 1
        return float(step[at].max()), float(np.delete(step, at).max())

    border, within = steps(0)
    assert border > 5 * within
    border, within = steps(8)
    assert border < 1.1 * within


def test_patches_without_data_are_not_there_and_their_windows_not_encoded() -> None:
    pixels = np.full((3, 64, 64), 9, np.uint8)
    pixels[:, :, 32:] = 0
    seen = []

    def count(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return looks_around(images)

    area, lattice = area_of(pixels), Lattice(4, 0, 64)
    block = area.blocks[0]
    _, there = embed_block(read_block(area, block, lattice), area, block, lattice, count, CPU)
    assert there[:, :8].all()
    assert not there[:, 8:].any()
    assert sum(seen) == 8


def test_pixels_are_read_across_chips_and_shards(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "d", shards=3, chips=13))
    (area,) = dataset_areas(dataset, 8)
    size = dataset.info.grid.size
    x0, y1 = area.west, area.north
    whole = np.zeros((3, *area.shape), np.uint8)
    for row in dataset.rows:
        shard = read_shard(dataset, row)
        for image, packed, bounds in zip(shard["image"], shard["chip_id"], shard["bounds"]):
            assert unpack_chip(packed).size == size
            x, y = round((bounds[0] - x0) / 10), round((y1 - bounds[3]) / 10)
            whole[:, y : y + size, x : x + size] = image
    np.testing.assert_array_equal(area.read(0, 0, *area.shape), whole)
    np.testing.assert_array_equal(area.read(20, 100, 71, 83), whole[:, 20:91, 100:183])
    assert [b.column for b in area.blocks] == [0, 16, 32]


@given(arrays(np.float32, (5, 7), elements=st.floats(-1e4, 1e4, width=32)))
@settings(max_examples=50, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(values: Any) -> None:
    stored, scale = to_int8(values)
    error = np.abs(stored.astype(np.float64) * scale[:, None] - values)
    assert (error <= scale[:, None] * 0.5000001 + 1e-30).all()


def test_colours_are_principal_components_and_clusters_are_those_that_are_there() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 10, (4, 6))
    label = rng.integers(0, 4, 800)
    vectors = (centres[label] + rng.normal(0, 0.1, (800, 6))).astype(np.float32)
    colours = fit_colours(vectors, 4, seed=0)
    found = colours.clusters(vectors)
    assert {len(set(found[label == n])) for n in range(4)} == {1}
    assert len(set(found.tolist())) == 4
    _, _, axes = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((colours.axes * axes[:3].T).sum(0)), 1, atol=1e-4)
    rgb = colours.rgb(vectors)
    assert (rgb.min(), rgb.max()) == (1, 255)
    again = fit_colours(vectors, 4, seed=0)
    np.testing.assert_array_equal(again.centres, colours.centres)


@pytest.mark.parametrize(("clusters", "message"), [(1, "cannot be drawn"), (3, "look alike")])
def test_clusters_that_cannot_be_are_told(clusters: int, message: str) -> None:
    with pytest.raises(GeoLinkError, match=message):
        fit_colours(np.ones((50, 4), np.float32), clusters, 0)


def test_images_that_were_imported_one_by_one_have_no_map(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "d", shards=1))
    imported = replace(dataset, info=dataset.info.model_copy(update={"aligned": False}))
    with pytest.raises(GeoLinkError, match="no common lattice"):
        dataset_areas(imported, 8)


def test_windows_overlap_by_half_at_most() -> None:
    with pytest.raises(GeoLinkError, match="choose 0 to 4"):
        Lattice(8, 5, 1)


def test_a_block_beyond_the_last_patch_is_smaller() -> None:
    assert [b[1:5] for b in cut_blocks((21, 9), 4, 4)] == [(0, 0, 4, 3), (4, 0, 2, 3)]
    assert isinstance(cut_blocks((4, 4), 4, 1)[0], Block)
