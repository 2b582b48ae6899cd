"""FLOPs and bytes of one op from its shapes: torch's own formulas where it has them, else one per output element."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from .batched_products import copied_bytes
from .graph import OpCost, Segment
from .nodes import named_arguments, source_of

aten = torch.ops.aten
VIEWS = {
    getattr(aten, name)
    for name in (
        "view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "unbind",
        "split_with_sizes", "alias", "detach", "diagonal", "narrow", "chunk", "unfold", "_reshape_alias",
        "movedim", "real", "imag",
    )
    if hasattr(aten, name)
}  # fmt: skip

# what costs less to make again than to keep: views, if of a copy where a shard's strides ask for one, and constants
FREE = {
    getattr(aten, name)
    for name in ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice",
                 "select", "reshape", "zeros", "ones", "full", "scalar_tensor", "zeros_like")
}  # fmt: skip


VECTOR_BYTES = 16  # that tensor cores load at once
_STACKED = {aten.bmm, torch.ops.shardwright.matmul}


@dataclass(frozen=True)
class OpWork:
    """flops: multiply and add count as two. bytes: read and written; 0 for views, which move nothing. launches: kernels
    that follow each other on an accelerator. is_aligned: are the rows of a product's stacked matrices whole vectors?"""

    flops: float
    bytes_moved: float
    launches: int = 1
    is_aligned: bool = True


def is_view(node: fx.Node) -> bool:
    """Does the result share memory with its first operand?"""
    if node.target is operator.getitem:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.reshape or packet is aten.contiguous:
        source, out = node.all_input_nodes[0].meta["val"], node.meta["val"]
        return packet is aten.reshape and source.is_contiguous() and out.is_contiguous()
    return packet in VIEWS


def is_free(node: fx.Node) -> bool:
    """Is the result made anew wherever it is read, and never kept?"""
    return getattr(node.target, "overloadpacket", None) in FREE


def size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def op_work(node: fx.Node) -> OpWork:
    if is_view(node):
        return OpWork(0.0, 0.0)
    operands: list[torch.Tensor] = []
    fx.node.map_arg(
        (node.args, node.kwargs),
        lambda n: operands.append(n.meta["val"]) if isinstance(n.meta.get("val"), torch.Tensor) else None,
    )
    val = node.meta.get("val")
    results = [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]
    moved = float(sum(map(size_bytes, operands)) + sum(map(size_bytes, results)))
    if node.target is torch.ops.shardwright.matmul.default:
        moved += 2.0 * copied_bytes(operands)
    return OpWork(_flops(node, operands, results), moved, _launches(node, operands), _is_aligned(node, results))


def _is_aligned(node: fx.Node, results: list[torch.Tensor]) -> bool:
    """Of stacks of matrices in 16 bits: do rows of both operands and of the result begin at whole vectors?"""
    if getattr(node.target, "overloadpacket", None) not in _STACKED or results[0].element_size() != 2:
        return True
    first, second = (operand.meta["val"] for operand in node.args[:2])  # type: ignore[union-attr]
    return all(size * 2 % VECTOR_BYTES == 0 for size in (first.shape[-1], second.shape[-1]))


# kernels of a step of shardwright::recurrence (recurrence_ops.py): its matmul, gates and what is kept
_LAUNCHES_OF_A_STEP = {"shardwright.recurrence": 12, "shardwright.recurrence_backward": 24}


def _launches(node: fx.Node, operands: list[torch.Tensor]) -> int:
    """A recurrence runs step by step: its first operand is [B, T, ...]."""
    steps = _LAUNCHES_OF_A_STEP.get(str(getattr(node.target, "overloadpacket", "")))
    return 1 if steps is None else steps * operands[0].shape[1]


def _flops(node: fx.Node, operands: list[torch.Tensor], results: list[torch.Tensor]) -> float:
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet)
    if name.startswith("shardwright.attention"):
        return attention_flops(node)
    if packet in flop_registry:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
        return float(flop_registry[packet](*args, **kwargs, out_val=node.meta["val"]))
    if packet in (aten.embedding, aten.gather, aten.index, aten.cat, aten.clone, aten._to_copy):
        return 0.0
    return float(max([math.prod(r.shape) for r in results], default=0))


def attention_pairs(queries: int, keys: int, causal: bool, window: int) -> float:
    """Pairs of a query and a key that see each other, of one head: half where causal; of a window w, w keys a query and
    on both sides 2w, less the corners that lie outside."""
    pairs = queries * keys * (0.5 if causal else 1.0)
    if window <= 0:
        return pairs
    width = min(window, queries, keys)
    band = width * queries - width * width / 2
    return min(pairs, band if causal else 2 * band)


def attention_flops(node: fx.Node, *, recomputed: bool = True) -> float:
    """Two products of pairs by head size, one over the queries' and one over the values'; the backward two and two, and
    the scores again where `recomputed` counts too, which no model asks for."""
    given = named_arguments(node)
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    batch, heads, queries, dim = query.shape
    over_queries, over_values = (2 + recomputed, 2) if "grad_out" in given else (1, 1)
    pairs = attention_pairs(queries, key.shape[2], bool(given["causal"]), int(given["window"]))
    return 2.0 * batch * heads * pairs * (over_queries * dim + over_values * value.shape[3])


def op_costs(segment: Segment) -> list[OpCost]:
    """One row for each op of the joint graph, at the captured shapes."""
    rows = []
    for node in segment.joint.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        work = op_work(node)
        val = node.meta.get("val")
        results = [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, torch.Tensor)]
        stack = node.meta.get("nn_module_stack")
        path = list(stack.values())[-1][0] if stack else ""
        rows.append(
            OpCost(node.name, str(node.target), int(work.flops), int(work.bytes_moved), sum(map(size_bytes, results)),
                   source_of(node), path)
        )  # fmt: skip
    return rows
