"""Batch norms with momentum=None while a model is captured: their statistics are the mean over all batches so far.

torch.nn reads the number of batches as a Python number to make a momentum of it, which no trace can know. Inside
`cumulative_norms` the statistics of the batch are written to tensors of their own, and the running ones move towards
them by one part in as many as there were batches, all as tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Forward = Callable[[_BatchNorm, torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def cumulative_norms() -> Iterator[None]:
    with mock.patch.object(_BatchNorm, "forward", _cumulative(_BatchNorm.forward)):
        yield


def _cumulative(forward: Forward) -> Forward:
    def run(self: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
        mean, var, seen = self.running_mean, self.running_var, self.num_batches_tracked
        if self.momentum is not None or not self.training or mean is None or var is None or seen is None:
            return forward(self, input)
        self._check_input_dim(input)
        seen.add_(1)
        own_mean, own_var = torch.zeros_like(mean), torch.zeros_like(var)
        out = F.batch_norm(input, own_mean, own_var, self.weight, self.bias, True, 1.0, self.eps)
        part = 1.0 / seen.to(mean.dtype)
        for running, own in ((mean, own_mean), (var, own_var)):
            running.copy_(running * (1 - part) + own * part)
        return out

    return run
