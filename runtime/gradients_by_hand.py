"""What a user does with gradients between forward_backward() and the step, that would not be what it is in PyTorch.

Gradients of a second forward_backward() replace those of the first; a step would leave the first out. Clipping by the
norm of the parameters that a rank of a pipeline holds clips each stage by a norm of its own. Both are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.weak import TensorWeakRef

from ..errors import ShardwrightError
from .parameters import ParameterStore

_SAMPLE = 16  # elements of each gradient, by which a factor is known


class GradientsByHand:
    def __init__(self, store: ParameterStore, group: dist.ProcessGroup | None) -> None:
        """group: of all ranks, on the host; None where there is one."""
        self.store, self._group = store, group
        self._is_pipeline = group is not None and store.grid.size("pp") > 1
        self._left_out = 0  # calls whose gradients were neither stepped nor dropped
        self._stepped = True
        self._samples: dict[str, tuple[TensorWeakRef, int, torch.Tensor]] = {}
        self._asked_factor = math.inf  # of the gradients by which the user stepped the optimizer

    def replaced(self) -> None:
        """forward_backward() is about to put its gradients in the place of those that are there."""
        held = [p for row in (self.store.parameters, self.store.local_parameters) for p in row.values()]
        there = any(p.grad is not None for p in held)
        self._left_out = 0 if self._stepped or not there else self._left_out + 1
        self._stepped = False

    def stepped(self) -> None:
        """They were used, or are made and used at once."""
        self._stepped, self._left_out, self._samples = True, 0, {}

    def made(self) -> None:
        """The gradients of the parameters are there."""
        if not self._is_pipeline:
            return
        self._samples = {}
        for name, grad in self.store.local_grads().items():
            self._samples[name] = TensorWeakRef(grad), grad._version, grad.reshape(-1)[:_SAMPLE].clone()

    def refuse(self) -> Callable[[], None]:
        """Before a step with them. Raises ShardwrightError for what a rank sees alone; every rank calls it. What they
        see together is on its way then, and the result, called on every rank, waits for it and raises likewise."""
        if self._left_out:
            raise _accumulated(self._left_out + 1)
        return self._start(self._factor()) if self._is_pipeline else _nothing

    def asked(self) -> None:
        """Before a step that the user asks the optimizer for, which a rank that has none does not make."""
        if self._left_out:
            raise _accumulated(self._left_out + 1)
        if not self._stepped:  # the second step by the same gradients has what the first one had
            self._asked_factor = self._factor() if self._is_pipeline else math.inf
            self.stepped()

    def refuse_asked(self) -> None:
        """After such a step. Raises ShardwrightError; every rank calls it once any has made one."""
        if self._is_pipeline:
            factor, self._asked_factor = self._asked_factor, math.inf
            self._start(factor)()

    def _start(self, factor: float) -> Callable[[], None]:
        """By what each rank multiplied its gradients; NaN: not all by one number; infinity: it has none."""
        own = torch.tensor([[factor, self._tolerance()]], dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        work = dist.all_gather(everyone, own, group=self._group, async_op=True)

        def look() -> None:
            work.wait()
            factors, tolerances = torch.cat(everyone).unbind(1)
            factors = factors[~factors.isinf()]
            if factors.isnan().any() or not factors.numel():
                return
            low, high = factors.min().item(), factors.max().item()
            if abs(high - low) > tolerances.max().item() * max(abs(high), abs(low)):
                raise _clipped_by_stage(low, high)

        return look

    def _tolerance(self) -> float:
        dtypes = {self.store.specs[name].master_dtype for name in self.store.parameters}
        return 2e-2 if dtypes & {torch.bfloat16, torch.float16} else 1e-4

    def _factor(self) -> float:
        now = self.store.local_grads()
        if not now and not self._samples:
            return math.inf
        written = now.keys() != self._samples.keys() or any(
            now[name] is not grad() or now[name]._version != version
            for name, (grad, version, _) in self._samples.items()
        )
        if not written:  # then no device is waited for
            return 1.0
        if now.keys() != self._samples.keys():
            return math.nan
        found = [
            (now[name].reshape(-1)[:_SAMPLE][before != 0] / before[before != 0]).double()
            for name, (_, _, before) in self._samples.items()
        ]
        ratios = torch.cat(found) if found else torch.empty(0)
        if not ratios.numel():
            return math.inf
        low, high = ratios.min().item(), ratios.max().item()
        return low if abs(high - low) <= self._tolerance() * max(abs(low), abs(high)) else math.nan


def _nothing() -> None:
    pass


def _accumulated(count: int) -> ShardwrightError:
    return ShardwrightError(
        f"forward_backward() was called {count} times since the last step; the gradients are those of the last call",
        means="they are not added up, as backward() would: a step would leave out the batches before",
        change="the batch, or the gradients",
        works=f"one call with a batch {count} times as large, which the plan runs in microbatches; or "
        "program.zero_grad() before a call whose predecessor does not count",
    )


def _clipped_by_stage(low: float, high: float) -> ShardwrightError:
    return ShardwrightError(
        f"the gradients were multiplied by {low:.6g} on one stage of the pipeline and by {high:.6g} on another",
        means="each rank holds the parameters of its stages, and clip_grad_norm_ clips by the norm of those alone",
        change="max_grad_norm",
        works="OptimizerSpec(..., max_grad_norm=...) or parallelize(max_grad_norm=...): the norm of the whole model",
    )
