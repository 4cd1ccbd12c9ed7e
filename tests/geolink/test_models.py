"""Behaviour of the paper variant on random batches."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geolink.graph import KINDS, GraphBatch, normalise_tag_weight, pack
from geolink.models import GeoLink, ModelConfig, build
from geolink.models.losses import consistency_loss, contrast_loss, reconstruction_loss
from geolink.models.masking import mask_nodes, mask_patches, node_slots
from geolink.models.ops import patchify, rank_within, segment_softmax, sincos
from geolink.models.osm import set2set
from schemas.errors import GeoLinkError

CONFIG = ModelConfig(
    image_size=32, patch_size=8, bands=4, embed_dim=32, depth=2, num_heads=2, tag_dim=12,
    osm_dim=16, fusion_dim=16, fusion_heads=2, projection_dim=8, decoder_dim=16, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
TAGS = 20
LOSSES = ("reconstruction", "contrast", "consistency")


def random_graph(
    objects: list[int], *, kinds: tuple[int, ...] = (0, 1, 2), seed: int = 0
) -> GraphBatch:
    """Chips with so many objects of the given kinds, random edges both ways, 1-3 tags each."""
    rng = np.random.default_rng(seed)
    m = sum(objects)
    edges, edge_offset = [np.zeros((0, 2), np.int64)], [0]
    for n in objects:
        ends = rng.integers(0, n, (2 * n, 2))
        loops = np.repeat(np.arange(n), 2).reshape(-1, 2)
        edges.append(np.unique(np.concatenate([loops, ends, ends[:, ::-1]]), axis=0))
        edge_offset.append(edge_offset[-1] + len(edges[-1]))
    edge = np.concatenate(edges)
    tag_offset = np.concatenate([[0], rng.integers(1, 4, m).cumsum()]).astype(np.int64)
    return pack(
        object_offset=np.concatenate([[0], np.cumsum(objects)]).astype(np.int64),
        kind=rng.choice(kinds, m).astype(np.uint8),
        osm_class=np.zeros(m, np.uint8),
        osm_id=np.arange(m),
        size=np.ones(m, np.float32),
        anchor=rng.random((m, 4, 2)).astype(np.float32),
        tag_offset=tag_offset,
        tag=rng.integers(0, TAGS, tag_offset[-1]),
        tag_weight=normalise_tag_weight(tag_offset, rng.random(tag_offset[-1])),
        edge_offset=np.array(edge_offset, np.int64),
        edge=edge,
        relation=np.zeros(len(edge), np.uint8),
        patch_offset=np.zeros(m + 1, np.int64),
        patch=np.zeros(0, np.uint16),
        patch_weight=np.zeros(0, np.uint8),
    )


def make_model(**changes: Any) -> GeoLink:
    torch.manual_seed(0)
    return GeoLink(CONFIG.model_copy(update=changes), torch.randn(TAGS, CONFIG.tag_dim))


def random_images(chips: int) -> Tensor:
    return torch.randn(chips, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def unmasked(graph: GraphBatch) -> Tensor:
    return torch.zeros(graph.nodes, dtype=torch.bool)


def encode(model: GeoLink, graph: GraphBatch, masked: Tensor | None = None) -> Tensor:
    """Output of the graph attention, before the LayerNorm over the batch."""
    token = torch.cat([model.osm_mask_token[k] for k in KINDS])
    masked = unmasked(graph) if masked is None else masked
    encoded: Tensor = model.osm_encoder(model._node_features(graph), masked, token, graph)
    return encoded


# --- the graph side against torch_geometric -------------------------------------------------


def pyg_encode(model: GeoLink, features: Tensor, graph: GraphBatch) -> dict[str, Tensor]:
    from torch_geometric.nn import GATConv, HeteroConv

    c, kind = model.config, graph.kind()
    convs = HeteroConv(
        {
            (s, "to", t): GATConv(c.tag_dim, c.osm_dim, add_self_loops=False)
            for s in KINDS
            for t in KINDS
        },
        aggr="mean",
    )
    edges = {}
    for i, s in enumerate(KINDS):
        for j, t in enumerate(KINDS):
            ours = model.osm_encoder.convs[0].convs[f"<{s}___to___{t}>"]
            convs.convs[s, "to", t].load_state_dict(ours.state_dict())
            among = (kind[graph.edge[0]] == i) & (kind[graph.edge[1]] == j)
            start = torch.tensor([[graph.kind_ptr[i]], [graph.kind_ptr[j]]])
            edges[s, "to", t] = graph.edge[:, among] - start
    x = {k: features[graph.kind_slice(i)] for i, k in enumerate(KINDS)}
    return {k: v.relu() for k, v in convs(x, edges).items()}


@pytest.mark.parametrize("kinds", [(0, 1, 2), (1, 2), (0,)])
@torch.no_grad()
def test_graph_attention_equals_nine_gat_convolutions(kinds: tuple[int, ...]) -> None:
    pytest.importorskip("torch_geometric")
    model, graph = make_model(), random_graph([5, 9, 1], kinds=kinds)
    expected = pyg_encode(model, model._node_features(graph), graph)
    found = encode(model, graph)
    for i, kind in enumerate(KINDS):
        torch.testing.assert_close(found[graph.kind_slice(i)], expected[kind])


@torch.no_grad()
def test_a_masked_node_is_encoded_as_its_kinds_mask_token() -> None:
    pytest.importorskip("torch_geometric")
    model, graph = make_model(), random_graph([6, 8])
    masked = torch.rand(graph.nodes) < 0.5
    features = model._node_features(graph).clone()
    token = torch.cat([model.osm_mask_token[k] for k in KINDS])
    features[masked] = token[graph.kind()[masked]]
    expected = pyg_encode(model, features, graph)
    found = encode(model, graph, masked)
    torch.testing.assert_close(found, torch.cat([expected[k] for k in KINDS]))


@torch.no_grad()
def test_read_out_equals_set2set_per_kind() -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    model, graph = make_model(), random_graph([4, 0, 7])
    nodes = torch.randn(graph.nodes, CONFIG.osm_dim)
    star, some = set2set(model.osm_read_out, nodes, graph)
    for i, kind in enumerate(KINDS):
        oracle = pyg.aggr.Set2Set(CONFIG.osm_dim, processing_steps=5)
        oracle.load_state_dict(model.osm_read_out[kind].state_dict())
        at = graph.kind_slice(i)
        torch.testing.assert_close(star[i], oracle(nodes[at], graph.chip[at], dim_size=3))
        assert some[i].tolist() == [bool((graph.chip[at] == b).any()) for b in range(3)]


@torch.no_grad()
def test_norm_runs_over_all_nodes_and_channels_of_a_kind() -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    norm = make_model().osm_norm["line"]
    norm.weight.uniform_()
    oracle = pyg.LayerNorm(CONFIG.osm_dim, mode="graph")
    oracle.load_state_dict(norm.state_dict())
    x = torch.randn(9, CONFIG.osm_dim)
    torch.testing.assert_close(norm(x), oracle(x))


def test_segment_softmax_is_a_softmax_of_each_segment() -> None:
    logit, segment = torch.randn(50) * 30, torch.randint(0, 7, (50,))
    found = segment_softmax(logit, segment, 8)
    for s in range(7):
        torch.testing.assert_close(found[segment == s], logit[segment == s].softmax(0))


# --- one chip and its batch -----------------------------------------------------------------


def one_chip(objects: list[int], chip: int) -> tuple[GraphBatch, Tensor]:
    """A batch and the place of one chip's nodes in it."""
    graph = random_graph(objects)
    return graph, torch.nonzero(graph.chip == chip)[:, 0]


def cut(graph: GraphBatch, nodes: Tensor) -> GraphBatch:
    """The graph of some nodes of one chip, alone."""
    inside = torch.isin(graph.edge[1], nodes)
    lengths = graph.tag_offset.diff()
    of_node = torch.repeat_interleave(torch.arange(graph.nodes), lengths)
    tags = torch.isin(of_node, nodes)
    count = [int((graph.kind()[nodes] == k).sum()) for k in range(3)]
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[nodes].cumsum(0)])
    values = vars(graph) | {
        "kind_ptr": (0, count[0], count[0] + count[1], sum(count)),
        "chip": torch.zeros(len(nodes), dtype=torch.int64),
        "anchor": graph.anchor[nodes],
        "tag_offset": offset,
        "tag": graph.tag[tags],
        "tag_weight": graph.tag_weight[tags],
        "edge": torch.searchsorted(nodes, graph.edge[:, inside]),
        "relation": graph.relation[inside],
        "chips": 1,
    }
    return GraphBatch(**values)


@torch.no_grad()
def test_a_chips_graph_does_not_depend_on_the_batch_but_for_the_norm() -> None:
    model = make_model().eval()
    graph, nodes = one_chip([7, 12, 4], chip=1)
    alone = cut(graph, nodes)
    torch.testing.assert_close(encode(model, graph)[nodes], encode(model, alone))
    same = torch.randn(graph.nodes, CONFIG.osm_dim)
    together = model._read_out(same, graph)[0][1:2]
    torch.testing.assert_close(together, model._read_out(same[nodes], alone)[0])
    # The norm's statistics are the batch's: a documented property of the published weights.
    difference = model.encode_region(graph)[1] - model.encode_region(alone)[0]
    assert difference.abs().max() > 1e-3


@torch.no_grad()
def test_regions_and_fusion_follow_a_reordering_of_the_chips() -> None:
    model = make_model().eval()
    graph, images = random_graph([7, 7, 7]), random_images(3)
    order = torch.tensor([2, 0, 1])
    chip = torch.argsort(order)[graph.chip]
    by_chip = torch.argsort(graph.kind() * 3 + chip, stable=True)
    place = torch.argsort(by_chip)
    edge = place[graph.edge]
    by_target = torch.argsort(edge[1], stable=True)
    lengths = graph.tag_offset.diff()[by_chip]
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    first = torch.repeat_interleave(graph.tag_offset[by_chip] - offset[:-1], lengths)
    tags = torch.arange(len(graph.tag)) + first
    moved = GraphBatch(
        **vars(graph)
        | {
            "chip": chip[by_chip],
            "anchor": graph.anchor[by_chip],
            "tag_offset": offset,
            "tag": graph.tag[tags],
            "tag_weight": graph.tag_weight[tags],
            "edge": edge[:, by_target],
        }
    )
    torch.testing.assert_close(model.encode_region(moved), model.encode_region(graph)[order])
    found = model.fusion_embedding(images[order], moved, [1])[0]
    expected = model.fusion_embedding(images, graph, [1])[0][order]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- what the published code could not ------------------------------------------------------


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(random_graph([5, 6, 7], kinds=(2,)), id="one kind"),
        pytest.param(random_graph([5, 0, 7]), id="a chip without objects"),
        pytest.param(random_graph([0, 0, 7], kinds=(0, 1)), id="one chip with objects"),
        pytest.param(random_graph([0, 0, 0]), id="no object at all"),
        pytest.param(random_graph([1, 1, 1]), id="too few objects to mask"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_kinds_and_chips_give_finite_losses_and_gradients(
    graph: GraphBatch, dtype: torch.dtype
) -> None:
    model, images = make_model(), random_images(3)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(images, graph, generator=torch.Generator().manual_seed(0))
    out["total"].backward()
    assert all(value.isfinite().all() for value in out.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


@torch.no_grad()
def test_a_chip_without_objects_has_a_zero_region_and_a_fusion() -> None:
    model = make_model().eval()
    graph, images = random_graph([5, 0, 7]), random_images(3)
    region = model.encode_region(graph)
    assert (region.abs().sum(1) > 0).tolist() == [True, False, True]
    fused = model.fusion_embedding(images, graph, [1])[0]
    assert bool(fused.isfinite().all())
    # Without nodes there is nothing of other chips to depend on.
    alone = model.fusion_embedding(images[1:2], random_graph([0]), [1])[0]
    torch.testing.assert_close(fused[1:2], alone)


def test_bf16_losses_are_close_to_float32() -> None:
    model, images, graph = make_model().eval(), random_images(3), random_graph([9, 8, 7])
    full = model(images, graph, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, graph, generator=torch.Generator().manual_seed(0))
    for name in LOSSES:
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], atol=0.03, rtol=0.03)


def test_a_pass_leaves_its_inputs_as_they_are() -> None:
    model, images, graph = make_model(), random_images(3), random_graph([9, 0, 7])
    before = copy.deepcopy((images, vars(graph), model.tag_table))
    model(images, graph)["total"].backward()
    assert torch.equal(before[0], images)
    assert torch.equal(before[2], model.tag_table)
    for name, value in before[1].items():
        same = getattr(graph, name)
        assert torch.equal(value, same) if torch.is_tensor(value) else value == same


# --- training -------------------------------------------------------------------------------


def test_gradient_reaches_every_trainable_parameter_and_no_other() -> None:
    model = make_model(contrast_weight=1.0, consistency_weight=1.0)
    model(random_images(4), random_graph([20, 25, 30, 20]))["total"].backward()
    untrained = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert untrained == {
        "img_pos_embed", "rec_img_pos_embed", "fusion_img_pos_embed", "img_encoder.cls_token",
        "img_encoder.pos_embed", "img_encoder.norm.weight", "img_encoder.norm.bias",
        "type_attention.weight", "type_attention.bias",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in untrained:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


def test_fifty_steps_on_one_batch_lower_every_loss() -> None:
    model = make_model(contrast_weight=1.0, consistency_weight=1.0)
    images, graph = random_images(4), random_graph([10, 12, 8, 15])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for _ in range(50):
        out = model(images, graph, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
        history.append([float(out[name].detach()) for name in LOSSES])
    first, last = history[0], history[-1]
    assert all(b < 0.9 * a for a, b in zip(first, last)), dict(zip(LOSSES, zip(first, last)))


def test_total_is_the_weighted_sum_of_the_losses() -> None:
    model = make_model(contrast_weight=0.3, consistency_weight=0.7)
    out = model(random_images(2), random_graph([9, 9]))
    total = out["reconstruction"] + 0.3 * out["contrast"] + 0.7 * out["consistency"]
    torch.testing.assert_close(out["total"], total)


def test_the_same_generator_gives_the_same_masks_and_losses() -> None:
    model, images, graph = make_model().eval(), random_images(3), random_graph([9, 8, 7])
    runs = [model(images, graph, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(runs[0]["total"], runs[1]["total"])
    assert torch.equal(runs[0]["node_masked"], runs[1]["node_masked"])
    assert not torch.equal(runs[0]["masked"], runs[2]["masked"])


# --- masks ----------------------------------------------------------------------------------


def test_three_quarters_of_the_patches_are_hidden_those_with_most_noise() -> None:
    noise = torch.rand(3, 64)
    visible, restore, masked = mask_patches(noise, 0.75)
    assert visible.shape == (3, 16)
    assert masked.sum(1).tolist() == [48] * 3
    for b in range(3):
        assert noise[b, visible[b]].max() < noise[b, masked[b]].min()
        assert torch.equal(noise[b].sort().values[restore[b]], noise[b])


def test_a_fifth_of_each_chips_nodes_is_masked() -> None:
    objects = [0, 1, 2, 3, 10, 50, 99]
    graph = random_graph(objects)
    masked = mask_nodes(graph, torch.rand(graph.nodes), 0.2)
    found = [int(masked[graph.chip == b].sum()) for b in range(len(objects))]
    assert found == [round(0.2 * n) for n in objects] == [0, 0, 0, 1, 2, 10, 20]


@pytest.mark.parametrize("capacity", [None, 3, 10])
def test_slots_hold_the_selected_nodes_of_their_chip(capacity: int | None) -> None:
    graph = random_graph([12, 0, 1, 30])
    selected, noise = torch.rand(graph.nodes) < 0.4, torch.rand(graph.nodes)
    slot, valid = node_slots(graph, selected, noise, capacity)
    for chip in range(4):
        mine = torch.nonzero(selected & (graph.chip == chip))[:, 0]
        kept = mine[noise[mine].argsort()][:capacity]
        assert set(slot[chip][valid[chip]].tolist()) == set(kept.tolist())
    assert slot.shape[1] == (capacity or 30)


def test_ranks_count_from_zero_within_each_group() -> None:
    rank = rank_within(torch.tensor([1, 0, 1, 1, 3]), torch.tensor([0.5, 0.1, 0.2, 0.9, 0.0]), 4)
    assert rank.tolist() == [1, 0, 0, 2, 0]


# --- losses and positions by hand -----------------------------------------------------------


def test_reconstruction_is_the_error_on_hidden_patches_normalised_one_by_one() -> None:
    images = random_images(2)
    patches, prediction = patchify(images, 8), torch.randn(2, 16, 8 * 8 * 4)
    masked = torch.rand(2, 16) < 0.5
    errors = []
    for b, patch in torch.nonzero(masked).tolist():
        y, x = divmod(patch, 4)
        pixels = images[b, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].permute(1, 2, 0).reshape(-1)
        target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
        errors.append((prediction[b, patch] - target).square().mean())
    found = reconstruction_loss(prediction, patches, masked)
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_chips_without_a_region_take_no_part_in_the_contrast() -> None:
    image, region = torch.randn(5, 8), torch.randn(5, 8)
    some = torch.tensor([True, False, True, True, False])
    found = contrast_loss(image, region, 0.2, some)
    every = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(found, contrast_loss(image[some], region[some], 0.2, every))
    assert contrast_loss(image, region, 0.2, torch.zeros(5, dtype=torch.bool)) == 0


def test_consistency_is_the_mean_error_of_masked_nodes() -> None:
    prediction, target = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    valid = torch.tensor([[True, False, True], [False, True, False]])
    expected = (prediction[valid] - target[valid]).square().mean()
    torch.testing.assert_close(consistency_loss(prediction, target, valid), expected)


def test_weights_make_losses_weighted_means_over_chips() -> None:
    torch.manual_seed(3)
    patches, prediction = torch.randn(4, 16, 12), torch.randn(4, 16, 12)
    image, region = torch.randn(4, 8), torch.randn(4, 8)
    target, hidden = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    one, every = torch.ones(4), torch.ones(4, dtype=torch.bool)
    masked = torch.rand(4, 16).argsort(1) < 12
    valid = torch.ones(4, 3, dtype=torch.bool)

    def losses(weight: torch.Tensor | None, rows: slice = slice(None)) -> list[torch.Tensor]:
        return [
            reconstruction_loss(prediction[rows], patches[rows], masked[rows], weight),
            consistency_loss(hidden[rows], target[rows], valid[rows], weight),
        ]

    def contrast(weight: torch.Tensor | None, some: torch.Tensor = every) -> torch.Tensor:
        return contrast_loss(image, region, 0.2, some, weight)

    # Weights of 1 change no bit, nor does a common factor change the mean.
    for found, plain in zip([*losses(one), contrast(one)], [*losses(None), contrast(None)]):
        assert torch.equal(found, plain)
    torch.testing.assert_close(losses(0.01 * one), losses(None))
    # Every chip has as many patches and nodes, so the loss is the weighted mean of theirs.
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    for n, found in enumerate(losses(weight)):
        alone = torch.stack([losses(None, slice(b, b + 1))[n] for b in range(4)])
        torch.testing.assert_close(found, (alone * weight).sum() / weight.sum())
    # A chip of weight 0 is no positive, but still a negative of the others.
    alone = torch.stack([contrast(torch.eye(4)[b]) for b in range(4)])
    torch.testing.assert_close(contrast(weight), (alone * weight).sum() / weight.sum())
    assert contrast(weight) != contrast(weight, weight > 0)
    assert contrast(torch.zeros(4)) == 0


def test_positions_of_patches_and_anchors_are_the_same_function() -> None:
    model = make_model()
    # A point at the top-left corner of patch (x=2, y=1) of a 4 x 4 grid has that patch's position.
    anchor = torch.tensor([[[0.5, 0.25]] * 4])
    found = model._node_positions(anchor, torch.tensor([0]))
    torch.testing.assert_close(found[0], model.fusion_img_pos_embed[0, 1 + 1 * 4 + 2])


def test_a_lines_position_is_the_mean_of_its_first_three_anchors() -> None:
    model, anchor = make_model(), torch.rand(1, 4, 2)
    found = model._node_positions(anchor, torch.tensor([1]))
    expected = sincos(anchor[0, :3] * model.grid, CONFIG.fusion_dim).mean(0)
    torch.testing.assert_close(found[0], expected)


# --- embeddings and errors ------------------------------------------------------------------


@torch.no_grad()
def test_image_embedding_is_the_mean_of_patch_tokens_without_the_class_token() -> None:
    model, images = make_model().eval(), random_images(2)
    tokens = model.encode_image(images)
    assert tokens.shape == (2, 17, 32)
    torch.testing.assert_close(model.embed_image(images), tokens[:, 1:].mean(1))


@pytest.mark.parametrize("variant", ["paper", "geolink2"])
@torch.no_grad()
def test_no_image_has_no_embedding(variant: str) -> None:
    """As of a shard at sea, of which no chip has a class."""
    model = build.make_model(CONFIG.model_copy(update={"variant": variant}))
    assert model.embed_image(random_images(1)[:0]).shape == (0, CONFIG.embed_dim)


@torch.no_grad()
def test_exported_image_encoder_is_a_timm_model_with_the_trained_parts() -> None:
    model, images = make_model().eval(), random_images(2)
    model.cls_token.normal_()
    model.img_norm.weight.uniform_()
    encoder = model.image_encoder()
    assert type(encoder).__module__.startswith("timm.")
    found = encoder.forward_features(images)
    torch.testing.assert_close(found, model.encode_image(images), atol=1e-5, rtol=1e-5)
    encoder.cls_token.zero_()
    assert bool(model.cls_token.any())


@torch.no_grad()
def test_fusion_maps_have_the_patch_grid() -> None:
    model = make_model().eval()
    maps = model.fusion_embedding(random_images(2), random_graph([9, 60]), [0, 1], max_nodes=50)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4), (2, 16, 4, 4)]


def test_wrong_shapes_are_named() -> None:
    model, graph = make_model(), random_graph([3, 3])
    with pytest.raises(GeoLinkError, match=r"\[2, 3, 32, 32\].*\[batch, 4, 32, 32\]"):
        model(torch.zeros(2, 3, 32, 32), graph)
    with pytest.raises(GeoLinkError, match="3 images came with graphs of 2 chips"):
        model(random_images(3), graph)
    with pytest.raises(GeoLinkError, match=r"\[7, 5\].*\[tags, 12\]"):
        model.set_tag_table(torch.zeros(7, 5))
    with pytest.raises(GeoLinkError, match="layer 2 does not exist"):
        model.fusion_embedding(random_images(2), graph, [0, 2])


def test_tag_table_is_no_part_of_the_weights() -> None:
    assert not [name for name in make_model().state_dict() if "tag_table" in name]
