"""Files of a local folder: written whole and durably, under locks that die with their holder."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from schemas.storage import Entry, Files, writing

_PARTIAL = ".partial"
_THREADS = 8


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

    def ahead(self, names: Iterable[str]) -> Files:
        """All files: those of a folder need no preparation."""
        return self

    def create(self, name: str, data: bytes) -> bool:
        """Create a file, durably; False if it is there with other content."""
        with self._whole(name, data) as (partial, path):
            try:
                os.link(partial, path)
            except FileExistsError:
                return path.read_bytes() == data
        return True

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, durably and at once."""
        with self._whole(name, data) as (partial, path):
            partial.replace(path)

    @contextmanager
    def _whole(self, name: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """A file that is whole under a passing name, and the name it is to get; then durable.

        Its folder is locked meanwhile.
        """
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent):
                partial = path.with_name(path.name + _PARTIAL)
                try:
                    _write_file(partial, data)
                    yield partial, path
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


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_files(folder: Path, files: Mapping[str, bytes]) -> bool:
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return there.keys() == files.keys() and all(
        there[name].read_bytes() == data for name, data in files.items()
    )


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a new folder and flush them. In threads: the time goes into the flushes."""
    folders: dict[Path, dict[Path, bytes]] = {folder: {}}
    for name, data in files.items():
        path = folder / name
        folders.setdefault(path.parent, {})[path] = data
    for each in sorted(folders):
        each.mkdir()

    def fill(each: Path) -> None:
        for path, data in folders[each].items():
            _write_file(path, data)
        flush(each)

    # A thread takes a folder at a time: handing over every file costs as much as writing it.
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(fill, folders):
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
