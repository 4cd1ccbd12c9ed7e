"""Image encoders for other libraries, and their cards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor

from geolink.checkpoint import (
    CheckpointMeta,
    checkpoint_folder,
    load_model,
    model_tensors,
    read_meta,
    save_checkpoint,
)
from geolink.cli import main
from geolink.export.encoder import Target, export_encoder
from geolink.models import GeoLink, ModelConfig
from geolink.models.build import make_model
from schemas.errors import GeoLinkError
from schemas.licences import OSM
from schemas.training import TrainConfig

CONFIG = ModelConfig(
    image_size=32, patch_size=8, bands=4, embed_dim=32, depth=2, num_heads=2, tag_dim=4, osm_dim=8,
    fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1, decoder_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, all of whose weights are as if trained, and an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = GeoLink(CONFIG)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    meta = CheckpointMeta(
        geolink="0.1.0", revision="abc", step=20, steps=40, dataset="monaco", snapshot=7,
        tag_encoder="wordllama", licences=(OSM,), bands=("blue", "green", "red", "nir"), nodata=0,
        mean=(510.0, 1020.0, 255.0, 2550.0), std=(51.0, 102.0, 25.5, 255.0),
        config=TrainConfig(dataset=Path("d"), run=folder, model=CONFIG),
    )  # fmt: skip
    save_checkpoint(folder, {"model.safetensors": model_tensors(model)}, meta, {})
    lines: list[dict[str, Any]] = [
        {"step": 10, "validation": {"accuracy": 0.5, "balanced_accuracy": 0.25}},
        {"step": 20, "validation": {"accuracy": 0.75, "balanced_accuracy": 0.625}},
        {"step": 30, "validation": {"accuracy": 0.875, "balanced_accuracy": 0.875}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"step": 30, "valid')
    point = {"score": {"accuracy": 0.786}, "interval": {"accuracy": [0.768, 0.806]}}
    result = {"task": "knn", "step": 20, "dataset": "monaco", "held_out": 1600, "classes": 19,
              "measures": ["accuracy"], "scores": {"encoder": point}}  # fmt: skip
    for name in ("knn", "older"):
        (folder / name).mkdir()
    (folder / "knn" / "result.json").write_text(json.dumps(result))
    (folder / "older" / "result.json").write_text(
        json.dumps(result | {"step": 10, "task": "outdated"})
    )
    return folder


def images(chips: int = 3) -> Tensor:
    return torch.randn(chips, 4, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("to", ["timm", "hf"])
@torch.no_grad()
def test_what_timm_loads_from_an_export_encodes_as_the_checkpoint(
    to: Target, run: Path, tmp_path: Path
) -> None:
    done = export_encoder(run, tmp_path / "export", to)
    assert len({path.stat().st_mode for path in done.folder.iterdir()}) == 1
    encoder = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    model, _ = load_model(run)
    # The trained parts stand where timm has its own.
    assert torch.equal(encoder.cls_token, model.cls_token)
    assert torch.equal(encoder.pos_embed, model.img_pos_embed)
    assert torch.equal(encoder.norm.weight, model.img_norm.weight)
    expected = model.encode_image(images())
    loaded = encoder.forward_features(images())
    # timm's last norm adds 1e-6 to the variance, the published model's 1e-5.
    variance = encoder.norm.weight.abs().max() * expected.abs().max() * 1e-4
    assert (loaded - expected).abs().max() < variance
    encoder.norm.eps = 1e-5
    same = encoder.forward_features(images())
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    assert done.largest_difference is not None
    assert done.largest_difference < 1e-3
    assert done.parameters == sum(p.numel() for p in encoder.parameters())
    assert set(done.files) == {"README.md", "config.json", "model.safetensors"}


@torch.no_grad()
def test_an_encoder_with_registers_is_exported_too(run: Path, tmp_path: Path) -> None:
    meta = read_meta(checkpoint_folder(run))
    config = ModelConfig.model_validate(
        CONFIG.model_dump() | {"variant": "geolink2", "osm_dim": 32}
    )
    changed = meta.config.model_copy(update={"model": config})
    model = make_model(config).eval()
    meta = meta.model_copy(update={"config": changed})
    save_checkpoint(tmp_path / "run", {"model.safetensors": model_tensors(model)}, meta, {})
    done = export_encoder(tmp_path / "run", tmp_path / "export", "timm")
    assert "embedding = tokens[:, 5:].mean(1)" in done.load
    encoder = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    found, expected = encoder.forward_features(images()), model.encode_image(images())
    assert found.shape == (3, 5 + 16, 32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(GeoLinkError, match="have no registers"):
        export_encoder(tmp_path / "run", tmp_path / "torchgeo", "torchgeo")


@torch.no_grad()
def test_timm_normalises_images_of_8_bits_as_the_run_did(run: Path, tmp_path: Path) -> None:
    export_encoder(run, tmp_path / "export", "timm")
    encoder = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    config = timm.data.resolve_model_data_config(encoder)
    assert config["input_size"] == (4, 32, 32)
    assert config["mean"] == pytest.approx((2, 4, 1, 10))
    assert config["std"] == pytest.approx((0.2, 0.4, 0.1, 1))


@torch.no_grad()
def test_onnx_gives_the_same_tokens_for_any_number_of_images(run: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    done = export_encoder(run, tmp_path / "export", "onnx")
    assert done.largest_difference is not None
    assert done.largest_difference < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "export" / "encoder.onnx"))
    model, _ = load_model(run)
    for chips in (1, 5):
        (found,) = session.run(None, {"images": images(chips).numpy()})
        np.testing.assert_allclose(found, model.encode_image(images(chips)), atol=1e-4, rtol=1e-4)


def test_the_card_tells_inputs_origin_results_and_licences(run: Path, tmp_path: Path) -> None:
    export_encoder(run, tmp_path / "timm", "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    for part in (
        "32 × 32 pixels and 4 bands in patches of 8 pixels",
        "| 3 | nir | 2550 | 255 |",
        "Pixels that are 0 (no data) in every band become 0",
        "Dataset `monaco`, snapshot 7, split `train`; 20 of 40 steps of 128 chips, seed 0",
        "`wordllama`",
        "kNN on the validation split, after step 20:",
        "| accuracy | 0.75 |",
        "knn on 1,600 images of monaco, 19 classes: accuracy, 95 % interval:",
        "| encoder | 78.6%, 76.8% to 80.6% |",
        "[ODbL-1.0](https://www.openstreetmap.org/copyright) | © OpenStreetMap contributors",
        '"embed_dim": 32',
    ):
        assert part in card, part
    assert "0.875" not in card
    assert "outdated" not in card
    export_encoder(run, tmp_path / "hf", "hf")
    head = (tmp_path / "hf" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(head)["library_name"] == "timm"


def test_what_cannot_be_exported_is_refused_and_nothing_left_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GeoLinkError, match=r"TorchGeo has no encoder of width 32.*--to timm"):
        export_encoder(run, tmp_path / "export", "torchgeo")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(GeoLinkError, match="is there already"):
        export_encoder(run, tmp_path / "full", "timm")
    with pytest.raises(GeoLinkError, match="does not exist"):
        export_encoder(tmp_path / "absent", tmp_path / "export", "timm")
    for options in ([], ["--to", "timm", "--format", "png"]):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(run), str(tmp_path / "export"), *options])
        assert stopped.value.code == 2
        assert "either --format (of a dataset) or --to" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_the_command_says_how_to_load_what_it_wrote(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run), str(tmp_path / "export"), "--to", "timm"])
    assert not stopped.value.code
    assert f'timm.create_model("local-dir:{tmp_path / "export"}"' in capsys.readouterr().out
