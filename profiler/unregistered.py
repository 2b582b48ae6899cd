"""Tensors that a forward or a loss reads and that no module of the model holds as a parameter or a buffer.

A graph keeps their values. That is right for a table or for class weights; it is not for one that takes a gradient (the
temperature of a loss, layers in a plain list), nor for one that is written to, as the next step would find it as
it was.
"""

from __future__ import annotations

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .nodes import source_of
from .where import is_users_line, place_of
from .workload import Loss
from .writes import written_memory

_KEEP_VALUES = {torch.ops.aten.detach_.default}  # in place, though no value changes: torch.tensor() ends with it


def refuse_unregistered(found_loss: torch.Tensor, loss: Loss | None) -> None:
    """Of the running trace, whose forward has just ended with this loss."""
    found = _torch.running_trace()
    if found is None:
        return
    graph, root = found
    held = {n: getattr(root, str(n.target), None) for n in graph.nodes if n.op == "get_attr"}
    tensors = {n: t for n, t in held.items() if isinstance(t, torch.Tensor)}
    taking = _leaves(found_loss)
    for node, tensor in tensors.items():
        if id(tensor) in taking:
            raise _refusal(
                f"{_place(_read_at(node), loss)} reads a tensor {tuple(tensor.shape)} that takes a gradient and is no "
                "parameter of the model",
                "a graph keeps its value as it is now: it would get no gradient and no step",
            )
    for node in graph.nodes:
        memory = written_memory(node) if node.op == "call_function" else None
        if memory in tensors and tensors[memory].numel() and node.target not in _KEEP_VALUES:
            raise _refusal(
                f"{_place(source_of(node), loss)} writes to a tensor {tuple(tensors[memory].shape)} that is no buffer "
                f"of the model ({node.target})",
                "a graph keeps its value as it is now: the next step would find it as it was",
            )


def _leaves(loss: torch.Tensor) -> set[int]:
    """The tensors that loss.backward() would give a gradient to."""
    found: set[int] = set()
    seen: set[object] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [other for other, _ in node.next_functions]
    return found


def _read_at(node: fx.Node) -> str:
    return next((line for user in node.users if (line := source_of(user))), "")


def _place(line: str, loss: Loss | None) -> str:
    """The line, where it is the user's; the loss is called from here, and leaves no frame of its own in a trace."""
    if is_users_line(line):
        return line
    return "the model" if loss is None else f"the loss ({place_of(loss)})"


def _refusal(what: str, means: str) -> ShardwrightError:

    return ShardwrightError(
        what,
        means=means,
        change="where the tensor is held: in a module of the model. A loss with state of its own goes into the model",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
        works="nn.Parameter, register_buffer or nn.ModuleList in a module whose forward returns the loss; "
        "requires_grad_(False) for what is not to be trained",
    )
