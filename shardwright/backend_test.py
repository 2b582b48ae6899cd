"""The compiler backend's self-test: at the first call of a compiled graph, it is run beside the graph that Dynamo gave.

A backend knows no loss: compared are the outputs, the inputs that are written to, and the gradients of all inputs for
given gradients of the outputs. Both run on copies, once, in the graph's own dtype and on this rank alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from .errors import ExitCode, ShardwrightError
from .rounding import largest
from .self_test import BUDGET_S, FLOORS, TOLERANCES, first_line, free_bytes, relative_difference

Compiled = Callable[..., Any]
T = TypeVar("T")
_RUNS = 4  # forwards' worth of time: both forwards, and backwards of about twice as long
_SEED = 5
_COLLECTIVES = ("c10d.", "c10d_functional.", "_c10d_functional.", "_c10d_functional_autograd.", "symm_mem.")
_log = logging.getLogger(__name__)


def tested_at_first_call(run: Compiled, make_trial: Callable[[], Compiled], written: fx.GraphModule) -> Compiled:
    """run, which is tested when it is first called. make_trial: compiles what stands for it there, without collectives.

    The call raises ShardwrightError, exit code 5, where they differ.
    """
    trial = _attempted(make_trial)
    waiting: list[Compiled] = [] if trial is None else [trial]

    def run_tested(*arguments: Any) -> Any:
        if waiting:
            _compare(waiting.pop(), written, arguments)
        return run(*arguments)

    return run_tested


def holds_collectives(graph_module: fx.GraphModule) -> bool:
    """Whether it, or a graph inside it, talks to other ranks. Each rank decides by itself whether it has the room and
    the time for a test, which so must hold none: another rank may not be there to take part.
    """
    graphs = [part.graph for part in graph_module.modules() if isinstance(part, fx.GraphModule)]
    return any(_communicates(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function")


def _communicates(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return str(target).startswith(_COLLECTIVES) or module.startswith("torch.distributed")


def _attempted(part: Callable[[], T]) -> T | None:
    """What it gives, or None and a line in the log. A difference is given, not raised, and so is never lost here; and
    what the compiled graph itself raises comes again when it runs after the test.
    """
    try:
        return part()
    except Exception as error:  # on copies, a graph or an op of the user's own may raise anything
        level = logging.INFO if isinstance(error, torch.OutOfMemoryError) else logging.WARNING
        _log.log(level, "a compiled graph is not tested: %s: %s", type(error).__name__, first_line(error))
        return None


@torch.compiler.disable
def _compare(compiled: Compiled, written: fx.GraphModule, arguments: Sequence[Any]) -> None:
    difference = _attempted(lambda: _difference(compiled, written, arguments))
    if difference is not None:
        raise difference


def _difference(compiled: Compiled, written: fx.GraphModule, arguments: Sequence[Any]) -> ShardwrightError | None:
    """None too where it cannot be told: no room, no time, random numbers, or inputs that share memory."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if not _can_copy(tensors):
        return None
    with torch.random.fork_rng(devices=_gpus(tensors)):
        return _run_both(compiled, written, arguments, _random_state(tensors))


def _run_both(
    compiled: Compiled, written: fx.GraphModule, arguments: Sequence[Any], before: Sequence[torch.Tensor]
) -> ShardwrightError | None:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    started = time.perf_counter()
    leaves, given = _copies(arguments)
    expected = written(*given)
    if any(not torch.equal(a, b) for a, b in zip(before, _random_state(tensors), strict=True)):
        return None  # the same draws come in another order, or of another generator
    if _RUNS * (time.perf_counter() - started) > BUDGET_S:
        return None
    expected_gradients = _gradients(expected, leaves)
    expected = [value.detach() if isinstance(value, torch.Tensor) else value for value in expected]  # lets its graph go
    my_leaves, mine = _copies(arguments)
    found = compiled(*mine)
    return (
        _first_difference("output", found, expected)
        or _first_difference("written input", mine, given)
        or _first_difference("gradient of input", _gradients(found, my_leaves), expected_gradients)
    )


def _can_copy(tensors: Sequence[torch.Tensor]) -> bool:
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in tensors)
    if not plain or not tensors or any(t.is_meta for t in tensors):
        return False
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    if len(set(storages)) != len(storages) or any(t.numel() and 0 in t.stride() for t in tensors):
        return False
    return 8 * sum(t.numel() * t.element_size() for t in tensors) < free_bytes(tensors[0].device)


def _copies(arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(tensors to take gradients of, tensors to call a graph with): the same but for what an earlier graph computed,
    which may be written to in place, as a leaf that requires a gradient may not.
    """
    leaves = [
        value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in arguments
    ]
    with torch.enable_grad():
        given = [
            leaf.clone() if isinstance(value, torch.Tensor) and not value.is_leaf else leaf
            for leaf, value in zip(leaves, arguments, strict=True)
        ]
    return leaves, given


def _gpus(tensors: Sequence[torch.Tensor]) -> list[int]:
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


def _random_state(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in _gpus(tensors))]


def _gradients(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Of the inputs, for output gradients that are drawn alike for both sides."""
    generator = torch.Generator().manual_seed(_SEED)
    ends = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not ends or not leaves or not torch.is_grad_enabled():
        return []
    arriving = [torch.rand(t.shape, generator=generator).to(t.device, t.dtype) for t in ends]
    return list(torch.autograd.grad(ends, leaves, arriving, allow_unused=True))


def _first_difference(kind: str, mine: Sequence[Any], theirs: Sequence[Any]) -> ShardwrightError | None:
    if len(mine) != len(theirs):
        return _differs(f"{len(mine)} of kind {kind} and not {len(theirs)}", "")
    scale = max((largest(t.detach()) for t in theirs if _is_real(t)), default=0.0)
    for position, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(b, torch.Tensor):
            continue
        dtype = str(b.dtype).removeprefix("torch.")
        if a is None:  # what no gradient reaches may have a zero or none
            a = torch.zeros_like(b)
        if not isinstance(a, torch.Tensor) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return _differs(f"{kind} {position} is another kind of value", dtype)
        a, b = a.detach(), b.detach()
        if torch.equal(a, b):
            continue
        floor = FLOORS.get(b.dtype, 1e-3) * (scale if kind.startswith("gradient") else 1.0)
        error = relative_difference(a, b, floor)
        if error > TOLERANCES.get(b.dtype, 1e-3):  # NaN on both sides: nothing can be told
            return _differs(f"{kind} {position} by {error:.1e}", dtype)
    return None


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
