"""RMSNorm, alone and fused with the residual addition before it, forward and backward.

    sum  = x + residual                                    (rms_norm: sum = x)
    rstd = 1 / sqrt(mean(sum^2, last dimension) + eps)     float32, float64 for float64
    y    = sum * rstd * weight

cast_first says where y returns to x's dtype: True, before the weight is multiplied in (Hugging Face's Llama and T5:
the product has the wider of x's and weight's dtype); False, after (torch.nn.RMSNorm). In float32 and float64 they are
the same.

With w = weight, n = sum * rstd and g = grad_y * w, the backward is

    grad_sum = rstd * (g - n * mean(g * n)) + (gradient of sum itself)       also that of x and of residual
    grad_weight = sum of grad_y * n over all but the last dimension

Shapes: x, residual, sum, y [..., D], weight [D], rstd [..., 1].
"""

from __future__ import annotations

from typing import Any

import torch

from .generator import accumulate_dtype
from .library import define, differentiable, not_differentiable
from .lowering import triton_for

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def output_dtype(x: torch.Tensor, weight: torch.Tensor, cast_first: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_first: bool) -> Pair:
    """(y, rstd)"""
    wide = x.to(accumulate_dtype(x.dtype))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
    normed = wide * rstd
    if cast_first:
        return normed.to(x.dtype) * weight, rstd
    return normed.mul_(weight).to(x.dtype), rstd


def rms_norm_backward_reference(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    cast_first: bool,
) -> Pair:
    """(grad_sum in all, grad_weight)"""
    normed = sum * rstd  # rstd is in the accumulating dtype, and brings sum into it
    upstream = grad_y.to(rstd.dtype)
    scaled = normed.to(sum.dtype) if cast_first else normed
    grad_weight = (upstream * scaled).sum_to_size(weight.shape)
    upstream = upstream * weight
    normed *= (upstream * normed).mean(-1, keepdim=True)
    grad = upstream.sub_(normed).mul_(rstd)
    if grad_sum is not None:
        grad += grad_sum
    return grad.to(sum.dtype), grad_weight.to(weight.dtype)


def _triton(x: torch.Tensor) -> Any:
    kernels = triton_for(x.device, "rms_norm_triton")
    return kernels if kernels is not None and x.shape[-1] <= kernels.MAX_DIM else None


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    torch._check(weight.shape == x.shape[-1:], lambda: f"weight {list(weight.shape)} does not fit x {list(x.shape)}")
    torch._check(
        residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
        lambda: f"x is {x.dtype} {list(x.shape)}, residual {residual.dtype} {list(residual.shape)}",  # type: ignore[union-attr]
    )


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, cast_first: bool
) -> Triple:
    _check(x, residual, weight)
    kernels = _triton(x)
    if kernels is not None:
        return kernels.forward(x, residual, weight, eps, cast_first)
    sum = torch.add(x, residual).contiguous()
    y, rstd = rms_norm_reference(sum, weight, eps, cast_first)
    return y, sum, rstd


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_first: bool) -> Pair:
    _check(x, None, weight)
    kernels = _triton(x)
    if kernels is not None:
        y, _, rstd = kernels.forward(x, None, weight, eps, cast_first)
        return y, rstd
    return rms_norm_reference(x.contiguous(), weight, eps, cast_first)


def _backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    cast_first: bool,
) -> Pair:
    kernels = _triton(sum)
    if kernels is not None:
        return kernels.backward(grad_y, grad_sum, sum, rstd, weight, cast_first)
    return rms_norm_backward_reference(grad_y.contiguous(), grad_sum, sum.contiguous(), rstd, weight, cast_first)


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, cast_first: bool) -> Pair:
    y = x.new_empty(x.shape, dtype=output_dtype(x, weight, cast_first))
    return y, x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x.dtype))


def _add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, cast_first: bool
) -> Triple:
    _check(x, residual, weight)
    y, rstd = _forward_fake(x, weight, cast_first)
    return y, x.new_empty(x.shape), rstd


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float, cast_first: bool) -> Pair:
    _check(x, None, weight)
    return _forward_fake(x, weight, cast_first)


def _backward_fake(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    cast_first: bool,
) -> Pair:
    return sum.new_empty(sum.shape), weight.new_empty(weight.shape)


add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool cast_first) "
    "-> (Tensor y, Tensor sum, Tensor rstd)",
    _add_rms_norm,
    _add_rms_norm_fake,
)
add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor rstd, Tensor weight, bool cast_first) "
    "-> (Tensor grad_sum_in_all, Tensor grad_weight)",
    _backward,
    _backward_fake,
)
rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool cast_first) -> (Tensor y, Tensor rstd)",
    _rms_norm,
    _rms_norm_fake,
)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    _, _, weight, _, ctx.cast_first = inputs
    _, sum, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sum, rstd, weight)


def _add_gradient(
    ctx: Any, grad_y: torch.Tensor | None, grad_sum: torch.Tensor | None, _grad_rstd: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_y is None:  # only the sum was used
        return grad_sum, grad_sum, None, None, None
    grad, grad_weight = add_rms_norm_backward(grad_y, grad_sum, *ctx.saved_tensors, ctx.cast_first)
    return grad, grad, grad_weight, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, weight, _, ctx.cast_first = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)


def _gradient(ctx: Any, grad_y: torch.Tensor, _grad_rstd: None) -> tuple[torch.Tensor | None, ...]:
    grad, grad_weight = add_rms_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.cast_first)
    return grad, grad_weight, None, None


differentiable(add_rms_norm, _add_gradient, _add_setup)
differentiable(rms_norm, _gradient, _setup)
not_differentiable(add_rms_norm_backward, "rms_norm has no second derivative")
