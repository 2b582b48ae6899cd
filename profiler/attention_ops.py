"""SDPA of an exported graph, and the markers of attention_interface.py, as shardwright::attention.

Ours takes four dimensions, [B, H, S, D]. Fewer or more are brought to that and back: one head where there is no
dimension for heads, all leading dimensions but the last flattened where there are more. The order of the probabilities
stays, and with it what dropout drops.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .nodes import value
from .random_forms import bind
from .random_ops import NUMBER

aten = torch.ops.aten
ours = torch.ops.shardwright


@dataclass(frozen=True)
class _Call:
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout_p: float
    causal: bool
    scale: float
    window: int


def replace_attention(graph: fx.Graph, key: fx.Node) -> None:
    """Two results; the second is the log-sum-exp."""
    for node in list(graph.nodes):
        call = _read(node) if node.op == "call_function" else None
        if call is None:
            continue
        with graph.inserting_before(node):
            new = _attend(graph, node, call, key)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _read(node: fx.Node) -> _Call | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    if name not in ("aten::scaled_dot_product_attention", "shardwright::sdpa_window", "shardwright::sdpa_masked"):
        return None
    a = bind(node.target, node.args, node.kwargs)
    scale = a["scale"] if a["scale"] is not None else value(a["query"]).shape[-1] ** -0.5
    mask = a.get("attn_mask", a.get("mask"))
    causal = True if name == "shardwright::sdpa_window" else bool(a.get("is_causal", a.get("causal")))
    window = a.get("window", 0)
    return _Call(a["query"], a["key"], a["value"], mask, float(a["dropout_p"]), causal, float(scale), window)


def _attend(graph: fx.Graph, node: fx.Node, call: _Call, key: fx.Node) -> fx.Node:
    if call.dropout_p >= 1:  # all is dropped, and torch draws nothing for it
        out = _attend(graph, node, replace(call, dropout_p=0.0), key)
        return _emit(graph, node, aten.mul.Scalar, out, 0)
    lead = list(value(node).shape[:-2])
    call = _four_dimensions(graph, node, call, lead)
    query = value(call.query)
    shape = [*query.shape[:3], value(call.key).shape[2]]
    draws = call.dropout_p > 0
    both = graph.call_function(
        ours.attention.default,
        (call.query, call.key, call.value, call.mask, key if draws else None, call.scale, call.causal, call.window,
         call.dropout_p, 0, shape, [0] * 4),
    )  # fmt: skip
    result = query.new_empty([*query.shape[:3], value(call.value).shape[3]])
    both.meta = {**node.meta, "val": (result, query.new_empty(shape[:3])), "random": draws}
    out = graph.call_function(operator.getitem, (both, 0))
    out.meta = {**node.meta, "val": result}
    out.meta.pop(NUMBER, None)
    if len(lead) == 2:
        return out
    return _emit(graph, node, aten.reshape.default, out, list(value(node).shape))


def _four_dimensions(graph: fx.Graph, node: fx.Node, call: _Call, lead: list[int]) -> _Call:
    """lead: the result's dimensions before the last two. What is broadcast over samples is expanded; a single key head
    that all query heads share stays single."""

    def brought(x: fx.Node, heads: bool) -> fx.Node:
        own = list(value(x).shape)
        missing = len(lead) + 2 - len(own)
        wanted = [*lead, *own[-2:]]
        if len(lead) > 1 and not heads and missing == 0:
            wanted[-3] = own[-3]  # key and value heads are fewer, or one
        if own != wanted:
            x = _emit(graph, node, aten.expand.default, x, wanted)
        if len(lead) == 2:
            return x
        samples = math.prod(wanted[:-3]) if len(lead) > 2 else (lead[0] if lead else 1)
        return _emit(graph, node, aten.reshape.default, x, [samples, wanted[-3] if len(lead) > 2 else 1, *own[-2:]])

    differ = len(lead) > 1 and value(call.key).shape[-3:-2] != value(call.value).shape[-3:-2]
    mask = call.mask
    if mask is not None and len(lead) != 2 and value(mask).dim() > 2:
        mask = brought(mask, heads=True)
    return replace(
        call,
        query=brought(call.query, heads=True),
        key=brought(call.key, heads=differ),
        value=brought(call.value, heads=differ),
        mask=mask,
    )


def _emit(graph: fx.Graph, node: fx.Node, op: Any, x: fx.Node, *args: Any) -> fx.Node:
    new = graph.call_function(op, (x, *args))
    new.meta = {k: v for k, v in node.meta.items() if k not in (NUMBER, "tensor_meta")}
    new.meta["val"] = op(value(x), *args)
    return new
