"""How shardwright::recurrence splits: by samples. Each step reads the whole hidden state of the one before it."""

from __future__ import annotations

import torch

from ..profiler import recurrence_ops  # noqa: F401  defines the operators
from ..profiler.op_view import OpView
from .placement import P, R
from .rules import RULES
from .strategy import Strategy

_OF_SAMPLES = {"gates", "state", "lengths", "grad_out", "grad_last", "out", "kept"}


def _operands(view: OpView) -> list[str]:
    """Names of the tensors that are there, in the order of the call."""
    names = [argument.name for argument in view.op._schema.arguments]
    return [name for name, argument in zip(names, view.args, strict=False) if isinstance(argument, torch.fx.Node)]


def recurrence(view: OpView) -> list[Strategy]:
    return [Strategy(tuple(0 if name in _OF_SAMPLES else R for name in _operands(view)), (0, 0, 0))]


def recurrence_backward(view: OpView) -> list[Strategy]:
    """Linear in the gradients that come in, so that sums pass."""
    names = _operands(view)
    of_projection = P if "projection" in names else R
    samples = Strategy(tuple(0 if name in _OF_SAMPLES else R for name in names), (0, 0, of_projection))
    sums = Strategy(tuple(P if name.startswith("grad_") else R for name in names), (P, P, of_projection))
    return [samples, sums]


RULES[torch.ops.shardwright.recurrence] = recurrence
RULES[torch.ops.shardwright.recurrence_backward] = recurrence_backward
