"""The optimizer over this rank's shards, and clipping by the norm of the whole model's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn, optim

from ..profiler.workload import OptimizerSpec
from .collectives import Summing
from .parameters import ParameterStore

# Their update of an element depends on nothing but that element: they step over plain local tensors, which spares the
# dispatch of DTensor for each parameter and op.
ELEMENTWISE = frozenset({
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SGD,
})  # fmt: skip


def build_optimizer(spec: OptimizerSpec, store: ParameterStore) -> torch.optim.Optimizer | None:
    """None where this rank holds no trainable parameter. Torch's fused update is taken where nothing else is asked."""
    local = spec.factory in ELEMENTWISE
    held = store.local_parameters if local else store.parameters
    trainable = [parameter for parameter in held.values() if parameter.requires_grad]
    if not trainable:
        return None
    options: dict[str, Any] = dict(spec.options)
    if spec.is_fused and _can_fuse(trainable):
        options["fused"] = True
    return spec.factory(trainable, **options)


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)


@torch.no_grad()
def start_grad_norm(store: ParameterStore) -> Summing:
    """The square of the 2-norm of the gradient of the whole model, on its way to every rank.

    Shards, copies over mesh axes or of a second direction, and parameters tied over stages are each counted once; the
    sum is taken in float64.
    """
    grads = [grad for name, grad in store.local_grads().items() if store.counts_once(name)]
    grads = [grad for grad in grads if grad.numel()]
    total = torch.zeros((), dtype=torch.float64, device=store.device)
    if grads:
        norms = torch._foreach_norm(grads, 2)
        total += torch.stack([norm.double() for norm in norms]).square().sum()
    return Summing(total, alone=store.grid.world_size == 1)


def clip_factor(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(store: ParameterStore, factor: torch.Tensor) -> None:
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for grad in store.local_grads().values():
        by_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, group in by_dtype.items():
        torch._foreach_mul_(group, factor.to(dtype))
