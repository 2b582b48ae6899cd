"""Cross entropy of the rows of a linear layer, some rows at a time: logits of all rows never stand whole.

    logits = hidden @ weight.T + bias, in hidden's dtype, then in the dtype of the loss
    lse    = log sum exp logits                     for each row
    loss   = lse - logits[target]                   0 where the target is to be ignored

The backward computes the logits of some rows again, from which with p = exp(logits - lse) and grad that of the losses

    grad_logits = grad * (p - one_hot(target))      in hidden's dtype, as a cast's gradient is
    grad_hidden = grad_logits @ weight,  grad_weight = grad_logits.T @ hidden,  grad_bias = sum of grad_logits

What is kept for it is lse. There a target of -1 is a class of another rank.

Shapes: hidden [N, H], weight [V, H], bias [V], target, loss, lse, grad [N].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from .library import define, differentiable, not_differentiable

CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 512 << 20}  # of the logits of some rows, in the dtype of the loss
LEAST_ROWS = 16  # at a time
_TENSORS_OF_LOGITS = {False: 3, True: 2}  # alive at once in the dtype of the loss, forward and backward


def rows_at_once(num_rows: int, num_classes: int, itemsize: int, kind: str) -> int:
    return max(1, min(num_rows, max(LEAST_ROWS, CHUNK_BYTES[kind] // max(1, num_classes * itemsize))))


def scratch_bytes(
    num_rows: float, weight: tuple[float, int], widths: tuple[int, int], kind: str, *, is_backward: bool
) -> float:
    """Held while it runs, besides operands and results. weight: rows and columns on this rank. widths: bytes of an
    element of hidden, of one of the loss."""
    classes, features = weight
    narrow, wide = widths
    rows = rows_at_once(int(num_rows), int(classes), wide, kind)
    held = rows * classes * (narrow + _TENSORS_OF_LOGITS[is_backward] * wide)
    if is_backward:  # the products of some rows, and their sum where hidden's dtype is too narrow for sums
        held += classes * features * (narrow + (wide if narrow < wide else 0))
    return float(held)


def _parts(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Iterator[slice]:
    kind = "cpu" if hidden.device.type == "cpu" else "gpu"
    step = rows_at_once(hidden.shape[0], weight.shape[0], dtype.itemsize, kind)
    return (slice(start, start + step) for start in range(0, hidden.shape[0], step))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return F.linear(hidden, weight, bias).to(dtype)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, lse = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))
    counts = target != ignore
    index = torch.where(counts, target, 0)[:, None]
    for part in _parts(hidden, weight, dtype):
        logits = _logits(hidden[part], weight, bias, dtype)
        lse[part] = torch.logsumexp(logits, 1)
        loss[part] = torch.where(counts[part], lse[part] - logits.gather(1, index[part])[:, 0], 0.0)
    return loss, lse


def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    wide = hidden.dtype if hidden.dtype.itemsize >= lse.dtype.itemsize else lse.dtype
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
    counts = target != ignore
    own = counts & (target >= 0)
    index, ones = torch.where(own, target, 0)[:, None], own.to(lse.dtype)[:, None]
    scale = torch.where(counts, grad, 0.0).to(lse.dtype)[:, None]
    for part in _parts(hidden, weight, lse.dtype):
        found = _logits(hidden[part], weight, bias, lse.dtype).sub_(lse[part][:, None]).exp_()
        found = found.scatter_add_(1, index[part], -ones[part]).mul_(scale[part]).to(hidden.dtype)
        grad_hidden[part] = found @ weight
        grad_weight += found.t() @ hidden[part]
        if grad_bias is not None:
            grad_bias += found.sum(0, dtype=wide)
    return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)  # type: ignore[union-attr]


def _forward_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(
        hidden.dim() == 2 and weight.shape[1:] == hidden.shape[1:] and target.shape == hidden.shape[:1],
        lambda: f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, target {list(target.shape)}",
    )
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


def _backward_fake(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
    )


linear_cross_entropy = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore, ScalarType dtype) "
    "-> (Tensor loss, Tensor lse)",
    _forward,
    _forward_fake,
)
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor lse, "
    "int ignore) -> (Tensor grad_hidden, Tensor grad_weight, Tensor? grad_bias)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight, bias, target, ctx.ignore, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, bias, target, output[1])


def _gradient(ctx: Any, grad: torch.Tensor, _grad_lse: None) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, target, lse = ctx.saved_tensors
    found = linear_cross_entropy_backward(grad, hidden, weight, bias, target, lse, ctx.ignore)
    return found[0], found[1], found[2], None, None, None


differentiable(linear_cross_entropy, _gradient, _setup)
not_differentiable(linear_cross_entropy_backward, "linear_cross_entropy has no second derivative")


@register_flop_formula(torch.ops.shardwright.linear_cross_entropy)
def flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """A multiply and an add count as two."""
    return 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.shardwright.linear_cross_entropy_backward)
def backward_flops(grad: Sequence[int], hidden: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products, and the logits again."""
    return 3 * flops(hidden, weight)


def logits_traffic(rows: int, classes: int, widths: tuple[int, int], *, is_backward: bool) -> float:
    """Bytes of logits that it writes and reads besides operands and results. widths: bytes of an element of hidden, of
    one of the loss."""
    narrow, wide = widths
    cast = 2 * narrow + wide if narrow != wide else narrow
    passes = 8 * wide + 3 * narrow if is_backward else 4 * wide
    return float(rows) * classes * (cast + passes)
