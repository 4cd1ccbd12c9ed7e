"""A whole training step: no waiting for the device, compiled without a break, any graph."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from geolink.graph import GraphBatch
from geolink.models.build import make_model
from geolink.models.context import ChipContext
from geolink.reader import open_dataset
from geolink.stream import Batch, read_chips
from geolink.training.augment import augment
from geolink.training.distributed import open_ranks
from geolink.training.loop import train_step
from geolink.training.placement import Placement, Window, place_graph
from geolink.training.setup import Training, hold_run, set_up
from schemas.errors import GeoLinkError
from schemas.grid import Block, printed_chip
from schemas.layout import dimensions
from schemas.training import Augment, Fix, ModelConfig, TrainConfig
from tests.shards import make_dataset, random_arrays, store_row

TINY = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=32, depth=2, num_heads=2, tag_dim=16,
    osm_dim=16, fusion_dim=16, fusion_heads=2, projection_dim=8, decoder_dim=16, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
PATCHES = 4
EVERYTHING = Augment(crop=(0.4, 0.9), rotate=True)
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero",
         "aten::masked_select", "aten::unique", "aten::_unique2", "aten::equal")  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("d"), shards=3, chips=8, objects=20)


def batch_of(folder: Path, chips: int = 8) -> Batch:
    return next(iter(read_chips(open_dataset(folder), None, batch_size=chips)))


@contextmanager
def training(dataset: Path, run: Path, **changes: Any) -> Iterator[Training]:
    config = TrainConfig(**{
        "dataset": dataset, "run": run, "model": TINY, "augment": EVERYTHING, "batch_size": 8,
        **changes,
    })  # fmt: skip
    with ExitStack() as stack:
        ranks = stack.enter_context(open_ranks(config))
        yield set_up(config, ranks, stack.enter_context(hold_run(config, ranks)))


@pytest.mark.parametrize("variant", ["paper", "geolink2"])
@pytest.mark.parametrize("capacity", [None, 10])
def test_no_operation_of_a_step_waits_for_the_device(
    dataset: Path, tmp_path: Path, capacity: int | None, variant: str
) -> None:
    model = TINY.model_copy(update={"max_masked_nodes": capacity, "variant": variant})
    with training(dataset, tmp_path / "r", model=model, accelerator="cpu") as t:
        first, second, *_ = t.stream
        t.step = 1
        train_step(t, first, 1e-3)
        with profile(activities=[ProfilerActivity.CPU]) as done:
            t.step = 2
            train_step(t, second, 1e-3)
    events = done.events()
    assert events is not None
    seen = {event.name for event in events}
    assert {"aten::scaled_dot_product_attention", "aten::grid_sampler", "aten::sort"} <= seen
    waits = []
    for event in events:
        if event.name in WAITS:
            above = event
            while above.cpu_parent is not None and above.name in WAITS:
                above = above.cpu_parent
            # On a CPU these look at their arguments; on a GPU they do so there, or not at all.
            if above.name not in ("aten::_fused_adamw_", "aten::one_hot"):
                waits.append((event.name, above.name))
    assert waits == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_a_step_on_a_gpu_never_waits_for_it(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cuda", "precision": "bf16-mixed"}
    with training(dataset, tmp_path / "r", **options) as t:
        batches = list(t.stream)
        t.step = 1
        train_step(t, batches[0], 1e-3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            t.step = 2
            losses, _ = train_step(t, batches[1], 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(torch.isfinite(losses["total"]))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """Batches of the same chips and very different graphs."""
    folder = tmp_path_factory.mktemp("ragged")
    return [
        batch_of(make_dataset(folder / str(n), shards=1, chips=8, objects=n, seed=n))
        for n in (20, 5, 9, 30, 14)
    ]


@pytest.mark.parametrize("variant", ["paper", "geolink2"])
def test_a_step_compiles_without_a_break_and_seldom_again(
    ragged: list[Batch], variant: str
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    images, weight = torch.randn(8, 3, 32, 32), torch.ones(8)
    model = make_model(
        TINY.model_copy(update={"variant": variant, "depth": 1}), torch.randn(40, 16)
    ).eval()
    counter = CompileCounterWithBackend("eager")
    # A break in the graph is an error.
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    for batch in ragged:
        known = {
            "weight": weight, "mask_noise": torch.rand(8, 16),
            "node_noise": torch.rand(batch.graph.nodes),
            "context": ChipContext(batch.time, batch.gsd_m, batch.center_lonlat),
        }  # fmt: skip
        losses = compiled(images, batch.graph, **known)
        losses["total"].backward()
        torch.testing.assert_close(losses["total"], model(images, batch.graph, **known)["total"])
    # Once for the first batch's sizes, once for any.
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_augmentation_compiles_without_a_break(ragged: list[Batch]) -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(augment)(
        torch.randn(8, 3, 32, 32), ragged[0].graph, options=EVERYTHING, patches=PATCHES
    )
    assert (found.graph_count, found.break_reasons) == (1, [])
    torch._dynamo.reset()


def test_bfloat16_gives_the_same_losses_but_for_rounding(dataset: Path) -> None:
    batch = batch_of(dataset)
    torch.manual_seed(0)
    model = make_model(TINY, torch.randn(40, 16)).eval()
    images = torch.randn(8, 3, 32, 32)
    noise = {"mask_noise": torch.rand(8, 16), "node_noise": torch.rand(batch.graph.nodes)}
    exact = model(images, batch.graph, **noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, batch.graph, **noise)
    rounded["total"].backward()
    for name in ("total", *model.losses):
        torch.testing.assert_close(rounded[name].float(), exact[name], rtol=0.03, atol=0.03)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


def test_activations_computed_again_give_the_same_gradients_for_less_memory(dataset: Path) -> None:
    batch = batch_of(dataset)
    images = torch.randn(8, 3, 32, 32)
    deep = TINY.model_copy(update={"depth": 8})
    kept_bytes, gradients = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = make_model(deep, torch.randn(40, 16))
        model.checkpoint_activations(again)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(images, batch.graph)["total"]
            kept_bytes.append(sum(kept.values()))
        total.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kept_bytes[1] < 0.6 * kept_bytes[0]
    for plain, again_computed in zip(*gradients, strict=True):
        torch.testing.assert_close(again_computed, plain)


@pytest.mark.parametrize("fixes", [(), get_args(Fix)])
def test_dead_nodes_count_for_nothing(dataset: Path, fixes: tuple[str, ...]) -> None:
    batch = batch_of(dataset)
    window = Window(
        torch.tensor([0, 1, 2, 3, 0, 0, 3, 1]), torch.tensor([0, 1, 2, 0, 3, 2, 3, 1]),
        torch.tensor([4, 3, 2, 1, 1, 2, 1, 3]), smallest=1,
    )  # fmt: skip
    graph = place_graph(batch.graph, Placement(PATCHES, window))
    compact = graph.compact()
    assert 0 < compact.nodes < graph.nodes
    torch.manual_seed(0)
    model = make_model(TINY.model_copy(update={"fixes": fixes}), torch.randn(40, 16)).eval()
    images, mask_noise = torch.randn(8, 3, 32, 32), torch.rand(8, 16)
    noise, alive = torch.rand(graph.nodes), graph.living()
    losses = model(images, graph, mask_noise=mask_noise, node_noise=noise)
    expected = model(images, compact, mask_noise=mask_noise, node_noise=noise[alive])
    for name in ("total", *model.losses, "region"):
        torch.testing.assert_close(losses[name], expected[name])
    assert torch.equal(losses["node_masked"][alive], expected["node_masked"])
    assert not bool(losses["node_masked"][~alive].any())
    losses["total"].backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected["total"].backward()
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        for a, b in (
            (model.encode_region(graph), model.encode_region(compact)),
            (model.encode_nodes(graph)[alive], model.encode_nodes(compact)),
            (model.fusion_embedding(images, graph, [1])[0],
             model.fusion_embedding(images, compact, [1])[0]),
        ):  # fmt: skip
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_chips_whose_objects_all_fall_outside_train_as_images_alone(dataset: Path) -> None:
    batch = batch_of(dataset)
    empty = no_objects(batch.graph)
    torch.manual_seed(0)
    model = make_model(TINY, torch.randn(40, 16)).eval()
    images, mask_noise = torch.randn(8, 3, 32, 32), torch.rand(8, 16)
    for graph in (empty, with_alive(batch.graph, torch.zeros(batch.graph.nodes, dtype=torch.bool))):
        losses = model(images, graph, mask_noise=mask_noise)
        assert float(losses["contrast"]) == float(losses["consistency"]) == 0
        assert float(losses["total"]) == float(losses["reconstruction"]) > 0
        losses["total"].backward()
        assert all(
            bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None
        )
    # One such chip among others: they learn as if it were not there.
    first = batch.graph.chip == 0
    losses = model(images, with_alive(batch.graph, ~first), mask_noise=mask_noise,
                   node_noise=torch.rand(batch.graph.nodes))  # fmt: skip
    assert float(losses["region"][0].detach().abs().sum()) == 0
    assert float(losses["contrast"]) > 0


@pytest.mark.parametrize("variant", ["paper", "geolink2"])
def test_a_dataset_without_any_object_trains(variant: str, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=1, chips=8, objects=0)
    model = TINY.model_copy(update={"variant": variant})
    with training(folder, tmp_path / "r", model=model, accelerator="cpu") as t:
        losses, norm = train_step(t, next(iter(t.stream)), 1e-3)
    assert float(losses["contrast"]) == 0 < float(losses["total"])
    assert bool(torch.isfinite(norm))


def test_a_chip_of_twenty_thousand_objects_trains(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=1, chips=1, objects=20_000)
    batch = batch_of(folder, 1)
    assert batch.graph.most is not None
    assert batch.graph.most > 19_000
    for most in (None, 10):
        model = make_model(TINY.model_copy(update={"max_masked_nodes": most}), torch.randn(40, 16))
        losses = model(torch.randn(1, 3, 32, 32), batch.graph)
        losses["total"].backward()
        assert float(losses["consistency"]) > 0
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


def test_an_unknown_relation_is_named_where_it_is_read(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=1)
    block = Block(32632, 99, 100)
    arrays = random_arrays(7, block=block)
    arrays["relation"] = arrays["relation"].copy()
    last = int(arrays["edge_offset"][3]) - 1
    arrays["relation"][last] = 77
    dataset = open_dataset(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.store.validate", dimensions)
        row = store_row(folder, block, arrays)
    chip = printed_chip(arrays["chip_id"][2])
    text = f"{block.name}.*: in chip {chip} an edge has the relation code 77"
    with pytest.raises(GeoLinkError, match=text):
        next(iter(read_chips(replace(dataset, rows=(row,)), None, batch_size=2)))


def no_objects(graph: GraphBatch) -> GraphBatch:
    return with_alive(graph, torch.zeros(graph.nodes, dtype=torch.bool)).compact()


def with_alive(graph: GraphBatch, alive: Tensor) -> GraphBatch:
    return replace(graph, alive=alive)
