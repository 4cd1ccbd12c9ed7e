"""Pixels of a block: scenes looked at, ranked, read, composited, cut to chips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling

from pipelines.composite import Composite, Layers, Part, median
from pipelines.datum import datum_change
from pipelines.files import AssetError
from pipelines.footprints import block_outline, coverage
from pipelines.items import Scene
from pipelines.loader import Loader, Place, open_loader
from pipelines.radiometry import apply_offset, image_findings
from pipelines.select import DEFAULT_RULES, Considered, Look, Rules, ranked
from schemas.grid import Bounds
from schemas.layout import UNKNOWN_TIME
from schemas.sensor import Sensor


@dataclass(frozen=True)
class BlockImage:
    """Pixels of a block, y down."""

    image: NDArray[Any]
    """[band, y, x] in the sensor's storage type, offsets applied."""
    valid: NDArray[np.bool_]
    """[y, x]: neither without data nor masked."""
    scene: NDArray[np.int16]
    """[y, x] index into `scenes`; -1: no data."""
    scenes: list[str]
    """Ids of the scenes that gave pixels, in the order of compositing."""
    times: NDArray[np.int64]
    """[scene] seconds since 1970 UTC."""
    counts: dict[str, int]
    """Findings."""
    radiometry: dict[str, str]
    """By scene: the offset that was added, and why."""
    considered: list[dict[str, object]]
    """Every candidate in the plan's order: scene, chosen, rank, cloud, coverage, reason."""


class ChipImages(NamedTuple):
    """Chips cut from a block, N = side**2 in raster order (north-west first)."""

    image: NDArray[Any]
    """[N, band, y, x]"""
    valid: NDArray[np.float32]
    """[N] share of valid pixels."""
    scene: NDArray[np.int16]
    """[N] scene with most pixels; -1: none."""
    time: NDArray[np.int64]
    """[N] acquisition of that scene."""


def load_block(
    scenes: Sequence[Scene],
    sensor: Sensor,
    epsg: int,
    bounds_utm: Bounds,
    gsd_m: float,
    rules: Rules = DEFAULT_RULES,
    *,
    patch: int = 1,
    date: int | None = None,
) -> BlockImage:
    """Composite of a block's candidates over bounds that are whole pixels.

    Their masks are looked at first: that gives the order, and rules some out (`select.ranked`).
    Then images are read, best first, and only while they can still give a pixel, except for a
    median, which takes all. patch: side in pixels, for `best-patch`. date: only the scenes of the
    day of that rank. A scene with an unreadable file is left out and counted.

    Raises GeoLinkError if the network fails or denies access, so that the block is tried again.
    """
    place = Place(epsg, bounds_utm, gsd_m)
    with open_loader(scenes, sensor, place, Resampling[rules.resampling]) as loader:
        block = _Block(scenes, loader)
        order = block.ranked(rules, date)
        if rules.composite == "median":
            made = block.median(order)
        else:
            made = block.layers(order, patch if rules.composite == "best-patch" else None)
    return block.result(order, made)


class _Block:
    """One block's work, and what is to be said of it."""

    def __init__(self, scenes: Sequence[Scene], loader: Loader) -> None:
        self.scenes = scenes
        self.loader = loader
        self.counts = loader.counts
        self.records = [Considered(s.id, None, None) for s in scenes]
        self.looks: dict[int, Look] = {}
        self.checked: set[int] = set()
        self.outline = block_outline(loader.place.epsg, loader.place.bounds_utm)

    def ranked(self, rules: Rules, date: int | None) -> list[int]:
        """Positions of the scenes to composite, best first."""
        for i, scene in enumerate(self.scenes):
            try:
                look = self.loader.look(scene)
            except AssetError as error:
                self._reject(i, error)
                continue
            if look is not None:
                self.looks[i] = look
                self.records[i].cloud, self.records[i].coverage = look.cloud, look.coverage
                if not look.data.any():
                    self._empty(i)
        longitude = float(self.outline.centroid.x)
        return ranked(self.scenes, self.records, self.looks, rules, longitude, date)

    def layers(self, order: Sequence[int], patch: int | None) -> Composite:
        """Scenes laid one under another."""
        layers = Layers(self.loader.sensor, self.loader.place.shape, patch)
        for rank, i in enumerate(order):
            if layers.complete:
                break
            try:
                clouded = self.loader.clouded(self.scenes[i])
                if not layers.wants(clouded):
                    continue
                image = self._image(i, clouded)
            except AssetError as error:
                self._reject(i, error)
                continue
            if image is not None:
                layers.add(rank, image, clouded)
        return layers.result()

    def median(self, order: Sequence[int]) -> Composite:
        """Median of all scenes; once more without those that turn out to be unreadable."""
        sensor, place = self.loader.sensor, self.loader.place

        def read(rows: slice) -> list[Part | None]:
            return [self._part(i, place.rows(rows)) for i in order]

        while True:
            rejected = {i for i in order if self.records[i].codes}
            made = median(sensor, place.shape, len(order), read)
            if rejected == {i for i in order if self.records[i].codes}:
                return made

    def _part(self, i: int, place: Place) -> Part | None:
        if self.records[i].rank is None:
            return None
        try:
            clouded = self.loader.clouded(self.scenes[i], place)
            image = self._image(i, clouded, place)
        except AssetError as error:
            self._reject(i, error)
            return None
        return None if image is None else (image, clouded)

    def _image(
        self, i: int, clouded: NDArray[np.bool_] | None, place: Place | None = None
    ) -> NDArray[Any] | None:
        """Pixels of a scene with its offset applied; looked at for what contradicts its item."""
        scene, nodata = self.scenes[i], self.loader.sensor.nodata
        image = self.loader.image(scene, place)
        if image is None or not (image != nodata).any():
            if place is None:
                self._empty(i)
            return None
        if i not in self.checked:
            self.checked.add(i)
            self.records[i].codes += image_findings(
                self.loader.sensor, scene.offset, image, clouded
            )
        apply_offset(image, scene.offset, nodata)
        return image

    def _reject(self, i: int, error: AssetError) -> None:
        self.records[i].codes.append(error.code)
        self.records[i].reason = str(error)
        self.records[i].rank = None

    def _empty(self, i: int) -> None:
        """A scene without a pixel here; whether its footprint says so."""
        self.records[i].reason = "has no data in the block"
        self.records[i].rank = None
        (share,) = coverage(np.array([self.scenes[i].footprint]), self.outline)
        if share >= _CLEARLY_COVERED:
            self.records[i].codes.append("scene_footprint_wrong")
            self.records[i].reason += f", though its footprint covers {share:.0%} of it"

    def result(self, order: Sequence[int], made: Composite) -> BlockImage:
        """The block with what is to be said of it."""
        place = self.loader.place
        pixels = np.bincount(made.rank.ravel() + 1, minlength=len(order) + 1)
        used = np.flatnonzero(pixels[1:]).tolist()
        index = np.full(len(order) + 1, -1, np.int16)
        index[used] = np.arange(len(used))
        scenes = [self.scenes[order[rank]] for rank in used]
        for rank, i in enumerate(order):
            record = self.records[i]
            if rank in used:
                record.chosen, record.reason = True, "gave pixels"
                epsg = self.scenes[i].bands[0].epsg or place.epsg
                change = datum_change(epsg, place.epsg, place.bounds_utm)
                if change:
                    record.codes.append("scene_datum_changed")
                    record.reason += f", moved by {change.text}"
            elif not record.reason:
                record.reason = "nothing was missing that it could give"
        self.counts.update(code for record in self.records for code in record.codes)
        if not used:
            self.counts["block_without_scene"] += 1
        return BlockImage(
            made.image,
            made.valid,
            index[made.rank],
            [s.id for s in scenes],
            np.array([s.seconds for s in scenes], np.int64),
            {k: n for k, n in self.counts.items() if n},
            {s.id: f"{s.offset:+d}: {s.offset_reason}" for s in scenes},
            [record.record() for record in self.records],
        )


_CLEARLY_COVERED = 0.05
"""Share of a block: footprints are drawn roughly."""


def cut_chips(block: BlockImage, side: int, size: int) -> ChipImages:
    """Cut a block of `side` x `side` chips of `size` pixels."""
    bands = len(block.image)
    n = side * side
    image = block.image.reshape(bands, side, size, side, size).transpose(1, 3, 0, 2, 4)
    valid = _per_chip(block.valid, side, size)
    votes = np.stack(
        [np.zeros(n, np.int64)]
        + [_per_chip(block.scene == k, side, size) for k in range(len(block.scenes))]
    )
    # The row of zeros stands for "none" and wins only where no scene has a pixel.
    scene = votes.argmax(axis=0) - 1
    times = np.append(block.times, UNKNOWN_TIME)
    return ChipImages(
        np.ascontiguousarray(image).reshape(n, bands, size, size),
        (valid / (size * size)).astype(np.float32),
        scene.astype(np.int16),
        times[scene],
    )


def _per_chip(flags: NDArray[np.bool_], side: int, size: int) -> NDArray[np.int64]:
    """Number of set pixels of each chip [N]."""
    counts = np.count_nonzero(flags.reshape(side, size, side, size), axis=3).sum(axis=1)
    flat: NDArray[np.int64] = counts.reshape(-1)
    return flat
