"""Files of a bucket, through obstore.

obstore tries a request again that fails on its way or meets an error of the server, and goes on
where the body of a file is cut. What it does not try again is tried here: a listing that is cut.
Every request may be repeated: files are written whole, and `create` knows its own file again.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

from numpy.typing import NDArray

from schemas.errors import GeoLinkError, NetworkFault
from schemas.storage import Entry, Files

T = TypeVar("T")

_THREADS = 32
_TRIES = 4
_FIRST_WAIT_S = 0.5
_PASSING = re.compile(r"error sending request|body error|timed out|status code: (408|429|5\d\d)")


class ObjectStorage:
    """A prefix of a bucket (Amazon S3 and its kin, Google Cloud, Azure)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix

    def read(self, name: str) -> bytes:
        """Content of a file."""
        import obstore

        return self._ask(name, lambda bucket, path: bytes(obstore.get(bucket, path).bytes()))

    def read_into(self, name: str, out: NDArray[Any]) -> tuple[int, bytes]:
        """Read the head of a file into `out`: how many bytes came, and up to 64 that follow."""
        return _copy(self.read(name), out)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        import obstore

        try:
            self._ask(name, obstore.head)
        except FileNotFoundError:
            return False
        return True

    def entries(self, prefix: str = "") -> list[Entry]:
        """Every file below a folder, by name."""
        import obstore

        root = self._path("")
        metas = self._ask(prefix, lambda bucket, path: list(chain(*obstore.list(bucket, path))))
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

        found = self._ask(prefix, obstore.list_with_delimiter)
        return sorted(p.rstrip("/").rpartition("/")[2] for p in found["common_prefixes"])

    def ahead(self, names: Iterable[str]) -> Files:
        """Some files, read side by side."""
        names = list(names)
        with ThreadPoolExecutor(_THREADS) as pool:
            contents = pool.map(self._read_or_none, names)
            found = zip(names, contents, strict=True)
            return MemoryFiles({name: data for name, data in found if data is not None})

    def _read_or_none(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Create a file; False if it is there with other content.

        A put whose answer was lost is tried again, and then finds its own file.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        while True:
            try:
                self._put(name, lambda b, path: obstore.put(b, path, data, mode="create"))
            except AlreadyExistsError:
                try:
                    return self.read(name) == data
                except FileNotFoundError:
                    # The other writer was about to, and then did not; or it was deleted since.
                    time.sleep(_FIRST_WAIT_S)
                    continue
            return True

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""
        import obstore

        self._put(name, lambda bucket, path: obstore.put(bucket, path, data))

    def write_group(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Write a folder of files, `last` when all the others are there."""
        first = {f"{name}/{file}": data for file, data in files.items() if file != last}
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda item: self.write(*item), first.items()):
                pass
        self.write(f"{name}/{last}", files[last])

    def delete(self, names: Iterable[str]) -> None:
        """Delete files."""
        paths = [self._path(name) for name in names]
        for start in range(0, len(paths), 1000):
            self._delete(paths[start : start + 1000])

    def _delete(self, paths: list[str]) -> None:
        import obstore

        self._ask("", lambda bucket, _: obstore.delete(bucket, paths))

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
            modified: datetime = self._ask(probe, obstore.head)["last_modified"]
        finally:
            self.delete([probe])
        return modified

    def sweep(self, prefix: str) -> list[str]:
        """Nothing: files of an object store are whole, and unfinished folders are written over."""
        return []

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self.prefix, name) if part)

    def _put(self, name: str, request: Callable[[Any, str], object]) -> None:
        try:
            self._ask(name, request)
        except FileNotFoundError:
            raise OSError(f"there is no bucket {self.bucket}; create it first") from None

    def _ask(self, name: str, request: Callable[[Any, str], T]) -> T:
        """What a request of the bucket gives, for the path of a file."""
        from obstore.exceptions import AlreadyExistsError, BaseError

        path, attempt = self._path(name), 0
        while True:
            try:
                return request(_bucket(self.bucket), path)
            except AlreadyExistsError:
                raise
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.bucket}/{path} does not exist") from None
            except BaseError as error:
                reason = str(error).strip().splitlines()[0]
                if not _PASSING.search(reason):
                    raise OSError(f"{self.bucket}/{path}: {reason}") from error
                attempt += 1
                # After so many tries of obstore's own, ours would be the same again.
                if attempt == _TRIES or "retries" in reason:
                    raise NetworkFault(
                        f"{self.bucket}/{path} cannot be reached ({reason}); run the same command "
                        "again when its server answers"
                    ) from error
            time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))


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
        "max_retries": 10,
        "retry_timeout": timedelta(minutes=4),
        "backoff": {"init_backoff": timedelta(milliseconds=200), "base": 2,
                    "max_backoff": timedelta(seconds=15)},
    }  # fmt: skip
    # A local endpoint (MinIO and the like) is often plain http; the user names it explicitly.
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
    options: Any = {"timeout": timedelta(seconds=120), "allow_http": endpoint.startswith("http://")}
    return from_url(address, client_options=options, retry_config=retry)
