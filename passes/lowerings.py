"""Local programs of ops whose sharded form is not the op itself on local tensors.

A strategy names one of these; it emits the local nodes, collectives included, and returns the result (or results).
What each reduces over ranks is in its record (ops/lowering.py), which the cost and the proof of a build read.
Arguments: emitter, the captured node, its arguments with tensors replaced by local nodes, the mesh axis.

    embedding_rows            vocabulary split: look up own rows, zero elsewhere (Shoeybi et al. 2019, section 3)
    embedding_rows_backward   the gradient of own rows
    nll_rows                  samples split: sums of losses and of weights added over ranks
    nll_cols                  classes split: each target's value comes from the rank that has it
    nll_cols_backward         own classes of the gradient
    log_softmax_cols          softmax over a split dimension: maximum and sum over ranks
    softmax_cols
    softmax_cols_backward, log_softmax_cols_backward
    linear_cross_entropy_cols, ..._backward     classes split: maximum, sum and the target's logit over ranks
    own_experts, own_experts_backward   experts split: choices of others' experts left out
    dispatch_experts, ..._backward      experts and tokens split: tokens sent to experts (passes/expert_dispatch.py)
    attention_rows, attention_rows_backward   queries split, each with the keys that it sees (passes/attention_rows.py)
    attention_near_rows, ..._backward         the same, where each sees as many: within a window
    attention_ring, attention_zigzag, ..._backward   keys and values go round (passes/attention_ring.py)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ops.lowering import LOWERINGS
from ..ops.placement import shard_size, shard_start
from .attention_ring import attention_ring, attention_ring_backward
from .attention_rows import attention_rows, attention_rows_backward
from .expert_dispatch import dispatch_experts, dispatch_experts_backward
from .redistribute import Emitter, MeshAxis

aten = torch.ops.aten
Program = Callable[[Emitter, fx.Node, list[Any], MeshAxis], Any]


def _range(size: int, axis: MeshAxis) -> tuple[int, int]:
    """First row and number of rows that this rank has."""
    return shard_start(size, axis.size, axis.index), shard_size(size, axis.size, axis.index)


def _own(emit: Emitter, index: fx.Node, start: int, count: int) -> tuple[fx.Node, fx.Node]:
    """(index relative to this rank's rows, clamped to be valid; mask of those that are not its own)"""
    shifted = emit.call(aten.sub.Scalar, index, start)
    outside = emit.call(
        aten.logical_or.default, emit.call(aten.lt.Scalar, shifted, 0), emit.call(aten.ge.Scalar, shifted, count)
    )
    return emit.call(aten.masked_fill.Scalar, shifted, outside, 0), outside


def embedding_rows(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    start, count = _range(node.args[0].meta["val"].shape[0], axis)  # type: ignore[union-attr]
    local, outside = _own(emit, args[1], start, count)
    found = emit.call(aten.embedding.default, args[0], local)
    return emit.call(aten.masked_fill.Scalar, found, emit.call(aten.unsqueeze.default, outside, -1), 0.0)


def embedding_rows_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """(grad, indices, num_weights, padding_idx, scale_grad_by_freq): rows of others and the padding row get nothing."""
    grad, index, num_weights, padding = args[0], args[1], args[2], args[3]
    start, count = _range(num_weights, axis)
    local, outside = _own(emit, index, start, count)
    if padding >= 0:
        outside = emit.call(aten.logical_or.default, outside, emit.call(aten.eq.Scalar, index, padding))
    grad = emit.call(aten.masked_fill.Scalar, grad, emit.call(aten.unsqueeze.default, outside, -1), 0.0)
    return emit.call(aten.embedding_dense_backward.default, grad, local, count, -1, False)


def nll(
    emit: Emitter, node: fx.Node, args: list[Any], rows: list[MeshAxis], cols: list[MeshAxis]
) -> tuple[fx.Node, fx.Node]:
    """(log_probabilities, target, weight, reduction, ignore_index) -> (loss, total weight), whole on every rank."""
    target, ignore = args[1], args[4]
    for axis in cols:
        target = _target_at(emit, target, ignore, node.args[0].meta["val"].shape[1], axis)  # type: ignore[union-attr]
        ignore = -100
    both = emit.call(node.target, args[0], target, args[2], 2, ignore)  # 2: sum
    total, weight = emit.call(operator.getitem, both, 0), emit.call(operator.getitem, both, 1)
    for axis in [*rows, *cols]:
        total, weight = emit.all_reduce(total, axis), emit.all_reduce(weight, axis)
    return (emit.call(aten.div.Tensor, total, weight) if args[3] == 1 else total), weight


def nll_rows(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    return nll(emit, node, args, [axis], [])


def nll_cols(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    return nll(emit, node, args, [], [axis])


def _target_at(emit: Emitter, target: fx.Node, ignore: int, classes: int, axis: MeshAxis) -> fx.Node:
    """Targets relative to this rank's classes; those of other ranks are ignored."""
    start, count = _range(classes, axis)
    local, outside = _own(emit, target, start, count)
    skip = emit.call(aten.logical_or.default, outside, emit.call(aten.eq.Scalar, target, ignore))
    return emit.call(aten.masked_fill.Scalar, local, skip, -100)


def nll_cols_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """(grad, log_probabilities, target, weight, reduction, ignore_index, total_weight)"""
    classes = node.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
    target = _target_at(emit, args[2], args[5], classes, axis)
    return emit.call(node.target, args[0], args[1], target, None, args[4], -100, args[6])


def _log_sum(emit: Emitter, x: fx.Node, dim: int, axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    """(x - max, sum of its exponentials over all ranks)"""
    top = emit.all_reduce(emit.call(aten.amax.default, x, [dim], True), axis, "max")
    shifted = emit.call(aten.sub.Tensor, x, top)
    exponentials = emit.call(aten.exp.default, shifted)
    return shifted, emit.all_reduce(emit.call(aten.sum.dim_IntList, exponentials, [dim], True), axis)


def log_softmax_cols(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    x = emit.call(aten._to_copy.default, args[0], dtype=torch.float32) if args[2] else args[0]
    shifted, total = _log_sum(emit, x, args[1], axis)
    return emit.call(aten.sub.Tensor, shifted, emit.call(aten.log.default, total))


def softmax_cols(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    x = emit.call(aten._to_copy.default, args[0], dtype=torch.float32) if args[2] else args[0]
    shifted, total = _log_sum(emit, x, args[1], axis)
    return emit.call(aten.div.Tensor, emit.call(aten.exp.default, shifted), total)


def log_softmax_cols_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """grad - softmax * sum(grad)"""
    grad, out, dim, dtype = args[:4]
    total = emit.all_reduce(emit.call(aten.sum.dim_IntList, grad, [dim], True), axis)
    found = emit.call(aten.sub.Tensor, grad, emit.call(aten.mul.Tensor, emit.call(aten.exp.default, out), total))
    return emit.call(aten._to_copy.default, found, dtype=dtype)


def softmax_cols_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """softmax * (grad - sum(grad * softmax))"""
    grad, out, dim, dtype = args[:4]
    inner = emit.call(aten.sum.dim_IntList, emit.call(aten.mul.Tensor, grad, out), [dim], True)
    centred = emit.call(aten.sub.Tensor, grad, emit.all_reduce(inner, axis))
    return emit.call(aten._to_copy.default, emit.call(aten.mul.Tensor, out, centred), dtype=dtype)


def linear_cross_entropy_cols(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> tuple[fx.Node, fx.Node]:
    """(hidden, weight, bias, target, ignore, dtype) -> (loss, lse), whole on every rank."""
    target = _target_at(emit, args[3], args[4], node.args[1].meta["val"].shape[0], axis)  # type: ignore[union-attr]
    both = emit.call(node.target, *args[:3], target, -100, args[5])
    loss, lse = emit.call(operator.getitem, both, 0), emit.call(operator.getitem, both, 1)
    others = emit.call(aten.eq.Scalar, target, -100)
    own = emit.call(aten.masked_fill.Scalar, emit.call(aten.sub.Tensor, lse, loss), others, 0.0)
    top = emit.all_reduce(lse, axis, "max")
    share = emit.call(aten.exp.default, emit.call(aten.sub.Tensor, lse, top))
    whole = emit.call(aten.add.Tensor, top, emit.call(aten.log.default, emit.all_reduce(share, axis)))
    rows = emit.call(aten.sub.Tensor, whole, emit.all_reduce(own, axis))
    ignored = emit.call(aten.eq.Scalar, args[3], args[4])
    return emit.call(aten.masked_fill.Scalar, rows, ignored, 0.0), whole


def linear_cross_entropy_cols_backward(
    emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis
) -> tuple[fx.Node | None, ...]:
    """(grad, hidden, weight, bias, target, lse, ignore): rows whose target is another rank's have their share of the
    gradient too, so that targets are told from ignored ones by a row of grad that is zero."""
    start, count = _range(node.args[2].meta["val"].shape[0], axis)  # type: ignore[union-attr]
    grad = emit.call(aten.masked_fill.Scalar, args[0], emit.call(aten.eq.Scalar, args[4], args[6]), 0.0)
    target, outside = _own(emit, args[4], start, count)
    target = emit.call(aten.masked_fill.Scalar, target, outside, -1)
    both = emit.call(node.target, grad, *args[1:4], target, args[5], -100)
    made = [emit.call(operator.getitem, both, k) for k in range(3 if args[3] is not None else 2)]
    return (*made, *[None] * (3 - len(made)))


def own_experts(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """(hidden, index, weight, experts..., activation), the experts split: numbers counted from this rank's first."""
    start, _ = _range(node.args[3].meta["val"].shape[0], axis)  # type: ignore[union-attr]
    index = emit.call(aten.sub.Scalar, args[1], start)
    return emit.call(node.target, args[0], index, *args[2:])


def own_experts_backward(emit: Emitter, node: fx.Node, args: list[Any], axis: MeshAxis) -> fx.Node:
    """(grad_out, hidden, index, weight, experts..., pre, activation); without pre, which is computed again."""
    start, _ = _range(node.args[4].meta["val"].shape[0], axis)  # type: ignore[union-attr]
    index = emit.call(aten.sub.Scalar, args[2], start)
    return emit.call(node.target, *args[:2], index, *args[3:-2], None, args[-1])


_ATTENTION: dict[str, Program] = {
    f"attention_{form}{phase}": function
    for forms, functions in (
        (("rows", "near_rows"), (attention_rows, attention_rows_backward)),
        (("ring", "zigzag"), (attention_ring, attention_ring_backward)),
    )
    for form in forms
    for phase, function in zip(("", "_backward"), functions, strict=True)
}
PROGRAMS: dict[str, Program] = _ATTENTION | {
    function.__name__: function
    for function in (
        embedding_rows, embedding_rows_backward, nll_rows, nll_cols, nll_cols_backward, log_softmax_cols, softmax_cols,
        log_softmax_cols_backward, softmax_cols_backward, linear_cross_entropy_cols,
        linear_cross_entropy_cols_backward, own_experts, own_experts_backward,
        dispatch_experts, dispatch_experts_backward,
    )
}  # fmt: skip


def program_of(name: str) -> Program:
    """That of an op which was added with all its facts stands with them (ops/facts.py)."""
    return LOWERINGS[name].emit or PROGRAMS[name]
