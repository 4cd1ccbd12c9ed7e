"""What a release says of itself agrees."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_newest_entry_of_the_changelog_is_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)( \(unreleased\)| – \d{4}-\d\d-\d\d)$", changes, re.M)
    assert newest is not None
    assert newest[1] == project["version"]


def test_every_extra_is_part_of_all_and_known_to_the_doctor() -> None:
    from geolink.cli.checks import MARKERS, PURPOSES

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    of_all = set(re.findall(r"\w+", everything.partition("[")[2]))
    assert of_all == set(extras) - {"all", "dev"} == set(MARKERS) == set(PURPOSES)
    for extra, markers in MARKERS.items():
        there = {re.split(r"[<>=]", text)[0] for text in extras[extra]}
        assert set(markers) <= there, extra
