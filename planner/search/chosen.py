"""What the search settles on: the simplest of equal plans, its best order, and the time and memory of that.

The candidates are scored by then. Plans that the cost model cannot tell apart go by simplicity; published orders
compete for the mesh (published_schedules.py), then orders made for its own stages (synthesized_schedule.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...costmodel.memory import RankMoments
from ...costmodel.stage_times import StageTimes
from ...costmodel.timeline import Timeline
from ...schedules import PipelineSchedule
from ..interfaces import ShardingSolution
from ..memory.rank_bytes import rank_breakdown, rank_moments
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.setting import Setting
from .outcome import Outcome, is_preferable
from .published_schedules import compare_orders, lowered, polished
from .scoring import score_alone
from .state import SearchState
from .step_time import run_timeline, stage_times
from .synthesized_schedule import OwnOrder, own_order

ALIKE = 1.01  # of the step time: closer than the cost model can tell


@dataclass(frozen=True)
class Chosen:
    """The plan. outcome: with the step as it is now timed. memory_chain: what its memory is counted with. own: the
    order that was synthesized for it, if one was."""

    outcome: Outcome
    candidate: Candidate
    solution: ShardingSolution
    chain: Chain
    memory_chain: Chain
    stages: list[StageTimes]
    timeline: Timeline
    own: OwnOrder | None

    @property
    def order(self) -> PipelineSchedule | None:
        return None if self.own is None else self.own.schedule

    @property
    def bounds(self) -> tuple[int, ...]:
        return self.outcome.bounds

    @property
    def step_s(self) -> float:
        return self.timeline.makespan_s

    def moments(self, setting: Setting) -> list[RankMoments]:
        """Of each pipeline rank."""
        return [
            rank_moments(setting, self.candidate, self.memory_chain, self.bounds, rank)
            for rank in range(self.candidate.pp)
        ]

    def breakdowns(self, setting: Setting) -> list[dict[str, int]]:
        """Bytes of each pipeline rank at its worst moment, by kind."""
        held = [None] * self.candidate.pp if self.own is None else self.timeline.peak_bytes
        return [
            rank_breakdown(setting, self.candidate, self.memory_chain, self.bounds, rank, held[rank])
            for rank in range(self.candidate.pp)
        ]


def choose(state: SearchState, interrupted: str) -> Chosen:
    """The incumbent as it stands, where the search was cut short."""
    if not interrupted:
        state.progress("comparing orders and cuts for the best mesh")
        _compare(state)
    best = state.incumbent
    assert best is not None and best.solution is not None
    setting, candidate = state.setting, best.candidate
    chain = setting.chain(best.solution, best.recompute)
    timeline = run_timeline(setting, candidate, chain, best.bounds)
    own = None
    if not interrupted:
        if candidate.pp > 1 and state.forced.schedule is None:
            state.progress("looking for an order of the plan's own")
        own = own_order(state, best, timeline, ALIKE)
    if own is not None:
        return _synthesized(own)
    stages = stage_times(setting, candidate, chain, best.bounds)
    timed = replace(best, step_s=timeline.makespan_s)
    return Chosen(timed, candidate, best.solution, chain, chain, stages, timeline, None)


def _synthesized(own: OwnOrder) -> Chosen:
    assert own.base.solution is not None
    timed = replace(own.base, step_s=own.timeline.makespan_s, bounds=own.bounds, recompute=own.way.recompute)
    return Chosen(
        outcome=timed,
        candidate=own.candidate,
        solution=own.base.solution,
        chain=own.way.chain,
        memory_chain=own.way.memory_chain,
        stages=own.stages,
        timeline=own.timeline,
        own=own,
    )


def _compare(state: SearchState) -> None:
    """Leaves the best as the incumbent, which an interruption then finds."""
    state.tolerance = ALIKE
    state.incumbent = best = polished(state, _simplest(state))
    for compared in compare_orders(state, best, ALIKE):
        if compared.is_new:
            state.candidates.append(compared.outcome.candidate)
        state.record(compared.outcome)
        if compared.is_best:
            state.incumbent = compared.outcome
    assert state.incumbent is not None
    state.incumbent = lowered(state, state.incumbent)
    state.record(state.incumbent)


def _simplest(state: SearchState) -> Outcome:
    """Of the plans on the same mesh that are as fast as the incumbent, to ALIKE, the simplest to which no other plan is
    preferable in both step and memory."""
    best = state.incumbent
    assert best is not None and best.step_s is not None
    own = best.candidate
    simpler = [
        c for c in state.candidates if c.mesh == own.mesh and c.simplicity < own.simplicity and c in state.outcomes
    ]
    limit_s = best.step_s * ALIKE
    for candidate in sorted(simpler, key=lambda c: (c.simplicity, -c.microbatch)):
        outcome = state.outcomes[candidate]
        if outcome.step_s is None and outcome.fits is not False and outcome.bound_s <= limit_s:
            outcome = score_alone(state, candidate)
        fast = outcome.step_s is not None and outcome.step_s <= limit_s and outcome.solution is not None
        if fast and not any(is_preferable(other, outcome) for other in state.outcomes.values()):
            assert outcome.solution is not None
            if state.is_own(outcome.solution, candidate):
                return outcome
    return best
