"""A sample of a region's chips, spread evenly over strata, by place alone.

Every chip has a rank: a seeded hash of its id. Of each stratum the chips of lowest rank are kept,
so that the choice is the same in every build, and a chip chosen in a large region is also chosen
in each smaller one with the same strata. Strata come from the converted extract, which is read
once, a few row groups at a time, however large it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipelines.features import project_features
from pipelines.osm import Extract
from pipelines.ragged import ranks
from pipelines.region import BlockPlan
from schemas.grid import Grid, block_bounds, block_chips, pack_chips, to_lonlat, to_utm
from schemas.layout import Kind
from schemas.sources import Sampling
from schemas.taxonomy import Taxonomy

_ROW_GROUPS = 8
"""Of the extract, read at a time: about 80,000 features."""
_BOX = ["xmin", "ymin", "xmax", "ymax"]


@dataclass(frozen=True)
class _Zone:
    """Candidate chips of one UTM zone."""

    epsg: int
    key: NDArray[np.int64]
    """[Z] column << 32 | row, ascending."""
    chip: NDArray[np.int64]
    """[Z] which candidate each is."""
    lonlat: tuple[float, float, float, float]
    """Box of degrees around them; west > east across the antimeridian."""

    def find(self, column: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Candidates at columns and rows; -1 where there is none."""
        key = (column << 32) | row
        at = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        return np.where(self.key[at] == key, self.chip[at], -1)


def sample_blocks(
    plans: list[BlockPlan], sample: Sampling, grid: Grid, extract: Extract, taxonomy: Taxonomy
) -> tuple[list[BlockPlan], dict[str, int]]:
    """Blocks with only the chips of a sample, without those that have none left; and findings.

    Strata share the chips evenly; what a stratum lacks is shared by the others. `land-use`: the
    class whose polygons cover most of the chip, or none. `osm-density`: fifths of the chips by the
    number of features centred in them; chips with the same number are in the same stratum.
    """
    block = np.repeat(np.arange(len(plans)), [int(p.chips.sum()) for p in plans])
    position = np.concatenate([np.flatnonzero(p.chips) for p in plans])
    ids = np.concatenate([_ids(grid, p) for p in plans])
    if sample.by == "place":
        stratum = np.zeros(len(ids), np.int64)
    elif sample.by == "land-use":
        stratum = _land_use(extract, _zones(grid, plans), grid, taxonomy, len(ids))
    else:
        count = objects_per_chip(extract, _zones(grid, plans), grid, len(ids))
        stratum = np.searchsorted(np.quantile(count, [0.2, 0.4, 0.6, 0.8]), count)
    kept = choose_evenly(stratum, seeded_rank(sample.seed, ids), ids, sample.chips)
    masks = [np.zeros_like(p.chips) for p in plans]
    for b, at in zip(block[kept].tolist(), position[kept].tolist()):
        masks[b][at] = True
    sampled = [replace(p, chips=m) for p, m in zip(plans, masks, strict=True) if m.any()]
    short = sample.chips - len(kept)
    return sampled, {"sample_short": short} if short > 0 else {}


def _ids(grid: Grid, plan: BlockPlan) -> NDArray[np.uint64]:
    chips = block_chips(grid, plan.block)
    return pack_chips(plan.block.epsg, grid, chips.cols[plan.chips], chips.rows[plan.chips])


def seeded_rank(seed: int, ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pseudo-random numbers uint64 [C] of packed chip ids [C, 2]: the finaliser of SplitMix64.

    (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.)
    """
    number = np.full(len(ids), seed % 2**64, np.uint64)
    for word in ids.T:
        number = (number ^ word) + np.uint64(0x9E3779B97F4A7C15)
        number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        number = number ^ (number >> np.uint64(31))
    return number


def choose_evenly(
    stratum: NDArray[np.int64], rank: NDArray[np.uint64], ids: NDArray[np.uint64], chips: int
) -> NDArray[np.int64]:
    """Positions of the chips to keep, ascending: the first of each stratum, then the second, ...

    Within a stratum by rank, then id; chips that are left over go to the lowest strata.
    """
    order = np.lexsort([ids[:, 1], ids[:, 0], rank, stratum])
    _, sizes = np.unique(stratum, return_counts=True)
    turn = ranks(sizes.astype(np.int64))
    kept: NDArray[np.int64] = np.sort(order[np.lexsort([stratum[order], turn])][:chips])
    return kept


def _zones(grid: Grid, plans: list[BlockPlan]) -> list[_Zone]:
    """Candidates by zone; candidates are numbered in order of plans and of chips in them."""
    first = np.cumsum([0, *(int(p.chips.sum()) for p in plans)])
    zones = []
    for epsg in sorted({p.block.epsg for p in plans}):
        of = [i for i, p in enumerate(plans) if p.block.epsg == epsg]
        tail = np.concatenate([_ids(grid, plans[i])[:, 1] for i in of]).astype(np.int64)
        number = np.concatenate([np.arange(first[i], first[i + 1]) for i in of])
        order = np.argsort(tail)
        bounds = np.array([block_bounds(grid, plans[i].block) for i in of])
        low, high = bounds[:, :2].min(axis=0).tolist(), bounds[:, 2:].max(axis=0).tolist()
        box = to_lonlat(epsg).transform_bounds(low[0], low[1], high[0], high[1], densify_pts=21)
        zones.append(_Zone(epsg, tail[order], number[order], box))
    return zones


def objects_per_chip(
    extract: Extract, zones: list[_Zone], grid: Grid, chips: int
) -> NDArray[np.int64]:
    """Features whose bounding box is centred in each candidate [C]."""
    table = _sum_over_features(extract, _BOX, _centred, zones, grid.chip_m)
    count = np.zeros(chips, np.int64)
    count[table["chip"].to_numpy()] = table["amount"].to_numpy()
    return count


def _land_use(
    extract: Extract, zones: list[_Zone], grid: Grid, taxonomy: Taxonomy, chips: int
) -> NDArray[np.int64]:
    """Class with the largest area of polygons in each candidate [C]; 0: no polygon."""
    columns = ["geometry", "osm", "tags", *_BOX]
    table = _sum_over_features(extract, columns, _covered, zones, grid.chip_m, taxonomy)
    # The largest last; of equal ones the lowest class.
    table = table.sort_values(["chip", "amount", "group"], ascending=[True, True, False])
    stratum = np.zeros(chips, np.int64)
    stratum[table["chip"].to_numpy()] = table["group"].to_numpy()
    return stratum


def _sum_over_features(
    extract: Extract, columns: list[str], amounts: Callable[..., pd.DataFrame], *arguments: Any
) -> pd.DataFrame:
    """Sum what `amounts` finds in every part of an extract, by chip and group.

    The extract of a country does not fit into memory; its row groups are read and measured a few
    at a time by Dask, with GeoPandas where geometry is asked for, and only sums are kept.
    """
    import dask.dataframe
    import dask_geopandas

    read = dask_geopandas if "geometry" in columns else dask.dataframe
    frame = read.read_parquet(
        extract.parquet, columns=columns, split_row_groups=_ROW_GROUPS, index=False
    )
    meta = pd.DataFrame({"chip": [0], "group": [0], "amount": [0.0]}).iloc[:0]
    parts = frame.map_partitions(amounts, *arguments, meta=meta)
    total = parts.groupby(["chip", "group"])["amount"].sum()
    summed: pd.DataFrame = total.compute(scheduler="threads").reset_index()
    return summed.sort_values(["chip", "group"])


def _table(chip: Any, group: Any, amount: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "chip": np.concatenate([np.empty(0, np.int64), *chip]),
            "group": np.concatenate([np.empty(0, np.int64), *group]),
            "amount": np.concatenate([np.empty(0), *amount]),
        }
    )


def _near(frame: pd.DataFrame, zone: _Zone) -> pd.DataFrame:
    """Features whose box meets that of a zone's candidates."""
    west, south, east, north = zone.lonlat
    x0, x1 = frame["xmax"] >= west, frame["xmin"] <= east
    meets = (x0 & x1) if west <= east else (x0 | x1)
    return frame[meets & (frame["ymax"] >= south) & (frame["ymin"] <= north)]


def _centred(frame: pd.DataFrame, zones: list[_Zone], chip_m: float) -> pd.DataFrame:
    """One for each feature, at the chip in which its box is centred."""
    found = []
    for zone in zones:
        box = _near(frame, zone)[_BOX].to_numpy()
        x, y = to_utm(zone.epsg).transform((box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2)
        xy = np.stack([x, y], axis=1)
        column, row = np.floor(xy[np.isfinite(xy).all(axis=1)] / chip_m).astype(np.int64).T
        chip = zone.find(column, row)
        found.append(chip[chip >= 0])
    chip = np.concatenate(found)
    return _table([chip], [np.zeros_like(chip)], [np.ones(len(chip))])


def _covered(
    frame: pd.DataFrame, zones: list[_Zone], chip_m: float, taxonomy: Taxonomy
) -> pd.DataFrame:
    """Square metres of each classified polygon, part by part, in each chip."""
    chips, groups, amounts = [], [], []
    for zone in zones:
        near = _near(frame, zone)
        near = near[shapely.get_dimensions(near["geometry"].to_numpy()) == 2]
        if not len(near):
            continue
        features = project_features(
            near["geometry"].to_numpy(), near["osm"].to_numpy(),
            pa.array(near["tags"], pa.list_(pa.string())), zone.epsg, taxonomy,
        )  # fmt: skip
        area = (features.kind == Kind.POLYGON) & (features.osm_class > 0)
        chip, of, amount = _areas(features.geometry[area], zone, chip_m)
        chips.append(chip)
        groups.append(features.osm_class[area][of].astype(np.int64))
        amounts.append(amount)
    return _table(chips, groups, amounts)


def _areas(
    polygons: NDArray[np.object_], zone: _Zone, chip_m: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Candidates that polygons (metres) meet, which polygon, and the area there, [A] each."""
    box = np.floor(shapely.bounds(polygons).reshape(-1, 4) / chip_m).astype(np.int64)
    columns, rows = (box[:, 2:] - box[:, :2] + 1).T
    of = np.repeat(np.arange(len(polygons)), columns * rows)
    dy, dx = np.divmod(ranks(columns * rows), columns[of])
    column, row = box[of, 0] + dx, box[of, 1] + dy
    chip = zone.find(column, row)
    chip, of, column, row = (a[chip >= 0] for a in (chip, of, column, row))
    area = shapely.area(polygons)[of]
    several = np.flatnonzero((columns * rows)[of] > 1)
    squares = shapely.box(*(np.stack([column, row, column + 1, row + 1])[:, several] * chip_m))
    across = polygons[of[several]]
    shapely.prepare(across)
    full = shapely.contains_properly(across, squares)
    edge = ~full & shapely.intersects(across, squares)
    area[several] = np.where(full, chip_m**2, 0.0)
    area[several[edge]] = shapely.area(shapely.intersection(across[edge], squares[edge]))
    met = area > 0
    return chip[met], of[met], area[met]
