"""Around the steps of a run: checkpoints beside them, full disks, kills, signals, figures."""

import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geolink.checkpoint import best_checkpoints, checkpoints, kept, load_model
from geolink.cli import main
from geolink.compare import _merged, compare_runs
from geolink.models import GeoLink
from geolink.training import writer
from geolink.training.flops import Speed, named_peak, peak_flops, step_flops
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from geolink.training.writer import CheckpointWriter
from schemas.errors import GeoLinkError
from schemas.training import Keep, ModelConfig
from tests.geolink.test_checkpoint import TINY as SMALL
from tests.geolink.test_checkpoint import files, meta
from tests.geolink.test_training import TINY, assert_same_run, config, fail_at
from tests.shards import make_dataset
from tests.training_kills import Killed, assert_same, finish, kill_somewhere, write_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=3, chips=7)


def test_runs_that_were_killed_go_on_to_the_bit(dataset: Path, tmp_path: Path) -> None:
    """SIGKILL at a moment that nobody chose, and while a checkpoint is written."""
    options = {"epochs": 15}
    rng, killed = random.Random(1), Killed()
    path = write_config(tmp_path, "killed", dataset, **options)
    for in_write in (True, False):
        assert not kill_somewhere(path, rng, killed, in_write=in_write)
    assert killed.in_write >= 1
    for name in ("killed", "whole"):
        finish(write_config(tmp_path, name, dataset, **options))
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GeoLink(SMALL)
    tensors = {name: dict(named) for name, named in files(model).items()}
    begun, go_on = threading.Event(), threading.Event()
    save = writer.save_checkpoint

    def slow(*arguments: Any) -> Path:
        begun.set()
        assert go_on.wait(30)
        return save(*arguments)

    monkeypatch.setattr(writer, "save_checkpoint", slow)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    writes = CheckpointWriter(tmp_path / "run", Keep())
    writes.write(tensors, meta(1), {})
    assert begun.wait(30)
    writes.check()
    for named in tensors.values():
        for value in named.values():
            value.add_(1)
    go_on.set()
    writes.close()
    loaded, _ = load_model(tmp_path / "run")
    assert all(torch.equal(v, expected[n]) for n, v in loaded.state_dict().items())
    assert writes.seconds > 0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Path:
        raise GeoLinkError("cannot write checkpoint: no space left on device")

    monkeypatch.setattr(writer, "save_checkpoint", full)
    with pytest.raises(GeoLinkError, match="no space left"):
        pretrain(config(dataset, tmp_path / "run", epochs=100, checkpoint_every=1))
    assert all(line["step"] < 50 for line in read_log(tmp_path / "run"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_it(
    dataset: Path, tmp_path: Path, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_disk / "run"
    done = pretrain(config(dataset, run, epochs=1, checkpoint_every=2, keep={"last": 1}))
    size = sum(f.stat().st_size for f in done.checkpoint.iterdir())
    assert size < 500_000
    path = tmp_path / "train.yaml"
    run = tiny_disk / "second"
    # Room for the log, one checkpoint and half of the next.
    used = sum(f.stat().st_size for f in tiny_disk.rglob("*") if f.is_file())
    (tiny_disk / "ballast").write_bytes(bytes(2**21 - used - int(1.6 * size) - 60_000))
    path.write_text(config(dataset, run, checkpoint_every=2, epochs=25).model_dump_json())
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "No space left on device" in error or "os error 28" in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1
    (last,) = checkpoints(run)
    load_model(last)
    # With room again it goes on from there, to the bit.
    (tiny_disk / "ballast").unlink()
    again = config(dataset, run, checkpoint_every=50, epochs=25, keep={"last": 1})
    assert pretrain(again).finished
    pretrain(config(dataset, tmp_path / "whole", epochs=25, checkpoint_every=50))
    assert_same_run(run, tmp_path / "whole")


def test_a_limit_of_file_size_leaves_the_checkpoint_before_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that really fails in its middle, where no file system can be made."""
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    fail_at(6, monkeypatch, limit)
    try:
        with pytest.raises(GeoLinkError, match=r"cannot write checkpoint .*step-00000[68]"):
            pretrain(config(dataset, run, checkpoint_every=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(run)[-1].name == "step-000004"
    assert not list(run.glob(".*.partial"))
    load_model(run)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_stopped_run_ends_with_a_status_that_schedulers_can_tell(
    name: str, status: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(config(dataset, tmp_path / "run").model_dump_json())
    fail_at(5, monkeypatch, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", str(path)])
    assert stopped.value.code == status
    last = read_log(tmp_path / "run")[-1]
    assert last["ended"]
    assert f"stopped by {name}: 5 of 12 steps are done, all are kept, 0." in last["message"]
    assert "stopped by" in (tmp_path / "run" / "index.html").read_text().lower()


def test_a_run_told_to_stop_while_it_is_looked_at_stops_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "d", shards=4, chips=7, splits=("train",) * 3 + ("val",))
    from geolink.training import look

    read_chips = look.read_chips

    def stop(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read_chips(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(look, "read_chips", stop)
        result = pretrain(config(dataset, tmp_path / "run", evaluate_every=6))
    assert (result.step, result.stopped_by) == (6, "SIGTERM")
    log = read_log(tmp_path / "run")
    assert sum("not evaluated after step 6" in line.get("message", "") for line in log) == 1
    assert pretrain(config(dataset, tmp_path / "run", evaluate_every=6)).finished
    pretrain(config(dataset, tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_would_stop_too_slowly_says_so_beforehand(dataset: Path, tmp_path: Path) -> None:
    pretrain(config(dataset, tmp_path / "run", stop_within_s=1e-6, checkpoint_every=1))
    said = [line["message"] for line in read_log(tmp_path / "run") if "message" in line]
    assert sum("more than stop_within_s 1e-06" in text for text in said) == 1


def folders(run: Path, figures: dict[int, float | None]) -> list[Path]:
    """Checkpoints of a run by step, with their validation figures."""
    for step, figure in figures.items():
        folder = run / f"step-{step:06d}"
        folder.mkdir(parents=True)
        about = meta(1).model_copy(update={"step": step, "validation": figure})
        (folder / "config.json").write_text(about.model_dump_json())
    return checkpoints(run)


def test_checkpoints_are_kept_as_the_policy_says(tmp_path: Path) -> None:
    found = folders(tmp_path, {10: 0.5, 20: None, 30: 0.9, 40: 0.9, 50: 0.7, 60: None, 70: 0.1})

    def steps(**keep: Any) -> list[int]:
        return sorted(int(p.name[5:]) for p in kept(found, Keep(**keep)))

    assert steps(last=1, best=0) == [70]
    assert steps(last=2, best=0) == [60, 70]
    assert steps(last=1, best=1) == [30, 70]
    assert steps(last=1, best=3) == [30, 40, 50, 70]
    assert steps(last=1, best=0, every=20) == [20, 40, 60, 70]
    assert [int(p.name[5:]) for p in best_checkpoints(found)] == [30, 40, 50, 10, 70]
    (found[2] / "config.json").write_text("{")
    assert steps(last=1, best=1) == [40, 70]


def test_checkpoints_that_are_never_written_cannot_be_kept(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep.every is 6, which is no multiple of .* 4"):
        config(dataset, tmp_path, keep={"every": 6})


def test_operations_of_a_step_are_those_of_the_published_formula() -> None:
    """Transformer: 24 L d² + 4 L² d forward for a block of L tokens (Kaplan et al. 2020, §2.1)."""
    c = ModelConfig(
        image_size=32, patch_size=8, bands=3, embed_dim=64, depth=3, num_heads=2, tag_dim=8,
        osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=16,
        decoder_depth=1, decoder_heads=2, mask_ratio=0.5,
    )  # fmt: skip
    from geolink.graph import pack

    none = np.zeros(1, np.int64)
    graph = pack(
        object_offset=np.zeros(5, np.int64), kind=np.zeros(0, np.uint8),
        osm_class=np.zeros(0, np.uint8), osm_id=np.zeros(0, np.int64),
        size=np.zeros(0, np.float32), anchor=np.zeros((0, 4, 2), np.float32), tag_offset=none,
        tag=np.zeros(0, np.int64), tag_weight=np.zeros(0, np.float32),
        edge_offset=np.zeros(5, np.int64), edge=np.zeros((0, 2), np.int64),
        relation=np.zeros(0, np.uint8), patch_offset=none, patch=np.zeros(0, np.int64),
        patch_weight=np.zeros(0, np.uint8),
    )  # fmt: skip
    images = torch.rand(4, 3, 32, 32)
    found = step_flops(GeoLink(c), images, graph)
    visible, every = 1 + 8, 1 + 16

    def blocks(tokens: int, dim: int, depth: int) -> int:
        return depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)

    embed = 2 * 8 * (64 * 3) * 64
    decode = 2 * visible * 64 * 16 + 2 * 16 * 16 * 192
    forward = 4 * (embed + blocks(visible, 64, 3) + blocks(every, 16, 1) + decode)
    # The rest, projections of chips without objects, is small.
    assert 1.0 <= found / (3 * forward) < 1.06


def test_the_share_of_the_peak_is_known_for_known_devices_only() -> None:
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None
    assert named_peak("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.4e12
    assert named_peak("NVIDIA H100 PCIe", "16-mixed") == 756e12
    assert named_peak("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12
    assert named_peak("Quadro K600", "bf16-mixed") is None
    assert Speed(2e9, 1e12).mfu(250) == pytest.approx(0.5)


def test_a_line_says_that_the_share_of_the_peak_is_not_known(dataset: Path, tmp_path: Path) -> None:
    pretrain(config(dataset, tmp_path / "run", epochs=1))
    line = next(line for line in read_log(tmp_path / "run") if "loss" in line)
    assert line["mfu"] is None
    assert list(line)[:6] == ["step", "epoch", "loss", *GeoLink.losses]


def test_wandb_that_is_not_installed_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(GeoLinkError, match="wandb is 'encoders', but the package"):
        pretrain(config(dataset, tmp_path / "run", wandb="encoders"))


def test_runs_are_compared_by_what_differs_and_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path / "d", shards=4, chips=7, splits=("train",) * 3 + ("val",))
    wide = TINY.model_copy(update={"mask_ratio": 0.5})
    a = pretrain(config(dataset, tmp_path / "a", evaluate_every=12))
    b = pretrain(config(dataset, tmp_path / "b", lr=1e-3, model=wide, evaluate_every=12))
    table = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert table["run"] == ["a", "b"]
    assert table["lr"] == [5e-4, 1e-3]
    assert table["model.mask_ratio"] == [0.75, 0.5]
    assert not {"seed", "model.depth", "dataset"} & table.keys()
    assert table["loss"] == [a.loss, b.loss]
    assert table["steps"] == [12, 12]
    for n, run in enumerate((tmp_path / "a", tmp_path / "b")):
        figures = [
            line["validation"]["balanced_accuracy"] for line in read_log(run)
            if "validation" in line
        ]  # fmt: skip
        assert table["kNN balanced accuracy, best"][n] == max(figures)
    plot = tmp_path / "plot.png"
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(plot)])
    assert not stopped.value.code
    assert plot.stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "model.mask ratio" in printed
    assert "samples per s, median" in printed


def test_what_only_one_run_has_stands_behind_what_it_follows_there() -> None:
    figures = [{"loss": 1, "contrast": 1, "memory": 1}, {"loss": 2, "contrast": 2, "dense": 2}]
    assert _merged(figures) == ["loss", "contrast", "dense", "memory"]
    assert _merged([]) == []


def test_what_is_no_run_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match=r"is no run folder: it has no run\.json"):
        compare_runs([tmp_path])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(GeoLinkError, match="is damaged"):
        compare_runs([tmp_path])
