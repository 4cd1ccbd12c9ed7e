"""TorchGeo loads an exported encoder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from geolink.checkpoint import load_model
from geolink.convert import to_checkpoint
from geolink.export.encoder import export_encoder
from geolink.models import PAPER_VIT_LARGE, GeoLink, ModelConfig
from tests.integration.torchgeo_there import torchgeo_folder

HERE = Path(__file__).parent


@torch.no_grad()
@pytest.mark.slow
def test_torchgeos_constructor_and_task_load_an_export_as_its_card_says(tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(torchgeo_folder()), "TORCH_HOME": str(tmp_path / "torch"),
    }  # fmt: skip
    small = {"vit": "small", "bands": 4, "decoder_dim": 64, "decoder_heads": 2}
    config = ModelConfig.model_validate(
        PAPER_VIT_LARGE.model_dump(exclude={"vit", "embed_dim", "depth", "num_heads"}) | small
    )
    torch.manual_seed(0)
    model = GeoLink(config)
    model.cls_token.normal_()
    model.img_norm.weight.uniform_(0.5, 1.5)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "small.pth")
    to_checkpoint(tmp_path / "small.pth", tmp_path / "checkpoint", config)
    done = export_encoder(tmp_path / "checkpoint", tmp_path / "export", "torchgeo")
    assert done.files[:2] == ("README.md", "backbone.ckpt")

    images = torch.randn(2, 4, 224, 224)
    np.save(tmp_path / "images.npy", images.numpy())
    run = subprocess.run(
        [
            sys.executable, "-W", "ignore", str(HERE / "encode_with_torchgeo.py"),
            *(str(tmp_path / name) for name in ("export", "images.npy", "tokens.npy")),
        ],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = torch.from_numpy(np.load(tmp_path / "tokens.npy"))
    expected = load_model(tmp_path / "checkpoint")[0].encode_image(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
