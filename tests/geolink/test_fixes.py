"""Quirks of the published model that can be put right, one by one; sizes by name."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from geolink.graph import KINDS, GraphBatch
from geolink.models import GeoLink, ModelConfig
from geolink.models.fusion import TwoWayBlock
from geolink.models.osm import set2set
from schemas.errors import GeoLinkError
from schemas.layout import Relation
from schemas.load import load_config
from schemas.training import Fix, TrainConfig
from tests.geolink.test_models import cut, encode, make_model, random_graph, random_images, unmasked

ROOT = Path(__file__).resolve().parents[2]

IMAGE = {"prediction", "masked", "tokens", "reconstruction"}
REGION = {"region", "region_projection"}
CONTRAST = {"contrast", "total"}
CONSISTENCY = {"consistency", "total"}
CHANGES: dict[Fix, set[str]] = {
    "all_nodes": CONSISTENCY,
    "centred_positions": CONSISTENCY,
    "node_norm": REGION | CONTRAST | CONSISTENCY,
    "node_residual": CONSISTENCY,
    "patch_mlp": CONSISTENCY,
    "present_kinds": REGION | CONTRAST | CONSISTENCY,
    "relation_codes": REGION | CONTRAST | CONSISTENCY,
    "type_attention": REGION | CONTRAST,
    "whole_image": {"image_projection"} | CONTRAST,
    "whole_region": REGION | CONTRAST,
}
"""What of a pretraining pass each of them changes."""
NEW: dict[Fix, set[str]] = {
    "relation_codes": {"osm_encoder.convs.0.relation_bias"},
    "patch_mlp": {
        f"osm_cross_modal_encoder.0.{name}"
        for name in ("patch_mlp.0.weight", "patch_mlp.0.bias", "patch_mlp.2.weight",
                     "patch_mlp.2.bias", "patch_norm.weight", "patch_norm.bias")
    },
}  # fmt: skip
"""Parameters that a fix brings."""


def graph_of(objects: list[int], **options: Any) -> GraphBatch:
    """Random chips with random relations."""
    graph = random_graph(objects, **options)
    generator = torch.Generator().manual_seed(4)
    code = torch.randint(0, len(Relation), graph.relation.shape, generator=generator)
    return replace(graph, relation=code.to(torch.uint8))


def fixed(plain: GeoLink, *fixes: Fix) -> GeoLink:
    """A model with the same weights where it has the same parameters, in evaluation mode."""
    model = make_model(fixes=fixes, max_masked_nodes=plain.config.max_masked_nodes)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.set_tag_table(plain.tag_table)
    return model.eval()


def one_pass(model: GeoLink, graph: GraphBatch) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(9)
    return model(random_images(graph.chips), graph, generator=noise)


@pytest.mark.parametrize("fix", get_args(Fix))
@torch.no_grad()
def test_a_fix_changes_what_it_says_and_nothing_else(fix: Fix) -> None:
    plain = make_model().eval()
    model, graph = fixed(plain, fix), graph_of([9, 14, 5])
    if fix == "relation_codes":
        # It begins as the published model: all biases are 0.
        for name, value in one_pass(plain, graph).items():
            torch.testing.assert_close(one_pass(model, graph)[name], value)
        nn.init.normal_(model.osm_encoder.convs[0].relation_bias)
    before, after = one_pass(plain, graph), one_pass(model, graph)
    changed = {
        name for name in before if before[name].shape != after[name].shape
        or not torch.allclose(before[name].float(), after[name].float(), atol=1e-6)
    }  # fmt: skip
    assert changed == CHANGES[fix]
    assert not changed & IMAGE
    names = {n for n, _ in model.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert names == NEW.get(fix, set())


@pytest.mark.parametrize("fix", get_args(Fix))
def test_with_a_fix_every_trainable_parameter_has_a_gradient(fix: Fix) -> None:
    model = make_model(fixes=(fix,), contrast_weight=1.0, consistency_weight=1.0)
    for graph in (graph_of([20, 25, 30]), graph_of([6, 0, 7], kinds=(1, 2)), graph_of([0, 0, 0])):
        model.zero_grad()
        out = one_pass(model, graph)
        out["total"].backward()
        assert bool(out["total"].isfinite())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert bool(parameter.grad.isfinite().all()), name
    assert model.type_attention.weight.requires_grad == (fix == "type_attention")


@pytest.mark.parametrize("fix", get_args(Fix))
def test_every_fix_stands_at_its_line_and_in_the_docs(fix: Fix) -> None:
    code = "".join(
        (ROOT / "geolink" / "models" / name).read_text()
        for name in ("paper.py", "osm.py", "fusion.py")
    )
    assert f"Quirk `{fix}`" in code
    assert re.search(rf"^\| .*`{fix}`.* \|$", (ROOT / "docs" / "model.md").read_text(), re.M)


# --- each against its own oracle ---------------------------------------------------------------


@torch.no_grad()
def test_with_node_norm_a_chip_does_not_depend_on_its_batch() -> None:
    model, graph = make_model(fixes=("node_norm",)).eval(), graph_of([7, 12, 4])
    alone = cut(graph, torch.nonzero(graph.chip == 1)[:, 0])
    torch.testing.assert_close(model.encode_region(graph)[1], model.encode_region(alone)[0])


@torch.no_grad()
def test_with_present_kinds_the_mean_is_over_kinds_that_have_an_edge() -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    model, graph = make_model(fixes=("present_kinds",)).eval(), graph_of([5, 9, 3])
    # Parameters that a new model has as zeros would hide whether a bias counts.
    for name, value in model.osm_encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value)
    features, kind = model._node_features(graph), graph.kind()
    total, count = torch.zeros(graph.nodes, model.config.osm_dim), torch.zeros(graph.nodes)
    for i, source in enumerate(KINDS):
        for j, target in enumerate(KINDS):
            conv = pyg.GATConv(model.config.tag_dim, model.config.osm_dim, add_self_loops=False)
            ours = model.osm_encoder.convs[0].convs[f"<{source}___to___{target}>"]
            conv.load_state_dict(ours.state_dict())
            edge = graph.edge[:, (kind[graph.edge[0]] == i) & (kind[graph.edge[1]] == j)]
            reached = torch.zeros(graph.nodes, dtype=torch.bool)
            reached[edge[1]] = True
            total += conv(features, edge) * reached[:, None]
            count += reached
    assert len(count.unique()) == 3
    torch.testing.assert_close(encode(model, graph), (total / count[:, None]).relu())


@torch.no_grad()
def test_with_type_attention_a_region_is_a_weighted_mean_of_its_kinds() -> None:
    model, graph = make_model(fixes=("type_attention",)).eval(), graph_of([6, 9, 0])
    nn.init.normal_(model.type_attention.weight)
    nodes = torch.randn(graph.nodes, model.config.osm_dim)
    found, some = model._read_out(nodes, graph)
    star, there = set2set(model.osm_read_out, nodes, graph)
    assert some.tolist() == [True, True, False]
    assert not found[2].any()
    for chip in (0, 1):
        kinds = torch.stack(
            [model.osm_aggr_mlp[k](star[i, chip]) for i, k in enumerate(KINDS) if there[i, chip]]
        )
        share = model.type_attention(kinds).softmax(0)
        torch.testing.assert_close(found[chip], (share * kinds).sum(0))


@torch.no_grad()
def test_with_relation_codes_what_stands_between_objects_matters() -> None:
    plain = make_model().eval()
    model, graph = fixed(plain, "relation_codes"), graph_of([9, 14, 5])
    nn.init.normal_(model.osm_encoder.convs[0].relation_bias)
    other = replace(graph, relation=(graph.relation + 3) % len(Relation))
    assert torch.equal(encode(plain, graph), encode(plain, other))
    assert not torch.allclose(encode(model, graph), encode(model, other), atol=1e-3)


@torch.no_grad()
def test_the_contrast_may_see_the_whole_image_and_the_whole_region() -> None:
    model = make_model(fixes=("whole_image", "whole_region")).eval()
    graph = graph_of([9, 14, 5])
    out, images = one_pass(model, graph), random_images(3)
    image = model.img_consistency_prj(model.embed_image(images))
    torch.testing.assert_close(out["image_projection"], image)
    torch.testing.assert_close(out["region"], model.encode_region(graph))


def test_with_centred_positions_the_middle_of_a_patch_has_its_position() -> None:
    model = make_model(fixes=("centred_positions",))
    # The middle of patch (x=2, y=1) of a 4 x 4 grid.
    anchor = torch.tensor([[[0.625, 0.375]] * 4])
    found = model._node_positions(anchor, torch.tensor([0]))
    torch.testing.assert_close(found[0], model.fusion_img_pos_embed[0, 1 + 1 * 4 + 2])


@torch.no_grad()
def test_with_all_nodes_what_is_not_masked_takes_part_in_the_fusion() -> None:
    plain = make_model().eval()
    graph = graph_of([9, 14, 5])
    hidden = unmasked(graph)
    hidden[::4] = True
    # Anchors are looked at by the fusion alone.
    moved = replace(graph, anchor=torch.where(hidden[:, None, None], graph.anchor, 0.9))
    images = random_images(3)
    noise = torch.rand(3, 16)

    def consistency(model: GeoLink, graph: GraphBatch) -> Tensor:
        return model(images, graph, mask_noise=noise, node_mask=hidden)["consistency"]

    assert torch.equal(consistency(plain, graph), consistency(plain, moved))
    model = fixed(plain, "all_nodes")
    assert consistency(model, graph) != consistency(model, moved)
    # Where only so many fit, the masked ones come first: then it is as published.
    one = graph_of([12])
    hidden = unmasked(one)
    hidden[:3] = True
    images, noise = images[:1], noise[:1]
    capped = make_model(max_masked_nodes=3).eval()
    torch.testing.assert_close(
        consistency(fixed(capped, "all_nodes"), one), consistency(capped, one)
    )


@torch.no_grad()
def test_the_fusion_block_with_a_residual_of_nodes_and_an_mlp_of_patches() -> None:
    torch.manual_seed(0)
    plain = TwoWayBlock(16, 2).eval()
    parts = [torch.randn(2, n, 16) for n in (9, 5, 9, 5)]
    patches, _ = plain(*parts, None)
    residual = TwoWayBlock(16, 2, ("node_residual",)).eval()
    residual.load_state_dict(plain.state_dict())
    seen: list[Tensor] = []
    residual.mlp.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    same, found = residual(*parts, None)
    assert torch.equal(same, patches)
    torch.testing.assert_close(found, plain.norm4(plain.mlp(seen[0]) + seen[0]))

    mlp = TwoWayBlock(16, 2, ("patch_mlp",)).eval()
    mlp.load_state_dict(plain.state_dict(), strict=False)
    found, _ = mlp(*parts, None)
    assert mlp.patch_mlp is not None
    assert mlp.patch_norm is not None
    torch.testing.assert_close(found, mlp.patch_norm(patches + mlp.patch_mlp(patches)))


# --- configs -----------------------------------------------------------------------------------


def test_a_vit_by_name_is_its_width_depth_and_heads() -> None:
    sizes = {
        "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
        "large": (1024, 24, 16), "huge": (1280, 32, 16),
    }  # fmt: skip
    for name, size in sizes.items():
        config = ModelConfig.model_validate({"vit": name})
        assert (config.embed_dim, config.depth, config.num_heads) == size
        assert ModelConfig.model_validate(config.model_dump()) == config
    with torch.device("meta"):
        count = {
            name: sum(
                p.numel()
                for p in GeoLink(
                    ModelConfig.model_validate(
                        {"vit": name, "image_size": 224, "patch_size": 14 if name == "huge" else 16}
                    )
                ).image_encoder().parameters()
            )
            for name in sizes
        }  # fmt: skip
    # Millions, as the papers have them without classifier.
    assert {n: round(c / 1e6) for n, c in count.items()} == {
        "tiny": 6, "small": 22, "base": 86, "large": 303, "huge": 631,
    }  # fmt: skip


def test_a_size_by_name_that_contradicts_another_is_refused() -> None:
    with pytest.raises(ValidationError, match="vit base has depth 12, not 6: leave out depth"):
        ModelConfig.model_validate({"vit": "base", "depth": 6})


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("vit: giant", "model.vit"),
        ("fixes: [half_patch]", "model.fixes"),
        ("embed_dim: 30", "embed_dim 30 cannot hold"),
        ("mask_ratio: 0.99", "mask_ratio 0.99 of 64 patches .* leaves none to see"),
        ("patch_size: 64", "mask_ratio 0.75 of 1 patches .* smaller patch_size"),
    ],
)
def test_a_model_that_cannot_be_is_one_sentence(line: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(f"dataset: d\nrun: r\nmodel:\n  {line}\n")
    with pytest.raises(GeoLinkError, match=f"{path}:[34]: .*{text}") as error:
        load_config(path, TrainConfig)
    assert str(error.value).count("\n") == 0


def test_betas_are_shares(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("dataset: d\nrun: r\nbetas: [0.9, 1.5]\n")
    with pytest.raises(GeoLinkError, match=f"{path}:3: betas.*less than 1"):
        load_config(path, TrainConfig)
