"""Several dates of a place: a chip for each of its clearest days, in shards of their own."""

from pathlib import Path

import numpy as np

from geolink.reader import open_dataset, read_shard
from pipelines.build import build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.dataset import SnapshotRow
from schemas.load import load_config
from tests.integration.conftest import WriteConfig


def test_each_date_is_a_shard_of_one_days_pixels_over_the_same_objects(
    satellite_config: WriteConfig, town: World
) -> None:
    config = satellite_config("dates", scenes={"stac": str(town.s2_catalog), "dates": 2})
    result = build_dataset(load_config(config, DatasetConfig))
    dataset = open_dataset(result.dataset)
    rows = {r.shard: r for r in dataset.rows}
    first = [name for name in rows if not name.endswith("-d1")]
    assert len(first) * 2 == len(rows)
    assert {f"{name}-d1" for name in first} < set(rows)
    pairs = [(rows[n], rows[f"{n}-d1"]) for n in first if rows[n].chips and rows[f"{n}-d1"].chips]
    assert len(pairs) >= 2
    for one, other in pairs:
        # Never in two splits, never of one day, and whatever OSM says of a place it says twice.
        assert one.split == other.split
        assert not set(one.scenes) & set(other.scenes)
        a, b = read_shard(dataset, one), read_shard(dataset, other)
        assert len(np.unique(a["time"])) == len(np.unique(b["time"])) == 1
        assert a["time"][0] != b["time"][0]
        if np.array_equal(a["chip_id"], b["chip_id"]):
            for name in ("object_osm", "object_class", "edge", "relation", "label_pixel", "patch"):
                assert np.array_equal(a[name], b[name])


def test_one_date_of_several_is_what_a_dataset_of_that_day_holds(
    satellite_config: WriteConfig, town: World
) -> None:
    stac = str(town.s2_catalog)
    both = satellite_config("both", scenes={"stac": stac, "dates": 2})
    days = {"2019": ("2019-01-01", "2019-12-31"), "2022": ("2022-01-01", "2022-12-31")}
    alone = {
        year: satellite_config(f"only{year}", scenes={"stac": stac, "start": start, "end": end})
        for year, (start, end) in days.items()
    }
    dated = _pixels(both)
    single = {**_pixels(alone["2019"]), **_pixels(alone["2022"])}
    assert dated
    assert dated.keys() <= single.keys()
    assert all(np.array_equal(dated[key], single[key]) for key in dated)


def _pixels(config: Path) -> dict[tuple[int, int, int], np.ndarray]:
    """Images by chip and time."""
    result = build_dataset(load_config(config, DatasetConfig))
    dataset = open_dataset(result.dataset)
    found = {}
    for row in (r for r in dataset.rows if r.chips):
        assert isinstance(row, SnapshotRow)
        arrays = read_shard(dataset, row)
        for n, (head, tail) in enumerate(arrays["chip_id"].tolist()):
            found[head, tail, int(arrays["time"][n])] = arrays["image"][n]
    return found
