"""The compiler backend's self-test: at the first call of a compiled graph, it is run beside the graph that Dynamo gave.

A backend knows no loss: compared are the outputs, the inputs that are written to, and the gradients of all inputs for
given gradients of the outputs. Both run on copies, once, in the graph's own dtype and on this rank alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .errors import ExitCode, ShardwrightError
from .self_test import BUDGET_S, FLOORS, TOLERANCES, free_bytes, largest, relative_difference

Compiled = Callable[..., Any]
_RUNS = 4  # forwards' worth of time: both forwards, and backwards of about twice as long
_SEED = 5


def tested_at_first_call(run: Compiled, trial: Callable[[], Compiled], written: fx.GraphModule) -> Compiled:
    """run, which is tested when it is first called. trial: gives what stands for it there, without collectives.

    The call raises ShardwrightError, exit code 5, where they differ.
    """
    waiting: list[fx.GraphModule] = [written]

    def run_tested(*arguments: Any) -> Any:
        if waiting:
            _compare(trial(), waiting.pop(), arguments)
        return run(*arguments)

    return run_tested


@torch.compiler.disable
def _compare(compiled: Compiled, written: fx.GraphModule, arguments: Sequence[Any]) -> None:
    """Nothing is said where it cannot be told: no room, no time, random numbers, or inputs that share memory."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if not _can_copy(tensors):
        return
    before = _random_state(tensors)
    try:
        _run_both(compiled, written, arguments, before)
    except torch.OutOfMemoryError:  # what trains without room to spare is not tested
        _set_random_state(tensors, before)


def _run_both(
    compiled: Compiled, written: fx.GraphModule, arguments: Sequence[Any], before: Sequence[torch.Tensor]
) -> None:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    started = time.perf_counter()
    given = _copies(arguments)
    expected = written(*given)
    if any(not torch.equal(a, b) for a, b in zip(before, _random_state(tensors), strict=True)):
        _set_random_state(tensors, before)  # the same draws come in another order, or of another generator
        return
    if _RUNS * (time.perf_counter() - started) > BUDGET_S:
        return
    expected_gradients = _gradients(expected, given)
    expected = [value.detach() if isinstance(value, torch.Tensor) else value for value in expected]  # lets its graph go
    mine = _copies(arguments)
    found = compiled(*mine)
    _require("output", found, expected)
    _require("written input", mine, given)
    _require("gradient of input", _gradients(found, mine), expected_gradients)


def _can_copy(tensors: Sequence[torch.Tensor]) -> bool:
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in tensors)
    if not plain or not tensors or any(t.is_meta for t in tensors):
        return False
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    if len(set(storages)) != len(storages) or any(t.numel() and 0 in t.stride() for t in tensors):
        return False
    return 6 * sum(t.numel() * t.element_size() for t in tensors) < free_bytes(tensors[0].device)


def _copies(arguments: Sequence[Any]) -> list[Any]:
    return [
        value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in arguments
    ]


def _random_state(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]


def _set_random_state(tensors: Sequence[torch.Tensor], states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    for index, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, index)


def _gradients(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Of the inputs, for output gradients that are drawn alike for both sides."""
    generator = torch.Generator().manual_seed(_SEED)
    ends = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not ends or not leaves or not torch.is_grad_enabled():
        return []
    arriving = [torch.rand(t.shape, generator=generator).to(t.device, t.dtype) for t in ends]
    return list(torch.autograd.grad(ends, leaves, arriving, allow_unused=True))


def _require(kind: str, mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    if len(mine) != len(theirs):
        raise _differs(f"{len(mine)} of kind {kind} and not {len(theirs)}", "")
    scale = max((largest(t.detach()) for t in theirs if _is_real(t)), default=0.0)
    for position, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(b, torch.Tensor):
            continue
        if a is None:  # what no gradient reaches may have a zero or none
            a = torch.zeros_like(b)
        a, b = a.detach(), b.detach()
        if torch.equal(a, b):
            continue
        floor = FLOORS.get(b.dtype, 1e-3) * (scale if kind.startswith("gradient") else 1.0)
        error = relative_difference(a, b, floor)
        if error > TOLERANCES.get(b.dtype, 1e-3):  # NaN on both sides: nothing can be told
            raise _differs(f"{kind} {position} by {error:.1e}", str(b.dtype).removeprefix("torch."))


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _differs(what: str, dtype: str) -> ShardwrightError:
    return ShardwrightError(
        f"the compiled graph differs from the one that it was made of: {what}",
        means=f"relative to the largest entry, in {dtype or 'its own dtype'}; training would be another model's",
        change="torch.compile(..., options={...}): fuse, activation_limit, inductor",
        works="options={'fuse': False}, or {'self_test': False} to do without this test",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
