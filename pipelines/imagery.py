"""Pixels of a block: one lazy stackstac load, radiometry, masks, composite, chips."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import stackstac
import xarray as xr
from numpy.typing import NDArray
from rasterio.enums import Resampling

from pipelines.items import Scene, stac_item
from pipelines.radiometry import apply_offset
from pipelines.rasters import AssetError, GridReader, OpenFiles, is_remote, network_fault
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.layout import UNKNOWN_TIME
from schemas.sensor import Sensor

_MASK = "mask"


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

    Raises GeoLinkError if the network fails, so that the block is tried again later.
    """
    size_y = round((bounds_utm[3] - bounds_utm[1]) / gsd_m)
    size_x = round((bounds_utm[2] - bounds_utm[0]) / gsd_m)
    composite = _Composite(sensor, (size_y, size_x))
    counts: Counter[str] = Counter()
    radiometry: dict[str, str] = {}
    clipped: dict[str, int] = {}
    with closing(OpenFiles()) as files, _scheduler(scenes) as scheduler:
        assets = {a.key: a for s in scenes for a in (*s.bands, s.mask) if a}
        place = {"epsg": epsg, "bounds": bounds_utm, "resolution": gsd_m}
        shared = {"assets": assets, "files": files, "clipped": clipped}
        bands, masks = lazy_stacks(scenes, sensor, Resampling[resampling], place, shared)
        for rank, scene in enumerate(scenes):
            if composite.complete:
                break
            try:
                clouded = _clouded(masks.read(rank, scheduler), sensor)
                if not composite.wants(clouded):
                    continue
                image = bands.read(rank, scheduler)
            except AssetError as error:
                if network_fault(error.href, error):
                    raise GeoLinkError(
                        f"scene {scene.id} cannot be fetched ({error}); run the build again when "
                        "its server can be reached"
                    ) from error
                counts["scene_unreadable"] += 1
                continue
            if image is None:
                continue
            counts["pixel_out_of_range"] += sum(clipped.get(a.key, 0) for a in scene.bands)
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


@contextmanager
def _scheduler(scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    """Dask's arguments: one thread for local files, several where waiting takes the time."""
    if not any(is_remote(a.href) for s in scenes for a in s.bands):
        yield {"scheduler": "synchronous"}
        return
    # A pool of our own: dask's would go on reading from files that are closed after an error.
    with ThreadPoolExecutor(8) as pool:
        yield {"scheduler": "threads", "pool": pool}


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
class Stack:
    """A lazy stackstac array, with the items and bands that stackstac left out filled back in."""

    array: xr.DataArray | None
    """[time, band, y, x]; None: no item meets the bounds."""
    names: tuple[str, ...]
    shape: tuple[int, int]
    fill: np.unsignedinteger[Any]

    @classmethod
    def of(
        cls,
        items: list[dict[str, Any]],
        names: tuple[str, ...],
        reader: Callable[..., GridReader],
        place: Mapping[str, Any],
        resampling: Resampling,
        fill: np.unsignedinteger[Any],
    ) -> "Stack":
        """One `stackstac.stack` of all items; nothing is read yet."""
        x0, y0, x1, y1 = place["bounds"]
        shape = (round((y1 - y0) / place["resolution"]), round((x1 - x0) / place["resolution"]))
        # Items get their rank as id: scenes of two collections may share one.
        ranked = [{**item, "id": str(n)} for n, item in enumerate(items) if item["assets"]]
        if not ranked:
            return cls(None, names, shape, fill)
        array = stackstac.stack(
            ranked,
            assets=list(names),
            snap_bounds=False,
            resampling=resampling,
            chunksize=(1, 1, -1, -1),
            dtype=fill.dtype,
            fill_value=fill,
            rescale=False,
            sortby_date=False,
            xy_coords="center",
            properties=False,
            band_coords=False,
            reader=reader,
            **place,
        )
        return cls(array if array.size else None, names, shape, fill)

    def read(self, rank: int, scheduler: Mapping[str, Any]) -> NDArray[Any] | None:
        """Pixels [band, y, x] of one scene, writable; None: it does not meet the bounds."""
        if self.array is None or str(rank) not in self.array["id"].values:
            return None
        row = list(self.array["id"].values).index(str(rank))
        data = self.array.data[row].compute(**scheduler)
        present = [self.names.index(n) for n in self.array["band"].values]
        if len(present) < len(self.names):
            whole = np.full((len(self.names), *self.shape), self.fill)
            whole[present] = data
            return whole
        pixels: NDArray[Any] = np.require(data, requirements="W")
        return pixels


def lazy_stacks(
    scenes: Sequence[Scene],
    sensor: Sensor,
    resampling: Resampling,
    place: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> tuple[Stack, Stack]:
    """Lazy stackstac arrays of the scenes' bands and of their masks.

    place: stackstac's `epsg`, `bounds` (whole pixels of the grid) and `resolution`;
    shared: arguments that every `GridReader` of the load gets.
    """
    names = tuple(b.name for b in sensor.bands)
    used = frozenset(b.index for b in sensor.bands)
    reader = partial(GridReader, data_bands=used, **shared)
    images = [stac_item(s, dict(zip(names, s.bands, strict=True))) for s in scenes]
    masks = [stac_item(s, {_MASK: s.mask} if s.mask else {}) for s in scenes]
    dtype = np.dtype(sensor.dtype)
    fill = dtype.type(sensor.nodata)
    return (
        Stack.of(images, names, reader, place, resampling, fill),
        Stack.of(masks, (_MASK,), reader, place, Resampling.nearest, np.uint16(0)),
    )


def _clouded(mask: NDArray[Any] | None, sensor: Sensor) -> NDArray[np.bool_] | None:
    if mask is None or sensor.mask is None:
        return None
    # A table look-up: one pass, however many values are invalid.
    bad = np.zeros(np.iinfo(mask.dtype).max + 1, bool)
    bad[list(sensor.mask.invalid)] = True
    clouded: NDArray[np.bool_] = bad[mask[0]]
    return clouded
