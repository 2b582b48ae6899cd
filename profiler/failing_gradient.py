"""Which op of a model has no gradient, where the backward of its graph cannot be traced."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .nodes import source_of, users_line_in
from .where import is_users_line


def without_gradient(
    forward: fx.GraphModule, arguments: Sequence[Any], error: RuntimeError | NotImplementedError
) -> ShardwrightError | None:
    """The refusal that names the op, or the line at which the trace stopped; None where neither is known."""
    reason = str(error).strip().splitlines()[0].partition("Hint:")[0][:200]
    finder = _Finder(forward, str(error))
    with torch.enable_grad(), contextlib.suppress(RuntimeError, NotImplementedError):  # in a forward, as the trace did
        finder.run(*arguments)
    if finder.found is None:
        line = users_line_in(str(error))
        return _stopped(line, reason) if is_users_line(line) else None
    return ShardwrightError(
        f"{source_of(finder.found) or 'the model'} has no gradient ({finder.found.target}): {reason}",
        means="loss.backward() fails there in plain PyTorch too, as soon as a tensor that it reads takes a gradient",
        change="that line",
        works="its operands detached, or other ops",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _stopped(line: str, reason: str) -> ShardwrightError:
    return ShardwrightError(
        f"{line} cannot be traced with its gradient: {reason}",
        means="torch does not run that op on tensors without values, as a plan needs it",
        change="that line",
        works="a copy in place of a view (clone), or other ops",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


class _Finder(fx.Interpreter):
    """Runs a forward, and of each op by itself the backward, until one fails as the whole did."""

    def __init__(self, forward: fx.GraphModule, message: str) -> None:
        super().__init__(forward)
        self.message = message
        self.found: fx.Node | None = None

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function" or self.found is not None:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        leaves: list[torch.Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value.detach()
            if value.is_floating_point() or value.is_complex():
                leaves.append(value.requires_grad_())
                return value.clone()  # as no leaf may be written in place
            return value

        args, kwargs = torch.utils._pytree.tree_map(leaf, (args, kwargs))
        results = node.target(*args, **kwargs)  # type: ignore[operator]
        listed = results if isinstance(results, (tuple, list)) else [results]
        taken = [r for r in listed if isinstance(r, torch.Tensor) and r.requires_grad]
        try:
            if taken:
                torch.autograd.grad(taken, leaves, [torch.empty_like(r) for r in taken], allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if _kind(str(error)) == _kind(self.message):
                self.found = node
        return torch.utils._pytree.tree_map(lambda r: r.detach() if isinstance(r, torch.Tensor) else r, results)


def _kind(message: str) -> str:
    """Without the shapes and names that differ from trace to trace."""
    return message.strip().partition(":")[0][:80]
