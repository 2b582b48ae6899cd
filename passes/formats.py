"""Memory formats: operands as the kernels that read memory, not strides, want them.

Most kernels read their operands through strides, whatever these are: elementwise ops, views, products, and every op of
our sharding tables but those of _IN_ORDER (tests/test_passes_formats.py holds each to it). The others take memory as it
lies: the backward of a group norm reads its gradient in the format of its input, that of a layer norm its statistics
one after the other. Autograd hands them what they want and records no copy where nothing was to be copied. Shards,
what collectives bring, and results written over operands have strides of their own, so a rewritten graph asks anew:
at each such op, and at each that has no rule here, when it runs, since only then the true strides are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..ops.rules import find_rule
from ._torch import suggest_memory_format

aten = torch.ops.aten

# op -> position of the operand whose format the kernel takes for all of its rank, or None: contiguous, all of them
_IN_ORDER: dict[Any, int | None] = {
    aten.native_group_norm: 0,
    aten.native_group_norm_backward: 1,
    aten.native_layer_norm: None,
    aten.native_layer_norm_backward: None,
    aten._fused_rms_norm: None,
    aten._fused_rms_norm_backward: None,
    aten.nll_loss2d_forward: None,
    aten.nll_loss2d_backward: None,
    aten.view_as_complex: None,
    aten.adaptive_max_pool3d_backward: None,
    aten.linalg_matrix_exp: None,
}
# Factors are of the transpose of a contiguous matrix, else of the matrix; the captured backward counts on those.
_AS_CAPTURED = {aten._linalg_det, aten._linalg_slogdet, aten._linalg_solve_ex}
_OURS = ("shardwright", "prims", "_c10d_functional")  # written for any strides


def in_format(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x, dense, in the memory format of `like`: channels-last on CPUs where that is, else contiguous.

    The same tensor where it lies so already. Kernels of other devices take contiguous memory alone.
    """
    if like.device.type != "cpu" or like.dim() != x.dim():
        return x.contiguous()
    return x.contiguous(memory_format=suggest_memory_format(like))


def in_order(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """x, dense, its dimensions in memory from the outermost to the innermost as listed."""
    back = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def arranged(node: fx.Node, args: list[Any], kwargs: dict[str, Any], call: Callable[..., fx.Node]) -> Any:
    """(args, kwargs) of a captured node on this rank, tensors brought to the format that its kernel reads.

    call: adds a node to the rewritten graph.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in _IN_ORDER and packet not in _AS_CAPTURED and _reads_strides(node.target):
        return args, kwargs
    originals: list[fx.Node] = []
    fx.node.map_arg((node.args, dict(node.kwargs)), originals.append)
    remaining = iter(originals)
    position = _IN_ORDER.get(packet)
    leader = args[position] if position is not None else None

    def arrange(local: fx.Node) -> fx.Node:
        captured = next(remaining).meta.get("val")
        if not isinstance(captured, torch.Tensor):
            return local
        if leader is not None:
            return call(in_format, local, leader)
        rank = captured.dim()
        order = sorted(range(rank), key=lambda dim: (-captured.stride()[dim], dim))
        if packet in _AS_CAPTURED and rank > 1 and not captured.is_contiguous():
            return call(in_order, local, (*range(rank - 2), rank - 1, rank - 2))
        if packet in _IN_ORDER or order == list(range(rank)) or not is_dense(captured):
            return call(aten.contiguous.default, local)
        return call(in_order, local, tuple(order))

    return fx.node.map_arg((args, kwargs), arrange)


def is_dense(tensor: torch.Tensor) -> bool:
    """Its elements fill their memory, each once, in whatever order."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != reach:
                return False
            reach *= size
    return True


def same_strides(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Does each index lead to the same place in both? Strides of dimensions of one element do not count."""
    return first.shape == second.shape and all(
        a == b for a, b, size in zip(first.stride(), second.stride(), first.shape, strict=True) if size > 1
    )


def _reads_strides(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name.split("::")[0] in _OURS:
        return True
    if any(result.alias_info is not None for result in target._schema.returns):
        return True  # a view, of which a copy would be no view
    return target.namespace == "aten" and find_rule(target) is not None
