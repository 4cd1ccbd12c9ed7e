"""Pins: names that keep a snapshot of a dataset from being removed by `geolink gc`.

A pin is a file `pins/<name>.json`. One of a person stays until it is removed. One of a program
expires, and is renewed while the program runs: so a program that died keeps nothing for ever.

Whoever pins writes the pin first and looks whether the snapshot is there afterwards; whoever
removes a snapshot removes it first and looks for pins afterwards, and puts it back if there is one.
So of the two one always sees the other.
"""

import getpass
import json
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from schemas.dataset import snapshot_name, snapshot_numbers
from schemas.errors import GeoLinkError
from schemas.storage import Location, join, storage, writing

LEASE = timedelta(days=7)
"""How long a pin of a program lasts without being renewed."""


class Pin(BaseModel):
    """Content of a pin's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot: Annotated[int, Field(ge=1)]
    by: str
    """Who pinned it: user and machine."""
    created: AwareDatetime
    expires: AwareDatetime | None
    """None: it stays until it is removed."""

    def holds(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires


def pin_name(name: str) -> str:
    """Where a pin lies in a dataset. Raises GeoLinkError for a name that no file can have."""
    if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) or name.startswith("."):
        raise GeoLinkError(
            f"{name!r} cannot name a pin; use letters, digits, dot, underscore and hyphen"
        )
    return f"pins/{name}.json"


def write_pin(
    dataset: Location, name: str, snapshot: int, *, lasts: timedelta | None = None
) -> Pin:
    """Pin a snapshot, or renew or move the pin of that name; `lasts`: none means for good.

    Raises GeoLinkError: no such snapshot, a bad name, or a dataset that cannot be written.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    by = f"{_user()}@{socket.gethostname()}"
    pin = Pin(snapshot=snapshot, by=by, created=now, expires=now + lasts if lasts else None)
    path, files = pin_name(name), storage(dataset)
    if not files.exists(snapshot_name(snapshot)):
        raise _missing(dataset, snapshot)
    with writing(str(join(dataset, path))):
        files.write(path, (pin.model_dump_json(indent=2) + "\n").encode())
    # It may have been removed just before the pin was there.
    if not files.exists(snapshot_name(snapshot)):
        files.delete([path])
        raise _missing(dataset, snapshot)
    return pin


def remove_pin(dataset: Location, name: str) -> bool:
    """Remove a pin; whether there was one. Raises GeoLinkError if it cannot be removed."""
    path, files = pin_name(name), storage(dataset)
    if not files.exists(path):
        return False
    with writing(str(join(dataset, path))):
        files.delete([path])
    return True


def read_pins(dataset: Location) -> dict[str, Pin]:
    """All pins of a dataset by name, expired ones too.

    Raises GeoLinkError if one cannot be read: it may keep a snapshot.
    """
    files, pins = storage(dataset), {}
    for entry in files.entries("pins"):
        if not entry.name.endswith(".json"):
            continue
        try:
            pins[entry.name[5:-5]] = Pin.model_validate(json.loads(files.read(entry.name)))
        except FileNotFoundError:  # removed since it was listed
            continue
        except (OSError, ValueError, ValidationError) as error:
            raise GeoLinkError(
                f"pin {join(dataset, entry.name)} cannot be read ({type(error).__name__}); "
                "remove it, or write it anew with `geolink pin`"
            ) from error
    return pins


def _missing(dataset: Location, snapshot: int) -> GeoLinkError:
    there = snapshot_numbers(dataset)
    shown = f"it has {', '.join(map(str, there[-5:]))}" if there else "it has none"
    return GeoLinkError(f"{dataset} has no snapshot {snapshot} to pin; {shown}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return "unknown"
