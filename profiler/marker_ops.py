"""Attention patterns that torch's scaled_dot_product_attention cannot say, each as one operator.

They mark a place in the exported graph: capture puts shardwright::attention there. Each is composite, so that where
nothing replaces it (a model run eagerly, another tool's export) it computes the same by an explicit mask, gradients
included.

    query [B, H, S, D]   key [B, Hkv, T, D]   value [B, Hkv, T, E]   Hkv divides H   ->   [B, H, S, E]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def visible(num_queries: int, num_keys: int, causal: bool, window: int, device: torch.device) -> torch.Tensor:
    """[S, T], True where query i sees key j: causal j <= i; window w > 0 also i - j < w and, not causal, j - i < w."""
    distance = torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = seen & (distance < window) & (distance > -window)
    return seen


def _sdpa_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    seen = visible(query.shape[2], key.shape[2], causal, window, query.device)
    if mask is None:
        mask = seen
    elif mask.dtype == torch.bool:
        mask = mask & seen
    else:
        mask = mask.masked_fill(~seen, float("-inf"))
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=grouped)


def _sdpa_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, scale: float, window: int
) -> torch.Tensor:
    return _sdpa_masked(query, key, value, None, dropout_p, scale, True, window)


_LIBRARY.define(
    "sdpa_window(Tensor query, Tensor key, Tensor value, float dropout_p, float scale, int window) -> Tensor"
)
_LIBRARY.impl("sdpa_window", _sdpa_window, "CompositeImplicitAutograd")
_LIBRARY.define(
    "sdpa_masked(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout_p, float scale, bool causal, "
    "int window) -> Tensor"
)
_LIBRARY.impl("sdpa_masked", _sdpa_masked, "CompositeImplicitAutograd")

sdpa_window = torch.ops.shardwright.sdpa_window.default
sdpa_masked = torch.ops.shardwright.sdpa_masked.default
