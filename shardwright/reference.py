"""The single-device model as written, run eagerly: what `check` compares a program with.

Nothing of the planner, the passes or the runtime is used. The model runs op by op over the microbatches, gradients
accumulated, inside the context that capture uses (one attention operator, no rounding below float64). Random ops draw
from the counter-based generator, numbered in the order in which the model runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .kernels.ops import make_key
from .profiler.attention_interface import shardwright_attention
from .profiler.capture import compute_loss
from .profiler.inputs import batch_dims_of
from .profiler.marker_ops import sdpa_masked, sdpa_window
from .profiler.workload import Workload

_DROPOUTS = {F.dropout, torch.dropout, torch.dropout_}
_FEATURE_DROPOUTS = {F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout}
_UNIFORM = {torch.rand, torch.rand_like}
_NORMAL = {torch.randn, torch.randn_like}


class CounterBasedRandom(TorchFunctionMode):
    """Inside, dropout, rand, randn, bernoulli and dropout in attention are functions of (seed, step, microbatch)."""

    def __init__(self, seed: int, step: int, microbatch: int) -> None:
        super().__init__()
        self.key = make_key(seed, step, microbatch)
        self.count = 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(*args, **kwargs)
        if func in _FEATURE_DROPOUTS:
            return self._feature_dropout(*args, **kwargs)
        if func in _UNIFORM or func in _NORMAL:
            return self._draw(func, args, kwargs)
        if func in (torch.bernoulli, torch.Tensor.bernoulli) and len(args) == 1:
            probabilities = args[0]
            drawn = self._new("rand_uniform", probabilities.shape, probabilities.dtype, probabilities.device)
            return (drawn < probabilities).to(probabilities.dtype)
        if func is F.scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        if func in (sdpa_window, sdpa_masked):
            return self._marked_attention(func, args)
        return func(*args, **kwargs)

    def _next(self) -> int:
        self.count += 1
        return self.count - 1

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        shape = list(input.shape)
        return torch.ops.shardwright.dropout(input, self.key, p, self._next(), shape, [0] * len(shape))

    def _feature_dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0:
            return input
        shape = [*input.shape[:2], *[1] * (input.dim() - 2)]
        ones = input.new_ones(shape)
        return input * torch.ops.shardwright.dropout(ones, self.key, p, self._next(), shape, [0] * len(shape))

    def _draw(self, func: Callable, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Shape, dtype and device are those that the call itself would give."""
        like = func(*args, **kwargs)
        kind = "rand_uniform" if func in _UNIFORM else "rand_normal"
        return self._new(kind, like.shape, like.dtype, like.device).requires_grad_(like.requires_grad)

    def _new(self, kind: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes = list(shape)
        op = getattr(torch.ops.shardwright, kind)
        return op(self.key, sizes, sizes, [0] * len(sizes), self._next(), dtype, device)

    def _attention(self, func: Callable, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if not given.get("dropout_p"):
            return func(*args, **kwargs)
        query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
        causal = given.get("is_causal", False)
        return self._attend(query, key, value, mask, given["dropout_p"], given.get("scale"), causal, 0)

    def _marked_attention(self, func: Callable, args: Any) -> torch.Tensor:
        if func is sdpa_window:
            query, key, value, dropout_p, scale, window = args
            mask, causal = None, True
        else:
            query, key, value, mask, dropout_p, scale, causal, window = args
        if not dropout_p:
            return func(*args)
        return self._attend(query, key, value, mask, dropout_p, scale, causal, window)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout_p: float,
        scale: float | None,
        causal: bool,
        window: int,
    ) -> torch.Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        flags = (scale, bool(causal), window, float(dropout_p), self._next())
        shape = [*query.shape[:3], key.shape[2]]
        return torch.ops.shardwright.attention(query, key, value, mask, self.key, *flags, shape, [0] * 4)[0]


def split_batch(
    batch: Mapping[str, torch.Tensor], dims: Mapping[str, int], microbatch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Contiguous microbatches; entries without a dimension that counts samples go to each whole. The last may be
    shorter."""
    cut = {name: torch.split(batch[name], microbatch_size, dim) for name, dim in dims.items()}
    count = max(map(len, cut.values()), default=1)
    return [{name: cut[name][k] if name in cut else t for name, t in batch.items()} for k in range(count)]


def forward_backward(
    workload: Workload, batch: Mapping[str, torch.Tensor], *, microbatch_size: int, step: int = 0
) -> torch.Tensor:
    """Loss of a step; gradients are left in .grad of the model's parameters. workload: with real values."""
    size = workload.global_batch
    total = torch.zeros((), dtype=torch.float64)
    workload.model.zero_grad()
    for index, microbatch in enumerate(split_batch(batch, batch_dims_of(workload), microbatch_size)):
        weight = min(microbatch_size, size - index * microbatch_size) / size
        random = CounterBasedRandom(workload.seed, step, index)
        with shardwright_attention(workload.model), random:
            loss = compute_loss(workload.model, workload.loss, microbatch, workload.call)
        (loss * weight).backward()
        total += loss.detach().double().cpu() * weight
    return total
