"""The taxonomy: twenty classes in drawing order, and what a user's own may not say."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import GeoLinkError
from schemas.load import load_config
from schemas.taxonomy import Taxonomy, default_taxonomy

ROAD = {"name": "road", "color": "#8d8d8d", "rules": ["highway=*"], "width_m": 6}
WATER = {"name": "water", "color": "#4a90d9", "rules": ["natural=water", "waterway=river"]}


def _taxonomy(*classes: dict[str, Any]) -> Taxonomy:
    return Taxonomy.model_validate({"classes": classes})


def test_the_one_that_ships_has_the_land_use_and_cover_of_a_town() -> None:
    names = default_taxonomy().names
    assert len(names) == len(set(names)) == 20
    for name in ("residential", "farmland", "forest", "water", "road_major", "rail", "building"):
        assert name in names
    colors = [c.color for c in default_taxonomy().classes]
    assert len(set(colors)) == len(colors)


def test_what_stands_on_the_ground_is_drawn_after_the_ground() -> None:
    position = {name: i for i, name in enumerate(default_taxonomy().names)}
    assert position["building"] == max(position.values())
    ground = ("farmland", "forest", "grass", "residential", "industrial", "park_recreation")
    assert max(position[n] for n in ground) < position["water"] < position["road_minor"]
    assert position["path"] < position["road_minor"] < position["road_major"]


def test_roads_rails_and_rivers_have_widths_and_areas_have_none() -> None:
    width = {c.name: c.width_m for c in default_taxonomy().classes}
    assert all(width[n] for n in ("path", "road_minor", "road_major", "rail", "water"))
    assert not any(width[n] for n in ("residential", "forest", "building", "farmland"))
    major = next(c for c in default_taxonomy().classes if c.name == "road_major")
    assert major.widths["highway=motorway"] > major.widths["highway=secondary"]


def test_a_rule_belongs_to_one_class() -> None:
    rules = [rule for c in default_taxonomy().classes for rule in c.rules]
    assert len(rules) == len(set(rules))
    with pytest.raises(ValidationError, match="'highway=\\*' stands in both 'road' and 'lane'"):
        _taxonomy(ROAD, {**ROAD, "name": "lane"})


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "at least 1 item"),
        ([ROAD, {**WATER, "name": "road"}], "class 'road' is given twice"),
        ([{**ROAD, "rules": ["highway"]}], "'highway' is not of the form key=value"),
        ([{**ROAD, "rules": ["=yes"]}], "'=yes' is not of the form"),
        ([{**ROAD, "rules": []}], "at least 1 item"),
        ([{**ROAD, "name": "Major Road"}], "should match pattern"),
        ([{**ROAD, "color": "grey"}], "should match pattern"),
        ([{**ROAD, "width_m": 0}], "greater than 0"),
        ([{**ROAD, "widths": {"highway=path": 2}}], "width for 'highway=path', which is no rule"),
        ([{**ROAD, "colour": "#000000"}], "Extra inputs"),
        (
            [{**ROAD, "name": f"c{i}", "rules": [f"k=v{i}"]} for i in range(255)],
            "at most 254 items",
        ),
    ],
)
def test_a_taxonomy_that_makes_no_sense_is_an_error(
    classes: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        _taxonomy(*classes)


def test_a_users_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n"
        '  - {name: water, color: "#4a90d9", rules: [natural=water]}\n'
        '  - {name: road, color: "#8d8d8d", rules: ["highway=*"], width_m: 6}\n'
    )
    taxonomy = load_config(path, Taxonomy)
    assert taxonomy.names == ("water", "road")


def test_a_misspelt_key_of_a_class_is_named_with_its_line_and_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n"
        '  - {name: water, color: "#4a90d9", rules: [natural=water]}\n'
        '  - {name: road, color: "#8d8d8d", rules: ["highway=*"], width: 6}\n'
    )
    with pytest.raises(
        GeoLinkError, match=r"yaml:3: unknown key 'classes\.1\.width'; did you mean"
    ):
        load_config(path, Taxonomy)
