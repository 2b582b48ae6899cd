"""What a published row's step is made of: how it grows with each figure of its stack.

Placements are solved once for a row; its step with other figures is that of the same placements, priced anew by the
planner's own evaluation. That takes a tenth of another search. Memory is without limit here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from published_path import ENOUGH_MEMORY, PlannerPath
from published_rows import Row

from shardwright.costmodel.model import CostModel
from shardwright.costmodel.stacks import Stack, kernels, stack_named
from shardwright.errors import ShardwrightError
from shardwright.planner.interfaces import ShardingSolution
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.sharding.training import Job
from shardwright.plans.axes import MeshShape

# How far each figure is moved for a slope.
MOVES = {"product_factor": 0.1, "attention_factor": 0.2, "memory_factor": 0.2, "op_s": 4e-6, "tensor_factor": 0.3,
         "state_contention": 0.2, "unhidden_fraction": 0.3}  # fmt: skip
DISPATCHES = (1e-5, 2e-5, 4e-5, 8e-5)  # a step is no sum of these: it is predicted at each, and in between is a line


@dataclass(frozen=True)
class Parts:
    """A row's predicted step at some figures of its stack, how it grows with each of them, and what is added where the
    host takes each of DISPATCHES to start an op."""

    source: str
    number: int
    group: str
    stack: str
    measured_s: float
    base_s: float
    slopes: dict[str, float]
    figures: dict[str, float]
    waiting_s: Sequence[float] = (0.0,) * len(DISPATCHES)

    @property
    def is_hopper(self) -> bool:
        """By the end of the group's name."""
        return "xH100" in self.group or "xH200" in self.group

    def rest_s(self, dispatch_s: float) -> float:
        """Where all other figures are 0: factors too."""
        waiting_s = float(np.interp(dispatch_s, (0.0, *DISPATCHES), (0.0, *self.waiting_s)))
        return self.base_s + waiting_s - sum(self.slopes[name] * self.figures[name] for name in self.slopes)


class RepricedSharder(Sharder):
    """Keeps the placements that it solved first, and prices them with the cost model of the day."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._solved_as: dict[tuple[Any, float], Any] = {}
        self._first: dict[Any, ShardingSolution] = {}
        self._priced: dict[Any, ShardingSolution] = {}

    def reprice(self, cost_model: CostModel) -> None:
        self.cost_model, self._priced = cost_model, {}

    def _figures(self, key: Any, solved: Any, started: float) -> ShardingSolution:
        found = super()._figures(key, solved, started)
        self._solved_as[key, found.objective_s] = solved
        return found

    def solve(self, mesh: MeshShape, local_batch: int) -> ShardingSolution:
        key = (mesh.of_stage, local_batch)
        if key not in self._first:
            self._first[key] = self._priced[key] = super().solve(mesh, local_batch)
        if key not in self._priced:
            solved = self._solved_as[key, self._first[key].objective_s]
            solved.mesh.dispatch_s = self.cost_model.stack.figures.dispatch_s
            solved.mesh._transfers.clear()
            self._priced[key] = super()._figures(key, solved, 0.0)
        return self._priced[key]


class PartsPath(PlannerPath):
    """Of rows of one model after another."""

    def sharder(self, row: Row, job: Job, cost_model: CostModel) -> Sharder:
        graph = self.ready(row).graph
        key = id(graph), row.where, job
        if key not in self._sharders:
            self._sharders[key] = RepricedSharder(graph, cost_model, job=job)
        sharder = self._sharders[key]
        assert isinstance(sharder, RepricedSharder)
        sharder.reprice(cost_model)
        return sharder

    def step_s(self, row: Row, stack: Stack) -> float:
        """Raises ShardwrightError where the planner refuses the row."""
        return self.search(row, stack, ENOUGH_MEMORY).predicted.step_s

    def parts(self, row: Row) -> Parts | None:
        """None where the planner refuses the row."""
        stack = stack_named(row.stack)
        assert row.measured_s is not None
        try:
            base = self.step_s(row, stack)
            slopes = {name: self._slope(row, stack, name, base) for name in MOVES}
            waiting = [self.step_s(row, stack.with_figures(dispatch_s=value)) - base for value in DISPATCHES]
        except ShardwrightError:
            return None
        figures = {name: value for name, value in asdict(stack.figures).items() if name in MOVES}
        kernel = row.stack.partition("+")[2]
        if kernel:  # its factor stays beside the one that is fitted
            figures["attention_factor"] /= kernels()[kernel]
            slopes["attention_factor"] *= kernels()[kernel]
        return Parts(row.source, row.number, row.group, row.stack, row.measured_s, base, slopes, figures, waiting)

    def _slope(self, row: Row, stack: Stack, name: str, base_s: float) -> float:
        if name == "tensor_factor" and row.force["tp"] == "1":
            return 0.0
        if name in ("state_contention", "unhidden_fraction") and row.force["dp"] == "1":
            return 0.0
        moved = stack.with_figures(**{name: getattr(stack.figures, name) + MOVES[name]})
        return (self.step_s(row, moved) - base_s) / MOVES[name]


def parts_of_rows(path: PartsPath, rows: list[Row]) -> list[Parts]:
    return [found for found in map(path.parts, rows) if found is not None]
