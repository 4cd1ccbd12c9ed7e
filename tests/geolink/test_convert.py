"""Published files into checkpoints and back."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geolink.checkpoint import load_model, read_meta
from geolink.cli import main
from geolink.convert import to_checkpoint, to_published
from geolink.models import GeoLink, ModelConfig
from geolink.models.published import LAYOUTS, Layout, published_state, read_published
from schemas.errors import GeoLinkError

CONFIG = ModelConfig(
    image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, tag_dim=12, osm_dim=16,
    fusion_dim=16, fusion_heads=1, projection_dim=8, decoder_dim=32, decoder_depth=1,
    decoder_heads=1, max_masked_nodes=10,
)  # fmt: skip
STATED = {
    "architecture": "custom", "num_classes": 0, "global_pool": "",
    "pos_embed_requires_grad": False,
}  # fmt: skip


def native() -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = GeoLink(CONFIG)
    return {name: torch.randn_like(value) for name, value in model.named_parameters()}


def published(path: Path, layout: Layout) -> Path:
    state = published_state(native(), layout)
    # As files that were trained in half precision here and there would have it.
    kind = "img_encoder." if layout != "unimodal" else ""
    state[f"{kind}blocks.0.norm1.bias"] = state[f"{kind}blocks.0.norm1.bias"].half()
    torch.save({"model_config": STATED, "model_state_dict": state}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_published_file_comes_back_from_a_checkpoint_as_it_was(
    layout: Layout, suffix: str, tmp_path: Path
) -> None:
    source = published(tmp_path / "source.pth", layout)
    to_checkpoint(source, tmp_path / "checkpoint")
    assert to_published(tmp_path / "checkpoint", tmp_path / f"back{suffix}") == layout
    before, after = read_published(source), read_published(tmp_path / f"back{suffix}")
    assert after.layout == layout
    assert after.state.keys() == before.state.keys()
    for name, value in before.state.items():
        assert after.state[name].dtype == value.dtype, name
        assert torch.equal(after.state[name], value), name
    if suffix == ".pth":
        assert after.config == STATED
        # What is stored twice takes memory once, as in the file that it came from.
        distinct = [len({v.data_ptr() for v in f.state.values()}) for f in (before, after)]
        assert distinct[0] == distinct[1]


def test_both_golden_files_come_back_as_they_were(shared: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        image_size=224, patch_size=16, embed_dim=64, depth=4, num_heads=4, tag_dim=512, osm_dim=32,
        fusion_dim=64, fusion_heads=4, projection_dim=16, decoder_dim=64, decoder_depth=2,
        decoder_heads=4,
    )  # fmt: skip
    for name in ("fake_published_layout.pth", "weights_lin.safetensors"):
        source = shared / "reference" / "golden" / name
        folder, back = tmp_path / source.stem, tmp_path / f"back{source.suffix}"
        to_checkpoint(source, folder, config)
        to_published(folder, back)
        before, after = read_published(source), read_published(back)
        assert before.state.keys() == after.state.keys()
        assert all(torch.equal(after.state[n], v) for n, v in before.state.items())
        assert after.config == before.config


def test_a_converted_checkpoint_is_loaded_as_any_other(tmp_path: Path) -> None:
    source = published(tmp_path / "source.pth", "pyg240")
    to_checkpoint(source, tmp_path / "checkpoint")
    model, meta = load_model(tmp_path / "checkpoint")
    expected = native()
    for name, value in model.named_parameters():
        if name != "img_encoder.blocks.0.norm1.bias":
            assert torch.equal(value, expected[name]), name
    assert meta.config.model == CONFIG
    assert (meta.step, meta.steps, meta.snapshot, meta.nodata) == (0, 0, 0, -1)
    # ImageNet's statistics, of values of 8 bits.
    assert meta.mean == pytest.approx((123.675, 116.28, 103.53))
    assert meta.published is not None
    assert (meta.published.file, meta.published.layout) == ("source.pth", "pyg240")


def test_of_a_unimodal_file_the_rest_of_the_model_is_new_and_reproducible(tmp_path: Path) -> None:
    source = published(tmp_path / "source.pth", "unimodal")
    meta = to_checkpoint(source, tmp_path / "a")
    to_checkpoint(source, tmp_path / "b")
    (a, _), (b, _) = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
    assert torch.equal(a.cls_token, native()["cls_token"])
    assert meta.published is not None
    assert meta.published.layout == "unimodal"
    # The encoder of a whole model is written in this layout, too.
    to_checkpoint(published(tmp_path / "whole.pth", "pyg281"), tmp_path / "c")
    to_published(tmp_path / "c", tmp_path / "encoder.pth", "unimodal")
    both = [read_published(tmp_path / n).state for n in ("source.pth", "encoder.pth")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(v, both[1][n]) for n, v in both[0].items())


def test_what_cannot_be_converted_is_refused_and_nothing_left_behind(tmp_path: Path) -> None:
    source = published(tmp_path / "source.pth", "pyg281")
    to_checkpoint(source, tmp_path / "checkpoint")
    with pytest.raises(GeoLinkError, match="is there already"):
        to_checkpoint(source, tmp_path / "checkpoint")
    with pytest.raises(GeoLinkError, match=r"no \.pth, \.pt or \.safetensors"):
        to_published(tmp_path / "checkpoint", tmp_path / "back.bin")
    meta = read_meta(tmp_path / "checkpoint")
    fixed = CONFIG.model_copy(update={"fixes": ("node_norm",)})
    changed = meta.model_copy(update={"config": meta.config.model_copy(update={"model": fixed})})
    (tmp_path / "checkpoint" / "config.json").write_text(changed.model_dump_json())
    with pytest.raises(GeoLinkError, match=r"differs from the published model \(node_norm\)"):
        to_published(tmp_path / "checkpoint", tmp_path / "back.pth")
    to_published(tmp_path / "checkpoint", tmp_path / "encoder.pth", "unimodal")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "encoder.pth", "source.pth"]


def test_the_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "source.pth", "pyg240")
    folder, back = tmp_path / "checkpoint", tmp_path / "back.safetensors"
    for arguments in (
        ["convert", str(source), str(folder), "--json"],
        ["convert", str(folder), str(back), "--layout", "pyg281", "--json"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code
        told = json.loads(capsys.readouterr().out)
        if arguments[1] == str(source):
            # Shapes tell all but these, which could be wrong without a word.
            assert {"num_heads", "fusion_heads", "decoder_heads"} <= told["not_in_the_file"].keys()
    assert told["layout"] == "pyg281"
    assert len(read_published(back).state) == len(read_published(source).state) - 9
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(source), str(tmp_path / "x"), "--layout", "pyg281"])
    assert stopped.value.code == 2
    assert "a file has its own" in capsys.readouterr().err
