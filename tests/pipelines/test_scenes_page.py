"""What docs/scenes.md says of scenes is what the code does, row by row."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.datum import datum_change
from pipelines.radiometry import apply_offset, item_offset
from schemas.findings import FINDINGS
from schemas.sensor import SENSORS, SENTINEL_2_L2A
from schemas.sources import SceneSource

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scenes.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """Rows of the table whose first heading is `first`."""
    lines = PAGE.split(f"\n| {first} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _ways(cell: str, every: list[Any]) -> list[Any]:
    """What a cell stands for."""
    return every if cell == "any" else [{"–": None, "true": True, "false": False}.get(cell, cell)]


@pytest.mark.parametrize("row", table("collection"))
def test_the_table_of_offsets(row: list[str]) -> None:
    collection, *cells, added = row
    baselines = _ways(cells[0], [None, "02.14", "05.11"])
    applied = _ways(cells[1], [None, True, False])
    stated = _ways(cells[2], [None, "0", "-1000"])
    for baseline in baselines:
        for flag in applied:
            for offset in stated:
                properties = {"s2:processing_baseline": baseline} if baseline else {}
                if flag is not None:
                    properties["earthsearch:boa_offset_applied"] = flag
                assets = [
                    {"raster:bands": [{"scale": 1e-4, "offset": int(dn) * 1e-4}]}
                    for dn in (offset.split(" and ") if offset else [])
                ]
                item = {"id": "x", "collection": collection, "properties": properties}
                found = item_offset(SENTINEL_2_L2A, item, assets or [{}]).dn
                assert found == (None if added == "left out" else int(added)), row


def test_the_table_of_values() -> None:
    for value, added, stored in table("value in the file"):
        image = np.full((1, 2, 2), int(value), np.uint16)
        apply_offset(image, int(added), 0)
        assert image.tolist() == np.full((1, 2, 2), int(stored)).tolist()


def test_the_table_of_datums() -> None:
    for own, block, changed in table("scene's CRS"):
        epsg, utm = int(own[5:]), int(block[5:])
        place = (5e5, 5.3e6, 5.1e5, 5.31e6)
        assert (datum_change(epsg, utm, place) is not None) == (changed == "yes"), own


def test_the_table_of_sensors() -> None:
    rows = {row[0]: row[1:] for row in table("preset")}
    assert set(rows) == set(SENSORS)
    for name, row in rows.items():
        s = SENSORS[name]
        masked = "–"
        if s.mask is not None:
            what, of = ("bits", s.mask.invalid_bits) if s.mask.invalid_bits else (
                "values", s.mask.invalid)  # fmt: skip
            masked = f"{what} {', '.join(map(str, of))}"
        value = f"DN * {s.scale:g} + {s.offset:g}, {s.units}"
        assert row == [str(len(s.bands)), s.dtype, str(s.nodata), value, masked]


def test_every_code_and_composite_that_is_named_exists() -> None:
    codes = set(re.findall(r"`((?:scene|chip|pixel)_\w+)`", PAGE))
    assert codes <= set(FINDINGS)
    assert len(codes) >= 8
    names = SceneSource.model_fields["composite"].annotation.__args__  # type: ignore[union-attr]
    assert {row[0].strip("`") for row in table("`composite`")} == set(names)
