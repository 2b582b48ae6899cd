"""Attention by its formula, a block of query rows at a time, so that the S x T matrix never stands whole in memory.

    scores = scale * query @ key^T + mask       hidden keys get -inf
    lse    = log(sum(exp(scores)))              over keys
    p      = exp(scores - lse)                  0 for a row that sees no key
    out    = (p * keep / (1 - dropout_p)) @ value
and, for a gradient g of out,
    grad_value  = (p * keep / (1 - dropout_p))^T @ g
    grad_p      = (g @ value^T) * keep / (1 - dropout_p)
    grad_scores = p * (grad_p - sum(g * out))
    grad_query  = scale * grad_scores @ key,  grad_key = scale * grad_scores^T @ query,  grad_mask = grad_scores

Works in float32, or float64 where the query is. This is the oracle of the faster lowerings and stands in where they
do not apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .generator import accumulate_dtype, keep_scale
from .random import keep_mask

_MAX_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores held at once


@dataclass(frozen=True)
class Spec:
    """What attention is asked for beside its tensors. window 0: none. Fields as in the operator."""

    scale: float
    causal: bool
    window: int
    dropout_p: float = 0.0
    rng_index: int = 0
    rng_shape: Sequence[int] | None = None
    rng_offset: Sequence[int] | None = None


@dataclass(frozen=True)
class _Block:
    batch: slice
    rows: slice  # queries
    keys: slice  # those that any of the rows can see


def visible(rows: slice, keys: slice, spec: Spec, device: torch.device | None) -> torch.Tensor | None:
    """bool [rows, keys], or None where all is visible. Query i and key j both count from 0 (top-left, as in SDPA).

    Causal: j <= i. A window of w keys: i - j < w, and where not causal also j - i < w.
    """
    if not spec.causal and spec.window <= 0:
        return None
    distance = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) - torch.arange(
        keys.start, keys.stop, device=device
    )
    seen = None
    if spec.causal:
        seen = distance >= 0
    if spec.window > 0:
        near = (distance if spec.causal else distance.abs()) < spec.window
        seen = near if seen is None else seen & near
    return seen


def _blocks(
    batch: int, heads: int, num_queries: int, num_keys: int, spec: Spec, device: torch.device
) -> Iterator[_Block]:
    limit = _MAX_SCORES.get(device.type, 1 << 24)
    rows = min(max(1, limit // max(1, heads * num_keys)), num_queries)
    samples = max(1, limit // max(1, heads * num_keys * rows)) if rows == num_queries else 1
    for sample in range(0, batch, samples):
        for row in range(0, num_queries, rows):
            last = min(row + rows, num_queries)
            begin = max(0, row - spec.window + 1) if spec.window > 0 else 0
            end = last if spec.causal else last + spec.window - 1 if spec.window > 0 else num_keys
            if begin < min(end, num_keys):
                yield _Block(
                    slice(sample, min(sample + samples, batch)), slice(row, last), slice(begin, min(end, num_keys))
                )


def _grouped(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, H, S, D] to [B, Hkv, H/Hkv * S, D]: the queries that share a key head stand in one matrix."""
    batch, _, _, dim = tensor.shape
    return tensor.reshape(batch, kv_heads, -1, dim)


def _mask_index(mask: torch.Tensor, block: _Block) -> tuple[slice, ...]:
    wanted = (block.batch, slice(None), block.rows, block.keys)
    return tuple(s if size != 1 else slice(None) for s, size in zip(wanted, mask.shape, strict=True))


def mask_4d(mask: torch.Tensor) -> torch.Tensor:
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, block: _Block, spec: Spec
) -> torch.Tensor:
    dtype = accumulate_dtype(query.dtype)
    rows = query[block.batch, :, block.rows].to(dtype)
    keys = key[block.batch, :, block.keys].to(dtype)
    scores = (_grouped(rows, key.shape[1]) @ keys.mT).view(*rows.shape[:3], keys.shape[2])
    scores *= spec.scale
    if mask is not None:
        part = mask[_mask_index(mask, block)]
        scores = scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
    seen = visible(block.rows, block.keys, spec, query.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def _keep(
    rng_key: torch.Tensor | None, scores: torch.Tensor, shape: tuple[int, ...], block: _Block, spec: Spec
) -> torch.Tensor:
    assert rng_key is not None
    origin = spec.rng_offset if spec.rng_offset is not None else (0, 0, 0, 0)
    begin = (block.batch.start, 0, block.rows.start, block.keys.start)
    return keep_mask(
        rng_key,
        scores.shape,
        spec.rng_shape if spec.rng_shape is not None else shape,
        [o + b for o, b in zip(origin, begin, strict=True)],
        spec.rng_index,
        spec.dropout_p,
        scores.device,
    )


def sequence_major(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A zero [B, H, S, D] tensor whose memory is [B, S, H, D]: the layout that SDPA's fused kernels give."""
    batch, heads, length, dim = shape
    return like.new_zeros(batch, length, heads, dim).transpose(1, 2)


def attention_math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    spec: Spec,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    dtype = accumulate_dtype(query.dtype)
    out = sequence_major((batch, heads, num_queries, value.shape[3]), query)
    lse = query.new_full((batch, heads, num_queries), -torch.inf, dtype=dtype)
    mask = None if mask is None else mask_4d(mask)
    for block in _blocks(batch, heads, num_queries, num_keys, spec, query.device):
        scores = _scores(query, key, mask, block, spec)
        norm = scores.logsumexp(-1, keepdim=True)
        lse[block.batch, :, block.rows] = norm.squeeze(-1)
        p = scores.sub_(norm.masked_fill(norm == -torch.inf, 0)).exp_()
        if spec.dropout_p > 0:
            p *= _keep(rng_key, p, (batch, heads, num_queries, num_keys), block, spec)
            p *= keep_scale(spec.dropout_p)
        values = value[block.batch, :, block.keys].to(dtype)
        out[block.batch, :, block.rows] = (_grouped(p, key.shape[1]) @ values).view(*p.shape[:3], -1).to(out.dtype)
    return out, lse


def attention_backward_math(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rng_key: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: Spec,
    mask_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    batch, heads, num_queries, _ = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    dtype = accumulate_dtype(query.dtype)
    wide = query.new_empty((), dtype=dtype)
    grad_query = sequence_major(query.shape, wide)
    grad_key = sequence_major(key.shape, wide)
    grad_value = sequence_major(value.shape, wide)
    full_mask = None if mask is None else mask_4d(mask)
    grad_mask = full_mask.new_zeros(full_mask.shape, dtype=dtype) if mask_needs_grad and full_mask is not None else None
    for block in _blocks(batch, heads, num_queries, num_keys, spec, query.device):
        rows, keys = (block.batch, slice(None), block.rows), (block.batch, slice(None), block.keys)
        norm = lse[rows].unsqueeze(-1)
        p = _scores(query, key, full_mask, block, spec).sub_(norm.masked_fill(norm == -torch.inf, 0)).exp_()
        grad = grad_out[rows].to(dtype)
        grad_p = (_grouped(grad, kv_heads) @ value[keys].to(dtype).mT).view_as(p)
        dropped = p
        if spec.dropout_p > 0:
            keep = _keep(rng_key, p, (batch, heads, num_queries, num_keys), block, spec).to(dtype)
            keep *= keep_scale(spec.dropout_p)
            dropped = p * keep
            grad_p *= keep
        grad_value[keys] += _grouped(dropped, kv_heads).mT @ _grouped(grad, kv_heads)
        grad_p -= (grad * out[rows].to(dtype)).sum(-1, keepdim=True)
        grad_scores = grad_p.mul_(p)
        if grad_mask is not None:
            index = _mask_index(grad_mask, block)
            grad_mask[index] += grad_scores.sum_to_size(grad_mask[index].shape)
        grad_scores = _grouped(grad_scores.mul_(spec.scale), kv_heads)
        grad_query[rows] = (grad_scores @ key[keys].to(dtype)).view(*p.shape[:3], -1)
        grad_key[keys] += grad_scores.mT @ _grouped(query[rows].to(dtype), kv_heads)
    return (
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        None if grad_mask is None or mask is None else grad_mask.reshape(mask.shape).to(mask.dtype),
    )
