"""Programs of an op's parts that are not the op itself on local tensors: what is known of each, in one record.

A strategy names its program (Strategy.lowering). From the record the planner prices what it reduces over ranks
(planner/sharding/mesh.py), a build proves that it does so and no more (passes/verify.py), and both know which programs
may run at once on several axes. What it emits stands beside it for ops of our own (passes/lowerings.py), and in the
record for those that are added with all their facts in one place (facts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from .strategy import Strategy


@dataclass(frozen=True)
class AllReduce:
    """One inside a program. Its values have the type of a result, or of an operand: a single one, or one for each row.

    dim_at: which argument of the op says along what rows lie; None: the result has a value for each. is_needed: of the
    op and of those of its results that are read."""

    result: int = 0
    operand: int | None = None
    per_row: bool = False
    dim_at: int | None = None
    is_needed: Callable[[fx.Node, Collection[int]], bool] = lambda node, read: True


@dataclass(frozen=True)
class Lowering:
    """joins: programs of another axis that become one with it. sums_over_shared: may axes that share dimensions run it
    at once? cuts_again: beginning of the names of programs that cut its parts once more along an axis within.
    work: of a rank with most to do, over an equal share, on so many ranks. emit: (emitter, node, arguments with local
    tensors, axis) -> result or results; None: passes/lowerings.py has it."""

    name: str
    all_reduces: tuple[AllReduce, ...] = ()
    joins: frozenset[str] = frozenset()
    sums_over_shared: bool = False
    cuts_again: str = ""
    work: Callable[[int], float] | None = None
    emit: Callable[..., Any] | None = None

    @property
    def of_rows(self) -> bool:
        """Do its all-reduces carry a value for each row?"""
        return any(one.per_row for one in self.all_reduces)


LOWERINGS: dict[str, Lowering] = {}


def add_lowering(lowering: Lowering) -> None:
    LOWERINGS[lowering.name] = lowering


def may_run_at_once(first: Strategy, second: Strategy, shared: bool) -> bool:
    """On two axes; shared: these may share dimensions. At most one replaces the op's program, unless the two are made
    for each other."""
    if not first.lowering or not second.lowering or cuts_again(first, second):
        return True
    record = LOWERINGS[first.lowering]
    again = shared and record.sums_over_shared and second.lowering == first.lowering
    return again or second.lowering in record.joins


def cuts_again(first: Strategy, second: Strategy) -> bool:
    """Does the second axis cut what the first has divided by a program of its own?"""
    inner = LOWERINGS[first.lowering].cuts_again if first.lowering else ""
    return bool(inner) and second.lowering.startswith(inner)


_LOSS = (
    AllReduce(0, is_needed=lambda node, read: 0 in read),
    AllReduce(1, is_needed=lambda node, read: 1 in read or (0 in read and bool(node.args[3] == 1))),  # 1: the mean
)
_ROW, _ROW_BACK = AllReduce(per_row=True, dim_at=1), AllReduce(operand=0, per_row=True, dim_at=2)
_BOTH_WAYS = ("", "_backward")

for one in (
    Lowering("embedding_rows"),
    Lowering("embedding_rows_backward"),
    Lowering("nll_rows", _LOSS, joins=frozenset({"nll_cols"}), sums_over_shared=True),
    Lowering("nll_cols", _LOSS, joins=frozenset({"nll_rows"})),
    Lowering("nll_cols_backward"),
    *(Lowering(f"{name}_cols", (_ROW, _ROW)) for name in ("softmax", "log_softmax")),  # maximum and sum
    *(Lowering(f"{name}_cols_backward", (_ROW_BACK,)) for name in ("softmax", "log_softmax")),
    Lowering("linear_cross_entropy_cols", (AllReduce(1, per_row=True),) * 3),  # maximum, sum, the target's logit
    Lowering("linear_cross_entropy_cols_backward"),
    Lowering("own_experts"),
    # gate and up are computed again there, two of six products
    Lowering("own_experts_backward", work=lambda ranks: 4 / 3),
    # of n ranks the last has 2 n - 1 of the n^2 parts of a triangle
    *(Lowering(f"attention_rows{way}", work=lambda ranks: 2.0 - 1.0 / ranks) for way in _BOTH_WAYS),
    *(Lowering(f"attention_{form}{way}") for form in ("near_rows", "ring", "zigzag") for way in _BOTH_WAYS),
    *(Lowering(f"dispatch_experts{way}", cuts_again="own_experts") for way in _BOTH_WAYS),
):
    add_lowering(one)
