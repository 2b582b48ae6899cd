"""shardwright::attention: attention as one operator, forward and backward.

Letters: B batch, H query heads, Hkv key and value heads (Hkv divides H; query head h reads key head h // (H / Hkv)),
S queries, T keys, D and E the head sizes of query/key and of value.

    query [B, H, S, D]   key [B, Hkv, T, D]   value [B, Hkv, T, E]   mask broadcastable to [B, H, S, T]
    out [B, H, S, E], laid out in memory as [B, S, H, E]
    lse [B, H, S], natural logarithm, float32 (float64 for float64)

mask is additive, or boolean with True where a key is seen. causal: query i sees keys j <= i, both counted from 0, as
torch's SDPA has it where S differs from T. window w > 0: also i - j < w, and where not causal j - i < w; 0: none. A
query that sees no key gives zeros and no gradient; its lse is 0 or -inf, according to the lowering.

dropout_p > 0 needs rng_key (see random.py): element (b, h, s, t) of the probabilities is kept or not by its place in
the whole tensor of shape rng_shape, of which this one begins at rng_offset; both None where nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import attention_fused as fused
from .attention_math import Spec, attention_backward_math, attention_math
from .generator import accumulate_dtype
from .library import define, differentiable, not_differentiable

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? rng_key"
_OPTIONS = (
    "float scale, bool causal, int window, float dropout_p, int rng_index, SymInt[]? rng_shape, SymInt[]? rng_offset"
)

Shape = Sequence[int] | None


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """As Tensor.contiguous(), which fake tensors of a device that this PyTorch is not built for refuse."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The fused kernels read a head's elements one after another; those of CUDA 16 bytes at once, so that rows begin at
    multiples of that."""
    if tensor.stride(-1) != 1:
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.device.type == "cuda":
        places = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
        if any(place * tensor.element_size() % 16 for place in (tensor.storage_offset(), *places)):
            return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _sequence_major(tensor: torch.Tensor) -> torch.Tensor:
    """The layout that the fake kernel promises; a copy only where a lowering gave another."""
    return _contiguous(tensor.transpose(1, 2)).transpose(1, 2)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    rng_index: int,
    rng_shape: Shape,
    rng_offset: Shape,
) -> tuple[torch.Tensor, torch.Tensor]:
    spec = Spec(scale, causal, window, dropout_p, rng_index, rng_shape, rng_offset)
    _check(query, key, value, rng_key, dropout_p)
    query, key, value = _readable(query), _readable(key), _readable(value)
    lowering = fused.lowering(query, key, value, mask, spec)
    if lowering == "math":
        out, lse = attention_math(query, key, value, mask, rng_key, spec)
        return _sequence_major(out), _contiguous(lse)
    given = query, key, fused.widened(value, query.shape[3])
    match lowering:
        case "cpu":
            out, lse = fused.cpu_forward(*given, mask, spec)
        case "flash":
            out, lse = fused.flash_forward(*given, spec)
        case _:
            out, lse = fused.efficient_forward(*given, mask, spec)
    return _sequence_major(fused.narrowed(out, value.shape[3])), _contiguous(lse)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    rng_index: int,
    rng_shape: Shape,
    rng_offset: Shape,
    mask_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    spec = Spec(scale, causal, window, dropout_p, rng_index, rng_shape, rng_offset)
    grad_out, query, key, value = (_readable(tensor) for tensor in (grad_out, query, key, value))
    lse = _contiguous(lse)
    grads: Sequence[torch.Tensor]
    lowering = "math" if mask_needs_grad else fused.lowering(query, key, value, mask, spec)
    if lowering == "math":
        *grads, grad_mask = attention_backward_math(
            grad_out, query, key, value, mask, rng_key, out, lse, spec, mask_needs_grad
        )
        grad_query, grad_key, grad_value = (_sequence_major(grad) for grad in grads)
        return grad_query, grad_key, grad_value, grad_mask
    grad_out, wide, out = (fused.widened(tensor, query.shape[3]) for tensor in (grad_out, value, out))
    match lowering:
        case "cpu":
            grads = fused.cpu_backward(grad_out, query, key, wide, mask, out, lse, spec)
        case "flash":
            grads = fused.flash_backward(grad_out, query, key, wide, out, lse, spec)
        case _:
            grads = fused.efficient_backward(grad_out, query, key, wide, mask, out, lse, spec)
    grad_query, grad_key, grad_value = grads
    grad_value = fused.narrowed(grad_value, value.shape[3])
    return _sequence_major(grad_query), _sequence_major(grad_key), _sequence_major(grad_value), None


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rng_key: torch.Tensor | None, dropout_p: float
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    torch._check(query.dim() == key.dim() == value.dim() == 4, lambda: f"attention wants 4 dimensions each: {shapes}")
    torch._check(
        query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[1] % key.shape[1] == 0,
        lambda: f"attention: sizes do not go together: {shapes}",
    )
    torch._check(dropout_p == 0 or rng_key is not None, lambda: f"attention: dropout_p={dropout_p} needs rng_key")


def _empty_sequence_major(like: torch.Tensor, dim: int) -> torch.Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _forward_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    rng_index: int,
    rng_shape: Shape,
    rng_offset: Shape,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(query, key, value, rng_key, dropout_p)
    lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
    return _empty_sequence_major(query, value.shape[3]), lse


def _backward_fake(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    dropout_p: float,
    rng_index: int,
    rng_shape: Shape,
    rng_offset: Shape,
    mask_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    grads = tuple(_empty_sequence_major(t, t.shape[3]) for t in (query, key, value))
    return *grads, mask.new_empty(mask.shape) if mask_needs_grad and mask is not None else None  # type: ignore[return-value]


attention = define(
    f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
)
attention_backward = define(
    f"attention_backward(Tensor grad_out, {_TENSORS}, Tensor out, Tensor lse, {_OPTIONS}, bool mask_needs_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor? grad_mask)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, mask, rng_key, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, mask, rng_key, out, lse)
    ctx.options = options


def _gradients(ctx: Any, grad_out: torch.Tensor, _grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    query, key, value, mask, rng_key, out, lse = ctx.saved_tensors
    grads = attention_backward(
        grad_out, query, key, value, mask, rng_key, out, lse, *ctx.options, mask is not None and ctx.needs_input_grad[3]
    )
    return *grads, *(None,) * (1 + len(ctx.options))


differentiable(attention, _gradients, _setup_context)
not_differentiable(attention_backward, "attention has no second derivative")
