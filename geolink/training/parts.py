"""Batches on their way to the device: taken apart, brought there ahead, asked for more."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geolink.graph import GraphBatch, csr_take
from geolink.models.context import ChipContext
from geolink.models.losses import Pairs, unit_vectors
from geolink.stream import Batch, MixedStream, ShardStream
from schemas.training import Negatives

State = Mapping[str, Any]
"""`ShardStream.state_dict`."""


def endless(
    stream: ShardStream | MixedStream, device: torch.device
) -> Generator[tuple[Batch, State]]:
    """Batches of one epoch after the other, from where the stream stands, on the device.

    With each comes where the stream stands after it: with a GPU the next batch is on its way there
    while the last is at work.
    """
    if device.type != "cuda":
        yield from _endless(stream)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Batch, State] | None = None
    for batch, state in _endless(stream):
        with torch.cuda.stream(side):
            coming = moved(moved(batch, Tensor.pin_memory), _sent(device)), state
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(side)
        moved(coming[0], _used_by(torch.cuda.current_stream(device)))
        ahead = coming


def _endless(stream: ShardStream | MixedStream) -> Generator[tuple[Batch, State]]:
    while True:
        for batch in stream:
            yield batch, stream.state_dict()
        stream.set_epoch(stream.epoch + 1)


def _sent(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, non_blocking=True)


def _used_by(stream: torch.cuda.Stream) -> Callable[[Tensor], Tensor]:
    def use(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    return use


def moved(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with the function applied to its tensors, the graph's too."""
    values: dict[str, Any] = {
        f.name: function(v) for f in fields(batch) if torch.is_tensor(v := getattr(batch, f.name))
    }
    return replace(batch, **values, graph=batch.graph._map(function))


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts of the same number of chips, in their order; on the CPU."""
    if parts == 1:
        return [batch]
    size = len(batch) // parts
    return [take(batch, n * size, (n + 1) * size) for n in range(parts)]


def take(batch: Batch, low: int, high: int) -> Batch:
    """Chips low..high of a batch on the CPU."""
    values: dict[str, Any] = {
        f.name: v[low:high]
        for f in fields(batch)
        if isinstance(v := getattr(batch, f.name), Tensor | np.ndarray)
    }
    return replace(batch, **values, graph=take_graphs(batch.graph, low, high))


def take_graphs(graph: GraphBatch, low: int, high: int) -> GraphBatch:
    """The graphs of chips low..high of a batch on the CPU, which no crop has changed."""
    chip, target = graph.chip.numpy(), graph.edge[1].numpy()
    # Of each kind its chips are one run, and so are the edges that enter their nodes.
    runs = [np.searchsorted(chip[graph.kind_slice(k)], [low, high]) for k in range(3)]
    first, last = (np.array(graph.kind_ptr[:3]) + np.array(ends) for ends in zip(*runs))
    nodes = np.concatenate([np.arange(a, b) for a, b in zip(first, last)])
    edges = np.concatenate(
        [np.arange(*np.searchsorted(target, [a, b])) for a, b in zip(first, last)]
    )
    number = np.zeros(graph.nodes, np.int64)
    number[nodes] = np.arange(len(nodes))
    tags, tag_offset = csr_take(graph.tag_offset.numpy(), nodes)
    patches, patch_offset = csr_take(graph.patch_offset.numpy(), nodes)
    point, line, polygon = (last - first).tolist()
    return replace(
        graph,
        kind_ptr=(0, point, point + line, point + line + polygon),
        chip=graph.chip[nodes] - low,
        **{n: getattr(graph, n)[nodes] for n in ("osm_class", "osm_id", "size", "anchor")},
        tag_offset=torch.from_numpy(tag_offset),
        tag=graph.tag[tags],
        tag_weight=graph.tag_weight[tags],
        # Contiguous, as it is searched: numpy gathers columns into another order.
        edge=torch.from_numpy(np.ascontiguousarray(number[graph.edge.numpy()[:, edges]])),
        relation=graph.relation[edges],
        patch_offset=torch.from_numpy(patch_offset),
        patch=graph.patch[patches],
        patch_weight=graph.patch_weight[patches],
        chips=high - low,
    )


def chip_pairs(batch: Batch, options: Negatives) -> Pairs | None:
    """By what chips of a batch are too alike to be negatives, on its device; none: by nothing."""
    if not (options.min_distance_m or options.same_tags):
        return None
    return Pairs(
        unit_vectors(batch.center_lonlat), tag_signature(batch.graph),
        options.min_distance_m, options.same_tags,
    )  # fmt: skip


def tag_signature(graph: GraphBatch) -> Tensor:
    """One number per set of tags: int64 [B], 0 for chips without any; no wait for the device.

    Two sets have the same number with a chance of 2^-64.
    """
    chip = torch.repeat_interleave(
        graph.chip, graph.tag_offset.diff(), output_size=graph.tag.shape[0]
    )
    # Tags are fewer than 2^32, and so are chips: every pair once, in order.
    pair, _ = (chip << 32 | graph.tag).sort()
    again = torch.zeros_like(pair, dtype=torch.bool)
    again[1:] = pair[1:] == pair[:-1]
    mixed = _mix(pair & 0xFFFFFFFF).masked_fill(again, 0)
    return mixed.new_zeros(graph.chips).index_add_(0, pair >> 32, mixed)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014), in the wrapping arithmetic of int64."""
    value = value + 0x1E3779B97F4A7C15
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ (value >> shift & ((1 << 64 - shift) - 1))) * factor
    return value ^ (value >> 31 & ((1 << 33) - 1))


def chip_context(batch: Batch, wavelength_um: Tensor | None) -> ChipContext:
    """What is known of the chips of a batch beside their pixels and objects, on its device."""
    return ChipContext(batch.time, batch.gsd_m, batch.center_lonlat, wavelength_um)
