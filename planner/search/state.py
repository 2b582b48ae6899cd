"""SearchState: one search under way. What was solved, what was found, and the best so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import ExitCode, ShardwrightError
from ...plans.axes import MeshShape, placement_axes
from ...profiler.watch import TimeUp
from ..interfaces import Sharder, ShardingSolution
from ..memory.options import Ladder, ladders
from ..space.candidates import Candidate
from ..space.choices import Choices
from ..stages.setting import Setting
from .outcome import Outcome

Progress = Callable[[str], None]

BETTER = 1 - 1e-6  # a new incumbent is better by more than this


@dataclass
class MemoryPool:
    """The placements of a group with their recomputation. solved_for: the candidate whose sharding they have. widened:
    the frontier was asked for."""

    solved_for: Candidate
    ladders: list[Ladder]
    widened: bool = False


@dataclass
class SearchState:
    """One search under way."""

    setting: Setting
    sharder: Sharder
    forced: Choices
    candidates: list[Candidate]
    deadline: float
    progress: Progress
    # by the mesh of one stage and the local batch
    solutions: dict[tuple[MeshShape, int], ShardingSolution | None] = field(default_factory=dict)
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)
    incumbent: Outcome | None = None
    solve_seconds: float = 0.0
    # of each position with the whole batch on one device; empty where not known
    whole_forward_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    whole_backward_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    refusal: ShardwrightError | None = None  # the latest of the sharder's
    any_order_s: dict[Candidate, float] = field(default_factory=dict)  # of each certificate.base_of
    tolerance: float = BETTER  # of the incumbent's step: what is slower than this share of it is not looked at
    first_only: bool = False  # the first plan that fits is enough
    started: float = 0.0

    def solve(self, candidate: Candidate) -> ShardingSolution | None:
        return self.solve_for(candidate.mesh.of_stage, candidate.local_batch)

    def solve_for(self, mesh: MeshShape, local_batch: int) -> ShardingSolution | None:
        """mesh: of one stage."""
        key = (mesh, local_batch)
        if key not in self.solutions:
            self.progress(f"sharding {mesh.text(placement_axes())}, {local_batch} sequences a rank")
            started = time.monotonic()
            try:
                self.solutions[key] = self.sharder.solve(mesh, local_batch)
            except ShardwrightError as error:
                if error.exit_code == ExitCode.TIME_LIMIT and time.monotonic() > self.deadline:
                    raise TimeUp from None
                self.solutions[key], self.refusal = None, error
            self.solve_seconds += time.monotonic() - started
        return self.solutions[key]

    def frontier(self, candidate: Candidate) -> list[ShardingSolution]:
        self.progress(f"frontier of {candidate.mesh.text(placement_axes())}, {candidate.local_batch} sequences a rank")
        started = time.monotonic()
        try:
            found = self.sharder.frontier(candidate.mesh.of_stage, candidate.local_batch)
        except ShardwrightError as error:
            if error.exit_code == ExitCode.TIME_LIMIT and time.monotonic() > self.deadline:
                raise TimeUp from None
            raise
        self.solve_seconds += time.monotonic() - started
        return found

    def is_own(self, solution: ShardingSolution, candidate: Candidate) -> bool:
        """Was this solved for the candidate's own mesh?"""
        own = self.solve(candidate)
        return own is solution or any(found is solution for found in self.frontier(candidate))

    def pool(self, candidate: Candidate, solution: ShardingSolution) -> MemoryPool:
        return MemoryPool(candidate, self.ladders([solution]))

    def ladders(self, solutions: Sequence[ShardingSolution]) -> list[Ladder]:
        return ladders(self.setting.shape, solutions, self.forced.recompute)

    def widen(self, pool: MemoryPool) -> bool:
        """Ask for placements that keep less; was that of any use?"""
        if pool.widened:
            return False
        pool.widened = True
        solutions = self.frontier(pool.solved_for)
        pool.ladders = self.ladders(solutions)
        return len(solutions) > 1

    def learn(self, candidate: Candidate, **found: Any) -> Outcome:
        """What is known of the candidate, with what was found besides: fields of Outcome."""
        outcome = replace(self.outcomes.get(candidate) or Outcome(candidate), **found)
        self.record(outcome)
        return outcome

    def record(self, outcome: Outcome) -> None:
        """In place of what was known of its candidate."""
        self.outcomes[outcome.candidate] = outcome

    def may_win(self, at_least_s: float) -> bool:
        return self.incumbent is None or at_least_s < (self.incumbent.step_s or 0.0) * self.tolerance

    def is_better(self, outcome: Outcome) -> bool:
        if outcome.step_s is None:
            return False
        return self.may_win(outcome.step_s)
