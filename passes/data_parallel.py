"""Average parameter gradients over the data-parallel ranks inside a compiled backward graph.

As DistributedDataParallel does (Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
VLDB 2020, section 3.2): gradients are packed into buckets in the order in which the backward makes them, each
bucket's all-reduce starts as soon as its last gradient is there, and all are waited for at the end. Here both the
packing and the overlap are nodes of the graph, so the code generator below sees them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import _torch

DEFAULT_BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default


@dataclass(frozen=True)
class Gradient:
    """One gradient to average: slot of the graph's output, the node that makes it, its position in the graph."""

    slot: int
    node: fx.Node
    position: int

    @property
    def val(self) -> torch.Tensor:
        return self.node.meta["val"]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.val.shape) * self.val.element_size()


def average_gradients(
    backward: fx.GraphModule,
    slots: Collection[int],
    *,
    group_name: str,
    group_size: int,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> int:
    """Rewrite backward in place so that the outputs at these slots are means over the group. Returns the bucket count.

    Every rank of the group must run the same graph. Gradients of one bucket share dtype and device.
    """
    output = _torch.output_node(backward.graph)
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    gradients = _gradients(backward.graph, results, slots)
    buckets = _buckets(gradients, bucket_bytes)
    last_placeholder = max(
        (node for node in backward.graph.nodes if node.op == "placeholder"), key=_positions(backward.graph).__getitem__
    )
    started = [_start(backward.graph, bucket, last_placeholder, group_name, group_size) for bucket in buckets]
    with backward.graph.inserting_before(output):
        for bucket, reducing in zip(buckets, started, strict=True):
            for gradient, averaged in zip(bucket, _finish(backward.graph, bucket, reducing), strict=True):
                for slot in _slots_of(gradient.node, results, slots):
                    results[slot] = averaged
    meta = dict(output.meta)
    output.args = (tuple(results),)
    output.meta.update(meta)
    backward.graph.lint()
    backward.recompile()
    return len(buckets)


def _positions(graph: fx.Graph) -> Mapping[fx.Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}


def _gradients(graph: fx.Graph, results: list[Any], slots: Collection[int]) -> list[Gradient]:
    """In the order in which the backward makes them; a node that feeds two slots is reduced once."""
    positions = _positions(graph)
    first_slot: dict[fx.Node, int] = {}
    for slot in sorted(slots):
        if isinstance(results[slot], fx.Node):
            first_slot.setdefault(results[slot], slot)
    found = [Gradient(slot, node, positions[node]) for node, slot in first_slot.items()]
    return sorted(found, key=lambda gradient: gradient.position)


def _slots_of(node: fx.Node, results: list[Any], slots: Collection[int]) -> list[int]:
    return [slot for slot in slots if results[slot] is node]


def _buckets(gradients: list[Gradient], bucket_bytes: int) -> list[list[Gradient]]:
    """Greedy in order of readiness; a gradient of symbolic size stands alone."""
    open_buckets: dict[tuple[Any, ...], list[Gradient]] = {}
    closed: list[list[Gradient]] = []
    for gradient in gradients:
        if not all(isinstance(size, int) for size in gradient.val.shape):
            closed.append([gradient])
            continue
        kind = (gradient.val.dtype, gradient.val.device)
        bucket = open_buckets.setdefault(kind, [])
        bucket.append(gradient)
        if sum(member.num_bytes for member in bucket) >= bucket_bytes:
            closed.append(open_buckets.pop(kind))
    closed += open_buckets.values()
    return sorted(closed, key=lambda bucket: bucket[-1].position)


def _start(
    graph: fx.Graph, bucket: list[Gradient], last_placeholder: fx.Node, group_name: str, group_size: int
) -> fx.Node:
    """Pack, divide, and start the all-reduce right after the bucket's last gradient."""
    aten = torch.ops.aten
    last = bucket[-1].node
    with graph.inserting_after(last_placeholder if last.op == "placeholder" else last):
        packed = _call(graph, aten.reshape.default, bucket[0].node, [-1]) if len(bucket) > 1 else bucket[0].node
    if len(bucket) > 1:
        flat = [packed]
        for gradient in bucket[1:]:
            with graph.inserting_after(flat[-1]):
                flat.append(_call(graph, aten.reshape.default, gradient.node, [-1]))
        with graph.inserting_after(flat[-1]):
            packed = _call(graph, aten.cat.default, flat)
        after = packed
    else:
        after = last_placeholder if last.op == "placeholder" else last
    with graph.inserting_after(after):
        scaled = _call(graph, aten.div.Tensor, packed, group_size)
    with graph.inserting_after(scaled):
        return _call(graph, torch.ops._c10d_functional.all_reduce.default, scaled, "sum", group_name)


def _finish(graph: fx.Graph, bucket: list[Gradient], reducing: fx.Node) -> list[fx.Node]:
    waited = _call(graph, torch.ops._c10d_functional.wait_tensor.default, reducing)
    if len(bucket) == 1:
        return [waited]
    sizes = [math.prod(gradient.val.shape) for gradient in bucket]
    pieces = _call(graph, torch.ops.aten.split_with_sizes.default, waited, sizes)
    averaged = []
    for index, gradient in enumerate(bucket):
        piece = _call(graph, operator.getitem, pieces, index)
        averaged.append(_call(graph, torch.ops.aten.view.default, piece, list(gradient.val.shape)))
    return averaged


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Add a node and work out its value under the graph's own fake mode, as the code generator needs."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda argument: argument.meta["val"])
    mode = _torch.fake_mode_of(values)
    with mode:
        node.meta["val"] = target(*values)
    return node
