"""Parts of a batch, what they draw, and which of their chips are no negatives of one another."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geolink.graph import GraphBatch
from geolink.models.losses import Pairs, contrast_loss, not_negative, unit_vectors
from geolink.reader import open_dataset
from geolink.stream import Batch, read_chips
from geolink.training.draws import Part, kinds
from geolink.training.parts import split, tag_signature, take, take_graphs
from tests.shards import make_dataset


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = make_dataset(tmp_path_factory.mktemp("dataset"), shards=1, chips=8)
    return next(iter(read_chips(open_dataset(folder), "train", batch_size=8)))


def chips_of(graph: GraphBatch) -> list[dict[str, object]]:
    """What each chip's graph says, one at a time, whatever its nodes are numbered."""
    kind, found = graph.kind(), []
    for chip in range(graph.chips):
        nodes = torch.nonzero(graph.chip == chip)[:, 0].tolist()
        place = {node: n for n, node in enumerate(nodes)}
        edges = zip(*graph.edge.tolist(), graph.relation.tolist())
        found.append(
            {
                "kind": kind[nodes].tolist(), "id": graph.osm_id[nodes].tolist(),
                "anchor": graph.anchor[nodes].tolist(),
                "tags": [
                    graph.tag[graph.tag_offset[n] : graph.tag_offset[n + 1]].tolist() for n in nodes
                ],
                "patches": [
                    graph.patch[graph.patch_offset[n] : graph.patch_offset[n + 1]].tolist()
                    for n in nodes
                ],
                "edges": [(place[s], place[t], r) for s, t, r in edges if t in place],
            }
        )  # fmt: skip
    return found


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_a_batch_are_its_chips_in_turn(parts: int, batch: Batch) -> None:
    found = split(batch, parts)
    assert [len(part) for part in found] == [8 // parts] * parts
    whole = chips_of(batch.graph)
    assert [chip for part in found for chip in chips_of(part.graph)] == whole
    assert torch.equal(torch.cat([part.image for part in found]), batch.image)
    assert np.array_equal(np.concatenate([part.chip_id for part in found]), batch.chip_id)
    none = take(batch, 3, 3)
    assert (len(none), none.graph.nodes, none.graph.edge.shape[1]) == (0, 0, 0)


def test_a_part_draws_what_the_whole_would(batch: Batch) -> None:
    cpu = torch.device("cpu")
    parts = split(batch, 4)
    nodes = np.stack([kinds(part.graph) for part in parts])

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    whole = torch.rand(2, 8, 3, generator=seeded())
    noise = torch.rand(batch.graph.nodes, generator=seeded())
    for n, part in enumerate(parts):
        draw = Part(n, nodes)
        chips = slice(2 * n, 2 * n + 2)
        assert torch.equal(draw.rand((2, 2, 3), cpu, seeded(), chips=1), whole[:, chips])
        mine = (batch.graph.chip >= chips.start) & (batch.graph.chip < chips.stop)
        assert torch.equal(draw.node_rand(part.graph, cpu, seeded()), noise[mine])
    alone = Part(0, kinds(batch.graph)[None])
    assert torch.equal(alone.node_rand(batch.graph, cpu, seeded()), noise)


def great_circle_m(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Haversine, one pair."""
    (lon_a, lat_a), (lon_b, lat_b) = ([math.radians(v) for v in p] for p in (a, b))
    h = math.sin((lat_b - lat_a) / 2) ** 2
    h += math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * 6_371_008.8 * math.asin(math.sqrt(min(h, 1.0)))


@given(
    around=st.sampled_from([(180.0, 65.0), (-180.0, -16.5), (11.5, 48.1), (0.0, 89.9), (7.0, 0.0)]),
    seed=st.integers(0, 2**31),
    distance_m=st.sampled_from([300.0, 2_000.0, 3e7]),
)
@settings(max_examples=40, deadline=None)
def test_chips_nearer_than_a_distance_are_no_negatives_across_the_antimeridian_too(
    around: tuple[float, float], seed: int, distance_m: float
) -> None:
    rng = np.random.default_rng(seed)
    lonlat = np.array(around) + rng.normal(scale=0.02, size=(6, 2))
    lonlat[:, 0] = (lonlat[:, 0] + 180) % 360 - 180
    lonlat[:, 1] = lonlat[:, 1].clip(-90, 90)
    pairs = Pairs(
        unit_vectors(torch.from_numpy(lonlat)), torch.zeros(6, dtype=torch.int64), distance_m
    )
    found = not_negative(pairs)
    for i, a in enumerate(lonlat.tolist()):
        for j, b in enumerate(lonlat.tolist()):
            apart = great_circle_m(tuple(a), tuple(b))
            if abs(apart - distance_m) > 1e-3:
                assert bool(found[i, j]) == (i != j and apart < distance_m), (apart, i, j)


def test_the_signature_of_tags_is_that_of_their_set(batch: Batch) -> None:
    sets = [
        frozenset(tag for tags in chip["tags"] for tag in tags)  # type: ignore[attr-defined]
        for chip in chips_of(batch.graph)
    ]
    found = tag_signature(batch.graph).tolist()
    for a, signature in zip(sets, found, strict=True):
        assert (signature == 0) == (not a)
        for b, other in zip(sets, found, strict=True):
            assert (signature == other) == (a == b)
    # Whatever the order of nodes, and however often a tag comes.
    backwards = take_graphs(batch.graph, 2, 6)
    assert tag_signature(backwards).tolist() == found[2:6]


def test_the_contrast_is_a_loop_over_pairs_that_are_told_apart() -> None:
    draw = torch.Generator().manual_seed(3)
    image, region = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
    has_region = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    weight = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 0.0])
    lonlat = torch.tensor(
        [[8.0, 47], [8.001, 47], [8.2, 47], [8.2, 47.001], [9, 47], [10, 47]]
    ).double()
    tags = torch.tensor([1, 2, 0, 3, 0, 1])
    found = contrast_loss(
        image, region, 0.2, has_region, weight,
        pairs=Pairs(unit_vectors(lonlat), tags, 150.0, True),
    )  # fmt: skip
    out = {(0, 1), (1, 0), (2, 3), (3, 2), (0, 5), (5, 0)}
    a = image / image.norm(dim=1, keepdim=True)
    b = region / region.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        if not has_region[i]:
            continue
        others = [j for j in range(6) if has_region[j] and (i, j) not in out]
        for one, two in ((a, b), (b, a)):
            logits = {j: float(one[i] @ two[j]) / 0.2 for j in others}
            norm = math.log(sum(math.exp(v) for v in logits.values()))
            total += float(weight[i]) * (norm - logits[i]) / 2
    assert float(found) == pytest.approx(total / 4.5, rel=1e-5)


def test_negatives_by_distance_change_a_run(tmp_path: Path) -> None:
    from geolink.training.log import read_log
    from geolink.training.loop import pretrain
    from tests.geolink.test_training import config

    folder = make_dataset(tmp_path / "d", shards=1, chips=8)
    contrasts = []
    for n, negatives in enumerate(({}, {"min_distance_m": 1e5})):
        pretrain(config(folder, tmp_path / str(n), epochs=1, negatives=negatives, log_every=1))
        contrasts.append(read_log(tmp_path / str(n))[0]["contrast"])
    assert contrasts[0] > 0.5
    # All chips of one shard are near: none is left to be told from.
    assert contrasts[1] == pytest.approx(0.0, abs=1e-6)
