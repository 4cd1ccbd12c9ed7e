"""Checkpoints in the published layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from geolink.models import PAPER_VIT_LARGE, GeoLink, ModelConfig, load_published
from geolink.models.published import (
    Layout,
    Published,
    infer_config,
    layout_of,
    native_state,
    published_state,
)
from schemas.errors import GeoLinkError

CONFIG = ModelConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, tag_dim=12, osm_dim=16,
    fusion_dim=16, fusion_heads=2, projection_dim=8, decoder_dim=16, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
GOLDEN_CONFIG = ModelConfig(
    image_size=224, patch_size=16, embed_dim=64, depth=4, num_heads=4, tag_dim=512, osm_dim=32,
    fusion_dim=64, fusion_heads=4, projection_dim=16, decoder_dim=64, decoder_depth=2,
    decoder_heads=4,
)  # fmt: skip


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save({"model_config": {"architecture": "tiny"}, "model_state_dict": state}, path)
    return path


def stored_twice(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`lin.weight` of every attention as `lin_src.weight` and `lin_dst.weight`."""
    result = {}
    for name, value in state.items():
        if ".lin." in name:
            result[name.replace(".lin.", ".lin_src.")] = value
            result[name.replace(".lin.", ".lin_dst.")] = value
        else:
            result[name] = value
    return result


@pytest.fixture(scope="module")
def lists(shared: Path) -> dict[str, dict[str, list[Any]]]:
    """Names, shapes and types of the published ViT-L files, by layout."""
    path = shared / "reference" / "parameters_vit_large.json"
    found: dict[str, dict[str, list[Any]]] = json.loads(path.read_text())
    return found


def of_shapes(parameters: dict[str, list[Any]]) -> Published:
    """A file of these shapes, without memory behind them."""
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in parameters.items()}
    return Published(layout_of(state), state, {})


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [("multimodal_pyg240", "pyg240", 443), ("multimodal_pyg281", "pyg281", 434),
     ("unimodal_timm_vit", "unimodal", 294)],
)  # fmt: skip
def test_the_published_vit_large_is_known_by_its_shapes_in_every_layout(
    lists: dict[str, dict[str, list[Any]]],
    name: str,
    layout: Layout,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published = of_shapes(lists[name])
    assert (len(published.state), published.layout) == (count, layout)
    config = infer_config(published, Path("p.pth"))
    assert config == PAPER_VIT_LARGE
    # Tensors on the meta device have no values to compare.
    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)
    native = native_state(published, config, Path("p.pth"))
    back = published_state(native, layout)
    assert {n: [list(v.shape), "float32"] for n, v in back.items()} == lists[name]


def test_names_and_shapes_of_vit_large_are_the_published_ones(
    lists: dict[str, dict[str, list[Any]]],
) -> None:
    with torch.device("meta"):
        model = GeoLink(PAPER_VIT_LARGE)
    ours = {name: [list(p.shape), "float32"] for name, p in model.state_dict().items()}
    assert ours == lists["multimodal_pyg281"]
    assert sum(p.numel() for p in model.parameters()) > 300e6


@pytest.mark.parametrize("vit", ["tiny", "small", "base", "large", "huge"])
def test_every_vit_is_known_by_its_shapes(vit: str) -> None:
    config = ModelConfig.model_validate(
        PAPER_VIT_LARGE.model_dump(exclude={"embed_dim", "depth", "num_heads", "vit"})
        | {"vit": vit, "patch_size": 14, "bands": 4, "tag_dim": 384, "decoder_depth": 3}
    )
    with torch.device("meta"):
        state = dict(GeoLink(config).state_dict())
    found = infer_config(Published("pyg281", state, {}), Path("p.pth"))
    assert found == config.model_copy(update={"vit": None})


def test_shapes_that_do_not_tell_the_model_ask_for_its_config(tmp_path: Path) -> None:
    state = dict(GeoLink(CONFIG).state_dict())
    with pytest.raises(GeoLinkError, match="give its config"):
        load_published(save(state, tmp_path / "m.pth"))
    del state["img_pos_embed"]
    with pytest.raises(GeoLinkError, match=r"damaged one: it has no img_pos_embed$"):
        load_published(save(state, tmp_path / "m.pth"))


def test_both_golden_files_hold_the_same_model(shared: Path) -> None:
    golden = shared / "reference" / "golden"
    published = load_published(golden / "fake_published_layout.pth", GOLDEN_CONFIG).state_dict()
    plain = load_published(golden / "weights_lin.safetensors", GOLDEN_CONFIG).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in published.items())


def test_a_multimodal_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    state = GeoLink(CONFIG).state_dict()
    for content in (state, stored_twice(state)):
        loaded = load_published(save(content, tmp_path / "m.pth"), CONFIG).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


@torch.no_grad()
def test_a_unimodal_checkpoint_fills_the_image_encoder(tmp_path: Path) -> None:
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        global_pool="",
    )  # fmt: skip
    vit.norm.eps = 1e-5
    vit.eval()
    model = load_published(save(vit.state_dict(), tmp_path / "u.pth"), CONFIG).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = vit.forward_features(images)
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-5)


def test_every_name_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = dict(GeoLink(CONFIG).state_dict())
    state["img_norm.weight"] = torch.zeros(5)
    del state["cls_token"], state["osm_node_pred.bias"]
    state["surplus"] = torch.zeros(1)
    with pytest.raises(GeoLinkError) as error:
        load_published(save(state, tmp_path / "m.pth"), CONFIG)
    for part in (
        "cls_token is missing",
        "osm_node_pred.bias is missing",
        "surplus is not the model's",
        "img_norm.weight has shape [5], not [32]",
    ):
        assert part in str(error.value)


def test_weights_stored_twice_must_agree(tmp_path: Path) -> None:
    state = stored_twice(dict(GeoLink(CONFIG).state_dict()))
    name = "osm_encoder.convs.0.convs.<line___to___point>.lin_dst.weight"
    state[name] = state[name] + 1
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + 1
    with pytest.raises(GeoLinkError, match=r"differs from lin_src.*differs from img_encoder"):
        load_published(save(state, tmp_path / "m.pth"), CONFIG)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="there is no checkpoint"):
        load_published(tmp_path / "absent.pth", CONFIG)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(save(dict(GeoLink(CONFIG).state_dict()), broken).read_bytes()[:500])
    with pytest.raises(GeoLinkError, match="no readable checkpoint"):
        load_published(broken, CONFIG)
    other = tmp_path / "other.pth"
    torch.save([1, 2], other)
    with pytest.raises(GeoLinkError, match="named tensors"):
        load_published(other, CONFIG)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(GeoLinkError, match="no readable checkpoint"):
        load_published(tmp_path / "evil.pth", CONFIG)
    assert not (tmp_path / "ran").exists()
