"""The variables of a sharding problem: what each stands for, and what the caller fixes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from ...ops.placement import Places, to_text
from ...ops.strategy import Strategy
from ...profiler.graph import Segment
from ...profiler.slots import INPUT, INPUT_GRAD, OUTPUT, PARAM, TANGENT, slot_name
from .mesh import Sizes
from .pins import Demand, Resolved
from .solve.pbqp import Elimination, Problem, prepare

Strategies = tuple[Strategy, ...]  # of one op, one per axis
OWN, COPY = "own", "copy"
SAVED, STATE, SUMS = range(3)  # columns of the weights


@dataclass
class Build:
    """The problem and what its variables mean."""

    problem: Problem = field(default_factory=Problem)
    op_vars: dict[tuple[str, str], int] = field(default_factory=dict)  # (segment, node) -> variable
    op_options: dict[int, list[Strategies]] = field(default_factory=dict)
    place_options: dict[int, list[Places]] = field(default_factory=dict)  # param, value, gradient and copy variables
    slot_vars: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (segment, in|out|gin|tan|param, slot)
    copy_vars: dict[tuple[str, str, int, str], int] = field(default_factory=dict)  # (segment, node, output, phase)
    kept_vars: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (segment, node, output)
    kept_options: dict[int, list[tuple[str, Places]]] = field(default_factory=dict)
    unknown: list[tuple[str, fx.Node]] = field(default_factory=list)

    @functools.cached_property
    def prepared(self) -> Elimination:
        return prepare(self.problem)


@dataclass(frozen=True)
class Demands:
    """What the caller fixes. inputs: places of the model's inputs by name; other values that must lie so.

    params: name of a parameter -> its places, None on the axes that are free, taken where the sizes allow it. pins: the
    same, of parameters and of ops' first results, which must hold.
    """

    inputs: Callable[[str, Sizes], Places]
    params: Mapping[str, Demand] = field(default_factory=dict)
    pins: Resolved = field(default_factory=Resolved)


def place_variable(made: Build, options: list[Places], label: Any) -> int:
    index = made.problem.add_variable(np.zeros(len(options)), label)
    made.place_options[index] = options
    return index


def slot_key(segment: Segment, kind: str, slot: int) -> str:
    """Where a slot variable stands in AxisSolution.places."""
    if kind == "tan":
        return slot_name(TANGENT, segment.signature.tangents.index(slot))
    return slot_name({"in": INPUT, "out": OUTPUT, "gin": INPUT_GRAD, "param": PARAM}[kind], slot)


def add_weight(made: Build, variable: int, column: int, values: Sequence[float]) -> None:
    if any(values):
        weights = np.zeros((len(values), 3))
        weights[:, column] = values
        made.problem.add_weight(variable, weights)


def texts_of(options: list[Places]) -> str:
    return "; ".join(dict.fromkeys(", ".join(map(to_text, places)) for places in options))


def meets(places: Places, demand: Sequence[int | None]) -> bool:
    return all(wanted is None or place == wanted for place, wanted in zip(places, demand, strict=True))
