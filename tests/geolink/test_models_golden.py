"""The paper variant against outputs of the published code (small model, random weights)."""

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

CONFIG = ModelConfig(
    image_size=224, patch_size=16, embed_dim=64, depth=4, num_heads=4, tag_dim=512, osm_dim=32,
    fusion_dim=64, fusion_heads=4, projection_dim=16, decoder_dim=64, decoder_depth=2,
    decoder_heads=4,
)  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "reference" / "golden"


def load(folder: Path, name: str) -> dict[str, Tensor]:
    with np.load(folder / f"batchA_{name}.npz") as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays}


@pytest.fixture(scope="module")
def model(folder: Path) -> GeoLink:
    return load_published(folder / "weights_lin.safetensors", CONFIG).eval()


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Tensor]:
    return load(folder, "input")


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
    model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch, folder: Path
) -> None:
    golden = load(folder, "i_fusion_embedding")
    maps = model.fusion_embedding(inputs["images"], graph, [0, 1, 2, 3])
    for level, found in enumerate(maps):
        torch.testing.assert_close(found, golden[f"level{level}"], **CLOSE)


@torch.no_grad()
def test_osm_encoder_and_node_positions_are_the_published_ones(
    model: GeoLink, features: Tensor, graph: GraphBatch, folder: Path
) -> None:
    golden = load(folder, "ii_osm_encoder")
    token = torch.cat([model.osm_mask_token[k] for k in KINDS])
    encoded = model.osm_encoder(features, torch.zeros(graph.nodes, dtype=torch.bool), token, graph)
    normed = model.encode_nodes(graph)
    position = model._node_positions(graph.anchor, graph.kind())
    for i, kind in enumerate(KINDS):
        at = graph.kind_slice(i)
        torch.testing.assert_close(encoded[at], golden[f"{kind}/gat_relu"], **CLOSE)
        torch.testing.assert_close(normed[at], golden[f"{kind}/normed"], **CLOSE)
        torch.testing.assert_close(position[at], golden[f"{kind}/node_pos_embedding"], **CLOSE)


@torch.no_grad()
def test_region_embedding_is_the_published_one(
    model: GeoLink, graph: GraphBatch, folder: Path
) -> None:
    golden = load(folder, "iii_aggregation")
    star, some = set2set(model.osm_read_out, model.encode_nodes(graph), graph)
    for i, kind in ((1, "line"), (2, "polygon")):
        # Published rows end at the last chip with a node of the kind.
        rows = golden[f"{kind}/set2set"]
        torch.testing.assert_close(star[i, : len(rows)], rows, **CLOSE)
    assert some.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    torch.testing.assert_close(model.encode_region(graph), golden["aggregated"], **CLOSE)


@torch.no_grad()
def test_masked_image_pass_is_the_published_one(
    model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch, folder: Path
) -> None:
    golden = load(folder, "iv_image")
    noise = golden["noise"]
    out = model(inputs["images"], graph, mask_noise=noise)
    visible, restore, masked = mask_patches(noise, 0.75)
    assert torch.equal(restore, golden["ids_restore"])
    assert torch.equal(masked, golden["mask"].bool())
    assert torch.equal(out["masked"], masked)
    position = model.fusion_img_pos_embed[0, 1:][visible]
    torch.testing.assert_close(position, golden["fusion_pos_visible"], **CLOSE)
    torch.testing.assert_close(out["tokens"], golden["encoder_tokens"], **CLOSE)
    torch.testing.assert_close(out["prediction"], golden["pred"], **CLOSE)
    torch.testing.assert_close(out["reconstruction"], golden["loss"], **CLOSE)
    patches = patchify(inputs["images"], 16)
    loss = reconstruction_loss(golden["pred"], patches, masked)
    torch.testing.assert_close(loss, golden["loss"], **CLOSE)


@torch.no_grad()
def test_contrast_is_the_published_one(
    model: GeoLink, inputs: dict[str, Tensor], graph: GraphBatch, folder: Path
) -> None:
    golden = load(folder, "v_contrastive")
    nothing = torch.zeros(graph.nodes, dtype=torch.bool)
    noise = load(folder, "iv_image")["noise"]
    out = model(inputs["images"], graph, mask_noise=noise, node_mask=nothing)
    torch.testing.assert_close(out["image_projection"], golden["img"], **CLOSE)
    torch.testing.assert_close(out["region_projection"], golden["graph"], **CLOSE)
    torch.testing.assert_close(out["contrast"], golden["loss"], **CLOSE)
    every = torch.ones(3, dtype=torch.bool)
    loss = contrast_loss(golden["img"], golden["graph"], float(golden["temperature"]), every)
    torch.testing.assert_close(loss, golden["loss"], **CLOSE)


@torch.no_grad()
def test_two_way_block_is_the_published_one(model: GeoLink, folder: Path) -> None:
    golden = load(folder, "vi_twoway")
    block = model.osm_cross_modal_encoder[0]
    arguments = [golden[k] for k in ("queries", "keys", "query_pe", "key_pe")]
    patches, nodes = block(*arguments, ~golden["key_padding_mask"])
    torch.testing.assert_close(patches, golden["out_queries"], **CLOSE)
    torch.testing.assert_close(nodes, golden["out_keys"], **CLOSE)
    patches, nodes = block(*arguments, None)
    torch.testing.assert_close(patches, golden["nomask_queries"], **CLOSE)
    torch.testing.assert_close(nodes, golden["nomask_keys"], **CLOSE)
