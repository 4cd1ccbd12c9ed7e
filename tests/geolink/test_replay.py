"""A step that is not finite is kept with its chips, and run again it says what makes it so."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from geolink.cli import main
from geolink.reader import open_dataset, read_shard, tag_rows, tag_table
from geolink.stream import read_chips
from geolink.training.kept_step import read_step, write_step
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from geolink.training.replay import replay
from schemas.dataset import tag_table_name
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip
from tests.geolink.test_training import config
from tests.shards import make_dataset


def poisoned(folder: Path) -> tuple[Path, set[str]]:
    """A dataset where one tag's embedding is infinite; and the chips that have that tag."""
    path = make_dataset(folder, shards=3, chips=7, objects=2.0)
    dataset = open_dataset(path)
    of_chip: list[tuple[str, set[int]]] = []
    for row in dataset.rows:
        shard = read_shard(dataset, row)
        rows = tag_rows(dataset, shard["tag"])[shard["object_tag"]]
        for n in range(row.chips):
            first, last = shard["object_tag_offset"][shard["object_offset"][n : n + 2]]
            of_chip.append((printed_chip(shard["chip_id"][n]), set(rows[first:last].tolist())))
    # A tag of few chips.
    counts = np.bincount([t for _, tags in of_chip for t in tags])
    tag = int(np.where(counts == 0, 99, counts).argmin())
    table = np.array(tag_table(dataset))
    table[tag] = np.inf
    np.save(path / tag_table_name("fabricated", "wordllama"), table.astype(np.float16))
    return path, {name for name, tags in of_chip if tag in tags}


def failed(dataset: Path, run: Path, **changes: Any) -> Path:
    """Run until it fails; the file that it names."""
    with pytest.raises(GeoLinkError, match="geolink pretrain --replay") as error:
        pretrain(config(dataset, run, **changes))
    (path,) = run.glob("nonfinite-*.safetensors")
    assert str(path) in str(error.value)
    return path


def test_chips_that_make_a_loss_infinite_are_told_from_the_others(tmp_path: Path) -> None:
    dataset, bad = poisoned(tmp_path / "d")
    path = failed(dataset, tmp_path / "run")
    step = int(path.stem[-6:])
    chips = next(line["chips"] for line in read_log(tmp_path / "run") if "chips" in line)
    assert read_log(tmp_path / "run")[-1]["failed"]
    page = (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    assert '<p class="verdict error"><bdi>Failed: ' in page
    assert str(path) in page
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    found = replay(path)
    assert (found.step, found.finite) == (step, False)
    assert set(found.chips) == bad & set(chips)
    assert 0 < len(found.chips) < len(chips) == 5
    assert "consistency" in found.terms or "contrast" in found.terms
    assert "reconstruction" not in found.terms
    assert any("osm" in name for name in found.parameters)
    assert "look at them" in found.verdict
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_weights_that_ran_away_are_told_from_bad_chips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "d", shards=3, chips=7)
    path = failed(dataset, tmp_path / "run", lr=1e18, clip=1e30, warmup=0.0)
    step = int(path.stem[-6:])
    assert step > 1
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--replay", str(path), "--json"])
    assert not stopped.value.code
    found = json.loads(capsys.readouterr().out)
    assert not found["finite"]
    assert "done again" in found["weights"]
    assert "lower lr" in found["verdict"]


def test_a_kept_step_is_plain_data_and_comes_back_as_it_was(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", shards=1, chips=7)
    batch = next(read_chips(open_dataset(dataset), "train", batch_size=5))
    path = tmp_path / "nonfinite-000003.safetensors"
    write_step(path, config(dataset, tmp_path / "run"), 1, 3, batch)
    record, again = read_step(path)
    assert record["step"] == 3
    assert record["chips"] == [printed_chip(chip) for chip in batch.chip_id]
    for ours, theirs in ((batch, again), (batch.graph, again.graph)):
        for name in ours.__dataclass_fields__:
            a, b = getattr(ours, name), getattr(theirs, name)
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype, name
                assert torch.equal(a, b), name
            elif isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
            elif name != "graph":
                assert a == b, name
    with safe_open(path, "pt") as file:
        json.loads(file.metadata()["geolink"])


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 100, pickle.dumps({"a": 1})])
def test_what_is_no_kept_step_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GeoLinkError, match=r"does not exist|no step that a run has kept"):
        replay(path)
