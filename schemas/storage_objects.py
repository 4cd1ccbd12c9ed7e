"""Files of a bucket, through obstore, which tries again by itself when a request fails."""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from schemas.errors import GeoLinkError
from schemas.storage import Entry, Files

_THREADS = 32


class ObjectStorage:
    """A prefix of a bucket (Amazon S3 and its kin, Google Cloud, Azure)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix

    def read(self, name: str) -> bytes:
        """Content of a file."""
        import obstore

        with self._failing(name):
            return bytes(obstore.get(_bucket(self.bucket), self._path(name)).bytes())

    def read_into(self, name: str, out: NDArray[Any]) -> tuple[int, bytes]:
        """Read the head of a file into `out`: how many bytes came, and up to 64 that follow."""
        return _copy(self.read(name), out)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        import obstore

        try:
            with self._failing(name):
                obstore.head(_bucket(self.bucket), self._path(name))
        except FileNotFoundError:
            return False
        return True

    def entries(self, prefix: str = "") -> list[Entry]:
        """Every file below a folder, by name."""
        import obstore

        root = self._path("")
        with self._failing(prefix):
            pages = obstore.list(_bucket(self.bucket), self._path(prefix))
            metas = [meta for page in pages for meta in page]
        # Listed by prefix of the text: "shards/1" would find "shards/10" too.
        below = self._path(prefix).rstrip("/") + "/" if self._path(prefix) else ""
        return sorted(
            Entry(m["path"].removeprefix(f"{root}/"), m["size"], m["last_modified"])
            for m in metas
            if m["path"].startswith(below)
        )

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right in a folder, sorted."""
        import obstore

        with self._failing(prefix):
            found = obstore.list_with_delimiter(_bucket(self.bucket), self._path(prefix))
        return sorted(p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"])

    def group(self, name: str, parts: Iterable[str]) -> Files:
        """The files in some folders of a folder, read side by side."""
        below = tuple(f"{name}/{part}/" for part in parts)
        names = [e.name for e in self.entries(name) if e.name.startswith(below)]
        names.append(f"{name}/zarr.json")
        with ThreadPoolExecutor(_THREADS) as pool:
            contents = list(pool.map(self.read, names))
        plain = (n.removeprefix(f"{name}/") for n in names)
        return MemoryFiles(dict(zip(plain, contents, strict=True)))

    def create(self, name: str, data: bytes) -> bool:
        """Create a file; False if it is there with other content.

        A put whose answer was lost is tried again, and then finds its own file.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            with self._failing(name):
                obstore.put(_bucket(self.bucket), self._path(name), data, mode="create")
        except AlreadyExistsError:
            return self.read(name) == data
        return True

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""
        import obstore

        with self._failing(name):
            obstore.put(_bucket(self.bucket), self._path(name), data)

    def write_group(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Write a folder of files, `last` when all the others are there."""
        first = {f"{name}/{file}": data for file, data in files.items() if file != last}
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda item: self.write(*item), first.items()):
                pass
        self.write(f"{name}/{last}", files[last])

    def delete(self, names: Iterable[str]) -> None:
        """Delete files."""
        import obstore

        paths = [self._path(name) for name in names]
        with self._failing(""):
            for start in range(0, len(paths), 1000):
                obstore.delete(_bucket(self.bucket), paths[start : start + 1000])

    def delete_group(self, name: str, files: Iterable[Entry]) -> bool:
        """Delete a folder of the files that were listed; False if it holds others by now."""
        there = self.entries(name)
        if not set(there) <= set(files):
            return False
        self.delete(e.name for e in there)
        return True

    def touch(self, name: str) -> None:
        """Make a file as young as one that is written now: write it again."""
        self.write(name, self.read(name))

    def now(self) -> datetime:
        """The time by the clock of the store, UTC."""
        import obstore

        probe = f"clock-{uuid.uuid4().hex}"
        self.write(probe, b"")
        try:
            with self._failing(probe):
                meta = obstore.head(_bucket(self.bucket), self._path(probe))
        finally:
            self.delete([probe])
        return meta["last_modified"]

    def sweep(self, prefix: str) -> list[str]:
        """Nothing: files of an object store are whole, and unfinished folders are written over."""
        return []

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.prefix, name) if part)

    @contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.bucket}/{self._path(name)} does not exist") from None
        except BaseError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{self.bucket}/{self._path(name)}: {reason}") from error


class MemoryFiles:
    """Files in memory."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(f"{name} is missing")
        return self.files[name]

    def read_into(self, name: str, out: NDArray[Any]) -> tuple[int, bytes]:
        return _copy(self.read(name), out)


def _copy(data: bytes, out: NDArray[Any]) -> tuple[int, bytes]:
    view = memoryview(out.data).cast("B")
    count = min(len(data), len(view))
    view[:count] = data[:count]
    return count, data[count : count + 64]


@lru_cache(maxsize=16)
def _bucket(address: str) -> Any:
    """The client of a bucket, shared by all that reads from it in this process."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise GeoLinkError(
            f"{address} needs the package obstore; install geolink-osm[remote]"
        ) from error
    scheme = address.partition("://")[0]
    if scheme not in ("s3", "gs", "az"):
        raise GeoLinkError(f"{address}: {scheme}:// is not supported; use s3://, gs:// or az://")
    retry: Any = {
        "max_retries": 8,
        "retry_timeout": timedelta(minutes=5),
        "backoff": {"init_backoff": timedelta(milliseconds=200), "base": 2,
                    "max_backoff": timedelta(seconds=15)},
    }  # fmt: skip
    # A local endpoint (MinIO and the like) is often plain http; the user names it explicitly.
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
    options: Any = {"timeout": timedelta(seconds=120), "allow_http": endpoint.startswith("http://")}
    return from_url(address, client_options=options, retry_config=retry)
