"""The training loop: stopped anywhere it goes on as if it had not been, and says what is wrong."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geolink.checkpoint import checkpoints, load_model
from geolink.models import GeoLink
from geolink.training import loop
from geolink.training.log import read_log
from geolink.training.loop import RunResult, pretrain
from geolink.training.optim import learning_rate
from schemas.errors import GeoLinkError
from schemas.findings import CHIP_FLAGS
from schemas.pins import read_pins
from schemas.sensor import SENTINEL_2_L2A
from schemas.training import Geolink2Config, ModelConfig, TrainConfig
from tests.shards import make_dataset

TINY = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=16, depth=1, num_heads=2, tag_dim=16,
    osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
STEPS = 12
FIGURES = ("step", "epoch", "loss", "reconstruction", "contrast", "consistency", "grad_norm", "lr")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=3, chips=7)


def config(dataset: Path, run: Path, **changes: Any) -> TrainConfig:
    """A run of 12 steps, 4 an epoch."""
    return TrainConfig(**{
        "dataset": dataset, "run": run, "model": TINY, "epochs": 3, "batch_size": 5,
        "window_shards": 2, "log_every": 3, "checkpoint_every": 4, "accelerator": "cpu", **changes,
    })  # fmt: skip


def figures(run: Path) -> list[tuple[Any, ...]]:
    """What a log says that does not depend on the clock."""
    return [tuple(line[n] for n in FIGURES) for line in read_log(run) if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(run)[-1]
    both = [load_file(last / f"{name}.safetensors") for name in ("model", "optimizer")]
    return both[0] | both[1]


def assert_same_run(a: Path, b: Path) -> None:
    assert figures(a) == figures(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert pretrain(config(dataset, run)).finished
    return run


class Stop(Exception):
    """Something that goes wrong."""


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """Do `what` in the middle of a step."""
    train_step = loop.train_step

    def failing(t: Any, batch: Any, lr: float) -> Any:
        if t.step == step:
            what()
        return train_step(t, batch, lr)

    monkeypatch.setattr(loop, "train_step", failing)


def test_a_run_learns_and_writes_down_what_it_did(unbroken: Path, dataset: Path) -> None:
    lines = [line for line in read_log(unbroken) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2]
    for line in lines:
        total = line["reconstruction"] + 0.01 * (line["contrast"] + line["consistency"])
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["samples_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["memory_mb"] > 10
    model, meta = load_model(unbroken)
    assert (meta.step, meta.steps, meta.snapshot, meta.dataset) == (12, 12, 1, "fabricated")
    assert len(meta.mean) == len(meta.std) == len(meta.bands) == 3
    torch.manual_seed(0)
    assert not torch.equal(model.img_norm.weight, GeoLink(TINY).img_norm.weight)
    assert len(list((unbroken / "tensorboard").iterdir())) == 1


def test_the_same_config_gives_the_same_run_to_the_bit(
    unbroken: Path, dataset: Path, tmp_path: Path
) -> None:
    pretrain(config(dataset, tmp_path / "run", readers=2))
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("step", [2, 5, 8, 11])
def test_a_run_that_broke_goes_on_from_its_last_checkpoint_to_the_bit(
    step: int, unbroken: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise Stop

    torch.manual_seed(1234)  # whatever the state of the generators was
    with monkeypatch.context() as patch:
        fail_at(step, patch, fail)
        with pytest.raises(Stop):
            pretrain(config(dataset, tmp_path / "run"))
    result = pretrain(config(dataset, tmp_path / "run"))
    assert result.finished
    assert bool(result.notes) == (step > 4)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_keeps_it(
    signum: signal.Signals,
    unbroken: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        fail_at(5, patch, lambda: os.kill(os.getpid(), signum))
        result = pretrain(config(dataset, tmp_path / "run"))
    assert signal.getsignal(signum) is before
    assert (result.step, result.finished) == (5, False)
    assert signum.name in result.message
    assert result.checkpoint.name == "step-000005"
    # What it goes on with is kept, for a while.
    (pin,) = read_pins(dataset).values()
    assert pin.snapshot == 1
    assert pin.expires is not None
    again = pretrain(config(dataset, tmp_path / "run"))
    assert again.finished
    assert read_pins(dataset) == {}
    assert_same_run(tmp_path / "run", unbroken)


def test_a_dataset_that_cannot_be_written_is_trained_on_without_a_pin(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise GeoLinkError("cannot write pins: read-only file system")

    monkeypatch.setattr("geolink.training.pin.write_pin", refuse)
    result = pretrain(config(dataset, tmp_path / "run"))
    assert result.finished
    assert "gc may remove it: cannot write pins" in " ".join(result.notes)


def test_a_damaged_last_checkpoint_is_left_out_and_said(
    unbroken: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(10, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        pretrain(config(dataset, run))
    first, last = checkpoints(run)
    assert (first.name, last.name) == ("step-000008", "step-000010")
    content = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(content[:-100])
    result = pretrain(config(dataset, run))
    assert "step-000010" in result.notes[0]
    assert "truncated" in result.notes[0]
    assert "after step 8" in result.notes[1]
    assert_same_run(run, unbroken)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_in_silence(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(config(dataset, run, epochs=1))
    for folder in checkpoints(run):
        (folder / "optimizer.safetensors").unlink()
    with pytest.raises(GeoLinkError, match=r"no checkpoint of .* is whole.*optimizer\.safetensors"):
        pretrain(config(dataset, run, epochs=1))


def test_a_finished_run_says_so_and_is_left_alone(unbroken: Path, dataset: Path) -> None:
    before = (unbroken / "log.jsonl").read_bytes()
    result: RunResult = pretrain(config(dataset, unbroken))
    assert result.finished
    assert "finished already" in result.message
    assert (unbroken / "log.jsonl").read_bytes() == before


def test_a_run_folder_of_another_config_is_refused_by_its_first_field(
    unbroken: Path, dataset: Path, tmp_path: Path
) -> None:
    for changes, text in (
        ({"lr": 0.1}, r"lr 0\.0005, now it is 0\.1"),
        ({"model": TINY.model_copy(update={"mask_ratio": 0.5})}, r"model\.mask_ratio 0\.75"),
        ({"snapshot": 2}, "snapshot 1, now it is 2"),
    ):
        with pytest.raises(GeoLinkError, match=text):
            pretrain(config(dataset, unbroken, **changes))
    assert pretrain(config(dataset, unbroken, readers=2, checkpoint_every=1)).finished
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(GeoLinkError, match="other things than a run"):
        pretrain(config(dataset, tmp_path))


def test_a_loss_that_is_not_finite_names_step_and_chips_and_keeps_no_bad_weights(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GeoLink.forward
    calls = 0

    def infinite(self: GeoLink, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        losses = forward(self, *args, **kwargs)
        return losses | {"total": losses["total"] * (torch.nan if calls == 7 else 1.0)}

    monkeypatch.setattr(GeoLink, "forward", infinite)
    run = tmp_path / "run"
    with pytest.raises(GeoLinkError, match=r"loss is nan at step 7, with chips 32632-10000-32-"):
        pretrain(config(dataset, run, log_every=5))
    assert [p.name for p in checkpoints(run)] == ["step-000004"]
    *_, named, failed = read_log(run)
    assert len(named["chips"]) == 5
    assert failed["message"].startswith("failed: loss is nan at step 7")
    _, meta = load_model(run)
    assert meta.step == 4


def test_configs_that_do_not_fit_the_dataset_say_what_to_write(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def model(**changes: Any) -> dict[str, Any]:
        return {"model": TINY.model_copy(update=changes)}

    for changes, text in (
        (model(bands=12), r"model\.bands is 12, but .* has 3: write\nmodel:\n  bands: 3"),
        (model(image_size=64), r"model\.image_size is 64.*image_size: 32"),
        (model(tag_dim=512), r"model\.tag_dim is 512.*tag_dim: 16"),
        (model(variant="geolink2", patch_size=16), r"model\.patch_size is 16.*patch_size: 8"),
        (
            model(variant="geolink2", geolink2=Geolink2Config(classes=5)),
            r"geolink2\.classes is 5.*has 20 classes: write\nmodel:\n  geolink2: {classes: 20}",
        ),
        ({"split": "val"}, "no chips in split val"),
        ({"batch_size": 22}, "batch_size is 22.*only 21 chips"),
        ({"accelerator": "cuda"}, "'cuda' is asked for, but this machine has none"),
        ({"precision": "16-mixed"}, "16-mixed needs a CUDA GPU"),
        ({"dataset": tmp_path}, "is no GeoLink dataset"),
        ({"snapshot": 7}, "no snapshot 7"),
    ):
        run = tmp_path / "run"
        with pytest.raises(GeoLinkError, match=f"(?s){text}"):
            pretrain(config(**{"dataset": dataset, "run": run, **changes}))
        assert not (run / "run.json").exists()


def test_sentinel_2_chips_and_bfloat16_train_too(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=1, chips=6, sensor=SENTINEL_2_L2A)
    model = TINY.model_copy(update={"bands": 12})
    result = pretrain(
        config(folder, tmp_path / "r", model=model, precision="bf16-mixed", batch_size=3, epochs=1)
    )
    assert result.finished
    assert 0.5 < result.loss < 2
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "r").values())


def test_the_rate_rises_and_falls_as_a_half_cosine() -> None:
    c = TrainConfig(dataset=Path("d"), run=Path("r"), lr=2.0, warmup=0.1)
    rates = [learning_rate(c, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert learning_rate(c.model_copy(update={"warmup": 0.0}), 1, 100) == 2.0


def test_a_run_learns_only_from_chips_without_findings_and_weighs_the_others(
    dataset: Path, tmp_path: Path
) -> None:
    plain = pretrain(config(dataset, tmp_path / "plain"))
    ones = {"weights": {"chip_seam": 1.0}}
    pretrain(config(dataset, tmp_path / "ones", quality=ones))
    assert figures(tmp_path / "ones") == figures(tmp_path / "plain")
    half = {"weights": {"chip_seam": 0.5}}
    pretrain(config(dataset, tmp_path / "half", quality=half))
    assert figures(tmp_path / "half") != figures(tmp_path / "plain")
    less = pretrain(config(dataset, tmp_path / "less", quality={"drop": ["chip_cloudy"]}))
    assert 0 < less.steps < plain.steps
    with pytest.raises(GeoLinkError, match="left out by quality"):
        pretrain(config(dataset, tmp_path / "none", quality={"drop": list(CHIP_FLAGS)}))
    with pytest.raises(ValueError, match="'chip_blue' is no finding of chips"):
        config(dataset, tmp_path / "bad", quality={"drop": ["chip_blue"]})
