"""What the reference needs where it runs a model over microbatches: losses that count as the whole batch's do.

A mean of cross entropies over microbatches is weighted by samples, that of the batch by targets that are not ignored. A
model that draws random numbers or keeps batch statistics must be run microbatch by microbatch; its cross entropies are
then divided by the targets of all microbatches, counted by a run before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

_MEANS = {F.cross_entropy: inspect.signature(F.cross_entropy), F.nll_loss: inspect.signature(F.nll_loss)}


class CountedTargets(TorchFunctionMode):
    """Inside, means over targets are sums divided by totals[i] * share, for the i-th of them; without totals, by the
    targets' own weight. found: that weight, of each in turn."""

    def __init__(self, totals: list[torch.Tensor] | None = None, share: float = 1.0) -> None:
        super().__init__()
        self.totals, self.share = totals, share
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _MEANS:
            return func(*args, **kwargs)
        bound = _MEANS[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["reduction"] != "mean" or given["target"].is_floating_point():
            return func(*args, **kwargs)
        target, weight = given["target"], given["weight"]
        counts = target != given["ignore_index"]
        one = given["input"].new_ones(()) if weight is None else weight[torch.where(counts, target, 0)]
        self.found.append((one * counts).sum().detach())
        divisor = self.found[-1] if self.totals is None else self.totals[len(self.found) - 1] * self.share
        return func(*args, **{**kwargs, "reduction": "sum"}) / divisor


def has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
