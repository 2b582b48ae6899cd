"""A strategy: one way to run one op on one mesh axis."""

from __future__ import annotations

from typing import NamedTuple

from ..profiler.op_view import OpView
from .placement import R


class Strategy(NamedTuple):
    """inputs: placement of each tensor operand, in order of appearance. outputs: of each tensor result.

    even: the sharded sizes must divide evenly. lowering: name of the local program where it is not just the op on local
    tensors (passes/lowerings.py); it may use collectives on the axis. of_sequence: what an axis that cuts sequences may
    run and no other: TOKENS, a part of each sequence's tokens, or HEADS, whole sequences of some heads. inside: the
    dimension of the operand, and of the result, which axes outside this one must have cut down to one element.
    of_experts: what an axis that cuts experts' parameters may run and no other.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    even: bool = False
    lowering: str = ""
    of_sequence: str = ""
    inside: tuple[int, ...] = ()
    of_experts: bool = False


TOKENS, HEADS = "tokens", "heads"


def replicated(view: OpView) -> Strategy:
    return Strategy((R,) * len(view.inputs), (R,) * len(view.outputs))
