"""What the cost of a segment reads of its graph: the same under all placements, so it is read once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from ...profiler.graph import Segment
from ...profiler.joint import flatten_outputs, is_getitem
from ...profiler.op_view import OpView, is_op, origin, storage_root, view_of
from ...profiler.signature import results, split_backward
from ...profiler.slots import INPUT, kind_of
from ...profiler.work import attention_flops, op_work
from .lifetimes import Result, RunLifetimes


@dataclass(frozen=True, eq=False)
class SegmentFacts:
    """Of one segment."""

    segment: Segment
    # sizes of the mesh axes, units -> sets of units whose results may be made again (recompute.py)
    recompute_choices: dict[tuple[tuple[int, ...], frozenset[str]], list[frozenset[str]]] = field(default_factory=dict)

    @cached_property
    def views(self) -> dict[fx.Node, OpView]:
        """Of every op, in the order of the graph."""
        return {node: view_of(node) for node in self.segment.joint.graph.nodes if is_op(node)}

    @cached_property
    def parts(self) -> dict[fx.Node, str]:
        """Of every op: F forward, I a backward op that input gradients need, W one that only weight gradients need."""
        for_input, for_weight = split_backward(self.segment)
        return {node: "I" if node in for_input else "W" if node in for_weight else "F" for node in self.views}

    @cached_property
    def model_flops(self) -> dict[fx.Node, float]:
        """Of ops that count as model FLOPs."""
        found = {node: matrix_flops(node) for node in self.views}
        return {node: flops for node, flops in found.items() if flops}

    @cached_property
    def results(self) -> list[tuple[str, Result, str]]:
        return results(self.segment)

    @cached_property
    def placeholders(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.segment.joint.graph.nodes if n.op == "placeholder"}

    @cached_property
    def outputs(self) -> list[Result]:
        return [origin(n) for n in flatten_outputs(self.segment.joint.graph)[: len(self.segment.outputs)]]

    @cached_property
    def saved(self) -> list[Result]:
        return saved_tensors(self.segment)

    @cached_property
    def lifetimes(self) -> RunLifetimes:
        return RunLifetimes(self.segment)


def saved_tensors(segment: Segment) -> list[Result]:
    """Results of the forward (and inputs) that the backward reads, each memory once; no parameters and buffers."""
    found: dict[Result, None] = {}
    for node in segment.joint.graph.nodes:
        if node.meta.get("phase") != "backward" or node.op != "call_function" or is_getitem(node):
            continue
        for operand in node.all_input_nodes:
            if operand.meta.get("phase") == "backward" or not isinstance(operand.meta.get("val"), torch.Tensor):
                continue
            source, output = storage_root(operand)
            if source.op != "placeholder" or kind_of(source.name) == INPUT:
                found[(source, output)] = None
    return list(found)


def matrix_flops(node: fx.Node) -> float:
    """What counts as model FLOPs: matrix products, convolutions and attention."""
    name = str(getattr(node.target, "overloadpacket", ""))
    if name.split(".")[-1] in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "matmul",
        "convolution",
        "convolution_backward",
        "_grouped_mm",
    ):
        return op_work(node).flops
    if name.startswith("shardwright.expert_mlp"):
        return op_work(node).flops
    if name.startswith("shardwright.linear_cross_entropy"):  # whose backward makes the logits again
        return op_work(node).flops * (2 / 3 if name.endswith("backward") else 1.0)
    if name.startswith("shardwright.attention"):
        return attention_flops(node, recomputed=False)
    return 0.0
