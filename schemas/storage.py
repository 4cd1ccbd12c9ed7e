"""Where a dataset lies: a local folder, or a prefix of an object store.

Names are relative to a location, with forward slashes. Both kinds offer the same few operations.
Two of them decide between writers: `create` succeeds once per name, and `write_group` makes many
files visible together.

Object stores are reached through obstore. Its settings are the environment variables of the
clouds' own tools (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...), so that no secret
stands in a config. It tries again by itself when a request fails on its way.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from numpy.typing import NDArray
from pydantic import AfterValidator

from schemas.errors import GeoLinkError


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
    """Files to read. Failures are OSError, a missing file is FileNotFoundError; a server that does
    not answer is NetworkFault.
    """

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

    def ahead(self, names: Iterable[str]) -> Files:
        """Some files that are about to be read: remote ones come side by side."""

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
    from schemas.storage_local import LocalStorage
    from schemas.storage_objects import ObjectStorage

    if isinstance(location, Path) or "://" not in location:
        return LocalStorage(Path(location))
    parts = urlsplit(location)
    return ObjectStorage(f"{parts.scheme}://{parts.netloc}", parts.path.strip("/"))


def join(location: Path | str, name: str) -> Path | str:
    """The location of something below a location."""
    return location / name if isinstance(location, Path) else f"{location}/{name}"


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
