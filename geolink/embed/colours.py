"""Maps of embeddings: three principal components as colours, and k-means clusters.

Both are fitted on one sample over all areas, so that a colour means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from geolink.embed.area import Area
from geolink.embed.store import read_block
from schemas.errors import GeoLinkError

SAMPLE = 20_000
"""Patches that maps are fitted on."""
_ROUNDS = 100
_PERCENT = (1.0, 99.0)
PALETTE = (
    "4e79a7", "f28e2b", "59a14f", "e15759", "76b7b2", "edc948", "b07aa1", "9c755f", "ff9da7",
    "bab0ac", "2f4b7c", "a05195", "8cd17d", "d45087", "499894", "79706e",
)  # fmt: skip
"""Colours of clusters, RGB in hex."""


@dataclass(frozen=True, eq=False)
class Colours:
    """What turns embeddings into colours and clusters."""

    mean: NDArray[np.float64]
    """[C] of the sample."""
    axes: NDArray[np.float64]
    """[C, 3], principal components; of each the largest entry is positive."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """[3], between which colours are spread."""
    explained: tuple[float, ...]
    """Share of the variance, of each component."""
    centres: NDArray[np.float64]
    """[k, C], of clusters, by their place on the first component."""

    def rgb(self, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Colours [.., 3] of vectors [.., C], from 1 to 255: 0 is where nothing is."""
        scores = (vectors - self.mean) @ self.axes
        share = np.clip((scores - self.low) / (self.high - self.low), 0, 1)
        return (1 + np.rint(254 * share)).astype(np.uint8)

    def clusters(self, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Nearest centres [..] of vectors [.., C], counted from 1."""
        flat = vectors.reshape(-1, vectors.shape[-1]) - self.mean
        found = _nearest(flat, self.centres - self.mean)[0]
        return (found + 1).astype(np.uint8).reshape(vectors.shape[:-1])


def fit_colours(sample: NDArray[np.float32], clusters: int, seed: int) -> Colours:
    """Principal components and k-means of a sample [N, C]; the same for a seed.

    Raises GeoLinkError if there are fewer different patches than clusters, or more clusters than
    colours.
    """
    if not 2 <= clusters <= len(PALETTE):
        raise GeoLinkError(f"{clusters} clusters cannot be drawn: choose 2 to {len(PALETTE)}")
    if len(sample) < max(clusters, 4):
        raise GeoLinkError(f"{len(sample)} patches with data are too few for {clusters} clusters")
    vectors = sample.astype(np.float64)
    mean = vectors.mean(0)
    centred = vectors - mean
    values, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    scores = centred @ axes
    low, high = np.percentile(scores, _PERCENT, axis=0)
    centres = _kmeans(centred, clusters, seed) + mean
    return Colours(
        mean, axes, low, np.maximum(high, low + 1e-12),
        tuple((values[::-1][:3] / max(values.sum(), 1e-30)).tolist()),
        centres[np.argsort((centres - mean) @ axes[:, 0], kind="stable")],
    )  # fmt: skip


def _kmeans(vectors: NDArray[np.float64], clusters: int, seed: int) -> NDArray[np.float64]:
    """Lloyd's rounds from k-means++ (Arthur, Vassilvitskii 2007)."""
    rng = np.random.default_rng(seed)
    centres = vectors[[rng.integers(len(vectors))]]
    for _ in range(clusters - 1):
        far = _nearest(vectors, centres)[1]
        if far.sum() <= 0:
            raise GeoLinkError(f"all patches look alike: there are no {clusters} clusters")
        centres = np.vstack([centres, vectors[rng.choice(len(vectors), p=far / far.sum())]])
    label = np.full(len(vectors), -1)
    for _ in range(_ROUNDS):
        new, far = _nearest(vectors, centres)
        if (new == label).all():
            break
        label = new
        order = np.argsort(label, kind="stable")
        start = np.searchsorted(label[order], np.arange(clusters))
        count = np.bincount(label, minlength=clusters)
        sums = np.add.reduceat(vectors[order], np.minimum(start, len(order) - 1))
        # A cluster that is left empty begins again at the vector that is served worst.
        mean = sums / np.maximum(count, 1)[:, None]
        centres = np.where(count[:, None] > 0, mean, vectors[far.argmax()])
    return centres


def _nearest(
    vectors: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest centre of each vector, and the squared distance."""
    distance = (vectors**2).sum(1)[:, None] - 2 * vectors @ centres.T + (centres**2).sum(1)
    label = distance.argmin(1)
    return label, np.maximum(distance[np.arange(len(vectors)), label], 0)


def sample_patches(
    root: zarr.Group, areas: list[Area], name: str, seed: int
) -> NDArray[np.float32]:
    """About `SAMPLE` vectors [N, C], as many of each block where it has them."""
    blocks = [(area, block) for area in areas for block in area.blocks]
    each = -(-SAMPLE // len(blocks))
    found = []
    for area, block in blocks:
        group = root[area.name]
        assert isinstance(group, zarr.Group)
        values, there = read_block(group, name, block)
        named = xxhash.xxh3_64_intdigest(f"{area.name} {block.name}".encode())
        rng = np.random.default_rng((seed, named))
        own = values[there]
        found.append(own[np.sort(rng.permutation(len(own))[:each])])
    return np.concatenate(found)


def paint(
    root: zarr.Group, area: Area, name: str, colours: Colours
) -> Iterator[tuple[int, int, NDArray[np.uint8], NDArray[np.uint8]]]:
    """(row, column, RGB [3, y, x], clusters [1, y, x]) of an area's blocks, in patches."""
    group = root[area.name]
    assert isinstance(group, zarr.Group)
    for block in area.blocks:
        values, there = read_block(group, name, block)
        rgb = np.where(there[..., None], colours.rgb(values), 0).astype(np.uint8)
        clusters = np.where(there, colours.clusters(values), 0).astype(np.uint8)
        yield block.row, block.column, np.moveaxis(rgb, -1, 0), clusters[None]
