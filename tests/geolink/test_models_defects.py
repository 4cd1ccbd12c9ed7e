"""Defects of the published code that are not kept (docs/model.md); more are in test_models.py."""

from dataclasses import replace

import pytest
import torch

from geolink.graph import GraphBatch
from tests.geolink.test_models import LOSSES, make_model, random_graph, random_images


def without_edges(graph: GraphBatch) -> GraphBatch:
    return replace(graph, edge=graph.edge[:, :0], relation=graph.relation[:0])


def without_tags(graph: GraphBatch) -> GraphBatch:
    return replace(
        graph, tag_offset=torch.zeros_like(graph.tag_offset), tag=graph.tag[:0],
        tag_weight=graph.tag_weight[:0],
    )  # fmt: skip


@pytest.mark.parametrize("bare", [without_edges, without_tags])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_without_any_edge_or_tag_are_learnt_from(
    bare: type[GraphBatch], dtype: torch.dtype
) -> None:
    model = make_model()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(random_images(3), bare(random_graph([5, 0, 7])))
    out["total"].backward()
    assert all(bool(out[name].isfinite()) for name in LOSSES)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


@torch.no_grad()
def test_without_edges_a_node_is_the_mean_of_the_biases_as_an_empty_relation_is() -> None:
    model, graph = make_model().eval(), without_edges(random_graph([5, 7], kinds=(1,)))
    layer = model.osm_encoder.convs[0]
    biases = [layer.convs[f"<{kind}___to___line>"].bias for kind in ("point", "line", "polygon")]
    for bias in biases:
        bias.normal_()
    token = torch.cat(list(model.osm_mask_token.values()))
    none = torch.zeros(graph.nodes, dtype=torch.bool)
    found = layer(model._node_features(graph), none, token, graph)
    expected = torch.stack(biases).mean(0).relu().expand(graph.nodes, -1)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_no_node_is_left_out_at_random_after_pretraining() -> None:
    model, graph, images = make_model().eval(), random_graph([80, 3]), random_images(2)
    torch.manual_seed(1)
    first = model.fusion_embedding(images, graph, [1])[0]
    torch.manual_seed(2)
    again = model.fusion_embedding(images, graph, [1])[0]
    torch.testing.assert_close(first, again, atol=1e-6, rtol=1e-6)
    # The published cap can be had, and is reproducible.
    capped = [
        model.fusion_embedding(
            images, graph, [1], max_nodes=50, generator=torch.Generator().manual_seed(seed)
        )[0]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(capped[0], capped[1])
    assert not torch.allclose(capped[0], capped[2], atol=1e-6)


@torch.no_grad()
def test_an_encoder_that_is_only_used_has_no_dropout() -> None:
    model, graph, images = make_model().eval(), random_graph([9, 8]), random_images(2)
    passes = [
        model(images, graph, generator=torch.Generator().manual_seed(0))["total"] for _ in range(2)
    ]
    assert torch.equal(*passes)
