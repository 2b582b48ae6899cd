"""The optimizer over this rank's shards, and clipping by the norm of the whole model's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from ..profiler.workload import OptimizerSpec
from .collectives import Summing
from .parameters import ParameterStore
from .units import Unit


def build_optimizer(spec: OptimizerSpec, store: ParameterStore) -> torch.optim.Optimizer | None:
    """None where this rank holds no trainable parameter. Torch's fused update is taken where nothing else is asked.

    Where the update is elementwise it steps over plain local tensors, which spares the dispatch of DTensor for each
    parameter and op."""
    if store.link is not None and store.storage_mesh is not None and not spec.is_elementwise:
        raise ShardwrightError(
            f"{spec.name} steps over whole tensors, which ranks share, and the plan has its state in host memory",
            means="what it computes of a tensor would take collectives between hosts",
            change="--force optimizer_state",
            works="--force optimizer_state=device, or an elementwise optimizer such as AdamW",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    held = store.local_parameters if spec.is_elementwise else store.parameters
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
        total += torch.stack([norm.double() for norm in norms]).square().sum().to(store.device)
    return Summing(total, alone=store.grid.world_size == 1)


def clip_factor(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(store: ParameterStore, factor: torch.Tensor) -> None:
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in store.local_grads().values():
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), group in groups.items():
        torch._foreach_mul_(group, factor.to(device, dtype))


def subgroups(units: Sequence[Unit], most_elements: int) -> list[list[Unit]]:
    """Consecutive units with at most so many elements to step together, at least one each."""
    found: list[list[Unit]] = []
    elements = 0
    for unit in units:
        own = sum(master.numel() for master in unit.masters.values())
        if not found or elements + own > most_elements:
            found.append([])
            elements = 0
        found[-1].append(unit)
        elements += own
    return found
