"""The optimizer over this rank's shards, and clipping by the norm of the whole model's gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..profiler.workload import OptimizerSpec
from .parameters import ParameterStore


def build_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """None where this rank holds no trainable parameter."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return spec.factory(trainable, **dict(spec.options)) if trainable else None


@torch.no_grad()
def global_grad_norm(store: ParameterStore) -> torch.Tensor:
    """2-norm of the gradient of the whole model, the same on every rank.

    Shards, copies over dp or tp, and parameters tied over stages are each counted once; the sum is taken in float64.
    """
    grads = [grad for name, grad in store.local_grads().items() if store.counts_once(name)]
    grads = [grad for grad in grads if grad.numel()]
    total = torch.zeros((), dtype=torch.float64, device=store.device)
    if grads:
        norms = torch._foreach_norm(grads, 2)
        total += torch.stack([norm.double() for norm in norms]).square().sum()
    if store.grid.world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(store: ParameterStore, max_norm: float, norm: torch.Tensor) -> None:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    grads = list(store.local_grads().values())
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for grad in grads:
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, group in by_dtype.items():
        torch._foreach_mul_(group, factor.to(dtype))
