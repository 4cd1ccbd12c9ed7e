"""Only one run at a time works in a run's folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import GeoLinkError


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system frees it when the process ends, however.

    Raises GeoLinkError if another run holds it, or it cannot be made.
    """
    path = run / ".lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise GeoLinkError(f"cannot write to run folder {run}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GeoLinkError(
                f"another process is training in {run}; wait for it, or give another folder as run"
            ) from None
        except OSError as error:
            raise GeoLinkError(f"cannot lock run folder {run}: {error}") from error
        yield
