"""RMSNorm with the residual addition before it, in Triton. The formulas stand in rms_norm.py.

Forward: a program for each row. Backward: each program takes every P-th row and keeps its share of grad_weight in
registers, so that the result does not depend on the order in which programs finish. Imported only where triton is
installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .generator import accumulate_dtype
from .random_triton import on_device
from .rms_norm import output_dtype

MAX_DIM = 1 << 15  # a row must fit the registers of one program
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _forward_kernel(
    y_ptr,
    sum_ptr,
    rstd_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    dim,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    x = tl.load(x_ptr + row * dim + column, mask=inside, other=0).to(WIDE)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * dim + column, mask=inside, other=0).to(WIDE)
        narrow = x.to(x_ptr.dtype.element_ty)  # what the next block reads is what is normalized
        tl.store(sum_ptr + row * dim + column, narrow, mask=inside)
        x = narrow.to(WIDE)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / dim + tl.full((), EPS, WIDE))
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(WIDE)
    normed = x * rstd
    if CAST_FIRST:
        normed = normed.to(x_ptr.dtype.element_ty).to(WIDE)
    tl.store(y_ptr + row * dim + column, (normed * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    partial_ptr,
    grad_y_ptr,
    grad_sum_ptr,
    sum_ptr,
    rstd_ptr,
    weight_ptr,
    num_rows,
    dim,
    HAS_GRAD_SUM: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(WIDE)
    grad_weight = tl.zeros((BLOCK,), WIDE)
    for row in range(program, num_rows, tl.num_programs(0)):
        upstream = tl.load(grad_y_ptr + row * dim + column, mask=inside, other=0).to(WIDE)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.load(sum_ptr + row * dim + column, mask=inside, other=0).to(WIDE) * rstd
        if CAST_FIRST:
            grad_weight += upstream * normed.to(sum_ptr.dtype.element_ty).to(WIDE)
        else:
            grad_weight += upstream * normed
        upstream *= weight
        grad = (upstream - normed * (tl.sum(upstream * normed, 0) / dim)) * rstd
        if HAS_GRAD_SUM:
            grad += tl.load(grad_sum_ptr + row * dim + column, mask=inside, other=0).to(WIDE)
        tl.store(grad_ptr + row * dim + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * dim + column, grad_weight, mask=inside)


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: enough that programs share rows unevenly
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, cast_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, sum, rstd); sum is x where there is no residual."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    dim = x.shape[-1]
    num_rows = x.numel() // max(dim, 1)
    y = torch.empty_like(x, dtype=output_dtype(x, weight, cast_first))
    sum = x if residual is None else torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x.dtype))
    if x.numel():
        block = triton.next_power_of_2(dim)
        with on_device(x.device):
            _forward_kernel[(num_rows,)](
                y, sum, rstd, x, x if residual is None else residual, weight, dim,
                EPS=eps, HAS_RESIDUAL=residual is not None, CAST_FIRST=cast_first, WIDE=_wide(x.dtype),
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return y, sum, rstd


def backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    sum: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of sum in all, gradient of weight)"""
    grad_y, sum, rstd, weight = (t.contiguous() for t in (grad_y, sum, rstd, weight))
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    dim = sum.shape[-1]
    num_rows = sum.numel() // max(dim, 1)
    grad = torch.empty_like(sum)
    if not sum.numel():
        return grad, torch.zeros_like(weight)
    programs = min(num_rows, _num_programs(sum.device))
    partial = rstd.new_empty(programs, dim)
    block = triton.next_power_of_2(dim)
    with on_device(sum.device):
        _backward_kernel[(programs,)](
            grad, partial, grad_y, sum if grad_sum is None else grad_sum, sum, rstd, weight, num_rows, dim,
            HAS_GRAD_SUM=grad_sum is not None, CAST_FIRST=cast_first, WIDE=_wide(sum.dtype),
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad, partial.sum(0).to(weight.dtype)
