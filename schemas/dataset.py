"""A dataset on disk: `dataset.json`, snapshots, shards, and where things lie.

Reading lives here because builders and readers share it; writing is the builders' alone.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.config import ObjectOptions, Splits
from schemas.errors import GeoLinkError
from schemas.grid import Grid
from schemas.layout import ARRAYS, SCHEMA_VERSION
from schemas.licences import Licence
from schemas.parquet import read_parquet
from schemas.sensor import Sensor
from schemas.storage import Location, join, storage
from schemas.taxonomy import Taxonomy

if TYPE_CHECKING:
    from schemas.chunks import Empty, Rows


class DatasetInfo(BaseModel):
    """`dataset.json`: what holds for every shard of a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[int, Field(description="Version of the data contract.")]
    name: str
    grid: Grid
    aligned: Annotated[
        bool,
        Field(description="Chips lie on the grid; false: imported pairs with their own bounds."),
    ]
    sensor: Sensor
    taxonomy: Taxonomy
    drop_keys: tuple[str, ...]
    keep_keys: tuple[str, ...]
    objects: ObjectOptions
    splits: Splits
    tag_encoder: str
    licences: Annotated[
        tuple[Licence, ...], Field(description="Terms of the sources that it was planned from.")
    ]

    @property
    def licence(self) -> str:
        """Licence of each source, as a line."""
        stated: dict[str, list[str]] = {}
        for n in self.licences:
            stated.setdefault(n.source, []).append(n.licence or "not stated")
        return "; ".join(f"{s}: {' and '.join(dict.fromkeys(n))}" for s, n in stated.items())

    @property
    def attribution(self) -> tuple[str, ...]:
        """Who must be named, each once."""
        return tuple(dict.fromkeys(n.attribution for n in self.licences if n.attribution))


class SnapshotRow(NamedTuple):
    """One row of a snapshot: a shard."""

    shard: str
    """Shard id."""
    path: str
    """Relative to the dataset's folder, with forward slashes."""
    key: str
    """Content key: hash of everything the shard depends on."""
    checksum: str
    """Hash of the bytes of the shard's files."""
    split: str
    chips: int
    objects: int
    edges: int
    bytes: int
    epsg: int
    bounds_lonlat: list[float]
    """west, south, east, north of the chips."""
    scenes: list[str]
    osm_timestamp: str
    """Of the extract, ISO 8601; empty where it has none."""
    pixels: list[int]
    """Valid pixels of each band."""
    pixel_sum: list[float]
    pixel_sum_squares: list[float]
    qc: dict[str, int]
    """Counts by finding, e.g. ``object_below_minimum``."""
    chip_findings: list[int]
    """Findings of each chip as bits (`schemas.findings.CHIP_FLAGS`)."""


class Snapshot(NamedTuple):
    """A published state of a dataset."""

    number: int
    rows: list[SnapshotRow]
    """By shard id."""
    vocabulary: str
    """Key of the tag vocabulary (`vocabulary_name`)."""
    info: DatasetInfo
    """What held for every shard when it was published."""


def read_info(dataset: Location) -> DatasetInfo:
    """Read `dataset.json`: the contract of the latest build.

    Raises GeoLinkError: no dataset there, unreadable, or made by a newer version.
    """
    path = join(dataset, "dataset.json")
    try:
        data = json.loads(storage(dataset).read("dataset.json"))
    except FileNotFoundError:
        raise GeoLinkError(f"{dataset} is no GeoLink dataset: it has no dataset.json") from None
    except (OSError, ValueError) as error:
        raise GeoLinkError(f"cannot read {path}: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise GeoLinkError(
            f"{dataset} was made with data schema {version}, this GeoLink reads up to "
            f"{SCHEMA_VERSION}; upgrade GeoLink"
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise GeoLinkError(
            f"{dataset} was made with data schema {version}, this GeoLink reads {SCHEMA_VERSION}; "
            "build it anew in another folder"
        )
    try:
        return DatasetInfo.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise GeoLinkError(f"{path} is damaged: {field}: {first['msg']}") from None


def snapshot_name(number: int) -> str:
    """Where snapshot `number` lies in a dataset."""
    return f"snapshots/{number:08d}.parquet"


def certificate_name(number: int) -> str:
    """Where it says what was proven of the splits of snapshot `number`."""
    return f"snapshots/{number:08d}-splits.json"


def snapshot_numbers(dataset: Location) -> list[int]:
    """Published snapshots, ascending."""
    names = (e.name for e in storage(dataset).entries("snapshots"))
    found = (re.fullmatch(r"snapshots/(\d{8})\.parquet", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def vocabulary_name(key: str) -> str:
    """Where a vocabulary lies: Parquet of every tag, id uint64 (sorted), key, value, objects."""
    return f"tags/{key}.parquet"


def tag_table_name(key: str, encoder: str) -> str:
    """Where the embeddings [V, D] float16 of a vocabulary lie, rows as in its Parquet file."""
    return f"tags/{key}-{encoder}.npy"


def read_snapshot(dataset: Location, number: int | None = None) -> Snapshot:
    """Read a snapshot; none: the latest.

    Raises GeoLinkError: there is none, it is damaged, or made by a newer version.
    """
    import pyarrow as pa

    numbers = snapshot_numbers(dataset)
    if not numbers:
        raise GeoLinkError(f"{dataset} has no snapshot yet; run `geolink build` to the end")
    if number is None:
        number = numbers[-1]
    if number not in numbers:
        raise GeoLinkError(
            f"{dataset} has no snapshot {number}; it has {numbers[0]} to {numbers[-1]}"
        )
    path = join(dataset, snapshot_name(number))
    try:
        table = read_parquet(storage(dataset).read(snapshot_name(number)))
        meta = json.loads(table.schema.metadata[b"geolink"])
        if meta["schema_version"] > SCHEMA_VERSION:
            raise GeoLinkError(
                f"{path} was made with data schema {meta['schema_version']}, this GeoLink reads "
                f"up to {SCHEMA_VERSION}; upgrade GeoLink"
            )
        records = table.select(list(SnapshotRow._fields)).to_pylist()
        rows = [SnapshotRow(**{**r, "qc": dict(r["qc"])}) for r in records]
        return Snapshot(number, rows, meta["vocabulary"], DatasetInfo.model_validate(meta["info"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise GeoLinkError(f"snapshot {path} is damaged: {error}") from error


def read_arrays(
    dataset: Location,
    path: str,
    names: Iterable[str] | None = None,
    chips: "Rows" = None,
    empty: "Empty" = np.empty,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays of a dataset's shard (none: all of the layout), and the shard's attributes.

    Every chunk's checksum is tested while it is read. chips: first and last + 1 of those whose
    pixels and labels of pixels and patches are read (the arrays stored in chunks of chips; of all
    others the whole comes). empty: where memory for these comes from.

    Raises GeoLinkError naming shard and array if one is missing or damaged, NetworkFault.
    """
    from schemas.chunks import chunk_names, read_array

    shard = join(dataset, path)
    names = list(ARRAYS if names is None else names)
    try:
        group = json.loads(storage(dataset).read(f"{path}/zarr.json"))
        attributes, metas = group["attributes"], group["consolidated_metadata"]["metadata"]
        part = {name: chips for name in names if ARRAYS[name].chunk_chips is not None}
        chunks = [
            key for n in names for key in chunk_names(f"{path}/{n}", metas[n], part.get(n))
        ]  # fmt: skip
        files = storage(dataset).ahead(chunks)
    except (OSError, ValueError, KeyError) as error:
        raise GeoLinkError(f"shard {shard} is missing or damaged: {_named(error)}") from error
    arrays = {}
    for name in names:
        try:
            own = empty if name in part else np.empty
            arrays[name] = read_array(files, f"{path}/{name}", metas[name], part.get(name), own)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise GeoLinkError(
                f"shard {shard}: array {name!r} is missing or damaged ({_named(error)}); "
                "remove the shard's folder and build the dataset again"
            ) from error
    return arrays, attributes


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
