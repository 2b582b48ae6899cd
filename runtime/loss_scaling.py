"""Dynamic loss scaling for float16, whose smallest gradients would vanish: torch.amp.GradScaler's rule on all ranks.

The loss is multiplied by a scale before its backward and the gradients are divided by it, once they are summed and in
the precision of the master copy. A step whose gradient is not finite anywhere is left out, and the scale shrinks; after
enough finite steps in a row it grows. All ranks know the norm of the whole gradient, so all decide alike.
"""

from __future__ import annotations

import torch

from ..errors import ShardwrightError
from ..profiler.workload import LossScaling, Precision

_LARGEST = torch.finfo(torch.float32).max  # GradScaler keeps its scale in float32


class LossScaler:
    """The scale of a program. state: float64 [scale, finite steps since it last changed], on the CPU, as saved."""

    def __init__(self, rule: LossScaling) -> None:
        self.rule = rule
        self.state = torch.tensor([rule.initial, 0.0], dtype=torch.float64)

    @property
    def scale(self) -> float:
        return self.state[0].item()

    def update(self, is_finite: bool) -> None:
        """After each step. is_finite: was the whole gradient?"""
        scale, steps = self.state.tolist()
        if not is_finite:
            scale, steps = scale * self.rule.backoff, 0.0
        elif steps + 1 == self.rule.growth_interval:
            grown = scale * self.rule.growth
            scale, steps = grown if grown <= _LARGEST else scale, 0.0
        else:
            steps += 1
        self.state.copy_(torch.tensor([scale, steps], dtype=torch.float64))


def loss_scaler(precision: Precision) -> LossScaler | None:
    """None where the precision asks for none. Raises ShardwrightError where the gradients could not be divided."""
    if not precision.scales_loss:
        return None
    if precision.master == torch.float16:
        raise ShardwrightError(
            "parameters are updated in float16, where gradients divided by the loss scale vanish",
            means="float16 trains by a scaled loss and a wider copy of the parameters",
            change="precision",
            works="Precision(compute=torch.float16, master=torch.float32), or compute=torch.bfloat16",
        )
    assert precision.loss_scaling is not None
    return LossScaler(precision.loss_scaling)
