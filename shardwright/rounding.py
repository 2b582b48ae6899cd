"""How many digits a gradient has: one that is zero but for rounding has none, and is no difference to any other such.

The bias of a convolution before a batch norm, a score that is added to all classes alike: what the gradient adds up
cancels, and leaves the rounding of its terms. What is rounding alone shrinks with the unit of rounding: with more
digits the gradient, and what rounding moves it by, all but vanish. A gradient that has a size of its own keeps it, and
so does one on a kink (relu(a - b) of equal a and b), which rounding moves by all of its size in any dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from .profiler.copies import buffers_kept
from .profiler.models import make_reference_dtype
from .profiler.workload import Workload

ROUNDINGS = 16.0  # of which two that are rounding alone may differ, in units of how far one moves
# What may be left, with more digits, of what rounding moves with fewer: 2e-9 of it are, from float32 to float64.
LEFT_WITH_MORE_DIGITS = 1e-4
_RUNS = 2


def roundings(workload: Workload, run: Callable[[Workload], object]) -> dict[str, float]:
    """The most by which two of a gradient may differ, of each that is rounding alone; no others are named.

    workload: its gradients are in .grad. run: computes the gradients of a workload; it is given this one, with other
    roundings, and a copy in another dtype. Where the copy does not run, no gradient is known to be rounding alone.
    """
    own = next((p.dtype for p in workload.model.parameters() if p.dtype.is_floating_point), torch.float32)
    others = (torch.float32,) if own == torch.float64 else (torch.float64, torch.float32)
    for dtype in others:
        if dtype == own:
            continue
        try:
            copied = _with_gradients(make_reference_dtype(workload, dtype), run)
            moved_there = moved_by_rounding(copied.model, functools.partial(run, copied))
        except Exception:  # an op, or the model's own code, is there in the model's dtype only
            continue
        moved = moved_by_rounding(workload.model, functools.partial(run, workload))
        coarse, fine, wide = (moved_there, moved, workload) if own == torch.float64 else (moved, moved_there, copied)
        sizes = {n: largest(p.grad) for n, p in wide.model.named_parameters() if p.grad is not None}
        return {
            name: ROUNDINGS * by
            for name, by in moved.items()
            if name in sizes and max(sizes[name], fine.get(name, 0.0)) <= LEFT_WITH_MORE_DIGITS * coarse.get(name, 0.0)
        }
    return {}


def _with_gradients(workload: Workload, run: Callable[[Workload], object]) -> Workload:
    for parameter in workload.model.parameters():
        parameter.grad = None
    with buffers_kept(workload.model):
        run(workload)
    return workload


def moved_by_rounding(model: nn.Module, forward_backward: Callable[[], object]) -> dict[str, float]:
    """Largest change of an entry of each gradient, where every parameter is changed by a unit of rounding, up or down.

    forward_backward: leaves the gradients in .grad. Parameters, gradients and buffers are as before afterwards.
    """
    kept = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(_RUNS):
            for name, parameter in model.named_parameters():
                _round_otherwise(parameter, kept[name][0], generator)
                parameter.grad = None
            with buffers_kept(model):
                forward_backward()
            for name, parameter in model.named_parameters():
                before = kept[name][1]
                if before is not None and parameter.grad is not None:
                    found[name] = max(found.get(name, 0.0), largest(parameter.grad - before))
    finally:
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(kept[name][0])
            parameter.grad = kept[name][1]
    return found


@torch.no_grad()
def _round_otherwise(parameter: torch.Tensor, value: torch.Tensor, generator: torch.Generator) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        return
    signs = (torch.randint(2, value.shape, generator=generator) * 2 - 1).to(value.device, value.dtype)
    parameter.copy_(value * (1 + signs * torch.finfo(value.dtype).eps))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def largest(tensor: torch.Tensor) -> float:
    """Of its entries, whatever their sign; 0 of none."""
    return float(dense(tensor).abs().max()) if tensor.numel() else 0.0
