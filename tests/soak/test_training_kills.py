"""Pretraining killed many times, and how long a run takes to stop. `make soak`."""

import random
import signal
import time
from pathlib import Path

import pytest

from geolink.checkpoint import checkpoints, load_model
from geolink.cli.train import EXIT
from geolink.training.log import read_log
from tests.shards import make_dataset
from tests.training_kills import (
    Killed,
    assert_same,
    begin,
    finish,
    kill_somewhere,
    wait,
    write_config,
)  # fmt: skip

pytestmark = pytest.mark.soak


def test_thirty_kills_change_no_bit_of_a_run(tmp_path: Path) -> None:
    dataset = make_dataset(
        tmp_path / "d", shards=4, chips=7, splits=("train", "train", "train", "val")
    )
    options = {"epochs": 60, "evaluate_every": 60}
    finish(write_config(tmp_path, "whole", dataset, **options))
    steps = read_log(tmp_path / "whole")[-1]["step"]
    rng, killed = random.Random(20), Killed()
    while killed.kills < 30:
        config = write_config(tmp_path, f"killed{killed.runs}", dataset, **options)
        killed.runs += 1
        done = False
        while not done and killed.kills < 30:
            done = kill_somewhere(config, rng, killed, in_write=rng.random() < 0.4)
        if not done:
            finish(config)
        assert not list(config.with_suffix("").glob(".*.partial"))
        assert_same(config.with_suffix(""), tmp_path / "whole")
    print(killed, f"{steps} steps a run")
    assert killed.in_write >= 5


@pytest.mark.parametrize("name", sorted(EXIT))
def test_a_run_that_is_told_to_stop_has_its_checkpoint_soon(name: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", shards=3, chips=7)
    rng, waited = random.Random(7), []
    for n in range(5):
        config = write_config(tmp_path, f"run{n}", dataset, epochs=500, checkpoint_every=1000)
        run = config.with_suffix("")
        process = begin(config)
        wait(process, lambda run=run: len(read_log(run)) > 3)
        time.sleep(rng.uniform(0, 1))
        began = time.monotonic()
        process.send_signal(signal.Signals[name])
        process.communicate(timeout=60)
        waited.append(time.monotonic() - began)
        assert process.returncode == EXIT[name]
        (last,) = checkpoints(run)
        assert load_model(last)[1].step == read_log(run)[-1]["step"]
    print(f"{name}: processes ended after {[round(s, 2) for s in waited]} s")
    assert max(waited) < 10
