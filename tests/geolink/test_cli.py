"""What the command line prints."""

import json

import pytest

from geolink.cli import main
from schemas.layout import LAYOUT


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("what", ["dataset", "train", "evaluate"])
def test_every_field_of_a_config_schema_is_described(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("schema", what) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    for name, field in schema["properties"].items():
        assert "description" in field, name


def test_the_shard_layout_is_printed_as_a_table_and_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run("schema", "shard") == 0
    table = capsys.readouterr().out
    assert _run("schema", "shard", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows] == [s.name for s in LAYOUT]
    assert all(f"| `{s.name}` |" in table for s in LAYOUT)


def test_a_misspelt_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run("buidl") == 2
    assert "build" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--help") == 0
    text = capsys.readouterr().out
    for command in ("build", "info", "show", "pretrain", "evaluate", "demo", "schema"):
        assert f"\n  {command} " in text
    assert "..." not in text.partition("Commands:")[2]
