"""Certificates: what was proven of the splits of a snapshot, in a file beside it."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pipelines.leaks import SplitCheck
from pipelines.store import checksum
from schemas.dataset import certificate_name, snapshot_name
from schemas.errors import GeoLinkError
from schemas.storage import Location, join, storage, writing


def snapshot_checksum(dataset: Location, number: int) -> str:
    """Hash of a snapshot's file."""
    name = snapshot_name(number)
    return checksum({name: storage(dataset).read(name)})


def certify(check: SplitCheck) -> str:
    """Write into the snapshot what was proven; the certificate's name in the dataset.

    Certificates against several datasets stand beside each other; a newer one of the same kind
    takes the place of an older one.

    Raises GeoLinkError if something is shared, or the dataset cannot be written.
    """
    if not check.passed:
        raise GeoLinkError("splits that share something get no certificate")
    files, name = storage(check.dataset), certificate_name(check.snapshot)
    stated = snapshot_checksum(check.dataset, check.snapshot)
    kept: dict[str, Any] = {}
    if files.exists(name):
        with suppress(ValueError, KeyError, TypeError):
            before = json.loads(files.read(name))
            kept = before["checks"] if before["snapshot_checksum"] == stated else {}
    against = None
    if check.against:
        other, number = check.against
        against = {
            "dataset": str(other), "snapshot": number,
            "snapshot_checksum": snapshot_checksum(other, number),
        }  # fmt: skip
    kept["splits" if against is None else f"against {against['dataset']}"] = {
        "against": against,
        "buffer_m": check.buffer_m,
        "objects_that_cross_the_buffer": check.crossing,
        "chips": check.chips,
        "objects": check.objects,
        "object_parts_without_id": check.objects_without_id,
        "pairs_measured": check.pairs,
        "found": dict(sorted(check.found.items())),
        "checked": datetime.now(UTC).isoformat(timespec="seconds"),
        "geolink": version("geolink-osm"),
    }
    content = {
        "snapshot": check.snapshot, "snapshot_checksum": stated,
        "checks": dict(sorted(kept.items())),
    }  # fmt: skip
    with writing(str(join(check.dataset, name))):
        files.write(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return name
