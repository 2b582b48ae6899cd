"""torch.utils.checkpoint in the user's model: captured through.

What is kept for the backward and what is computed again is the plan's own decision, so a checkpointed part is captured
as if it were not. What checkpointing itself changes stays: with use_reentrant=True a part none of whose arguments takes
a gradient has none, as in PyTorch; the forward context of context_fn is entered, unless it is only the one that
says what selective checkpointing keeps; and a part that writes to buffers (batch norms' statistics) writes to them
twice, as PyTorch computes it twice. A part that draws other numbers when it is computed again is refused, and so is one
that draws before it writes to buffers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .random_ops import draws
from .where import users_line
from .writes import written_memory

_NORMS = {torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default}


class Parts:
    """The checkpointed parts of one forward that have to run a second time."""

    def __init__(self) -> None:
        self.again: list[Callable[[], Any]] = []
        self.depth = 0

    def run_again(self) -> None:
        """As the backward does, the last part first. Only what they write outlives this."""
        while self.again:
            self.again.pop()()

    @contextlib.contextmanager
    def part(self, again: Callable[[], Any], keeps_numbers: bool) -> Iterator[None]:
        before, line = _nodes(), users_line()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        made = [node for node in _nodes() if node not in before]
        if not keeps_numbers and any(draws(node) for node in made):
            raise ShardwrightError(
                f"the checkpoint at {line} draws random numbers, with preserve_rng_state=False",
                means="the backward would draw others than the forward, so its gradient would be of another loss",
                change="preserve_rng_state",
                works="preserve_rng_state=True",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        if self.depth and any(_writes_buffer(node) for node in made):
            raise ShardwrightError(
                f"the checkpoint at {line} lies within another, and writes to buffers",
                means="how often PyTorch computes such a part again hangs on what else its backward reads",
                change="that checkpoint, or the one around it",
                works="one checkpoint around batch norms and what else keeps statistics",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        if self.depth == 0 and torch.is_grad_enabled() and any(_writes_buffer(node) for node in made):
            _require_no_draw_before_a_write(made, line)
            self.again.append(again)

    def reentrant(self, original: Any, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """In place of CheckpointFunction.apply."""
        if not torch.is_grad_enabled() or not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            with torch.no_grad():
                return function(*args)
        with self.part(lambda: function(*args), preserve_rng_state):
            return function(*args)

    def resumed(
        self,
        original: Any,
        fn: Callable[..., Any],
        preserve_rng_state: bool = True,
        context_fn: Callable[[], tuple[Any, Any]] = _torch.no_checkpoint_contexts,
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[None]:
        """In place of checkpoint's generator: it is resumed before and after the part runs."""
        context, _ = context_fn()
        if _torch.is_selection(context):
            context = contextlib.nullcontext()
        bound = inspect.signature(original).bind(fn, preserve_rng_state, context_fn, *args, **kwargs).arguments
        with self.part(lambda: fn(*bound.get("args", ()), **bound.get("kwargs", {})), preserve_rng_state), context:
            yield


def _nodes() -> dict[fx.Node, None]:
    found = _torch.running_trace()
    return {} if found is None else dict.fromkeys(found[0].nodes)


def _require_no_draw_before_a_write(made: list[fx.Node], line: str) -> None:
    """PyTorch repeats the numbers of the first run in the second; in a graph each draw has numbers of its own."""
    last = max(i for i, node in enumerate(made) if _writes_buffer(node))
    if any(draws(node) for node in made[: last + 1]):
        raise ShardwrightError(
            f"the checkpoint at {line} draws random numbers before it writes to buffers",
            means="PyTorch runs it twice with the same numbers; here the second run would write what others give",
            change="what that checkpoint holds",
            works="one checkpoint for the part that draws (dropout), and another for the batch norms after it",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )


def _writes_buffer(node: fx.Node) -> bool:
    if node.target in _NORMS:
        return bool(node.args[5]) and isinstance(node.args[3], fx.Node)
    memory = written_memory(node)
    return memory is not None and memory.op == "placeholder"


@contextlib.contextmanager
def captured_through(parts: Parts) -> Iterator[None]:
    """Inside, checkpoint() runs its part as it is."""
    with _torch.checkpoint_replaced(parts.resumed, parts.reentrant):
        yield
