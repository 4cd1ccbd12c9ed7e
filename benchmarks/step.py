"""What OSM costs in a training step, and how that grows.

- `step`: a whole GeoLink step (augmentation with crop, forward, backward, clipping, AdamW) against
  the image-only MAE step of the same ViT at 224 px. Goal: at most 1.10 of its time.
- `osm_parts`: masking, positions, graph attention, read-out and fusion, forward and backward, at
  256 chips with 13,500 nodes, against the same written per kind with PyTorch Geometric
  (`_pyg.py`, which must give the same numbers first). Goal: at most 0.60 of its time.
- `growth`: exponents of time with nodes (edges in proportion) and with edges alone.
- `large_graph`: a chip of 20,000 objects beside seven usual ones.

`kept_mb` is what the forward pass keeps for the backward pass, other than parameters.

    python benchmarks/step.py [--device cuda] [--vit large] [--batch 256] [--repeat 3]

On a CPU by default with ViT-Tiny and 32 chips a step, in CPU seconds of one core; on a GPU with
ViT-L, 256 chips and bfloat16, eager and compiled. Prints JSON.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import best_of, growth, report
from _pyg import PygOsm, to_hetero
from torch import Tensor

from geolink.graph import KINDS, GraphBatch, normalise_tag_weight, pack
from geolink.models.losses import consistency_loss, reconstruction_loss
from geolink.models.masking import mask_nodes, mask_patches, most_masked, node_slots
from geolink.models.paper import GeoLink
from geolink.training.augment import augment
from geolink.training.optim import make_optimizer
from schemas.training import Augment, ModelConfig, TrainConfig
from tests.shards import TAGS, make_grid, random_arrays

PATCHES, VISIBLE = 14, 49
NODES, CHIPS = 13_500, 256
PAPER = {
    "image_size": 224, "patch_size": 16, "tag_dim": 512, "osm_dim": 128, "fusion_dim": 256,
    "fusion_heads": 16, "decoder_dim": 512, "decoder_depth": 2, "decoder_heads": 16,
    "max_masked_nodes": 10,
}  # fmt: skip
CROPPED = Augment(crop=(0.4, 0.9), rotate=True)


def make_graph(
    chips: int, objects: float, *, extra_edges: int = 0, large: int = 0, seed: int = 0
) -> GraphBatch:
    """Graphs with about so many objects a chip and four edges each, `extra_edges` copies of those,
    and as a last chip one of `large` objects.
    """
    grid = make_grid(size=PATCHES * 2, patch=2, shard_side=16)
    a = random_arrays(seed, chips=chips, objects=objects, grid=grid)
    if large:
        last = random_arrays(seed + 1, chips=1, objects=large, grid=grid)
        for name, array in last.items():
            if name.startswith(("object_", "edge", "relation", "patch")):
                more = array[1:] + a[name][-1] if name.endswith("_offset") else array
                a[name] = np.concatenate([a[name], more])
    weight = np.ones(len(a["object_tag"]), np.float32)
    graph = pack(
        object_offset=a["object_offset"], kind=a["object_kind"], osm_class=a["object_class"],
        osm_id=a["object_osm"], size=a["object_size"], anchor=a["object_anchor"],
        tag_offset=a["object_tag_offset"], tag=a["object_tag"],
        tag_weight=normalise_tag_weight(a["object_tag_offset"], weight),
        edge_offset=a["edge_offset"], edge=a["edge"], relation=a["relation"],
        patch_offset=a["patch_offset"], patch=a["patch"], patch_weight=a["patch_weight"],
    )  # fmt: skip
    copies = 1 + extra_edges
    return replace(
        graph,
        edge=graph.edge.repeat_interleave(copies, 1),
        relation=graph.relation.repeat_interleave(copies),
    )


class Timer:
    """Best of some calls on a device, and what they keep; on a CPU seconds of one core."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device, self.repeat = device, repeat
        self.autocast: Callable[[], Any] = nullcontext
        if device.type == "cuda":
            self.autocast = lambda: torch.autocast("cuda", torch.bfloat16)

    def __call__(self, function: Callable[[], Any]) -> float:
        def call() -> None:
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        call()
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        return best_of(self.repeat, call, clock)[0]

    def kept_mb(self, forward: Callable[[], Any], module: torch.nn.Module) -> float:
        """Bytes of distinct tensors kept for the backward pass."""
        own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), self.autocast():
            result = forward()
        del result
        return round(sum(kept.values()) / 1e6, 1)


def image_only(model: GeoLink, images: Tensor) -> Tensor:
    """The loss of an image-only MAE with the model's encoder and decoder."""
    patches = model._patches(images)
    noise = torch.rand(patches.shape[:2], device=images.device)
    visible, restore, masked = mask_patches(noise, model.config.mask_ratio)
    tokens = model._encode(patches, visible)[-1]
    prediction = model._decode(
        tokens, restore, model.rec_img_pos_embed, model.img_cross_modal_decoder
    )
    return reconstruction_loss(prediction, patches, masked)


def whole_step(timer: Timer, vit: str, chips: int, compiled: bool) -> dict[str, Any]:
    """Both steps, their ratio."""
    device = timer.device
    torch.manual_seed(0)
    config = ModelConfig(vit=vit, **PAPER)
    model = GeoLink(config, torch.randn(len(TAGS), 512)).to(device).train()
    graph = make_graph(chips, NODES / CHIPS).to(device)
    images = torch.randn(chips, 3, 224, 224, device=device)
    run = TrainConfig(dataset="d", run="r", model=config)
    optimizer = make_optimizer(model, run)
    forward: dict[str, Callable[..., Any]] = {"geolink": model, "image_only": image_only}
    if compiled:
        forward = {k: torch.compile(f) for k, f in forward.items()}

    def step(name: str) -> None:
        # Of an image-only run the graph is no part, and so is its augmentation.
        seen, placed, _ = augment(
            images, graph if name == "geolink" else empty, CROPPED, patches=PATCHES
        )
        with timer.autocast():
            if name == "geolink":
                total = forward[name](seen, placed)["total"]
            else:
                total = forward[name](model, seen)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    empty = make_graph(chips, 0).to(device)
    seconds = {f"{name}_s": timer(partial(step, name)) for name in ("image_only", "geolink")}
    result = {
        "vit": vit, "chips": chips, "nodes": graph.nodes, "edges": graph.edge.shape[1],
        **{k: round(s, 4) for k, s in seconds.items()},
        "ratio": round(seconds["geolink_s"] / seconds["image_only_s"], 3),
        "goal": 1.10,
    }  # fmt: skip
    if not compiled:
        result["kept_mb"] = {
            "image_only": timer.kept_mb(lambda: image_only(model, images), model),
            "geolink": timer.kept_mb(lambda: model(images, graph), model),
        }
    return result


class Parts:
    """Our OSM side on fixed patch tokens."""

    def __init__(self, graph: GraphBatch, device: torch.device, **changes: Any) -> None:
        torch.manual_seed(0)
        config = ModelConfig(**{**PAPER, "embed_dim": 1024, "depth": 1, "num_heads": 16, **changes})
        self.model = GeoLink(config, torch.randn(len(TAGS), 512)).to(device)
        self.graph = graph.to(device)
        self.tokens = torch.randn(graph.chips, VISIBLE, 1024, device=device, requires_grad=True)
        self.capacity = config.max_masked_nodes or most_masked(graph, config.node_mask_ratio)
        self.position = self.model.fusion_img_pos_embed[:, 1 : 1 + VISIBLE]

    def mask(self) -> tuple[Tensor, Tensor]:
        noise = torch.rand(self.graph.nodes, device=self.tokens.device)
        return mask_nodes(self.graph, noise, 0.2), noise

    def forward(self, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Projected regions, and the consistency loss."""
        m, graph = self.model, self.graph
        # By order, as the baseline takes the first, where the two are compared.
        noise = torch.arange(graph.nodes, device=graph.chip.device) / graph.nodes
        if masked is None:
            masked, noise = self.mask()
        features = m._node_features(graph)
        nodes = m._encode_nodes(features, masked, graph)
        region = m.osm_graph_consistency_prj(m._read_out(nodes, graph)[0])
        slot, valid = node_slots(graph, masked, noise, self.capacity)
        position = self.position.expand(graph.chips, -1, -1)
        _, fused = m._fuse(self.tokens, position, nodes, slot, valid, graph)
        return region, consistency_loss(m.osm_node_pred(fused), features[slot], valid)

    def seconds(self, timer: Timer) -> dict[str, float]:
        """Of the parts, forward; of all, forward and backward."""
        m, graph = self.model, self.graph
        masked, noise = self.mask()
        features = m._node_features(graph).detach()
        nodes = m._encode_nodes(features, masked, graph).detach()
        slot, valid = node_slots(graph, masked, noise, self.capacity)
        position = self.position.expand(graph.chips, -1, -1)
        calls: dict[str, Callable[[], Any]] = {
            "features": lambda: m._node_features(graph),
            "masking": self.mask,
            "padding": lambda: node_slots(graph, masked, noise, self.capacity),
            "positions": lambda: m._node_positions(graph.anchor[slot], graph.kind()[slot]),
            "attention": lambda: m._encode_nodes(features, masked, graph),
            "read_out": lambda: m._read_out(nodes, graph),
            "fusion": lambda: m._fuse(self.tokens, position, nodes, slot, valid, graph),
        }
        return both_ways(timer, calls, self.forward, m)


def both_ways(
    timer: Timer,
    calls: dict[str, Callable[[], Any]],
    forward: Callable[[], tuple[Tensor, Tensor]],
    module: torch.nn.Module,
) -> dict[str, float]:
    """Milliseconds of each part forward, of all forward and backward; megabytes kept."""

    def train() -> None:
        with timer.autocast():
            region, loss = forward()
            total = region.square().mean() + loss
        total.backward()
        module.zero_grad()

    def ahead(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with timer.autocast():
                call()

        return run

    parts = {name: round(1e3 * timer(ahead(call)), 2) for name, call in calls.items()}
    total = round(1e3 * timer(train), 2)
    kept = timer.kept_mb(lambda: forward(), module)
    return {**parts, "forward_and_backward": total, "kept_mb": kept}


def pyg_seconds(timer: Timer, ours: Parts) -> tuple[dict[str, float], bool]:
    """The same of the baseline, and whether it computes the same."""
    graph, chips = ours.graph, ours.graph.chips
    features = ours.model._node_features(graph).detach()
    data, pyg = to_hetero(graph, features), PygOsm(ours.model, chips).to(timer.device)
    position = ours.position.expand(chips, -1, -1)
    same = agree(ours, pyg, data, position)
    masked = pyg.choose(data)
    nodes = {k: v.detach() for k, v in pyg.encode(data, masked).items()}
    inner = {k: pyg.node_in[k](nodes[k]).detach() for k in KINDS}
    place = pyg.positions(data)
    (tokens, at), padding = pyg.pad(data, masked, [inner, place])
    calls: dict[str, Callable[[], Any]] = {
        "masking": lambda: pyg.choose(data),
        "padding": lambda: pyg.pad(data, masked, [inner, place]),
        "positions": lambda: pyg.positions(data),
        "attention": lambda: pyg.encode(data, masked),
        "read_out": lambda: pyg.region(data, nodes),
        "fusion": lambda: pyg.fuse(ours.tokens, position, tokens, at, padding),
    }
    return both_ways(timer, calls, lambda: pyg(data, ours.tokens, position), pyg), same


def agree(ours: Parts, pyg: PygOsm, data: Any, position: Tensor) -> bool:
    """Whether both compute the same, without dropout, for the same masked nodes."""
    graph = ours.graph
    masked, _ = ours.mask()
    per_kind = {k: masked[graph.kind_slice(i)] for i, k in enumerate(KINDS)}
    ours.model.eval()
    pyg.eval()
    with torch.no_grad():
        region, loss = ours.forward(masked)
        expected, expected_loss = pyg(data, ours.tokens, position, per_kind)
    ours.model.train()
    pyg.train()
    return bool(
        torch.allclose(region, expected, atol=1e-4, rtol=1e-3)
        and torch.allclose(loss, expected_loss, rtol=1e-3)
    )


def osm_parts(timer: Timer) -> dict[str, Any]:
    """Ours against the baseline."""
    ours = Parts(make_graph(CHIPS, NODES / CHIPS), timer.device)
    ours.model.train()
    mine = ours.seconds(timer)
    theirs, same = pyg_seconds(timer, ours)
    share = mine["forward_and_backward"] / theirs["forward_and_backward"]
    return {
        "chips": CHIPS, "nodes": ours.graph.nodes, "edges": ours.graph.edge.shape[1],
        "ours_ms": mine, "pyg_ms": theirs, "same_result": same,
        "ratio": round(share, 3), "goal": 0.60,
    }  # fmt: skip


def growths(timer: Timer) -> dict[str, Any]:
    """Exponents of the time of our OSM side."""

    def total(graph: GraphBatch) -> float:
        parts = Parts(graph, timer.device)
        parts.model.train()
        return both_ways(timer, {}, parts.forward, parts.model)["forward_and_backward"]

    nodes = [make_graph(CHIPS, NODES / CHIPS * k) for k in (0.25, 1, 4)]
    edges = [make_graph(CHIPS, NODES / CHIPS, extra_edges=k) for k in (0, 3, 15)]
    by_nodes, by_edges = ([total(g) for g in graphs] for graphs in (nodes, edges))
    return {
        "nodes": [g.nodes for g in nodes], "ms_by_nodes": by_nodes,
        "exponent_of_nodes": growth([g.nodes for g in nodes], by_nodes),
        "edges": [g.edge.shape[1] for g in edges], "ms_by_edges": by_edges,
        "exponent_of_edges": growth([g.edge.shape[1] for g in edges], by_edges),
    }  # fmt: skip


def large_graph(timer: Timer) -> dict[str, Any]:
    """A chip of 20,000 objects beside seven usual ones, by the most masked nodes of a chip.

    With all its masked nodes on a CPU one of 5,000 objects, alone: attention with dropout keeps
    every weight there (on a GPU it does not), for every chip as if it were as large.
    """
    gpu = timer.device.type == "cuda"
    graphs = {
        10: make_graph(7, NODES / CHIPS, large=20_000),
        None: make_graph(7 if gpu else 0, NODES / CHIPS, large=20_000 if gpu else 5_000),
    }
    result: dict[str, Any] = {}
    for most, graph in graphs.items():
        parts = Parts(graph, timer.device, max_masked_nodes=most)
        parts.model.train()
        result["all_masked" if most is None else f"{most}_masked"] = {
            "chips": graph.chips, "nodes": graph.nodes,
            **both_ways(timer, {}, parts.forward, parts.model),
        }  # fmt: skip
    return result


def main() -> None:
    """Run the benchmark."""
    there = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if there else "cpu")
    parser.add_argument("--vit", default="large" if there else "tiny")
    parser.add_argument("--batch", type=int, default=256 if there else 32)
    parser.add_argument("--repeat", type=int, default=10 if there else 3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timer = Timer(torch.device(arguments.device), arguments.repeat)
    steps = {"step": whole_step(timer, arguments.vit, arguments.batch, compiled=False)}
    if timer.device.type == "cuda":
        name = torch.cuda.get_device_name()
        steps["compiled_step"] = whole_step(timer, arguments.vit, arguments.batch, compiled=True)
        steps["peak_gpu_mb"] = {"step": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
    else:
        name = "CPU, one core"
    report(
        {"device": name, "torch": torch.__version__, **steps, "osm_parts": osm_parts(timer),
         "growth": growths(timer), "large_graph": large_graph(timer)}
    )  # fmt: skip


if __name__ == "__main__":
    main()
