"""Graphs of images that are taken out again are those that were put in."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from geolink.graph import GraphBatch
from geolink.reader import open_dataset
from geolink.stream import read_chips
from geolink.tasks.graphs import ImageGraphs
from geolink.training.parts import take_graphs
from tests.shards import make_dataset


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphBatch:
    dataset = open_dataset(make_dataset(tmp_path_factory.mktemp("d") / "d", objects=5, chips=7))
    return next(read_chips(dataset, "train", batch_size=28)).graph


def same(a: GraphBatch, b: GraphBatch) -> None:
    for f in fields(GraphBatch):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if f.name == "most":
            continue
        equal = torch.equal(left, right) if torch.is_tensor(left) else left == right
        assert equal, f.name


def test_the_graphs_of_a_batch_come_back_as_they_were(graph: GraphBatch) -> None:
    same(ImageGraphs.of(graph).take(np.arange(graph.chips)), graph)


def test_graphs_of_some_images_are_those_of_the_batch_cut_there(graph: GraphBatch) -> None:
    same(ImageGraphs.of(graph).take(np.arange(5, 17)), take_graphs(graph, 5, 17))


def test_joined_graphs_are_taken_in_any_order(graph: GraphBatch) -> None:
    parts = [ImageGraphs.of(take_graphs(graph, a, b)) for a, b in ((0, 9), (9, 28))]
    joined = ImageGraphs.join(parts)
    assert len(joined) == 28
    taken = joined.take(np.array([20, 3, 20]))
    for place, chip in enumerate((20, 3, 20)):
        same(take_graphs(taken, place, place + 1), take_graphs(graph, chip, chip + 1))
