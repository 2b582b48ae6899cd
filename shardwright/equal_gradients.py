"""Under torch.compile on several ranks: are the gradients that an optimizer first steps by the same on all of them?

Averaged is what the compiled graphs give. A part that Dynamo leaves to eager (a module that is not compiled, or has a
backward hook; a parameter that the loss uses beside the model) adds gradients of each rank alone, and the ranks'
copies of the model would drift apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import ExitCode, ShardwrightError

_TOLERANCE = 1e-6  # of a sum over one gradient; an all-reduce gives every rank the same bits
_averaged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by compiled graphs
_looked_at: WeakSet[torch.optim.Optimizer] = WeakSet()


def watched(run: Callable[..., Any], slots: Collection[int]) -> Callable[..., Any]:
    """run, whose parameters at these slots get averaged gradients: optimizers over them are looked at once."""
    _look_before_steps()
    known = False

    def run_watched(*arguments: Any) -> Any:
        nonlocal known
        if not known:
            known = True
            for slot in slots:
                _averaged[arguments[slot]] = True
        return run(*arguments)

    return run_watched


@functools.cache
def _look_before_steps() -> None:
    register_optimizer_step_pre_hook(lambda optimizer, *_: _look_once(optimizer))


@torch.no_grad()
def _look_once(optimizer: torch.optim.Optimizer) -> None:
    """At the first step, a collective that all ranks make if they step alike."""
    if optimizer in _looked_at or not dist.is_initialized():
        return
    named = [
        (names[i] if (names := group.get("param_names")) else f"parameter {i}", parameter)
        for group in optimizer.param_groups
        for i, parameter in enumerate(group["params"])
    ]
    if not any(parameter in _averaged for _, parameter in named) or any(isinstance(p, DTensor) for _, p in named):
        return
    _looked_at.add(optimizer)
    device = named[0][1].device
    count = torch.tensor([len(named), -len(named)], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    if count.sum():  # each rank steps its own part of the parameters
        return
    sums = [
        torch.zeros((), dtype=torch.float64) if p.grad is None else p.grad.sum(dtype=torch.float64) for _, p in named
    ]
    own = torch.stack([total.to(device) for total in sums]).nan_to_num()
    extremes = torch.cat([own, -own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    high, low = extremes[: len(named)], -extremes[len(named) :]
    apart = (high - low > _TOLERANCE * torch.maximum(high.abs(), low.abs())).nonzero().flatten().tolist()
    if apart:
        raise _differ([(name, tuple(parameter.shape)) for name, parameter in (named[i] for i in apart)])


def _differ(found: list[tuple[str, tuple[int, ...]]]) -> ShardwrightError:
    name, shape = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return ShardwrightError(
        f"the gradient of {name} of shape {shape}{more} differs between ranks at the optimizer's first step",
        means="a part of it is computed outside of the compiled graphs, where it is not averaged, as in a module that "
        "is not compiled or that Dynamo leaves to eager; the ranks would drift apart",
        change='torch.compile(..., options={"data_parallel": ...})',
        works='options={"data_parallel": False} and DistributedDataParallel around the model, which averages them all',
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
