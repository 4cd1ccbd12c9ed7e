"""Pixels of a block: each scene loaded once by stackstac, radiometry, masks, composite, chips."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import stackstac
from numpy.typing import NDArray
from rasterio.enums import Resampling

from pipelines.items import Scene, stac_item
from pipelines.radiometry import apply_offset
from pipelines.rasters import Asset, AssetError, GridReader, OpenFiles
from pipelines.remote import is_remote
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
    resampling: str = "bilinear",
) -> BlockImage:
    """Composite of scenes, in their order, over bounds that are whole pixels.

    A pixel comes from the first scene where it is valid; where no scene is, from the first that
    has data, and is then not valid. A later scene is read only while it can still give a pixel.
    A scene with an unreadable file is left out and counted.

    Raises GeoLinkError if the network fails or denies access, so that the block is tried again.
    """
    place = {"epsg": epsg, "bounds": bounds_utm, "resolution": gsd_m}
    x0, y0, x1, y1 = bounds_utm
    composite = _Composite(sensor, (round((y1 - y0) / gsd_m), round((x1 - x0) / gsd_m)))
    counts: Counter[str] = Counter()
    radiometry: dict[str, str] = {}
    with _loader(scenes, sensor, place, Resampling[resampling]) as loader:
        for rank, scene in enumerate(scenes):
            if composite.complete:
                break
            try:
                clouded = loader.clouded(scene)
                if not composite.wants(clouded):
                    continue
                image = loader.image(scene)
            except AssetError:
                counts["scene_unreadable"] += 1
                continue
            if image is None:
                continue
            counts["pixel_out_of_range"] += sum(loader.clipped.get(a.key, 0) for a in scene.bands)
            apply_offset(image, scene.offset, sensor.nodata)
            if composite.add(rank, image, clouded):
                radiometry[scene.id] = f"{scene.offset:+d}: {scene.offset_reason}"
    if not composite.used:
        counts["block_without_scene"] += 1
    used = [scenes[rank] for rank in composite.used]
    return BlockImage(
        composite.image,
        composite.valid,
        composite.scene_index(),
        [s.id for s in used],
        np.array([s.seconds for s in used], np.int64),
        {k: n for k, n in counts.items() if n},
        radiometry,
    )


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


class _Composite:
    """What has been put together so far."""

    def __init__(self, sensor: Sensor, shape: tuple[int, int]) -> None:
        self.sensor = sensor
        self.image = np.full((len(sensor.bands), *shape), sensor.nodata, sensor.dtype)
        self.valid = np.zeros(shape, bool)
        self.rank = np.full(shape, -1, np.int32)
        self.used: list[int] = []

    @property
    def complete(self) -> bool:
        return bool(self.valid.all())

    def wants(self, clouded: NDArray[np.bool_] | None) -> bool:
        """Whether a scene with this mask can give a pixel."""
        if clouded is None:
            return True
        return bool(((self.rank < 0) | ~(self.valid | clouded)).any())

    def add(self, rank: int, image: NDArray[Any], clouded: NDArray[np.bool_] | None) -> bool:
        """Take from a scene what is missing; whether it gave a pixel."""
        has_data, full = self._data(image)
        good = full if clouded is None else full & ~clouded
        take = (good & ~self.valid) | (has_data & (self.rank < 0))
        if not take.any():
            return False
        if not self.used:
            self.image = image
        else:
            np.copyto(self.image, image, where=take)
        self.rank[take] = rank
        self.valid |= good
        self.used.append(rank)
        return True

    def _data(self, image: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Pixels with data in some band, and those that count as having it in all.

        8-bit images use 0 for black too, so there a pixel is empty only if every band is.
        """
        filled = image != self.sensor.nodata
        has_data = filled.any(axis=0)
        return has_data, has_data if image.dtype == np.uint8 else filled.all(axis=0)

    def scene_index(self) -> NDArray[np.int16]:
        """[y, x] position in `used`; a scene overwritten everywhere keeps its place."""
        table = np.full(max(self.used, default=0) + 2, -1, np.int16)
        table[self.used] = np.arange(len(self.used))
        index: NDArray[np.int16] = table[self.rank]
        return index


@dataclass(frozen=True)
class _Loader:
    """Reads scenes onto a block, each by one lazy `stackstac.stack` that is then computed."""

    sensor: Sensor
    place: dict[str, Any]
    """stackstac's `epsg`, `bounds` (whole pixels of the grid) and `resolution`."""
    resampling: Resampling
    reader: Callable[..., GridReader]
    scheduler: Mapping[str, Any]
    """Dask's arguments."""
    clipped: dict[str, int]
    """By `Asset.key`: pixels that did not fit the storage type."""

    def image(self, scene: Scene) -> NDArray[Any] | None:
        """Pixels [band, y, x], writable; None: the scene does not meet the block."""
        names = (b.name for b in self.sensor.bands)
        fill = np.dtype(self.sensor.dtype).type(self.sensor.nodata)
        return self._load(scene, dict(zip(names, scene.bands)), self.resampling, fill)

    def clouded(self, scene: Scene) -> NDArray[np.bool_] | None:
        """[y, x] where the scene's mask marks pixels as invalid; None: it has no mask here."""
        if self.sensor.mask is None or scene.mask is None:
            return None
        mask = self._load(scene, {"mask": scene.mask}, Resampling.nearest, np.uint16(0))
        if mask is None:
            return None
        # A table look-up: one pass, however many values are invalid.
        bad = np.zeros(np.iinfo(mask.dtype).max + 1, bool)
        bad[list(self.sensor.mask.invalid)] = True
        clouded: NDArray[np.bool_] = bad[mask[0]]
        return clouded

    def _load(
        self,
        scene: Scene,
        assets: Mapping[str, Asset],
        resampling: Resampling,
        fill: np.unsignedinteger[Any],
    ) -> NDArray[Any] | None:
        array = stackstac.stack(
            [stac_item(scene, assets)],
            assets=list(assets),
            snap_bounds=False,
            resampling=resampling,
            chunksize=(1, 1, -1, -1),
            dtype=fill.dtype,
            fill_value=fill,
            rescale=False,
            xy_coords="center",
            properties=False,
            band_coords=False,
            reader=self.reader,
            **self.place,
        )
        # stackstac leaves out items and bands that do not meet the bounds.
        if not array.size:
            return None
        # Nothing to fuse: a task a band.
        data = array.data.compute(optimize_graph=False, **self.scheduler)[0]
        present = [list(assets).index(name) for name in array["band"].values]
        if len(present) == len(assets):
            pixels: NDArray[Any] = np.require(data, requirements="W")
            return pixels
        whole = np.full((len(assets), *data.shape[1:]), fill)
        whole[present] = data
        return whole


@contextmanager
def _loader(
    scenes: Sequence[Scene], sensor: Sensor, place: dict[str, Any], resampling: Resampling
) -> Iterator[_Loader]:
    """A loader whose files are open until the end of the block."""
    clipped: dict[str, int] = {}
    remote = any(is_remote(a.href) for s in scenes for a in s.bands)
    with ExitStack() as stack:
        files = stack.enter_context(closing(OpenFiles()))
        scheduler: dict[str, Any] = {"scheduler": "synchronous"}
        if remote:
            # Several threads where waiting takes the time. The pool is ours, and ends before the
            # files are closed: dask's own would go on reading from them after an error.
            pool = stack.enter_context(ThreadPoolExecutor(8))
            scheduler = {"scheduler": "threads", "pool": pool}
        reader = partial(
            GridReader,
            assets={a.key: a for s in scenes for a in (*s.bands, s.mask) if a},
            data_bands=frozenset(b.index for b in sensor.bands),
            files=files,
            clipped=clipped,
        )
        yield _Loader(sensor, place, resampling, reader, scheduler, clipped)
