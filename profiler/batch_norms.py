"""Batch and instance norms written out as sums over batch and space.

Sums are what a sharded batch can add up; a fused kernel could only see its own shard (Ioffe and Szegedy 2015, with the
unbiased running variance that PyTorch keeps). Running statistics become explicit writes to their buffers, which
replace_inplace turns into new values, one after the other where a norm is called more than once in a forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .nodes import value

aten = torch.ops.aten
Call = Callable[..., fx.Node]


def replace_batch_norm(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.batch_norm.default, aten.instance_norm.default):
            continue
        with graph.inserting_before(node):
            out = _normalized(node, _caller(graph, node))
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def _caller(graph: fx.Graph, node: fx.Node) -> Call:
    mode = value(node.args[0]).fake_mode

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(op, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
        operands = fx.node.map_arg((args, kwargs), lambda n: value(n))
        with mode:
            new.meta["val"] = op(*operands[0], **operands[1])
        return new

    return call


def _normalized(node: fx.Node, call: Call) -> fx.Node:
    """(x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)"""
    x, weight, bias, mean_in, var_in, own, momentum, eps = node.args[:8]
    shape = value(x).shape
    stat = [1, shape[1]] + [1] * (len(shape) - 2)
    if own:
        dims = [d for d in range(len(shape)) if d > 1 or (d == 0 and node.target is aten.batch_norm.default)]
        count = math.prod(shape[d] for d in dims)
        mean = call(aten.div.Scalar, call(aten.sum.dim_IntList, x, dims, True), count)
        centred = call(aten.sub.Tensor, x, mean)
        squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, centred, centred), dims, True)
        var = call(aten.div.Scalar, squares, count)
        if 0 in dims:  # of a microbatch: what a loss is of the batch (loss_over.py) does not ask how they come about
            mean.meta["statistics"] = var.meta["statistics"] = True
        for buffer, new, scale in ((mean_in, mean, 1.0), (var_in, var, count / max(count - 1, 1))):
            if buffer is not None and momentum is not None:
                _update(buffer, new, scale, momentum, call)
    else:
        centred = call(aten.sub.Tensor, x, call(aten.view.default, mean_in, stat))
        var = call(aten.view.default, var_in, stat)
    out = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Scalar, var, eps)))
    if weight is not None:
        out = call(aten.mul.Tensor, out, call(aten.view.default, weight, stat))
    if bias is not None:
        out = call(aten.add.Tensor, out, call(aten.view.default, bias, stat))
    if value(out).dtype != value(x).dtype:  # statistics and weights in float32 under a half-precision input
        out = call(aten._to_copy.default, out, dtype=value(x).dtype)
    return out


def _update(buffer: Any, new: fx.Node, scale: float, momentum: Any, call: Call) -> None:
    """Running statistics: those of an instance norm are the mean over its samples."""
    if value(new).shape[0] > 1:
        new = call(aten.div.Scalar, call(aten.sum.dim_IntList, new, [0], True), value(new).shape[0])
    flat = call(aten.detach.default, call(aten.view.default, new, list(value(buffer).shape)))
    old = call(aten.mul.Scalar, buffer, 1 - momentum)
    call(aten.copy_.default, buffer, call(aten.add.Tensor, old, call(aten.mul.Scalar, flat, momentum * scale)))
