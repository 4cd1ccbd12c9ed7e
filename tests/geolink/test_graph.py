"""The packed graph batch against a loop over chips, objects, tags and edges."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geolink.graph import KINDS, GraphBatch, csr_take, normalise_tag_weight, pack
from schemas.layout import Relation


def random_chips(seed: int, objects: list[int]) -> dict[str, Any]:
    """Arguments of `pack`: chips with so many objects each, as a shard would hold them."""
    rng = np.random.default_rng(seed)
    m = sum(objects)
    edges, relations, edge_offset = [], [], [0]
    for n in objects:
        pairs = {(i, i): 0 for i in range(n)}
        for _ in range(n):
            source, target = rng.integers(0, n, 2).tolist()
            if source != target:
                pairs[source, target] = pairs[target, source] = int(rng.integers(1, 10))
        edges += sorted(pairs)
        relations += [pairs[pair] for pair in sorted(pairs)]
        edge_offset.append(len(edges))
    tags, patches = rng.integers(0, 4, m), rng.integers(0, 3, m)
    tag_offset = np.concatenate([[0], tags.cumsum()]).astype(np.int64)
    patch_offset = np.concatenate([[0], patches.cumsum()]).astype(np.int64)
    return {
        "object_offset": np.concatenate([[0], np.cumsum(objects)]).astype(np.int64),
        "kind": rng.integers(0, 3, m).astype(np.uint8),
        "osm_class": rng.integers(0, 20, m).astype(np.uint8),
        "osm_id": rng.permutation(m).astype(np.int64) + 1000,
        "size": rng.random(m).astype(np.float32),
        "anchor": rng.random((m, 4, 2)).astype(np.float32),
        "tag_offset": tag_offset,
        "tag": rng.integers(0, 50, tag_offset[-1]).astype(np.int32),
        "tag_weight": normalise_tag_weight(tag_offset, rng.integers(0, 3, tag_offset[-1])),
        "edge_offset": np.array(edge_offset, np.int64),
        "edge": np.array(edges, np.int32).reshape(-1, 2),
        "relation": np.array(relations, np.uint8),
        "patch_offset": patch_offset,
        "patch": rng.integers(0, 64, patch_offset[-1]).astype(np.uint16),
        "patch_weight": rng.integers(0, 256, patch_offset[-1]).astype(np.uint8),
    }


def expected_nodes(a: dict[str, Any]) -> list[dict[str, Any]]:
    """Nodes in packed order, one dict each, made one object at a time."""
    nodes = []
    for kind in range(3):
        for chip in range(len(a["object_offset"]) - 1):
            for i in range(a["object_offset"][chip], a["object_offset"][chip + 1]):
                if a["kind"][i] != kind:
                    continue
                tags = slice(a["tag_offset"][i], a["tag_offset"][i + 1])
                patches = slice(a["patch_offset"][i], a["patch_offset"][i + 1])
                nodes.append(
                    {
                        "object": i,
                        "chip": chip,
                        "tags": list(zip(a["tag"][tags].tolist(), a["tag_weight"][tags].tolist())),
                        "patches": list(
                            zip(a["patch"][patches].tolist(), a["patch_weight"][patches].tolist())
                        ),
                    }
                )
    return nodes


def expected_edges(a: dict[str, Any]) -> set[tuple[int, int, int]]:
    """(source OSM id, target OSM id, relation) of every edge."""
    found = set()
    for chip in range(len(a["object_offset"]) - 1):
        first = a["object_offset"][chip]
        for e in range(a["edge_offset"][chip], a["edge_offset"][chip + 1]):
            source, target = a["osm_id"][first + a["edge"][e]].tolist()
            found.add((source, target, int(a["relation"][e])))
    return found


chip_sizes = st.lists(st.integers(0, 7), min_size=1, max_size=6)


@given(seed=st.integers(0, 2**32), objects=chip_sizes)
@settings(max_examples=50, deadline=None)
def test_packing_equals_a_loop_over_chips_and_objects(seed: int, objects: list[int]) -> None:
    arrays = random_chips(seed, objects)
    before = {name: array.copy() for name, array in arrays.items()}
    batch = pack(**arrays)
    nodes = expected_nodes(arrays)
    at = [n["object"] for n in nodes]
    assert batch.chips == len(objects)
    assert batch.nodes == len(nodes)
    assert batch.chip.tolist() == [n["chip"] for n in nodes]
    assert batch.kind().tolist() == arrays["kind"][at].tolist()
    for name in ("osm_class", "osm_id", "size", "anchor"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), arrays[name][at])
    for i, node in enumerate(nodes):
        tags = slice(*batch.tag_offset[i : i + 2].tolist())
        patches = slice(*batch.patch_offset[i : i + 2].tolist())
        found = list(zip(batch.tag[tags].tolist(), batch.tag_weight[tags].tolist()))
        assert found == node["tags"]
        assert batch.patch[patches].tolist() == [p for p, _ in node["patches"]]
        share = batch.patch_weight[patches] * 255
        assert share.round().tolist() == [w for _, w in node["patches"]]
    ids = batch.osm_id[batch.edge]
    edges = set(zip(*ids.tolist(), batch.relation.tolist())) if ids.numel() else set()
    assert edges == expected_edges(arrays)
    assert batch.edge.shape[1] == len(arrays["edge"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


@given(seed=st.integers(0, 2**32), objects=chip_sizes)
@settings(max_examples=25, deadline=None)
def test_edges_come_by_target_and_never_leave_their_chip(seed: int, objects: list[int]) -> None:
    batch = pack(**random_chips(seed, objects))
    assert bool((batch.edge[1].diff() >= 0).all())
    assert torch.equal(batch.chip[batch.edge[0]], batch.chip[batch.edge[1]])
    loops = batch.edge[0][batch.edge[0] == batch.edge[1]]
    assert loops.tolist() == list(range(batch.nodes))


def test_batch_has_the_documented_dtypes() -> None:
    batch = pack(**random_chips(0, [5, 0, 3]))
    dtypes = {
        "chip": torch.int64, "osm_class": torch.uint8, "osm_id": torch.int64,
        "size": torch.float32, "anchor": torch.float32, "tag_offset": torch.int64,
        "tag": torch.int64, "tag_weight": torch.float32, "edge": torch.int64,
        "relation": torch.uint8, "patch_offset": torch.int64, "patch": torch.int32,
        "patch_weight": torch.float32,
    }  # fmt: skip
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes
    assert batch.anchor.shape == (8, 4, 2)


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = pack(**random_chips(1, [4, 2]))
    moved = batch.to("meta")
    assert moved.kind_ptr == batch.kind_ptr
    assert moved.chips == batch.chips
    tensors = [v for v in vars(moved).values() if torch.is_tensor(v)]
    assert len(tensors) == 13
    assert all(t.device.type == "meta" for t in tensors)
    assert batch.chip.device.type == "cpu"


def test_rows_of_a_csr_array_can_be_taken_in_any_order_and_twice() -> None:
    values, offset = np.array([10, 20, 21, 40, 41, 42]), np.array([0, 1, 3, 3, 6])
    index, taken = csr_take(offset, np.array([3, 2, 1, 3]))
    assert values[index].tolist() == [40, 41, 42, 20, 21, 40, 41, 42]
    assert taken.tolist() == [0, 3, 3, 5, 8]


def test_tag_weights_sum_to_one_and_are_equal_where_all_are_zero() -> None:
    weight = normalise_tag_weight(np.array([0, 2, 2, 4, 5]), np.array([1.0, 3.0, 0.0, 0.0, 2.0]))
    assert weight.tolist() == [0.25, 0.75, 0.5, 0.5, 1.0]


def test_a_batch_without_any_object_is_a_batch() -> None:
    batch = pack(**random_chips(0, [0, 0]))
    assert batch.kind_ptr == (0, 0, 0, 0)
    assert batch.chips == 2
    assert batch.edge.shape == (2, 0)


def test_pyg_graph_holds_the_same_nodes_and_edges() -> None:
    pytest.importorskip("torch_geometric")
    batch = pack(**random_chips(3, [6, 0, 9]))
    data = batch.to_pyg()
    edges = set()
    for source, relation, target in data.edge_types:
        code = Relation[relation.upper()].value
        for s, t in data[source, relation, target].edge_index.t().tolist():
            edges.add((int(data[source].osm_id[s]), int(data[target].osm_id[t]), code))
    assert edges == expected_edges(random_chips(3, [6, 0, 9]))
    for kind, name in enumerate(KINDS):
        store, at = data[name], batch.kind_slice(kind)
        assert store.num_nodes == at.stop - at.start
        assert torch.equal(store.batch, batch.chip[at])
        tags = [store.tag[a:b].tolist() for a, b in pairwise(store.tag_ptr)]
        assert tags == tags_of(batch, at)


def tags_of(batch: GraphBatch, nodes: slice) -> list[list[int]]:
    offset = batch.tag_offset[nodes.start : nodes.stop + 1].tolist()
    return [batch.tag[a:b].tolist() for a, b in pairwise(offset)]
