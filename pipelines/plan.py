"""What to build: config -> shards -> content keys -> difference to the latest snapshot."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import xxhash
from numpy.typing import NDArray
from platformdirs import user_cache_path
from shapely.geometry.base import BaseGeometry

from pipelines.items import Scene
from pipelines.osm import (
    EMPTY_DIGEST,
    Extract,
    age_findings,
    block_digests,
    check_reach,
    extract_of,
    no_object,
)
from pipelines.pairs import PairShard, plan_pairs
from pipelines.places import region_geometry
from pipelines.region import BlockPlan, plan_blocks, search_boxes
from pipelines.registration import reach_px
from pipelines.sampling import sample_blocks
from pipelines.scenes import find_scenes
from pipelines.select import Choice, Rules, SceneIndex, choose
from schemas.config import DatasetConfig, Registration
from schemas.dataset import DatasetInfo
from schemas.errors import GeoLinkError
from schemas.grid import Block, Bounds, block_bounds, to_lonlat
from schemas.layout import SCHEMA_VERSION, UNKNOWN_TIME
from schemas.licences import NO_TERMS, OSM, Licence, distinct, licence_findings
from schemas.sources import DROP_KEYS
from schemas.splits import Split
from schemas.storage import Location

STAGES = {
    "scenes": 2, "objects": 2, "tags": 1, "relations": 1, "anchors": 1, "correspondence": 1,
    "labels": 1, "statistics": 1, "checks": 1, "store": 4,
}  # fmt: skip
"""Version of each stage's output. Raise it when the bytes change: shards are then built anew."""


@dataclass(frozen=True)
class BlockSource:
    """Inputs of a shard on the grid."""

    block: Block
    chips: NDArray[np.bool_]
    scenes: tuple[Scene, ...]
    """Candidates, best metadata first."""
    rules: Rules
    min_valid: float
    parquet: Path
    date: int | None = None
    """Rank of the day among the block's; None: days are mixed."""


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to build one shard: small and picklable."""

    dataset: Location
    info: DatasetInfo
    shard: str
    key: str
    """Content key: hash of `made_from`."""
    made_from: dict[str, Any]
    """Everything the shard depends on: digests of the contract's parts, stages, inputs."""
    split: Split
    osm_timestamp: str
    source: BlockSource | PairShard
    counts: dict[str, int]
    registration: Registration = "keep"


@dataclass(frozen=True)
class Plan:
    """All shards of a dataset, in order of shard id."""

    info: DatasetInfo
    tasks: list[ShardTask]
    extract: Extract | None
    choices: dict[str, list[Choice]]
    """By shard: every scene considered, and why it was or was not chosen."""
    region: BaseGeometry | None
    skipped: dict[str, int]
    """Inputs left out before any shard was planned, by reason."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """Which inputs those are, by reason, where that is known."""


def make_plan(config: DatasetConfig, *, within: BaseGeometry | None = None) -> Plan:
    """Plan a dataset, or the part of it whose shards meet `within` (degrees).

    Raises GeoLinkError for anything wrong with region, scenes, extract or pairs.
    """
    if config.pairs is not None:
        return _plan_pairs(config, config.pairs)
    assert config.region
    assert config.scenes
    assert config.osm
    region = region_geometry(config.region)
    blocks, named = plan_blocks(config.region, config.grid, config.splits)
    sensor, taxonomy = config.resolved_sensor(), config.resolved_taxonomy()
    extract = extract_of(config.osm, config.region, cache_folder(config))
    skipped = {code: len(about) for code, about in named.items()}
    if config.region.sample is not None:
        blocks, short = sample_blocks(blocks, config.region.sample, config.grid, extract, taxonomy)
        skipped |= short
    boxes = search_boxes(config.grid, blocks)
    check_reach(extract, boxes, region)
    place = shapely.union_all([shapely.box(*box) for box in boxes])
    scenes, without = find_scenes(config.scenes, place.bounds, sensor, place)
    times = [s.seconds for s in scenes if not s.problem and s.seconds != UNKNOWN_TIME]
    until = datetime.fromtimestamp(max(times), UTC) if times else config.scenes.end
    skipped |= without | extract.counts | age_findings(extract, config.osm.max_age_days, until)
    if within is not None:
        blocks = [b for b in blocks if within.intersects(_footprint(config, b))]
    info = _info(config, [s.licence for s in scenes if not s.problem])
    skipped |= licence_findings(info.licences)
    margin = margin_m(info, config.registration)
    digests = block_digests(extract, [lonlat_bounds(config, b.block, margin) for b in blocks])
    if set(digests) == {EMPTY_DIGEST}:
        raise GeoLinkError(no_object(extract, region))
    contract, index = _contract(info), SceneIndex.of(scenes)
    tasks, choices = [], {}
    for plan, digest in zip(blocks, digests, strict=True):
        bounds = block_bounds(config.grid, plan.block)
        found = choose(index, plan.block.epsg, bounds, config.scenes)
        choices[plan.block.name] = found.choices
        tasks += _block_tasks(config, info, contract, extract, plan, digest, found.scenes)
    return Plan(info, tasks, extract, choices, region, skipped, named)


def _block_tasks(
    config: DatasetConfig,
    info: DatasetInfo,
    contract: dict[str, str],
    extract: Extract,
    plan: BlockPlan,
    digest: str,
    scenes: tuple[Scene, ...],
) -> list[ShardTask]:
    """A block's shard; where several dates are asked for, one for the day of each rank."""
    assert config.scenes
    rules = Rules.of(config.scenes)
    counts = {"chip_near_other_split": plan.near_other_split} if plan.near_other_split else {}
    if digest == EMPTY_DIGEST:
        counts["shard_without_osm"] = 1
    tasks = []
    for date in range(rules.dates) if rules.dates > 1 else [None]:
        made_from = {
            "contract": contract,
            "stages": STAGES,
            "inputs": {
                "block": plan.block.name,
                "chips": np.packbits(plan.chips).tobytes().hex(),
                "scenes": [s.identity() for s in scenes],
                "rules": rules._asdict(),
                "date": date,
                "min_valid": config.min_valid,
                "registration": config.registration,
                "osm": digest,
                "counts": counts,
            },
        }
        source = BlockSource(
            plan.block, plan.chips, scenes, rules, config.min_valid, extract.parquet, date
        )
        name = f"{plan.block.name}-d{date}" if date else plan.block.name
        tasks.append(
            ShardTask(
                config.dataset, info, name, content_key(made_from), made_from, plan.split,
                extract.osm_timestamp, source, counts, config.registration,
            )
        )  # fmt: skip
    return tasks


def _plan_pairs(config: DatasetConfig, folder: Path) -> Plan:
    info = _info(config, [Licence(source="pairs", licence="")])
    shards, skipped = plan_pairs(folder, config.grid, config.splits)
    contract, tasks = _contract(info), []
    for shard in shards:
        inputs = {
            "pairs": list(shard.digests),
            "min_valid": config.min_valid,
            "registration": config.registration,
        }
        made_from = {"contract": contract, "stages": STAGES, "inputs": inputs}
        tasks.append(
            ShardTask(
                config.dataset, info, shard.name, content_key(made_from), made_from, shard.split,
                "", shard, {}, config.registration,
            )
        )  # fmt: skip
    return Plan(info, tasks, None, {}, None, skipped | licence_findings(info.licences))


def cache_folder(config: DatasetConfig) -> Path:
    """Where converted extracts are kept."""
    return config.cache or user_cache_path("geolink")


def lonlat_bounds(config: DatasetConfig, block: Block, margin_m: float) -> Bounds:
    """Bounds of a block in degrees, widened by a margin in metres."""
    x0, y0, x1, y1 = block_bounds(config.grid, block)
    west, south, east, north = to_lonlat(block.epsg).transform_bounds(
        x0 - margin_m, y0 - margin_m, x1 + margin_m, y1 + margin_m, densify_pts=21
    )
    return (west, south, east, north)


def margin_m(info: DatasetInfo, registration: Registration) -> float:
    """How far outside a block an object can still be drawn in it.

    Half the widest drawn line, and the largest move where objects are moved onto the image.
    """
    widths = [w for c in info.taxonomy.classes for w in (c.width_m or 0.0, *c.widths.values())]
    reach = reach_px(info.grid.size) * info.grid.gsd_m if registration == "correct" else 0.0
    return max(widths, default=0.0) / 2 + reach


def _footprint(config: DatasetConfig, plan: BlockPlan) -> BaseGeometry:
    return shapely.box(*lonlat_bounds(config, plan.block, 0.0))


def _info(config: DatasetConfig, images: list[Licence]) -> DatasetInfo:
    stated = [
        n.model_copy(update={"licence": config.licence})
        if config.licence and n.licence.lower() in NO_TERMS
        else n
        for n in images
    ]
    return DatasetInfo(
        schema_version=SCHEMA_VERSION,
        name=config.name,
        grid=config.grid,
        aligned=config.pairs is None,
        sensor=config.resolved_sensor(),
        taxonomy=config.resolved_taxonomy(),
        drop_keys=config.osm.drop_keys if config.osm else DROP_KEYS,
        keep_keys=config.osm.keep_keys if config.osm else (),
        objects=config.objects,
        splits=config.splits,
        tag_encoder=config.tag_encoder,
        licences=distinct([OSM, *stated]),
    )


def content_key(made_from: dict[str, Any]) -> str:
    """Hash of everything a shard depends on."""
    return xxhash.xxh3_128_hexdigest(json.dumps(made_from, sort_keys=True).encode())


def _contract(info: DatasetInfo) -> dict[str, str]:
    """Digest of each part of the contract that a shard's bytes depend on."""
    outside = {"name", "splits", "tag_encoder", "licences"}
    parts = info.model_dump(mode="json", exclude=outside)
    return {
        name: xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())
        for name, value in parts.items()
    }
