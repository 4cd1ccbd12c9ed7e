"""Where a dataset lies: a local folder, or a prefix of an object store.

Names are relative to a location, with forward slashes. Both kinds offer the same few operations.
Two of them decide between writers: `create` succeeds once per name, and `write_group` makes many
files visible together.

Object stores are reached through obstore. Its settings are the environment variables of the
clouds' own tools (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...), so that no secret
stands in a config. It tries again by itself when a request fails on its way.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from numpy.typing import NDArray
from pydantic import AfterValidator

from schemas.errors import GeoLinkError

_PARTIAL = ".partial"
_THREADS = 8
_REMOTE_THREADS = 32


def _parse(value: object) -> object:
    if isinstance(value, str):
        return value.rstrip("/") if "://" in value else Path(value)
    return value


Location = Annotated[str | Path, AfterValidator(_parse)]
"""A folder, or the address of a prefix of an object store, such as `s3://bucket/prefix`."""


class Entry(NamedTuple):
    """A file of a storage."""

    name: str
    size: int
    modified: datetime
    """UTC."""


class Files(Protocol):
    """Files to read. Failures are OSError; a missing file is FileNotFoundError."""

    def read(self, name: str) -> bytes:
        """Content of a file."""

    def read_into(self, name: str, out: NDArray[Any]) -> tuple[int, bytes]:
        """Read the head of a file into `out`: how many bytes came, and up to 64 that follow."""


class Storage(Files, Protocol):
    """Files below a location."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def entries(self, prefix: str = "") -> list[Entry]:
        """Every finished file below a folder, by name; empty where there is no such folder."""

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right in a folder, sorted."""

    def group(self, name: str, parts: Iterable[str]) -> Files:
        """The files of a folder, those in some of its folders about to be read."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a file, durably; False if it is there with other content."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, durably and at once."""

    def write_group(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Write a folder of files, durably; `last` is there only when all the others are."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there are left out."""

    def delete_group(self, name: str, files: Iterable[Entry]) -> bool:
        """Delete a folder of the files that were listed; False if it holds others by now."""

    def touch(self, name: str) -> None:
        """Make a file as young as one that is written now. Failures are OSError."""

    def now(self) -> datetime:
        """The time by the clock that `Entry.modified` is told by, UTC."""

    def sweep(self, prefix: str) -> list[str]:
        """Remove what killed writers left unfinished in the folders of a folder; their names."""


def storage(location: Path | str) -> Storage:
    """The storage of a location.

    Raises GeoLinkError for a scheme that is not supported, or where obstore is not installed.
    """
    if isinstance(location, Path):
        return LocalStorage(location)
    if "://" not in location:
        return LocalStorage(Path(location))
    parts = urlsplit(location)
    return ObjectStorage(f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"))


def join(location: Path | str, name: str) -> Path | str:
    """The location of something below a location."""
    return location / name if isinstance(location, Path) else f"{location}/{name}"


class LocalStorage:
    """A folder of the local file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return (self.folder / name).read_bytes()

    def read_into(self, name: str, out: NDArray[Any]) -> tuple[int, bytes]:
        """Read the head of a file into `out`: how many bytes came, and up to 64 that follow."""
        with (self.folder / name).open("rb", buffering=0) as file:
            return file.readinto(out.data) or 0, file.read(64)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / name).is_file()

    def entries(self, prefix: str = "") -> list[Entry]:
        """Every finished file below a folder, by name."""
        entries = []
        # A walk passes over folders, and the loop over files, that another process removes.
        for folder, folders, names in os.walk(self.folder / prefix):
            folders[:] = [f for f in folders if _PARTIAL not in f]
            for path in (Path(folder, n) for n in names if _PARTIAL not in n):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                name = path.relative_to(self.folder).as_posix()
                modified = datetime.fromtimestamp(stat.st_mtime, UTC)
                entries.append(Entry(name, stat.st_size, modified))
        return sorted(entries)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right in a folder, sorted."""
        path = self.folder / prefix
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if p.is_dir() and _PARTIAL not in p.name)

    def group(self, name: str, parts: Iterable[str]) -> Files:
        """The files of a folder."""
        return LocalStorage(self.folder / name)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file, durably; False if it is there with other content."""
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                partial = path.with_name(path.name + _PARTIAL)
                try:
                    _write_file(partial, data)
                    os.link(partial, path)
                except FileExistsError:
                    return path.read_bytes() == data
                finally:
                    partial.unlink(missing_ok=True)
                flush(path.parent)
        return True

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, durably and at once."""
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                partial = path.with_name(path.name + _PARTIAL)
                try:
                    _write_file(partial, data)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                flush(path.parent)

    def write_group(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Write a folder of files, durably, and rename it into place."""
        final = self.folder / name
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            with locked(final.parent):
                _remove_partial(final.parent)
                # Another writer of the same files may have come first; readers may have them open.
                if final.exists() and _same_files(final, files):
                    return
                partial = final.parent / f"{final.name}{_PARTIAL}"
                try:
                    _write_files(partial, files)
                    if final.exists():
                        shutil.rmtree(final)
                    partial.rename(final)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                flush(final.parent)
                flush(final.parent.parent)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, and the folders that are empty then."""
        with writing(self.folder):
            for name in names:
                path = self.folder / name
                path.unlink(missing_ok=True)
                for parent in path.parents:
                    if parent == self.folder or not parent.is_dir() or any(parent.iterdir()):
                        break
                    parent.rmdir()

    def delete_group(self, name: str, files: Iterable[Entry]) -> bool:
        """Delete a folder of the files that were listed; False if it holds others by now."""
        folder = self.folder / name
        if not folder.is_dir():
            return True
        # The folder around it stays: another writer may be waiting for its lock.
        with writing(folder), locked(folder.parent):
            if not set(self.entries(name)) <= set(files):
                return False
            leaving = folder.with_name(folder.name + _PARTIAL)
            folder.rename(leaving)
            shutil.rmtree(leaving)
        return True

    def touch(self, name: str) -> None:
        """Make a file as young as one that is written now."""
        os.utime(self.folder / name)

    def now(self) -> datetime:
        """The time by the clock of the file system, UTC."""
        with writing(self.folder), tempfile.TemporaryFile(dir=self.folder) as probe:
            return datetime.fromtimestamp(os.fstat(probe.fileno()).st_mtime, UTC)

    def sweep(self, prefix: str) -> list[str]:
        """Remove what killed writers left half-written; folders of living writers are left."""
        removed = []
        with writing(self.folder / prefix):
            for folder in sorted((self.folder / prefix).glob("*/")):
                if next(folder.glob(f"*{_PARTIAL}"), None) is None:
                    continue
                with locked(folder, wait=False) as held:
                    removed += _remove_partial(folder) if held else []
        return [p.relative_to(self.folder).as_posix() for p in removed]


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
        with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
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
        with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
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


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder's lock against other writers; the system frees it if this process dies.

    Yields whether it is held: always, unless `wait` is false and another writer has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a GeoLinkError that names the path and the remedy."""
    remedies = {
        ENOSPC: "free some space or choose another folder",
        EDQUOT: "free some space or choose another folder",
        EROFS: "choose a folder that can be written",
        EACCES: "choose a folder that you may write",
        EPERM: "choose a folder that you may write",
    }
    try:
        yield
    except OSError as error:
        remedy = remedies.get(error.errno or 0)
        where = error.filename or path
        raise GeoLinkError(
            f"cannot write {where}: {error.strerror or error}" + (f"; {remedy}" if remedy else "")
        ) from error


def _same_files(folder: Path, files: Mapping[str, bytes]) -> bool:
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return there.keys() == files.keys() and all(
        there[name].read_bytes() == data for name, data in files.items()
    )


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a new folder and flush them. In threads: the time goes into the flushes."""
    folders = sorted({folder, *((folder / name).parent for name in files)})
    for each in folders:
        each.mkdir()
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda item: _write_file(folder / item[0], item[1]), files.items()):
            pass
        for _ in pool.map(flush, folders):
            pass


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove_partial(folder: Path) -> list[Path]:
    leftovers = sorted(folder.glob(f"*{_PARTIAL}"))
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers
