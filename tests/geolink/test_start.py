"""Weights that a model starts from."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from geolink.checkpoint import CheckpointMeta, model_tensors, save_checkpoint
from geolink.models import GeoLink, ModelConfig
from geolink.models.base import PretrainModel
from geolink.models.build import make_model
from geolink.models.ops import grid_sincos
from geolink.models.start import start_from
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig

CONFIG = ModelConfig(
    image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, tag_dim=12, osm_dim=16,
    fusion_dim=16, fusion_heads=1, projection_dim=8, decoder_dim=32, decoder_depth=1,
    decoder_heads=1, max_masked_nodes=10,
)  # fmt: skip


def new_model(seed: int = 1, **changes: Any) -> GeoLink:
    torch.manual_seed(seed)
    return GeoLink(CONFIG.model_copy(update=changes))


def timm_model(**changes: Any) -> VisionTransformer:
    torch.manual_seed(2)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return VisionTransformer(**{**sizes, "num_classes": 5, **changes}).eval()


def saved(vit: VisionTransformer, path: Path) -> Path:
    save_file(vit.state_dict(), path)
    return path


@torch.no_grad()
def test_a_model_started_from_timm_encodes_as_timm(tmp_path: Path) -> None:
    vit, model = timm_model(), new_model()
    # Positions that are learnt, not computed.
    vit.pos_embed.normal_()
    notes = start_from(model, saved(vit, tmp_path / "vit.safetensors"))
    vit.norm.eps = 1e-5
    images = torch.randn(2, 3, 32, 32)
    found, expected = model.eval().encode_image(images), vit.forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert notes[1:] == ["new weights for everything but the image encoder"]
    fresh = new_model()
    assert torch.equal(model.osm_node_pred.weight, fresh.osm_node_pred.weight)


@torch.no_grad()
def test_bands_patches_and_positions_are_brought_to_the_model(tmp_path: Path) -> None:
    vit = timm_model(img_size=12, patch_size=4)
    vit.pos_embed.normal_()
    model = new_model(bands=6)
    notes = start_from(model, saved(vit, tmp_path / "vit.safetensors"))
    assert notes[1:3] == [
        "patch embedding brought from 3 to 6 bands and from 4 to 8 pixels",
        "learnt positions interpolated from 3 x 3 to 4 x 4 patches",
    ]
    # Six bands that repeat three give what the three give: the sums stay as large.
    plain = new_model()
    start_from(plain, tmp_path / "vit.safetensors")
    images = torch.randn(2, 3, 32, 32)
    found = model.eval().encode_image(images.repeat(1, 2, 1, 1))
    torch.testing.assert_close(found, plain.eval().encode_image(images), atol=1e-5, rtol=1e-5)
    # Of an even image, a resized patch embedding gives as much.
    even = torch.full((1, 3, 8, 8), 0.7)
    large = plain.patch_embed.proj(even).flatten()
    small = vit.patch_embed.proj(even[..., :4, :4]).flatten()
    torch.testing.assert_close(large, small, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sin_cos_positions_are_computed_for_the_grid(tmp_path: Path) -> None:
    vit, model = timm_model(img_size=48), new_model()
    vit.pos_embed.copy_(grid_sincos(6, 64))
    notes = start_from(model, saved(vit, tmp_path / "vit.safetensors"))
    assert "sin-cos positions computed anew, from 6 x 6 to 4 x 4 patches" in notes
    assert torch.equal(model.img_pos_embed, grid_sincos(4, 64))


def checkpoint(folder: Path, model: PretrainModel) -> Path:
    meta = CheckpointMeta(
        geolink="0", revision=None, step=5, steps=10, dataset="d", snapshot=3, tag_encoder="t",
        bands=("a", "b", "c"), nodata=0, mean=(0, 0, 0), std=(1, 1, 1),
        config=TrainConfig(dataset=Path("d"), run=folder, model=model.config),
    )  # fmt: skip
    save_checkpoint(folder, {"model.safetensors": model_tensors(model)}, meta, {})
    return folder


@pytest.mark.parametrize("kind", ["published", "run"])
def test_a_published_file_or_a_run_gives_the_whole_model(kind: str, tmp_path: Path) -> None:
    trained, model = new_model(7), new_model()
    if kind == "published":
        what = tmp_path / "m.pth"
        torch.save({"model_state_dict": trained.state_dict()}, what)
    else:
        what = checkpoint(tmp_path / "run", trained)
    notes = start_from(model, what)
    assert len(notes) == 1
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_has_another_shape_beside_the_encoder_stays_new_and_is_told(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", new_model(7))
    model = new_model(tag_dim=24, bands=4)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    notes = start_from(model, run)
    assert notes[1] == "patch embedding brought from 3 to 4 bands"
    assert notes[2] == (
        "new weights, as theirs have other shapes or are not there: img_decoder_pred, "
        "osm_encoder, osm_mask_token, osm_node_pred"
    )
    assert torch.equal(model.osm_node_pred.weight, fresh["osm_node_pred.weight"])
    assert not torch.equal(model.osm_norm["line"].weight + 1, fresh["osm_norm.line.weight"])
    assert not torch.equal(model.img_fusion_mlp.weight, fresh["img_fusion_mlp.weight"])


@torch.no_grad()
def test_the_encoder_of_one_variant_starts_from_that_of_another(tmp_path: Path) -> None:
    paper = new_model(7).eval()
    paper.cls_token.normal_()
    other = {"variant": "geolink2", "osm_dim": 32}
    second = make_model(ModelConfig.model_validate(CONFIG.model_dump() | other)).eval()
    registers = [n for n, _ in second.named_parameters() if n.endswith("reg_token")]
    notes = start_from(second, checkpoint(tmp_path / "run", paper))
    assert notes[1:] == ["new weights for everything but the image encoder"]
    # Registers are new: without them, and with the norms' eps alike, it is the same encoder.
    images, encoder = torch.randn(2, 3, 32, 32), second.image_encoder().eval()
    encoder.reg_token, encoder.num_prefix_tokens, encoder.num_reg_tokens = None, 1, 0
    for block in encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    assert registers
    found, expected = encoder.forward_features(images), paper.encode_image(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(GeoLinkError, match="reg_token is not the model's"):
        start_from(new_model(), checkpoint(tmp_path / "second", second))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"depth": 3}, r"blocks\.2.*is not the model's"),
        ({"depth": 1}, r"blocks\.1.* is missing"),
        ({"embed_dim": 32}, r"has shape \[32, 32\], not \[64, 64\]"),
        ({"reg_tokens": 4, "num_classes": 0}, r"reg_token is not the model's"),
        ({"init_values": 0.1}, r"ls1\.gamma is not the model's"),
    ],
)
def test_an_encoder_of_another_build_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = saved(timm_model(**changes), tmp_path / "vit.safetensors")
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GeoLinkError, match=problem):
        start_from(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_name_is_looked_up_in_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GeoLinkError, match="there are no weights absent to start from"):
        start_from(new_model(), "absent")

    def offline(name: str, pretrained: bool) -> None:
        raise OSError(f"no route to the host of {name}")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(GeoLinkError, match=r"cannot be fetched \(no route to the host"):
        start_from(new_model(), "timm:vit_tiny_patch16_224")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: timm_model())
    assert "vit_tiny" in start_from(new_model(), "timm:vit_tiny_patch16_224")[0]
