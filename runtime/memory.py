"""How much memory a step took, in bytes.

On CUDA the allocator's own peak. On a CPU there is no such counter: the meter adds up what the runtime holds at the
end of each forward, where the most activations are alive; peak_of() measures one call exactly, through torch's
profiler, and resident_bytes() is what the operating system sees, interpreter and libraries included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from ..units import format_bytes
from .buffers import Buffers
from .parameters import ParameterStore, local_tensor
from .stage import StageRunner


class MemoryMeter:
    """Samples the first `num_steps` steps on a CPU; later ones repeat them, and sampling costs time.

    limit_bytes: what a step may take, where one is set; a step that takes more is ended with an error."""

    def __init__(self, device: torch.device, num_steps: int = 3) -> None:
        self.device = device
        self.peak_bytes = 0
        self.limit_bytes: int | None = None
        self._steps_left = num_steps
        self._runners: Sequence[StageRunner] = ()
        self._store: ParameterStore | None = None
        self._buffers: Buffers | None = None
        self._optimizer_bytes = 0

    def watch(self, runners: Sequence[StageRunner], store: ParameterStore, buffers: Buffers) -> None:
        self._runners, self._store, self._buffers = runners, store, buffers
        for runner in runners:
            runner.on_forward = self.sample

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._optimizer_bytes = self._state_bytes(optimizer) if self._steps_left else 0

    def sample(self) -> None:
        if self._steps_left and self.device.type != "cuda" and self._store is not None:
            activations = sum(runner.kept_bytes() for runner in self._runners)
            self.peak_bytes = max(self.peak_bytes, self.static_bytes() + self._store.grad_bytes() + activations)
            self._enforce()

    def end(self, optimizer: torch.optim.Optimizer | None, kept_bytes: int = 0) -> None:
        """Before gradients are freed, after the optimizer has made its state. kept_bytes: what a roll-back needs."""
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self._enforce()
        elif self._steps_left:
            self._optimizer_bytes = self._state_bytes(optimizer, kept_bytes)
            self.sample()
            self._steps_left -= 1

    def _enforce(self) -> None:
        if self.limit_bytes is not None and self.peak_bytes > self.limit_bytes:
            raise ShardwrightError(
                f"a step takes {format_bytes(self.peak_bytes)} of {self.device.type} memory, and its limit is "
                f"{format_bytes(self.limit_bytes)}",
                means="the plan was made for more memory, or its prediction is off",
                change="--memory-limit of the plan",
                works=f"--memory-limit {int(self.limit_bytes * self.limit_bytes / self.peak_bytes)}",
                exit_code=ExitCode.DOES_NOT_FIT,
            )

    def _state_bytes(self, optimizer: torch.optim.Optimizer | None, kept_bytes: int = 0) -> int:
        """Of the device; all of it is in host memory where what the optimizer steps over is."""
        on_host = self._store is not None and self._store.link is not None
        return 0 if on_host else optimizer_bytes(optimizer) + kept_bytes

    def held(self, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        """Bytes now, by kind. On CUDA workspace is what the allocator has given out beside the rest."""
        assert self._store is not None and self._buffers is not None
        items = {
            "parameters": self._store.param_bytes(),
            "optimizer": self._state_bytes(optimizer),
            "buffers": sum(tensor.numel() * tensor.element_size() for tensor in self._buffers.tensors.values()),
            "gradients": self._store.grad_bytes(),
            "activations": sum(runner.kept_bytes() for runner in self._runners),
        }
        if self.device.type == "cuda":
            rest = torch.cuda.memory_allocated(self.device) - sum(items.values())
            items["workspace"] = max(rest, 0)
        return items

    def static_bytes(self) -> int:
        """Parameters, master copies, optimizer state and buffers."""
        assert self._store is not None and self._buffers is not None
        buffers = sum(tensor.numel() * tensor.element_size() for tensor in self._buffers.tensors.values())
        return self._store.param_bytes() + buffers + self._optimizer_bytes


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    kept = optimizer.state.values()
    values = [v for state in kept for v in (state.values() if isinstance(state, dict) else [state])]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def resident_bytes() -> int:
    """Resident set of this process now (Linux /proc; 0 elsewhere)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_of(call: Callable[[], Any]) -> int:
    """Most bytes that `call` had allocated on the CPU at once, beyond what was there. Slow: every op is recorded."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
