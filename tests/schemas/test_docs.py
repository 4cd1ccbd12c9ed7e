"""What the pages say is so: made from the contract, or checked against the code."""

import ast
import re
import shlex
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml

from geolink.cli.main import cli
from schemas.docs import PAGES
from schemas.training import Fix, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
GUIDES = (
    "README.md",
    "docs/build.md",
    "docs/train.md",
    "docs/model.md",
    "docs/evidence.md",
    "docs/operate.md",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_made_from_the_contract_is_the_contract(name: str) -> None:
    path = ROOT / "docs" / name
    assert path.read_text(encoding="utf-8") == PAGES[name](), "run python -m schemas.docs docs"


def read(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Code of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_of_a_guide_are_known_with_their_options(guide: str) -> None:
    found = 0
    for line in "\n".join(blocks(read(guide), "sh")).replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if "geolink" not in words or words[words.index("geolink") + 1].startswith("-"):
            continue
        name, *given = words[words.index("geolink") + 1 :]
        command = cli.commands[name]
        if isinstance(command, click.Group):
            command = command.commands[given.pop(0)]
        known = {option for p in command.params for option in p.opts}
        assert {word for word in given if word.startswith("--")} <= known, line
        found += 1
    assert found


@pytest.mark.parametrize("guide", ["docs/train.md", "docs/model.md"])
def test_configs_of_a_guide_are_valid(guide: str) -> None:
    configs = [yaml.safe_load(block) for block in blocks(read(guide), "yaml")]
    assert configs
    for config in configs:
        TrainConfig.model_validate({"dataset": "d", "run": "r", **config})
    # What stands in a sentence: `key: value`, or `key` alone.
    for key, value in re.findall(r"`([a-z_]+): ([^`…]+)`", read(guide)):
        if key in TrainConfig.model_fields and value.upper() != value:
            values = {"dataset": "d", "run": "r", key: yaml.safe_load(value.rstrip(":"))}
            TrainConfig.model_validate(values)


def test_the_table_of_quirks_names_all_of_them_and_where_they_stand() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([\w.]+)`, `([\w.]+)` \|$", read("docs/model.md"), re.M)
    assert [name for name, *_ in rows] == sorted(get_args(Fix))
    for name, file, place in rows:
        code = (ROOT / "geolink" / "models" / file).read_text(encoding="utf-8")
        lines = code.splitlines()
        spans = [
            lines[node.lineno - 1 : node.end_lineno]
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and node.name == place.rpartition(".")[2]
        ]
        assert any(f"Quirk `{name}`" in line for span in spans for line in span), name


@pytest.mark.parametrize("guide", GUIDES)
def test_links_of_a_guide_lead_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(guide)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / guide).parent / file if file else ROOT / guide
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, target
