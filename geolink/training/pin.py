"""The pins that keep a run's snapshots while it trains."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

from schemas.errors import GeoLinkError
from schemas.pins import LEASE, remove_pin, write_pin
from schemas.storage import Location

_RENEW_S = 3600.0


class RunPin:
    """A pin of each dataset, named after the run's folder; renewed while the run goes on.

    It is removed when the run is finished. One of a run that was stopped or died lasts a week, in
    which the run can go on. One of the run's processes holds it. A dataset
    that cannot be written is not pinned: `note` says so.
    """

    def __init__(
        self, snapshots: list[tuple[Location, int]], run: Path, *, held: bool = True
    ) -> None:
        place = f"{socket.gethostname()}:{run.resolve()}"
        self.name = f"run-{hashlib.blake2b(place.encode(), digest_size=8).hexdigest()}"
        self.snapshots, self._held = snapshots, held
        self.note = ""
        self._write()

    def renew(self) -> None:
        """Renew it if an hour has passed."""
        if not self.note and time.monotonic() - self._written > _RENEW_S:
            self._write()

    def remove(self) -> None:
        """Remove it: the run needs the snapshot no longer."""
        if self._held and not self.note:
            for dataset, snapshot in self.snapshots:
                try:
                    remove_pin(dataset, self.name)
                except GeoLinkError as error:
                    self.note = f"the pin of snapshot {snapshot} was left: {error}"

    def _write(self) -> None:
        self._written = time.monotonic()
        if not self._held:
            return
        for dataset, snapshot in self.snapshots:
            try:
                write_pin(dataset, self.name, snapshot, lasts=LEASE)
            except GeoLinkError as error:
                self.note = f"snapshot {snapshot} is not pinned, gc may remove it: {error}"
