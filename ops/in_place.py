"""Which ops may write their result over an operand that nothing reads any more.

The passes rewrite such ops (passes/reuse.py), and what a segment holds is worked out with that in view
(planner/sharding/lifetimes.py).
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# op -> (in-place op, positions of the operands that it may write over); the first operand is the one written
IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {
    aten.add.Tensor: (aten.add_.Tensor, (0, 1)),
    aten.sub.Tensor: (aten.sub_.Tensor, (0,)),
    aten.mul.Tensor: (aten.mul_.Tensor, (0, 1)),
    aten.mul.Scalar: (aten.mul_.Scalar, (0,)),
    aten.div.Tensor: (aten.div_.Tensor, (0,)),
    aten.div.Scalar: (aten.div_.Scalar, (0,)),
    aten.neg.default: (aten.neg_.default, (0,)),
    aten.exp.default: (aten.exp_.default, (0,)),
    aten.tanh.default: (aten.tanh_.default, (0,)),
    aten.relu.default: (aten.relu_.default, (0,)),
    aten.masked_fill.Scalar: (aten.masked_fill_.Scalar, (0,)),
    aten.addmm.default: (aten.addmm_.default, (0,)),
    c10d.all_reduce.default: (c10d.all_reduce_.default, (0,)),
}
# op -> variant that takes the result's memory under this name; that of its first operand, a gradient, is given
OUT_OF_GRADIENT = {
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
}
LOSS_CHUNK_BYTES = 2 << 20  # of the gradient of a loss's rows that CPUs work on at a time


def may_write_over(op: Any, has_options: bool = False) -> tuple[int, ...]:
    """Positions of the operands. has_options: is it called with keyword arguments?"""
    if op in IN_PLACE:
        positions = IN_PLACE[op][1]
        return positions[:1] if has_options else positions  # alpha belongs to the second operand
    return (0,) if op in OUT_OF_GRADIENT else ()
