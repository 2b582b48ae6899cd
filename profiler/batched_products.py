"""shardwright::matmul: a product of two stacks of matrices, [..., M, K] and [..., K, N], as one operator.

torch writes a matmul of [B, H, M, K] as a bmm of [B H, M, K]: samples and heads then lie in one dimension, which ranks
that each have some heads of every sample cannot cut. The operator's kernel is that same matmul. What torch copies to
bring both into one dimension is not kept for the backward, which copies it anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import register_flop_formula

from ..kernels.library import define, differentiable
from .nodes import value

aten = torch.ops.aten
ours = torch.ops.shardwright


def _fake(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first.new_empty([*first.shape[:-1], second.shape[-1]])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    first, second = ctx.saved_tensors
    wanted_first, wanted_second = ctx.needs_input_grad
    return (
        ours.matmul(grad, second.transpose(-2, -1)) if wanted_first else None,
        ours.matmul(first.transpose(-2, -1), grad) if wanted_second else None,
    )


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


define("matmul(Tensor first, Tensor second) -> Tensor", torch.matmul, _fake)
differentiable(ours.matmul.default, _backward, _setup_context)


@register_flop_formula(ours.matmul)
def matmul_flops(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """A multiply and an add count as two."""
    return 2 * math.prod(first) * second[-1]


def copied_bytes(operands: Sequence[torch.Tensor]) -> int:
    """Of the operands that torch copies before the product, as their leading dimensions are not one in memory."""
    return sum(t.numel() * t.element_size() for t in operands if not _is_one_stack(t))


def _is_one_stack(tensor: torch.Tensor) -> bool:
    leading = [(size, stride) for size, stride in zip(tensor.shape[:-2], tensor.stride()[:-2], strict=True) if size > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))


def replace_batched_products(graph: fx.Graph) -> None:
    """Products of real numbers with two or more leading dimensions, the same in both."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.matmul.default:
            continue
        first, second = map(value, node.args)
        alike = first.shape[:-2] == second.shape[:-2] and first.dtype == second.dtype
        if first.dim() < 4 or not alike or not first.is_floating_point():
            continue
        node.target = ours.matmul.default
