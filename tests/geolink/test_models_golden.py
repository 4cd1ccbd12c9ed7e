"""The paper variant against outputs of the published code (small model, random weights).

Each test runs on what is kept in `golden/` and, where they are there, on the whole files.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geolink.graph import KINDS, GraphBatch
from geolink.models import GeoLink, ModelConfig, load_published
from geolink.models.losses import contrast_loss, reconstruction_loss
from geolink.models.masking import mask_patches
from geolink.models.ops import patchify
from geolink.models.osm import set2set
from tests.geolink.golden.keep import KEPT, LEFT_OUT, PARTS, from_planes, normalised

CONFIG = ModelConfig(
    image_size=224, patch_size=16, embed_dim=64, depth=4, num_heads=4, tag_dim=512, osm_dim=32,
    fusion_dim=64, fusion_heads=4, projection_dim=16, decoder_dim=64, decoder_depth=2,
    decoder_heads=4,
)  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
HERE = Path(__file__).parent / "golden"


class Golden:
    """Arrays by `<part>/<name>`; which have been looked at."""

    def __init__(self, arrays: dict[str, Tensor], model: GeoLink, *, whole: bool) -> None:
        self.arrays, self.model, self.whole = arrays, model, whole
        self.looked_at: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.looked_at.add(name)
        return self.arrays[name]

    def check(self, found: Tensor, name: str) -> None:
        """To 1e-5, absolute and relative; of what is kept in part, that part."""
        key = name.rpartition("/")[2]
        if not self.whole and key in KEPT:
            found = found[KEPT[key]]
        torch.testing.assert_close(found, self[name], **CLOSE)


def kept() -> Golden:
    with np.load(HERE / "weights.npz") as file:
        values, shapes = torch.from_numpy(from_planes(file["planes"])), file["shapes"].tolist()
    model, state, at = GeoLink(CONFIG), {}, 0
    for name, *shape in (line.split() for line in shapes):
        sizes = [int(n) for n in shape]
        state[name] = values[at : at + int(np.prod(sizes))].view(sizes)
        at += state[name].numel()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(LEFT_OUT) for name in missing)
    with np.load(HERE / "outputs.npz") as file:
        arrays = {name: torch.as_tensor(file[name]) for name in file}
    arrays["input/images"] = torch.from_numpy(normalised(arrays["input/images"].numpy()))
    return Golden(arrays, model, whole=False)


def whole(folder: Path) -> Golden:
    arrays = {}
    for part in PARTS:
        with np.load(folder / f"batchA_{part}.npz") as file:
            arrays |= {f"{part}/{name}": torch.as_tensor(file[name]) for name in file}
    model = load_published(folder / "weights_lin.safetensors", CONFIG)
    return Golden(arrays, model, whole=True)


@pytest.fixture(scope="module", params=["kept", "whole"])
def golden(request: pytest.FixtureRequest) -> Golden:
    if request.param == "kept":
        found = kept()
    else:
        found = whole(request.getfixturevalue("shared") / "reference" / "golden")
    found.model.eval()
    return found


@pytest.fixture(scope="module")
def model(golden: Golden) -> GeoLink:
    return golden.model


@pytest.fixture(scope="module")
def inputs(golden: Golden) -> dict[str, Tensor]:
    part = "input/"
    return {n.removeprefix(part): v for n, v in golden.arrays.items() if n.startswith(part)}


@pytest.fixture(scope="module")
def features(inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([inputs[f"node/{k}/x"][:, :512] for k in KINDS])


@pytest.fixture(scope="module")
def graph(inputs: dict[str, Tensor]) -> GraphBatch:
    """The published batch, packed: node features become a vocabulary of one tag per node."""
    counts = [len(inputs[f"node/{k}/x"]) for k in KINDS]
    ptr = np.cumsum([0, *counts]).tolist()
    nodes = ptr[3]
    anchors = []
    for kind, n_anchors in zip(KINDS, (1, 3, 4)):
        xy = inputs[f"node/{kind}/x"][:, 512:].unflatten(1, (n_anchors, 2))
        anchors.append(torch.cat([xy, xy[:, -1:].expand(-1, 4 - n_anchors, -1)], 1))
    edges = [
        inputs[f"edge/{s}__{t}/edge_index"] + torch.tensor([[ptr[i]], [ptr[j]]])
        for i, s in enumerate(KINDS)
        for j, t in enumerate(KINDS)
    ]
    edge = torch.cat(edges, 1)
    edge = edge[:, edge[1].argsort(stable=True)]
    return GraphBatch(
        kind_ptr=tuple(ptr),
        chip=torch.cat([inputs[f"node/{k}/batch"] for k in KINDS]),
        osm_class=torch.zeros(nodes, dtype=torch.uint8),
        osm_id=torch.arange(nodes),
        size=torch.zeros(nodes),
        anchor=torch.cat(anchors),
        tag_offset=torch.arange(nodes + 1),
        tag=torch.arange(nodes),
        tag_weight=torch.ones(nodes),
        edge=edge,
        relation=torch.zeros(edge.shape[1], dtype=torch.uint8),
        patch_offset=torch.zeros(nodes + 1, dtype=torch.int64),
        patch=torch.zeros(0, dtype=torch.int32),
        patch_weight=torch.zeros(0),
        chips=3,
    )


@pytest.fixture(autouse=True)
def _published_tags(model: GeoLink, features: Tensor) -> None:
    model.set_tag_table(features)


@torch.no_grad()
def test_fusion_embeddings_are_the_published_ones(
    golden: Golden, model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch
) -> None:
    maps = model.fusion_embedding(inputs["images"], graph, [0, 1, 2, 3])
    for level, found in enumerate(maps):
        golden.check(found, f"i_fusion_embedding/level{level}")
    golden.check(maps[3], "i_fusion_embedding/level3_all_nodes")
    # No chip has more nodes than the published cap, so the cap changes nothing but their order.
    capped = model.fusion_embedding(inputs["images"], graph, [3], max_nodes=50)
    golden.check(capped[0], "i_fusion_embedding/level3")


@torch.no_grad()
def test_osm_encoder_and_node_positions_are_the_published_ones(
    golden: Golden, model: GeoLink, features: Tensor, graph: GraphBatch
) -> None:
    token = torch.cat([model.osm_mask_token[k] for k in KINDS])
    encoded = model.osm_encoder(features, torch.zeros(graph.nodes, dtype=torch.bool), token, graph)
    normed = model.encode_nodes(graph)
    position = model._node_positions(graph.anchor, graph.kind())
    for i, kind in enumerate(KINDS):
        at = graph.kind_slice(i)
        golden.check(encoded[at], f"ii_osm_encoder/{kind}/gat_relu")
        golden.check(normed[at], f"ii_osm_encoder/{kind}/normed")
        golden.check(position[at], f"ii_osm_encoder/{kind}/node_pos_embedding")


@torch.no_grad()
def test_region_embedding_is_the_published_one(
    golden: Golden, model: GeoLink, graph: GraphBatch
) -> None:
    star, some = set2set(model.osm_read_out, model.encode_nodes(graph), graph)
    for i, kind, chips in ((1, "line", 2), (2, "polygon", 3)):
        # Published rows end at the last chip with a node of the kind.
        golden.check(star[i, :chips], f"iii_aggregation/{kind}/set2set")
    assert some.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    golden.check(model.encode_region(graph), "iii_aggregation/aggregated")


@torch.no_grad()
def test_masked_image_pass_is_the_published_one(
    golden: Golden, model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch
) -> None:
    part = "iv_image/"
    noise = golden[part + "noise"]
    out = model(inputs["images"], graph, mask_noise=noise)
    visible, restore, masked = mask_patches(noise, 0.75)
    assert torch.equal(restore, golden[part + "ids_restore"])
    assert torch.equal(masked, golden[part + "mask"].bool())
    assert torch.equal(out["masked"], masked)
    golden.check(model.fusion_img_pos_embed[0, 1:][visible], part + "fusion_pos_visible")
    golden.check(out["tokens"], part + "encoder_tokens")
    golden.check(out["prediction"], part + "pred")
    golden.check(out["reconstruction"], part + "loss")
    patches = patchify(inputs["images"], 16)
    if golden.whole:
        golden.check(reconstruction_loss(golden[part + "pred"], patches, masked), part + "loss")


@torch.no_grad()
def test_contrast_is_the_published_one(
    golden: Golden, model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch
) -> None:
    part = "v_contrastive/"
    nothing = torch.zeros(graph.nodes, dtype=torch.bool)
    noise = golden["iv_image/noise"]
    out = model(inputs["images"], graph, mask_noise=noise, node_mask=nothing)
    golden.check(out["image_projection"], part + "img")
    golden.check(out["region_projection"], part + "graph")
    golden.check(out["contrast"], part + "loss")
    assert model.config.temperature == float(golden[part + "temperature"])
    every = torch.ones(3, dtype=torch.bool)
    loss = contrast_loss(golden[part + "img"], golden[part + "graph"], 0.2, every)
    golden.check(loss, part + "loss")


@torch.no_grad()
def test_two_way_block_is_the_published_one(golden: Golden, model: GeoLink) -> None:
    part = "vi_twoway/"
    block = model.osm_cross_modal_encoder[0]
    patches, nodes, at_patches, at_nodes = (
        golden[part + k] for k in ("queries", "keys", "query_pe", "key_pe")
    )
    valid = ~golden[part + "key_padding_mask"]
    out_patches, out_nodes = block(patches, nodes, at_patches, at_nodes, valid)
    golden.check(out_patches, part + "out_queries")
    golden.check(out_nodes, part + "out_keys")
    plain_patches, plain_nodes = block(patches, nodes, at_patches, at_nodes, None)
    golden.check(plain_patches, part + "nomask_queries")
    golden.check(plain_nodes, part + "nomask_keys")
    # What each node looks at, in the last of the three attentions.
    placed = nodes + at_nodes
    seen = block.norm1(nodes + block.self_attn(placed, placed, nodes, valid))
    looked = block.cross_attn_image_to_token.attention_map(
        seen + at_nodes, out_patches + at_patches, None
    )
    golden.check(looked, part + "attn")


def test_every_golden_array_has_been_compared(golden: Golden) -> None:
    """What the tests above did not look at would be no oracle."""
    if not golden.looked_at:
        pytest.skip("runs after the tests above")
    outputs = {name for name in golden.arrays if not name.startswith("input/")}
    assert outputs == golden.looked_at


def test_the_self_attention_map_of_padded_nodes_is_zero(model: GeoLink) -> None:
    block = model.osm_cross_modal_encoder[0].self_attn
    tokens, valid = torch.randn(2, 5, 64), torch.arange(5) < torch.tensor([[3], [0]])
    looked = block.attention_map(tokens, tokens, valid)
    assert not looked[0, :, 3:].any()
    assert not looked[1].any()
    torch.testing.assert_close(looked[0].sum(-1), torch.ones(5))
