"""How many digits a gradient has: one that is zero but for rounding has none, and is no difference to any other such.

The bias of a convolution before a batch norm, a score that is added to all classes alike: what the gradient adds up
cancels, and leaves the rounding of its terms, which may be larger than the largest gradient of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .profiler.copies import buffers_kept

ROUNDINGS = 16.0  # of which two that are rounding alone may differ, in units of how far one moves
_RUNS = 2


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
