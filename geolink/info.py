"""What a path is: a dataset, a shard, a checkpoint or a run, in figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from geolink.reader import Dataset, open_dataset, read_shard_at
from schemas.errors import GeoLinkError
from schemas.layout import validate
from schemas.storage import Location, storage


def describe(path: Location, snapshot: int | None = None) -> dict[str, Any]:
    """Name, counts, sizes and licence of a dataset, shard, checkpoint or run.

    Raises GeoLinkError if the path is none of these, or is damaged.
    """
    if storage(path).exists("dataset.json"):
        return _dataset(open_dataset(path, snapshot))
    if isinstance(path, str):
        raise GeoLinkError(f"there is no dataset in {path}")
    if path.suffix == ".zarr" and path.is_dir():
        return _shard(path)
    if (path / "model.safetensors").exists() or any(path.glob("*/model.safetensors")):
        from geolink.checkpoint import describe_checkpoint

        return describe_checkpoint(path)
    what = "does not exist" if not path.exists() else "is neither"
    raise GeoLinkError(f"{path} {what}: give a dataset, shard (.zarr), checkpoint or run folder")


def _dataset(dataset: Dataset) -> dict[str, Any]:
    info, rows = dataset.info, dataset.rows
    findings: Counter[str] = Counter()
    for row in rows:
        findings.update(row.qc)
    bounds = [r.bounds_lonlat for r in rows if r.chips]
    low, high = (
        [min(b[i] for b in bounds) for i in (0, 1)],
        [max(b[i] for b in bounds) for i in (2, 3)],
    )
    return {
        "dataset": info.name,
        "path": str(dataset.path),
        "snapshot": dataset.snapshot,
        "schema_version": info.schema_version,
        "sensor": f"{info.sensor.name}: {', '.join(b.name for b in info.sensor.bands)}",
        "grid": f"{info.grid.size} px at {info.grid.gsd_m:g} m, patches of {info.grid.patch} px",
        "bounds_lonlat": [round(v, 5) for v in (*low, *high)],
        "shards": sum(1 for r in rows if r.chips),
        "chips": {s: sum(r.chips for r in rows if r.split == s) for s in ("train", "val", "test")},
        "objects": sum(r.objects for r in rows),
        "edges": sum(r.edges for r in rows),
        "distinct_tags": len(dataset.vocabulary),
        "scenes": len({s for r in rows for s in r.scenes}),
        "osm_timestamp": ", ".join(sorted({r.osm_timestamp for r in rows if r.osm_timestamp})),
        "megabytes": sum(r.bytes for r in rows) / 1e6,
        "findings": dict(sorted(findings.items())),
        "licence": info.licence,
        "attribution": "; ".join(info.attribution),
    }


def _shard(path: Path) -> dict[str, Any]:
    arrays, attributes = read_shard_at(path)
    sizes = validate(arrays)
    return {
        "shard": str(path),
        **{
            name: n
            for name, n in sizes.items()
            if name not in ("word", "bound", "lonlat", "anchor", "xy", "ends")
        },
        "megabytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6,
        **{k: json.dumps(v) for k, v in attributes.items()},
    }
