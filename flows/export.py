"""A dataset, or a part of it, written in other formats, a shard at a time.

Memory holds one shard. Every file is written at once and a shard that is finished is marked, so an
export that was stopped goes on where it was, and one that is done does nothing when run again.
`export.json` says what a folder was made from; a folder made from something else is refused.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from schemas.chips import ShardPart, take_chips
from schemas.dataset import Snapshot, SnapshotRow, read_arrays, read_info, read_snapshot
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.splits import SPLITS
from schemas.storage import Location, writing
from schemas.storage_local import LocalStorage

FORMATS = ("geotiff", "png", "geoparquet", "webdataset", "pyg", "stac")

_ODBL = (
    "The objects, labels and relations are derived from OpenStreetMap and are available under the\n"
    "Open Database License (ODbL) 1.0: https://opendatacommons.org/licenses/odbl/1-0/\n"
)

Progress = Callable[[int, int], None]
"""Called with shards done and shards to look at."""


@dataclass(frozen=True)
class ExportResult:
    """What an export did."""

    folder: Path
    snapshot: int
    formats: tuple[str, ...]
    shards: int
    chips: int
    written: int
    """Shards of a format that were written now; the others were there."""


def export(
    dataset: Location,
    folder: Path,
    formats: tuple[str, ...],
    *,
    snapshot: int | None = None,
    split: str | None = None,
    bbox: Bounds | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write chips of a dataset to a folder in some of `FORMATS`.

    split: only this one. bbox: only chips centred in it (degrees; east > 180 crosses the 180th
    meridian). limit: the first so many chips in the order of shards.

    Raises GeoLinkError: no such dataset or snapshot, nothing to export, a folder that holds
    something else or cannot be written.
    """
    _check(formats, split, bbox, limit)
    read_info(dataset)
    found = read_snapshot(dataset, snapshot)
    rows = [r for r in found.rows if r.chips and split in (None, r.split) and _meets(r, bbox)]
    selected = _selected(dataset, rows, bbox, limit)
    first = next(selected, None)
    if first is None:
        raise GeoLinkError(
            f"{dataset} has no chip to export in split {split or 'any'}"
            + (f" and bbox {list(bbox)}" if bbox else "")
            + "; `geolink info` says what it has"
        )
    _claim(folder, found, {"split": split, "bbox": list(bbox) if bbox else None, "limit": limit})
    marks = LocalStorage(folder / ".done")
    if marks.exists("stac/collection"):
        # A catalog that is there is to know of the files that are added now.
        formats = (*formats, "stac")
    writers = _writers(dataset, folder, found, formats)
    shards = chips = written = 0
    for row, picked in chain([first], selected):
        missing = [f for f in writers if f == "stac" or not marks.exists(f"{f}/{row.shard}")]
        if missing:
            arrays, _ = read_arrays(dataset, row.path)
            part = ShardPart(found.info, row, take_chips(arrays, picked))
            for name in missing:
                writers[name](part)
                marks.write(f"{name}/{row.shard}", b"")
        shards, chips, written = shards + 1, chips + len(picked), written + len(missing)
        if progress:
            progress(shards, len(rows))
    if "stac" in writers:
        from pipelines.export.stac import write_collection

        write_collection(found, folder)
        marks.write("stac/collection", b"")
    return ExportResult(folder, found.number, tuple(writers), shards, chips, written)


def _check(
    formats: tuple[str, ...], split: str | None, bbox: Bounds | None, limit: int | None
) -> None:
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        what = f"unknown format {unknown[0]!r}" if unknown else "no format given"
        raise GeoLinkError(f"{what}; known: {', '.join(FORMATS)}")
    if split not in (None, *SPLITS):
        raise GeoLinkError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if bbox and not (bbox[0] < bbox[2] and bbox[1] < bbox[3]):
        raise GeoLinkError(f"bbox {list(bbox)} has no area; give west < east and south < north")
    if limit is not None and limit < 1:
        raise GeoLinkError(f"limit {limit} is less than one chip")


def _meets(row: SnapshotRow, bbox: Bounds | None) -> bool:
    west, south, east, north = row.bounds_lonlat
    return bbox is None or any(
        west + turn <= bbox[2] and east + turn >= bbox[0] and south <= bbox[3] and north >= bbox[1]
        for turn in (-360, 0, 360)
    )


def _selected(
    dataset: Location, rows: list[SnapshotRow], bbox: Bounds | None, limit: int | None
) -> Iterator[tuple[SnapshotRow, NDArray[np.int64]]]:
    """Shards and the indices of their chips that are exported."""
    left = sum(r.chips for r in rows) if limit is None else limit
    for row in rows:
        picked = np.arange(row.chips)
        if bbox is not None:
            lon, lat = read_arrays(dataset, row.path, ["center_lonlat"])[0]["center_lonlat"].T
            # Degrees east of the western edge, whichever way the longitude is written.
            east = (lon - bbox[0]) % 360 <= bbox[2] - bbox[0]
            picked = np.flatnonzero(east & (lat >= bbox[1]) & (lat <= bbox[3]))
        picked = picked[:left]
        left -= len(picked)
        if len(picked):
            yield row, picked
        if left == 0:
            return


def _claim(folder: Path, found: Snapshot, selection: dict[str, Any]) -> None:
    """Say in `export.json` what the folder is made from, with licence and attribution beside.

    Raises GeoLinkError if it holds something else.
    """
    shards = "".join(f"{r.shard}/{r.key}/{r.split}\n" for r in found.rows)
    made_from = {
        "dataset": found.info.name,
        "snapshot": found.number,
        "shards": xxhash.xxh3_128_hexdigest(shards.encode()),
        "selection": selection,
    }
    files = LocalStorage(folder)
    with writing(folder):
        there = folder.is_dir() and any(folder.iterdir())
        if there and not files.exists("export.json"):
            raise GeoLinkError(f"{folder} is not empty and holds no export; choose a new folder")
        if files.exists("export.json") and json.loads(files.read("export.json")) != made_from:
            raise GeoLinkError(
                f"{folder} holds an export of another dataset, snapshot or selection; choose a new "
                "folder"
            )
        files.write("export.json", (json.dumps(made_from, indent=2) + "\n").encode())
    files.write("LICENSE", f"{found.info.licence}\n\n{_ODBL}".encode())
    files.write("ATTRIBUTION", "".join(f"{text}\n" for text in found.info.attribution).encode())


Writers = dict[str, Callable[[ShardPart], None]]


def _writers(dataset: Location, folder: Path, found: Snapshot, formats: tuple[str, ...]) -> Writers:
    """What writes a shard of each format, STAC last: it lists the files of the others."""
    from geolink.export.webdataset import write_webdataset
    from pipelines.export.rasters import write_geotiffs, write_labels
    from pipelines.export.tables import write_tables

    writers: Writers = {
        "geotiff": lambda part: write_geotiffs(part, folder),
        "png": lambda part: write_labels(part, folder),
        "geoparquet": lambda part: write_tables(part, folder),
        "webdataset": lambda part: write_webdataset(part, folder),
    }
    if "pyg" in formats:
        from geolink.export.pyg import write_pyg
        from geolink.reader import open_dataset

        opened = open_dataset(dataset, found.number)
        writers["pyg"] = lambda part: write_pyg(part, folder, dataset=opened)
    if "stac" in formats:
        from pipelines.export.stac import write_item

        def item(part: ShardPart) -> None:
            there = [
                f for f in FORMATS if LocalStorage(folder / ".done").exists(f"{f}/{part.shard}")
            ]
            write_item(part, folder, dataset=dataset, formats=there)

        writers["stac"] = item
    return {name: writers[name] for name in FORMATS if name in formats}
