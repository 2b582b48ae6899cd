"""All facts of an op in one place, for ops that are added beside those of torch and our own.

What torch has a place for stands there: the kernel, its fake and its backward, with torch.library. The rest is here:

    add_op(torch.ops.mylib.my_op, OpFacts(rule=..., lowerings=(...,), flops=..., kind="reduction"))

The capture, the solver of placements, the cost model, the passes and their proof read it from there, and no other file
names the op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from .lowering import LOWERINGS, Lowering, add_lowering
from .rules import RULES, Rule


@dataclass(frozen=True)
class OpFacts:
    """rule: how it may lie on an axis. lowerings: programs of its own that strategies of the rule name. flops: of the
    op's arguments, tensors as their shapes, with out_shape by name, as torch's flop counter has it; None: one for each
    element of the result. kind: the class whose efficiencies the cost model takes; '': as its name says."""

    rule: Rule
    lowerings: tuple[Lowering, ...] = ()
    flops: Callable[..., float] | None = None
    kind: str = ""


KINDS: dict[str, str] = {}  # name of an op, with its overload -> class


def add_op(op: torch._ops.OpOverloadPacket, facts: OpFacts) -> None:
    """In each process that plans or builds: where the op is defined, so that both have it."""
    for lowering in facts.lowerings:
        if lowering.emit is None or lowering.name in LOWERINGS:
            raise ValueError(f"{lowering.name}: a lowering has a program, and a name of its own")
    RULES[op] = facts.rule
    for lowering in facts.lowerings:
        add_lowering(lowering)
    if facts.flops is not None:
        register_flop_formula(op)(facts.flops)
    if facts.kind:
        KINDS.update({str(getattr(op, name)): facts.kind for name in op.overloads()})
