"""A checkpoint is there whole or not at all, and a broken one is told by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geolink import checkpoint
from geolink.checkpoint import (
    MODEL,
    OPTIMIZER,
    CheckpointMeta,
    checkpoints,
    describe_checkpoint,
    host_copy,
    load_model,
    load_optimizer,
    model_tensors,
    save_checkpoint,
)
from geolink.models import GeoLink
from geolink.training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from schemas.errors import GeoLinkError
from schemas.training import ModelConfig, TrainConfig

TINY = ModelConfig(
    image_size=16, patch_size=8, bands=2, embed_dim=16, depth=1, num_heads=2, tag_dim=4,
    osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


def meta(step: int = 5, model: ModelConfig = TINY) -> CheckpointMeta:
    return CheckpointMeta(
        geolink="0", revision=None, step=step, steps=10, dataset="d", snapshot=3,
        tag_encoder="wordllama", bands=("a", "b"), nodata=0, mean=(0.1, 2.0), std=(1.5, 1 / 3),
        config=TrainConfig(dataset=Path("d"), run=Path("r"), model=model),
    )  # fmt: skip


def files(
    model: GeoLink, optimizer: Mapping[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by file."""
    return {MODEL: host_copy(model_tensors(model)), OPTIMIZER: host_copy(optimizer or {})}


def saved(run: Path, step: int = 5) -> tuple[Path, GeoLink]:
    torch.manual_seed(step)
    model = GeoLink(TINY)
    return save_checkpoint(run, files(model), meta(step), {"note": 1}), model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_model_comes_back_as_it_was_saved(run: Path) -> None:
    folder, model = saved(run)
    assert folder.name == "step-000005"
    for path in (folder, run):
        loaded, found = load_model(path)
        assert found == meta()
        assert not loaded.training
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.patch_embed.proj.weight is loaded.img_encoder.patch_embed.proj.weight


def test_who_may_read_a_folder_may_read_all_of_a_checkpoint(run: Path) -> None:
    beside = run.parent / "beside"
    beside.touch()
    modes = {path.stat().st_mode for path in saved(run)[0].iterdir()}
    assert modes == {beside.stat().st_mode}


def test_the_last_checkpoints_are_kept_and_the_highest_step_is_the_last(run: Path) -> None:
    for step in (8, 9, 10, 100, 1_000_000):
        saved(run, step)
    found = checkpoints(run)
    assert len(found) == 2
    assert found[-1].name == "step-1000000"
    assert load_model(run)[1].step == 1_000_000


def test_the_optimizer_goes_on_as_if_it_had_not_been_saved(run: Path) -> None:
    def step(model: GeoLink, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    torch.manual_seed(0)
    model = GeoLink(TINY)
    config = meta().config
    optimizer = make_optimizer(model, config)
    step(model, optimizer, 1)
    tensors = files(model, optimizer_tensors(model, optimizer))
    folder = save_checkpoint(run, tensors, meta(), {})
    step(model, optimizer, 2)

    again, _ = load_model(folder)
    restored = make_optimizer(again, config)
    load_optimizer_tensors(again, restored, load_optimizer(folder))
    step(again, restored, 2)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_only_weights_of_two_dimensions_decay() -> None:
    model = GeoLink(TINY)
    groups = make_optimizer(model, meta().config).param_groups
    decay, plain = (set(map(id, group["params"])) for group in groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay | plain
        elif any(part in name for part in ("bias", "norm", "mask_token", "cls_token", "att_")):
            assert id(parameter) in plain, name
        else:
            assert id(parameter) in decay, name


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "other"])
def test_a_damaged_file_is_named(run: Path, name: str, fault: str) -> None:
    folder, _ = saved(run)
    path = folder / name
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "other": b"\x80\x04K*."}
    path.unlink() if fault == "missing" else path.write_bytes(damaged[fault])
    with pytest.raises(GeoLinkError, match=name):
        load_model(folder)


def test_parameters_of_another_model_are_named(run: Path) -> None:
    folder, _ = saved(run)
    tensors = load_file(folder / "model.safetensors")
    odd = dict(tensors)
    del odd["img_norm.weight"]
    odd["stranger"] = torch.zeros(1)
    odd["img_norm.bias"] = torch.zeros(7)
    save_file(odd, folder / "model.safetensors")
    with pytest.raises(GeoLinkError) as error:
        load_model(folder)
    text = str(error.value)
    assert "model.safetensors is of another model" in text
    assert "img_norm.weight is missing" in text
    assert "stranger is not the model's" in text
    assert "img_norm.bias has shape [7], not [16]" in text


def test_a_config_of_something_else_is_told_from_a_checkpoints(run: Path) -> None:
    folder, _ = saved(run)
    for content in ({}, [], {**json.loads(meta().model_dump_json()), "step": -1}):
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(GeoLinkError, match=r"config\.json"):
            load_model(folder)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, reason in (
        ("nowhere", "does not exist"), ("file", "is a file"), (".", "holds no checkpoint"),
    ):  # fmt: skip
        with pytest.raises(GeoLinkError, match=reason):
            load_model(tmp_path / path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_others_and_nothing_half(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = saved(run)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(GeoLinkError, match=r"step-000006.*No space left"):
        save_checkpoint(run, files(model), meta(6), {})
    assert [p.name for p in run.iterdir()] == [folder.name]


def test_steps_done_again_replace_a_damaged_checkpoint(run: Path) -> None:
    folder, _ = saved(run)
    (folder / "model.safetensors").write_bytes(b"")
    saved(run)
    assert load_model(run)[1].step == 5


def test_a_checkpoint_is_described(run: Path) -> None:
    folder, model = saved(run)
    found = describe_checkpoint(run)
    assert found["checkpoint"] == str(folder)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["step"], found["steps"], found["dataset"], found["snapshot"]) == (5, 10, "d", 3)
