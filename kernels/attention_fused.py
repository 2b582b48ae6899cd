"""Attention by PyTorch's fused kernels. The private names of torch that attention needs are gathered here.

Each lowering says where it applies; attention.py asks them in turn and falls back to attention_math.py. What none of
them does: our dropout (its mask is a function of the element, not of a generator's state) and the gradient of a mask.
"""

from __future__ import annotations

import torch

from .attention_math import Spec, mask_4d, visible

Forward = tuple[torch.Tensor, torch.Tensor]
Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_aten = torch.ops.aten
_EFFICIENT_ALIGN = 32  # its log-sum-exp is padded to a multiple of this many queries, with +inf


def lowering(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec) -> str:
    """'cpu', 'flash', 'efficient' or 'math': by device, dtype and shape alone, so that forward and backward agree."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    dim = query.shape[3]
    if spec.dropout_p > 0 or value.shape[3] != dim or not query.numel() or not key.numel():
        return "math"
    if not (query.dtype == key.dtype == value.dtype):
        return "math"
    if query.device.type == "cpu":
        return "cpu" if half or query.dtype in (torch.float32, torch.float64) else "math"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "math"
    major = torch.cuda.get_device_capability(query.device)[0]
    square = query.shape[2] == key.shape[2]  # flash counts a causal mask and a window from the bottom right
    masked = mask is not None or (not square and (spec.causal or spec.window > 0))
    if half and major >= 8 and dim % 8 == 0 and dim <= 256 and not masked:
        return "flash"
    if (
        dim % (8 if half else 4) == 0
        and (half or query.dtype == torch.float32)
        and query.shape[0] * query.shape[1] < 65536
    ):
        return "efficient"
    return "math"


def _bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, spec: Spec) -> torch.Tensor | None:
    """One additive mask in query's dtype for what the kernel's own flags cannot say."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        else:
            bias = mask.to(query.dtype)
    if spec.window > 0 or (spec.causal and bias is not None):
        seen = visible(slice(0, num_queries), slice(0, num_keys), spec, query.device)
        assert seen is not None
        hidden = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    return None if bias is None else mask_4d(bias)


def cpu_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec
) -> Forward:
    bias = _bias(query, key, mask, spec)
    causal = spec.causal and bias is None
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=spec.scale
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
    bias = _bias(query, key, mask, spec)
    causal = spec.causal and bias is None
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=spec.scale
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
    no_lengths = query.new_empty(0, dtype=torch.int32)
    no_state = query.new_empty(2, dtype=torch.int64)  # of the kernel's own dropout, which is off
    grads = _aten._flash_attention_backward(
        *(t.transpose(1, 2) for t in (grad_out, query, key, value, out)),
        lse,
        no_lengths,
        no_lengths,
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


def _aligned_bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, spec: Spec) -> torch.Tensor | None:
    """The bias, expanded, its rows padded in memory to 16 elements as the kernel's vector loads want."""
    bias = _bias(query, key, mask, spec)
    if bias is None:
        return None
    num_keys = key.shape[2]
    padded = torch.nn.functional.pad(bias.expand(*bias.shape[:3], num_keys), (0, -num_keys % 16))
    return padded[..., :num_keys].expand(query.shape[0], query.shape[1], query.shape[2], num_keys)


def efficient_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, spec: Spec
) -> Forward:
    bias = _aligned_bias(query, key, mask, spec)
    heads = query.shape[1]
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        query,
        _expand_heads(key, heads),
        _expand_heads(value, heads),
        bias,
        True,
        0.0,
        spec.causal and bias is None,
        scale=spec.scale,
    )
    return out, lse[..., : query.shape[2]]


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
    bias = _aligned_bias(query, key, mask, spec)
    heads, kv_heads, num_queries = query.shape[1], key.shape[1], query.shape[2]
    lse = torch.nn.functional.pad(lse, (0, -num_queries % _EFFICIENT_ALIGN), value=torch.inf)
    state = torch.zeros((), dtype=torch.int64, device=query.device)
    grad_query, *grads, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad_out,
        query,
        _expand_heads(key, heads),
        _expand_heads(value, heads),
        bias,
        out,
        lse,
        state,
        state,
        0.0,
        [True, True, True, False],
        spec.causal and bias is None,
        scale=spec.scale,
    )
    if heads != kv_heads:
        grads = [grad.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for grad in grads]
    return grad_query, grads[0], grads[1]
