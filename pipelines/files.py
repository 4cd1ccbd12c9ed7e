"""Raster files: where a band lies (`Asset`), and files that stay open from read to read."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import rasterio
from rasterio.errors import RasterioError

from pipelines.remote import is_remote, local_path, public, retried

T = TypeVar("T")


@dataclass(frozen=True)
class Asset:
    """One band of one file, and where the file lies."""

    href: str
    """Path or URL."""
    index: int
    """1-based band within the file."""
    epsg: int | None
    transform: tuple[float, ...] | None
    """Six coefficients a, b, c, d, e, f of pixel to map coordinates."""
    shape: tuple[int, int] | None
    """Rows, columns."""
    sign: str = "none"
    """How the href is made readable: a `SceneSource.sign`, with `/<collection>` where it is used
    (Planetary Computer)."""

    @property
    def key(self) -> str:
        """Name of the band within a load; what `GridReader` gets as its URL."""
        return f"{self.href}#{self.index}"


def open_raster(path: str) -> Any:
    """Open a file, by a path or what `retried` gives. Raises rasterio.errors.RasterioIOError."""
    return rasterio.open(path, sharing=False)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex; read once per process for the same size and time."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class AssetError(Exception):
    """An asset that is missing, broken or of another place."""

    def __init__(self, href: str, error: Exception | str, code: str = "scene_unreadable") -> None:
        super().__init__(public(f"{href}: {error}"))
        self.href = href
        self.code = code
        """Finding to count it by."""


class OpenFiles:
    """Datasets that stay open from read to read, one per thread and file.

    Bands of one file share a dataset, so pixel-interleaved files are decoded once.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def read(self, asset: Asset, use: Callable[[Any], T]) -> T:
        """What `use` makes of a file's dataset, the calling thread's own.

        Raises as `pipelines.remote.retried` does.
        """
        key = (threading.get_ident(), asset.href, *_version(asset.href))

        def with_dataset(address: str) -> T:
            if key not in self._open:
                self._open[key] = open_raster(address)
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(key)
            return use(self._open[key])

        def forget() -> None:
            if key in self._open:
                self._open.pop(key).close()

        try:
            return retried(asset.href, asset.sign, with_dataset, forget)
        except (RasterioError, OSError):
            forget()
            raise

    def close(self) -> None:
        """Close every dataset."""
        for dataset in self._open.values():
            dataset.close()
        self._open.clear()


_MOST_OPEN = 256
_LOCAL = threading.local()


def _version(href: str) -> tuple[int, ...]:
    """What tells a local file from one that has taken its place."""
    if is_remote(href):
        return ()
    stat = local_path(href).stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextmanager
def open_files(remote: bool) -> Iterator[OpenFiles]:
    """Files for one load. Local ones stay open in their thread for the next: blocks share them."""
    if remote:
        with closing(OpenFiles()) as files:
            yield files
        return
    if not hasattr(_LOCAL, "files"):
        _LOCAL.files = OpenFiles()
    yield _LOCAL.files
