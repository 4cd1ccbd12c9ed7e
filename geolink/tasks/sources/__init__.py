"""Labelled images: what lies at a place, and who reads it. `open_data` picks by what lies there.

One module a layout. Files are read through a `ReadPixels` that is handed in, so that formats which
need rasterio stay out of this layer. May import `schemas` and the rest of `geolink` but `cli`.
"""

from __future__ import annotations

from pathlib import Path

from geolink.tasks.contracts import ReadPixels, TaskData
from geolink.tasks.sources.files import read_pixels
from geolink.tasks.sources.folder import open_folder
from geolink.tasks.sources.masks import holds_masks, open_masks
from geolink.tasks.sources.npz import open_npz
from geolink.tasks.sources.pairs import holds_pairs, open_pairs
from geolink.tasks.sources.shards import open_shards
from geolink.tasks.sources.zones import holds_zones, open_zones
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig


def open_data(config: TaskConfig, read: ReadPixels = read_pixels) -> TaskData:
    """The labelled images at `config.data`, as its task needs them.

    read: reads image files. Raises GeoLinkError: nothing there, or as the source does.
    """
    if not isinstance(config.data, Path) or (config.data / "dataset.json").exists():
        return open_shards(config)
    if config.data.suffix == ".npz":
        return open_npz(config)
    if holds_zones(config.data):
        return open_zones(config, read)
    if not config.data.is_dir():
        raise GeoLinkError(f"there are no data {config.data}")
    # Whatever else lies there, what is missing to a pair is said to who asks for change.
    if config.task == "change" or holds_pairs(config.data):
        return open_pairs(config, read)
    if holds_masks(config.data):
        return open_masks(config, read)
    return open_folder(config, read)
