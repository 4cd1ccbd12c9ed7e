"""Rates by step and layer; the average of the weights; where weights start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geolink.checkpoint import checkpoints, load_model
from geolink.cli.main import main
from geolink.models import GeoLink
from geolink.models.build import make_model
from geolink.training import loop
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from geolink.training.optim import learning_rate, make_optimizer, rate_factor, set_rate
from schemas.training import ModelConfig, TrainConfig
from tests.geolink.test_training import TINY, assert_same_run, config, fail_at
from tests.shards import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=3, chips=7)


def rates(steps: int, **changes: Any) -> list[float]:
    c = TrainConfig(dataset=Path("d"), run=Path("r"), lr=2.0, **changes)
    return [learning_rate(c, step, steps) for step in range(1, steps + 1)]


def test_warm_up_stable_decay_rises_stays_and_falls_in_a_line() -> None:
    found = rates(100, schedule="wsd", warmup=0.1, cooldown=0.2)
    assert found[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert set(found[10:81]) == {2.0}
    assert found[80:] == pytest.approx([0.1 * n for n in range(20, 0, -1)])
    # All of the steps may rise or fall.
    assert rates(4, schedule="wsd", warmup=0.0, cooldown=1.0) == [2.0, 1.5, 1.0, 0.5]
    with pytest.raises(ValueError, match="more than all steps"):
        rates(10, schedule="wsd", warmup=0.5, cooldown=0.6)


def test_each_layer_of_the_image_encoder_has_its_rate() -> None:
    expected = {
        "patch_embed.proj.weight": 0.5**3, "cls_token": 0.5**3,
        "img_encoder.blocks.0.mlp.fc1.weight": 0.5**2, "img_encoder.blocks.1.norm1.bias": 0.5,
        "img_norm.weight": 1.0, "osm_mask_token.point": 1.0, "img_decoder_mlp.weight": 1.0,
    }  # fmt: skip
    model = GeoLink(TINY.model_copy(update={"depth": 2}))
    c = TrainConfig(
        dataset=Path("d"), run=Path("r"), model=model.config, layer_decay=0.5, weight_decay=0.3
    )
    optimizer = make_optimizer(model, c)
    set_rate(optimizer, 8.0)
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    for name, factor in expected.items():
        real = (
            name.replace("patch_embed", "img_encoder.patch_embed") if name not in trained else name
        )
        assert found[id(trained[real])]["lr"] == 8.0 * factor, name
        assert rate_factor(name, 2, 0.5) == factor
    for name, parameter in trained.items():
        group = found[id(parameter)]
        assert group["weight_decay"] == (0.3 if parameter.squeeze().ndim > 1 else 0.0), name
    # Without it there are two groups, of one rate.
    plain = make_optimizer(model, c.model_copy(update={"layer_decay": 1.0}))
    assert len(plain.param_groups) == 2


def test_class_token_and_registers_of_geolink2_have_the_rate_of_the_patch_embedding() -> None:
    model = make_model(TINY.model_copy(update={"variant": "geolink2", "depth": 2}))
    factor = {n: rate_factor(n, 2, 0.5) for n, p in model.named_parameters() if p.requires_grad}
    for name in ("cls_token", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert factor[f"img_encoder.{name}"] == 0.5**3, name
    assert factor["img_encoder.blocks.0.attn.qkv.weight"] == 0.5**2
    assert factor["img_encoder.norm.weight"] == factor["osm_embed.weight"] == 1


def test_the_average_is_that_of_the_weights_after_each_step_and_is_what_is_loaded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, seen = "img_norm.weight", []
    train_step = loop.train_step

    def watched(t: Any, *args: Any) -> Any:
        if not seen:
            seen.append(t.model.img_norm.weight.detach().clone())
        result = train_step(t, *args)
        seen.append(t.model.img_norm.weight.detach().clone())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", watched)
        pretrain(config(dataset, tmp_path / "run", ema=0.75))
    average = seen[0]
    for weight in seen[1:]:
        average = 0.75 * average + 0.25 * weight
    last = checkpoints(tmp_path / "run")[-1]
    torch.testing.assert_close(load_file(last / "ema.safetensors")[name], average)
    model, _ = load_model(tmp_path / "run")
    torch.testing.assert_close(model.img_norm.weight, average)
    assert torch.equal(load_file(last / "model.safetensors")[name], seen[-1])
    assert not torch.equal(average, seen[-1])

    # It goes on to the bit where a run was broken.
    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fail_at(7, patch, fail)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config(dataset, tmp_path / "again", ema=0.75))
    pretrain(config(dataset, tmp_path / "again", ema=0.75))
    assert_same_run(tmp_path / "again", tmp_path / "run")
    again = load_file(checkpoints(tmp_path / "again")[-1] / "ema.safetensors")
    whole = load_file(last / "ema.safetensors")
    assert all(torch.equal(again[n], whole[n]) for n in whole)


def test_a_run_starts_from_the_weights_of_another(dataset: Path, tmp_path: Path) -> None:
    first = config(dataset, tmp_path / "first", epochs=1)
    pretrain(first)
    # A rate of next to nothing: what is learnt is what it started from.
    second = config(dataset, tmp_path / "second", epochs=1, lr=1e-12, start=str(tmp_path / "first"))
    result = pretrain(second)
    assert "after step 4" in result.notes[0]
    ours, theirs = (
        load_file(checkpoints(tmp_path / n)[-1] / "model.safetensors") for n in ("first", "second")
    )
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-7)


def test_the_command_line_refuses_weights_and_runs_of_other_data_or_sizes_in_a_sentence(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    pretrain(config(dataset, trained, epochs=1))
    folder = checkpoints(trained)[-1]
    meta = folder / "config.json"
    content = meta.read_text()

    def said(**changes: Any) -> str:
        values = config(**{"dataset": dataset, "run": tmp_path / "run", **changes})
        (tmp_path / "config.yaml").write_text(values.model_dump_json())
        with pytest.raises(SystemExit) as end:
            main(["pretrain", str(tmp_path / "config.yaml")])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    start = str(folder)
    for old, new, text in (
        ('"red"', '"swir"', "was trained on bands swir, "),
        ('"tag_encoder": "wordllama"', '"tag_encoder": "clip"', "with tags encoded by clip, but"),
        ('"residential"', '"suburb"', "another taxonomy than that of"),
    ):
        assert old in content
        meta.write_text(content.replace(old, new, 1))
        assert text in said(start=start)
        # So is going on where the dataset is another one now.
        again = said(run=trained, epochs=1)
        assert text in again
        assert "put the dataset back that the run began with" in again
    meta.write_text(content)
    wide = ModelConfig(**{**TINY.model_dump(), "patch_size": 16})
    assert "has patches of 8 pixels, but model.patch_size is 16" in said(model=wide, start=start)
    wider = TINY.model_copy(update={"embed_dim": 32})
    assert "does not fit the model" in said(model=wider, start=start)
    assert "nowhere" in said(start="nowhere")
    assert "holds a run with lr 0.0005, now it is 0.1" in said(run=trained, lr=0.1, epochs=1)
    assert "batch_size is 22, but split 'train'" in said(batch_size=22)
    many = TINY.model_copy(update={"bands": 12})
    assert "model.bands is 12, but" in said(model=many)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_compiled_step_and_recomputed_blocks_are_the_same_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.nn.Module.compile
    # The graph that is found is what is tested; code for it takes a minute to make.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_(self, backend="eager", fullgraph=True)
    )
    for name, changes in (
        ("plain", {}), ("compiled", {"compile": True}),
        ("again", {"checkpoint_activations": True}),
    ):  # fmt: skip
        pretrain(config(dataset, tmp_path / name, epochs=1, log_every=1, **changes))
    plain, compiled, again = (
        [line["loss"] for line in read_log(tmp_path / n) if "loss" in line]
        for n in ("plain", "compiled", "again")
    )
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert again == pytest.approx(plain, rel=1e-6)
