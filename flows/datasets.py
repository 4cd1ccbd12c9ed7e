"""Prefect flows that build and refresh datasets; each task is one call into `pipelines`."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task

from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.load import load_config
from schemas.sources import Region


@task
def load(config: Path) -> DatasetConfig:
    """Read a dataset config."""
    return load_config(config, DatasetConfig)


@task
def build(config: DatasetConfig, workers: int, within: Region | None = None) -> dict[str, Any]:
    """Build what is missing and publish; fails if a shard failed, so that Prefect shows it."""
    from pipelines.build import build_dataset as run
    from pipelines.places import region_geometry

    area = None if within is None else region_geometry(within)
    result = run(config, workers=workers, within=area)
    if result.failed:
        shard, message = next(iter(result.failed.items()))
        raise GeoLinkError(
            f"{len(result.failed)} shards failed, nothing was published; first {shard}: {message}"
        )
    return {
        "dataset": str(result.dataset),
        "snapshot": result.snapshot,
        "published": result.published,
        "built": result.built,
        "unchanged": result.unchanged,
        "findings": result.qc,
    }


@flow(name="build-dataset")
def build_dataset(config: Path, workers: int = 1) -> dict[str, Any]:
    """Build a dataset from a config file, or bring it up to date."""
    summary = build(load(config), workers)
    get_run_logger().info("snapshot %s of %s", summary["snapshot"], summary["dataset"])
    return summary


@flow(name="refresh-region")
def refresh_region(config: Path, region: Region, workers: int = 1) -> dict[str, Any]:
    """Rebuild what changed in a part of a dataset's region; the rest stays as it is."""
    summary = build(load(config), workers, region)
    get_run_logger().info("snapshot %s of %s", summary["snapshot"], summary["dataset"])
    return summary
