"""Attention by PyTorch's fused kernels. The private names of torch that attention needs are gathered here.

Each lowering says where it applies; attention.py asks them in turn and falls back to attention_math.py. What none of
them does: our dropout (its mask is a function of the element, not of a generator's state) and the gradient of a mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .attention_math import Spec, mask_4d, visible

Forward = tuple[torch.Tensor, torch.Tensor]
Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_aten = torch.ops.aten
_MAX_GRID = 65535  # CUDA's limit of a grid's second and third dimension: batch and heads
_CAUSAL_FROM_TOP_LEFT = 1  # sdp::CustomMaskType
_EFFICIENT_ALIGN = 32  # its log-sum-exp is padded to a multiple of this many queries, with +inf


def lowering(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec) -> str:
    """'cpu', 'flash', 'efficient' or 'math': by device, dtype and shape alone, so that forward and backward agree."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    dim = query.shape[3]
    if spec.dropout_p > 0 or value.shape[3] > dim or not query.numel() or not key.numel():
        return "math"
    if not (query.dtype == key.dtype == value.dtype):
        return "math"
    if query.device.type == "cpu":
        return "cpu" if half or query.dtype in (torch.float32, torch.float64) else "math"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "math"
    if max(query.shape[:2]) > _MAX_GRID:
        return "math"
    square = query.shape[2] == key.shape[2]  # flash counts a causal mask and a window from the bottom right
    masked = mask is not None or (not square and (spec.causal or spec.window > 0))
    if half and not masked and _flash_takes(dim, torch.cuda.get_device_capability(query.device)):
        return "flash"
    if dim % (8 if half else 4) == 0 and (half or query.dtype == torch.float32):
        return "efficient"
    return "math"


def widened(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Heads of `dim` elements, the last of them zero: the kernels want values as wide as keys, and those of multi-head
    latent attention are narrower. Zeros in values make zeros in the output, which add nothing to a gradient."""
    missing = dim - tensor.shape[3]
    return tensor if not missing else torch.nn.functional.pad(tensor, (0, missing))


def narrowed(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """What widened() started from."""
    return tensor if tensor.shape[3] == dim else tensor.narrow(3, 0, dim)


def _flash_takes(dim: int, capability: tuple[int, int]) -> bool:
    """Its backward refuses heads of 193 to 224 elements where shared memory is small: sm 8.6, 8.9 and 12.0."""
    large = capability in ((8, 0), (9, 0)) or capability[0] == 10
    return capability[0] >= 8 and dim % 8 == 0 and dim <= 256 and (large or not 192 < dim <= 224)


class _LastBias:
    """The bias of the last mask asked for: a microbatch's layers are given one tensor, and it is converted once."""

    def __init__(self) -> None:
        self._mask: weakref.ref[torch.Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._bias: torch.Tensor | None = None

    def of(self, mask: torch.Tensor, key: tuple[Any, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = (mask._version, *key)
        if self._mask is not None and self._mask() is mask and self._key == key and self._bias is not None:
            return self._bias
        bias = make()
        if bias is not mask:
            self._mask, self._key, self._bias = weakref.ref(mask, self._forget), key, bias
        return bias

    def _forget(self, dead: weakref.ref[torch.Tensor]) -> None:
        if dead is self._mask:
            self._mask, self._bias = None, None


_last_bias = _LastBias()


def bias_shape(
    query: Sequence[int], key: Sequence[int], mask: Sequence[int] | None, kernel_does_window: bool, spec: Spec
) -> list[int] | None:
    """Shape of the additive mask that a kernel is given, in query's dtype; None where there is none.

    Causal masks are the kernel's own flag and are in no bias; a window is in it where the kernel has no such flag.
    """
    windowed = spec.window > 0 and not kernel_does_window
    if mask is None and not windowed:
        return None
    shape = [1] * (4 - len(mask or ())) + list(mask or ())
    return [*shape[:2], query[2], key[2]] if windowed else shape


def _bias(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, spec: Spec, *, align: int = 1, windows: bool
) -> torch.Tensor | None:
    """What the kernel's flags cannot say, in query's dtype and 4-D, its rows `align` elements apart.

    windows: the kernel has a flag for them. Not expanded over rows that are alike: padding stays [B, 1, 1, T].
    """
    shape = bias_shape(query.shape, key.shape, None if mask is None else mask.shape, windows, spec)
    if shape is None:
        return None

    def make() -> torch.Tensor:
        bias = None if mask is None else _additive(_once(mask_4d(mask)), query.dtype)
        if spec.window > 0 and not windows:
            seen = visible(slice(0, query.shape[2]), slice(0, key.shape[2]), spec, query.device)
            assert seen is not None
            hidden = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(
                seen.logical_not(), -torch.inf
            )
            bias = mask_4d(hidden) if bias is None else bias + hidden
        assert bias is not None
        num_keys = key.shape[2]
        if align > 1:
            bias = torch.nn.functional.pad(bias.expand(*bias.shape[:3], num_keys), (0, -num_keys % align))
            bias = bias.narrow(-1, 0, num_keys)
        return bias

    if mask is None or mask.is_inference():  # an inference tensor has no version to tell that it was written to
        return make()
    return _last_bias.of(mask, (query.dtype, tuple(shape), key.shape[2], spec.causal, spec.window, align), make)


def _once(mask: torch.Tensor) -> torch.Tensor:
    """Without the copies that expand() pretends: a conversion would store each of them."""
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return mask.to(dtype)


def cpu_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec
) -> Forward:
    bias = _bias(query, key, mask, spec, windows=False)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, spec.causal, attn_mask=bias, scale=spec.scale
    )


def cpu_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: Spec,
) -> Backward:
    bias = _bias(query, key, mask, spec, windows=False)
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, spec.causal, attn_mask=bias, scale=spec.scale
    )


def _window(spec: Spec) -> tuple[int | None, int | None]:
    """Flash attention's (left, right): how many keys each side of the diagonal are seen."""
    if spec.window <= 0:
        return None, None
    return spec.window - 1, 0 if spec.causal else spec.window - 1


def flash_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: Spec) -> Forward:
    left, right = _window(spec)
    out, lse, *_ = _aten._flash_attention_forward(
        *(t.transpose(1, 2) for t in (query, key, value)),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        spec.causal,
        False,
        scale=spec.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out.transpose(1, 2), lse


def flash_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: Spec,
) -> Backward:
    left, right = _window(spec)
    no_state = query.new_empty(2, dtype=torch.int64)  # of the kernel's own dropout, which is off
    grads = _aten._flash_attention_backward(
        *(t.transpose(1, 2) for t in (grad_out, query, key, value, out)),
        lse,
        None,  # a tensor here, however empty, would say that sequences of several lengths are packed in one row
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        spec.causal,
        no_state,
        no_state,
        scale=spec.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return tuple(grad.transpose(1, 2) for grad in grads)  # type: ignore[return-value]


def _expand_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The memory-efficient kernel wants a key head for each query head."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _efficient_masks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, spec: Spec
) -> tuple[torch.Tensor | None, int]:
    """(bias [B, H, S, T] with rows aligned as the kernel's vector loads want, window). Equal rows are not repeated."""
    window = spec.window if spec.causal else 0  # the kernel has windows for causal attention alone
    bias = _bias(query, key, mask, spec, align=16, windows=window > 0)
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return bias, window


def efficient_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec
) -> Forward:
    """A bias and causality together: the kernel adds the one and then hides by the other."""
    bias, window = _efficient_masks(query, key, mask, spec)
    heads = query.shape[1]
    key, value = _expand_heads(key, heads), _expand_heads(value, heads)
    if window:
        out, lse, *_ = _aten._efficient_attention_forward(
            *(t.transpose(1, 2) for t in (query, key, value)),
            bias,
            None,
            None,
            None,
            None,
            0.0,
            _CAUSAL_FROM_TOP_LEFT,
            True,
            scale=spec.scale,
            window_size=window,
        )
        out = out.transpose(1, 2)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, spec.causal, scale=spec.scale
        )
    return out, lse.narrow(-1, 0, query.shape[2])


def efficient_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: Spec,
) -> Backward:
    bias, window = _efficient_masks(query, key, mask, spec)
    heads, kv_heads, num_queries, num_keys = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    key, value = _expand_heads(key, heads), _expand_heads(value, heads)
    lse = torch.nn.functional.pad(lse, (0, -num_queries % _EFFICIENT_ALIGN), value=torch.inf)
    state = torch.zeros((), dtype=torch.int64, device=query.device)
    if window:
        grads = _aten._efficient_attention_backward(
            *(t.transpose(1, 2) for t in (grad_out, query, key, value)),
            bias,
            out.transpose(1, 2),
            None,
            None,
            num_queries,
            num_keys,
            lse,
            0.0,
            state,
            state,
            _CAUSAL_FROM_TOP_LEFT,
            False,
            scale=spec.scale,
            window_size=window,
        )
        grads = [grad.transpose(1, 2) for grad in grads[:3]]
    else:
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            query,
            key,
            value,
            bias,
            out,
            lse,
            state,
            state,
            0.0,
            [True, True, True, False],
            spec.causal,
            scale=spec.scale,
        )
    grad_query, grad_key, grad_value = grads[:3]
    if heads != kv_heads:
        grad_key, grad_value = (
            grad.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for grad in (grad_key, grad_value)
        )
    return grad_query, grad_key, grad_value
