"""Several processes are one: the same losses, the same run, one voice, and none is left behind."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from geolink.checkpoint import checkpoints
from geolink.cli.main import main
from geolink.training.distributed import OtherRankFailed, Ranks
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig
from tests.geolink import ranks
from tests.geolink.test_training import TINY, config
from tests.shards import make_dataset

IMAGE_ONLY = TINY.model_copy(update={"contrast_weight": 0.0, "consistency_weight": 0.0})
PARTS = ("loss", "reconstruction", "contrast", "consistency", "grad_norm")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=3, chips=7)


def run_config(dataset: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Five steps of four chips; all that is drawn and weighed is on."""
    return {
        **config(dataset, run, batch_size=4, epochs=1, log_every=1).model_dump(),
        "augment": {"flip": True, "jitter": 0.1, "crop": (0.5, 0.9), "rotate": True},
        "negatives": {"min_distance_m": 50.0, "same_tags": True},
        "quality": {"weights": {"chip_seam": 0.5}},
        "ema": 0.9,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {
        name: run_config(dataset, folder / name, **changes)
        for name, changes in {
            "ddp": {}, "fsdp": {"strategy": "fsdp"},
            "parts": {"accumulate": 2, "model": IMAGE_ONLY},
        }.items()
    }  # fmt: skip
    for name, changes in {"good": {}, "bad": {"dataset": folder}}.items():
        values = config(
            **{"dataset": dataset, "run": folder / name, "batch_size": 4, "epochs": 1, **changes}
        )
        (folder / f"{name}.json").write_text(values.model_dump_json())
    mp.spawn(ranks.work, (folder, runs), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


def test_two_ranks_have_the_losses_and_gradients_of_one_device_with_all_chips(
    folder: Path,
) -> None:
    total, gradients = ranks.all_losses(slice(None))
    found = [torch.load(folder / f"losses-{n}.pt", weights_only=True) for n in (0, 1)]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, total, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        # The mean over the ranks is what their gradients are brought together as.
        whole = torch.cat([found[0][1][name], found[1][1][name]]) / 2
        torch.testing.assert_close(whole, gradient, rtol=1e-5, atol=1e-6)


def run_of_one(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    """The same in this process alone."""
    monkeypatch.setattr(
        ranks.Attention, "dropout", property(lambda _: 0.0, lambda *_: None), raising=False
    )
    pretrain(TrainConfig(**values))
    return Path(values["run"])


def test_a_run_of_two_ranks_is_the_run_of_one(
    dataset: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_of_one(monkeypatch, run_config(dataset, tmp_path / "run"))
    assert_same_run(folder / "ddp", one)


def test_parts_of_a_batch_are_the_batch_but_for_what_chips_tell_of_one_another(
    dataset: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in two parts each, chips of unequal weights; without contrast and graphs."""
    one = run_of_one(monkeypatch, run_config(dataset, tmp_path / "run", model=IMAGE_ONLY))
    assert_same_run(folder / "parts", one, ("loss", "reconstruction", "grad_norm"))


def test_a_run_of_sharded_weights_is_the_run_of_whole_ones(folder: Path) -> None:
    assert_same_run(folder / "fsdp", folder / "ddp")


def assert_same_run(a: Path, b: Path, parts: tuple[str, ...] = PARTS) -> None:
    ours, theirs = ([line for line in read_log(run) if "loss" in line] for run in (a, b))
    assert len(ours) == len(theirs) == 5
    for line, other in zip(ours, theirs, strict=True):
        for part in parts:
            assert line[part] == pytest.approx(other[part], rel=1e-5, abs=1e-5), part
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        mine, its = (load_file(checkpoints(run)[-1] / file) for run in (a, b))
        assert mine.keys() == its.keys()
        for key, value in mine.items():
            # A key's bias changes no attention: its gradient is rounding, which Adam makes large.
            if not key.endswith(("qkv.bias", "in_proj_bias")):
                torch.testing.assert_close(value, its[key], rtol=1e-3, atol=2e-5, msg=key)


def test_a_run_on_two_devices_stops_on_all_of_them_and_goes_on_on_one(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    two = config(dataset, run, batch_size=4, epochs=8, log_every=1, devices=2)

    def stop(step: int, *_: object) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    result = pretrain(two, progress=stop)
    assert not result.finished
    assert "SIGTERM" in result.message
    assert 3 <= result.step < 40
    assert result.checkpoint.name == f"step-{result.step:06d}"
    ended = pretrain(two.model_copy(update={"devices": 1}))
    assert ended.finished
    assert [line["step"] for line in read_log(run) if "loss" in line] == list(range(1, 41))


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", 130)])
def test_a_run_on_two_devices_that_is_told_to_end_before_its_first_step_ends_as_one_would(
    name: str, status: int, dataset: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.yaml"
    run = config(dataset, tmp_path / "run", batch_size=4, epochs=200, devices=2)
    path.write_text(run.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "geolink.cli", "pretrain", str(path)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and len(begun_processes(process.pid)) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.Signals[name])
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert "memory" not in error
    assert not checkpoints(tmp_path / "run")


def test_a_process_that_is_killed_ends_the_run_in_one_sentence(
    dataset: Path, tmp_path: Path
) -> None:
    def kill(step: int, *_: object) -> None:
        if step == 2:
            os.kill(max(begun_processes()), signal.SIGKILL)

    begun = time.monotonic()
    with pytest.raises(GeoLinkError, match=r"process \d of 2 .*SIGKILL.*run again"):
        pretrain(
            config(dataset, tmp_path / "run", batch_size=4, epochs=200, log_every=1, devices=2),
            progress=kill,
        )
    assert time.monotonic() - begun < 60


def begun_processes(by: int | None = None) -> list[int]:
    """Processes of runs that a process (this one) has begun."""
    found = subprocess.run(
        ["pgrep", "-P", str(by or os.getpid()), "-f", "run_rank"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [int(pid) for pid in found.stdout.split()]


def test_of_processes_that_torchrun_begins_one_prints(folder: Path) -> None:
    first, second = (json.loads((folder / f"said-{n}.json").read_text()) for n in (0, 1))
    assert [said["status"] for said in first] == [said["status"] for said in second] == [0, 2]
    assert json.loads(first[0]["out"])["finished"]
    assert "is no GeoLink dataset" in first[1]["error"]
    assert [said["out"] + said["error"] for said in second] == ["", ""]


def test_a_mistake_that_all_ranks_find_is_told_by_one() -> None:
    """Each rank hears what the others say, in turn."""

    class Two(Ranks):
        def hear(self, value: Any) -> list[Any]:
            return [None, "second"] if self.number == 0 else [None, value]

    for number, kind in ((0, OtherRankFailed), (1, GeoLinkError)):
        with (  # noqa: PT012
            pytest.raises(GeoLinkError, match="second") as error,
            Two(None, number, 2, None).all_or_none(),  # type: ignore[arg-type]
        ):
            if number == 1:
                raise GeoLinkError("second")
        assert error.type is kind


def test_a_folder_is_one_runs(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused: list[str] = []

    def second(step: int, *_: object) -> None:
        with pytest.raises(GeoLinkError) as error:
            pretrain(config(dataset, run))
        refused.append(str(error.value))

    assert pretrain(config(dataset, run), progress=second).finished
    assert len(refused) == 4
    assert f"another process is training in {run}" in refused[0]
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_command_line_refuses_devices_that_cannot_be(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    whole = config(dataset, run).model_dump_json()
    cuda = '"accelerator":"cuda"'
    cpu = '"accelerator":"cpu"'
    assert cpu in whole
    for there, text, changes in (
        (0, "'cuda' is asked for, but this machine has none", {cpu: cuda}),
        (1, "2 devices are asked for, but this machine has 1 of accelerator 'cuda'",
         {cpu: cuda, '"devices":1': '"devices":2', '"batch_size":5': '"batch_size":4'}),
        (0, "precision 16-mixed needs a CUDA GPU", {'"32-true"': '"16-mixed"'}),
        (0, "batch_size 5 cannot be shared evenly by devices 2 in accumulate 1 parts",
         {'"devices":1': '"devices":2'}),
        (0, "batch_size 5 cannot be shared evenly by devices 1 in accumulate 2 parts",
         {'"accumulate":1': '"accumulate":2'}),
        (0, "batch_size is 30, but split 'train'", {'"batch_size":5': '"batch_size":30'}),
        (0, "strategy fsdp has no gradient scaler",
         {'"32-true"': '"16-mixed"', '"strategy":"auto"': '"strategy":"fsdp"'}),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        content = whole
        for old, new in changes.items():
            assert old in content
            content = content.replace(old, new)
        (tmp_path / "config.yaml").write_text(content)
        # What the launched processes find, without launching them.
        if '"devices":2' in content and there:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
            monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as end:
            main(["pretrain", str(tmp_path / "config.yaml")])
        error = capsys.readouterr().err
        assert end.value.code == 2, text
        assert text in error, error
        assert "Traceback" not in error
        assert not (run / "run.json").exists()
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_a_gpu_trains_with_every_strategy(strategy: str, dataset: Path, tmp_path: Path) -> None:
    """Also that batches brought ahead on another stream are whole: losses as on the CPU."""
    figures = []
    for accelerator in ("cpu", "cuda"):
        run = tmp_path / accelerator
        pretrain(
            config(
                dataset, run, model=TINY, accelerator=accelerator, log_every=1,
                strategy=strategy if accelerator == "cuda" else "auto",
            )
        )  # fmt: skip
        figures.append([line["reconstruction"] for line in read_log(run) if "loss" in line])
    # Masks are drawn on the device, so that losses agree only about.
    assert figures[0] == pytest.approx(figures[1], rel=0.1)
