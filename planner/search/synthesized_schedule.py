"""An order synthesized for the chosen plan's own stages, where their bound leaves enough to gain.

Cuts and order are improved in turn, on the placement that suits. Where activations may be let go of one by one, such
orders compete with those that keep them all or recompute some or all of a segment in its backward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...costmodel.activation_memory import peak_host_memory
from ...costmodel.memory import pinned_bytes
from ...costmodel.stage_times import StageTimes
from ...costmodel.timeline import Timeline
from ...schedules import PipelineSchedule
from ...schedules.bounds import lower_bound
from ...schedules.problem import PipelineProblem
from ...schedules.published.library import SCHEDULES
from ...schedules.schedule import SYNTHESIZED
from ...schedules.synthesis.synthesize import synthesize
from ..interfaces import ShardingSolution
from ..memory.limits import host_need
from ..memory.options import Offers, again_seconds, ladders, offering
from ..memory.rank_bytes import activation_room, placement_of, placements_of
from ..space.candidates import Candidate
from ..stages.chain import Chain, Recompute, whole_segments
from ..stages.cuts import improve_cuts
from ..stages.setting import Setting
from .outcome import Outcome
from .state import SearchState
from .step_time import hops, run_timeline, stage_times

MAX_SECONDS = 3.0
MAX_CHUNKS = 2  # of plans besides the best one
FIRST_SHARE = 0.5  # of the time, for the winner's own way to save memory
FIRST_CUTS_SHARE = 0.2  # of the time of a search
LEAST_SECONDS = 0.5  # for an order that is asked for, whatever the time limit
PROVEN = 1e-9  # gap of an order that is not looked for again
SHARES = (0.5, 0.7, 1.0)  # of the time left, of one order after the other
MAX_ACTIONS = 12_000  # of an order that is synthesized without being asked for


@dataclass(frozen=True)
class Way:
    """How memory is saved. chain: what the order is timed with. memory_chain: what its memory is counted with, as a
    forward whose activations go needs the workspace of recomputation. recompute: of each
    segment, what its backward makes again."""

    chain: Chain
    memory_chain: Chain
    recompute: Recompute
    offers: Offers


@dataclass(frozen=True)
class OwnOrder:
    """base: the plan that it was made for. candidate: with a schedule of the order's placement. timeline: with the
    bytes held."""

    base: Outcome
    candidate: Candidate
    schedule: PipelineSchedule
    timeline: Timeline
    bounds: tuple[int, ...]
    way: Way
    stages: list[StageTimes]


def own_order(state: SearchState, best: Outcome, published: Timeline, least_gain: float) -> OwnOrder | None:
    """None where no order is faster than the published one by the factor least_gain, or, where one is asked for, where
    there is none."""
    asked = state.forced.synthesize
    if best.candidate.pp == 1 or best.solution is None or (state.forced.schedule is not None and not asked):
        return None
    after_s = published.makespan_s - published.compute_makespan_s
    limit_s = published.makespan_s / least_gain
    stop_at = min(time.monotonic() + MAX_SECONDS, state.deadline)
    searches = [_Search(state, base, way) for base in _bases(state, best) for way in _ways(state, base)]
    searches = [search for search in searches if asked or search.num_actions <= MAX_ACTIONS]
    found: OwnOrder | None = None
    for index, search in enumerate(searches):
        now = time.monotonic()
        share = max(1 / (len(searches) - index), 0.0 if index else FIRST_SHARE)
        until = now + share * (stop_at - now)
        other = search.run(limit_s - after_s, until, at_least=asked and found is None)
        if other is not None and (found is None or other.timeline.makespan_s < found.timeline.makespan_s):
            found = other
            limit_s = min(limit_s, found.timeline.makespan_s / least_gain)
    if found is None or (not asked and found.timeline.makespan_s * least_gain > published.makespan_s):
        return None
    return found


def _bases(state: SearchState, best: Outcome) -> Iterator[Outcome]:
    """The best plan, and on its mesh the fastest of one direction for each other number of chunks up to MAX_CHUNKS."""
    own, seen = best.candidate, set()
    alike = [
        outcome
        for outcome in state.outcomes.values()
        if outcome.step_s is not None
        and outcome.solution is not None
        and outcome.candidate.virtual_stages <= MAX_CHUNKS
        and replace(outcome.candidate, schedule=own.schedule, virtual_stages=own.virtual_stages) == own
    ]
    for outcome in (best, *sorted(alike, key=lambda outcome: outcome.step_s or 0.0)):
        chunks = outcome.candidate.virtual_stages
        if len(placements_of(outcome.candidate)) == 1 and chunks not in seen:
            seen.add(chunks)
            yield outcome


def _ways(state: SearchState, best: Outcome) -> Iterator[Way]:
    setting, forced, solution = state.setting, state.forced, best.solution
    assert solution is not None
    chain = setting.chain(solution, best.recompute)
    yield Way(chain, chain, best.recompute, Offers())
    again = forced.recompute == "auto"
    for offers in dict.fromkeys((Offers(again, forced.offload), Offers(again))):
        if offers == Offers():
            continue
        own = best.recompute if offers.offload or not best.recompute else None
        for recompute in _lesser(setting, solution, best.recompute, forced.recompute, own):
            keeping = setting.chain(solution, recompute)
            whole = whole_segments(setting.shape, solution)
            counted = setting.chain(solution, whole) if offers.recompute else keeping
            yield Way(keeping, counted, recompute, offers)


def _lesser(
    setting: Setting, solution: ShardingSolution, best: Recompute, forced: str, own: Recompute | None
) -> Iterator[Recompute]:
    """What recomputes less than the best plan does, and, where it is given, what that does itself."""
    (ladder,) = ladders(setting.shape, [solution], forced)
    most_s = again_seconds(setting.shape, solution, best)
    for rung in ladder.rungs:
        if again_seconds(setting.shape, solution, rung) < most_s * (1 - 1e-9):
            yield rung
    if own is not None:
        yield own


class _Search:
    """Orders for one way to save memory."""

    def __init__(self, state: SearchState, base: Outcome, way: Way) -> None:
        self.state, self.setting, self.base, self.way = state, state.setting, base, way
        self.placed = list(_placements(base.candidate))

    @property
    def num_actions(self) -> int:
        return 3 * self.base.candidate.num_stages * self.base.candidate.count

    def _problems(self, bounds: tuple[int, ...]) -> list[PipelineProblem]:
        return [_problem(self.setting, candidate, self.way, bounds) for candidate in self.placed]

    def _first_cuts(self, stop_at: float) -> tuple[int, ...]:
        """Single cuts moved while the least time of any order falls, where they were made for other memory."""
        bounds = self.base.bounds
        if self.state.forced.cuts is not None or self.way.offers == Offers():
            return bounds

        def bound_s(trial: tuple[int, ...]) -> float:
            if trial != bounds and time.monotonic() > stop_at:
                return float("inf")
            return min(map(lower_bound, self._problems(trial)))

        return improve_cuts(bounds, bound_s)

    def run(self, limit_s: float, stop_at: float, *, at_least: bool) -> OwnOrder | None:
        """None also where no order takes less than limit_s. at_least: LEAST_SECONDS, whatever stop_at and limit_s."""
        now = time.monotonic()
        bounds = self._first_cuts(now + FIRST_CUTS_SHARE * (stop_at - now))
        problems = self._problems(bounds)
        if min(map(lower_bound, problems)) > limit_s and not at_least:
            return None
        found: OwnOrder | None = None
        for turn, share in enumerate(SHARES):
            left_s = share * (stop_at - time.monotonic())
            if at_least and found is None:
                left_s = max(left_s, LEAST_SECONDS)
            synthesis = synthesize(problems, time_limit_s=left_s, seed=turn) if left_s > 0 else None
            if synthesis is None:
                break
            schedule, before = replace(synthesis.schedule, name=SYNTHESIZED), bounds
            candidate = next(one for one in self.placed if placement_of(one) == schedule.stage_rank)
            bounds = self._cuts_under(candidate, bounds, schedule, stop_at)
            stages = _stages(self.setting, candidate, self.way, bounds)
            timeline = self._timeline(candidate, bounds, schedule, stages)
            if not self._host_holds(candidate, bounds, schedule, stages):
                continue
            if found is None or timeline.makespan_s < found.timeline.makespan_s:
                found = OwnOrder(self.base, candidate, schedule, timeline, bounds, self.way, stages)
            elif bounds != before:
                break
            if bounds != before:
                problems = [_problem(self.setting, candidate, self.way, bounds)]
            elif synthesis.gap_fraction <= PROVEN:
                break
        return found

    def _host_holds(
        self, candidate: Candidate, bounds: tuple[int, ...], schedule: PipelineSchedule, stages: list[StageTimes]
    ) -> bool:
        """What is offloaded at once, beside the optimizer's state there; a host whose memory is not known holds
        anything."""
        for rank, away in enumerate(peak_host_memory(schedule.ranks, stages)):
            need = host_need(self.setting, candidate, self.way.chain, bounds, rank)
            if away and need.limit_bytes and need.needed_bytes + pinned_bytes(away) > need.limit_bytes:
                return False
        return True

    def _timeline(
        self, candidate: Candidate, bounds: tuple[int, ...], schedule: PipelineSchedule, stages: list[StageTimes]
    ) -> Timeline:
        return run_timeline(
            self.setting, candidate, self.way.chain, bounds, schedule=schedule, stages=stages, with_memory=True
        )

    def _cuts_under(
        self, candidate: Candidate, bounds: tuple[int, ...], schedule: PipelineSchedule, stop_at: float
    ) -> tuple[int, ...]:
        """Single cuts moved while the step under this order falls, within what its activations leave room for."""
        if self.state.forced.cuts is not None:
            return bounds

        def seconds(trial: tuple[int, ...]) -> float:
            if trial != bounds and time.monotonic() > stop_at:
                return float("inf")
            stages = _stages(self.setting, candidate, self.way, trial)
            timeline = self._timeline(candidate, trial, schedule, stages)
            rooms = _rooms(self.setting, candidate, self.way, trial)
            fit = all(peak <= room for peak, room in zip(timeline.peak_bytes, rooms, strict=True))
            return timeline.makespan_s if fit else float("inf")

        return improve_cuts(bounds, seconds)


def _placements(candidate: Candidate) -> Iterator[Candidate]:
    """Its own, then the others that its number of chunks allows: the loop and the V."""
    chunks, seen = candidate.virtual_stages, set()
    names = [name for name in ("interleaved_1f1b", "zb_v", "hanayo") if chunks > 1 and chunks in SCHEDULES[name].chunks]
    for one in (candidate, *(replace(candidate, schedule=name) for name in names)):
        if placement_of(one) not in seen:
            seen.add(placement_of(one))
            yield one


def _stages(setting: Setting, candidate: Candidate, way: Way, bounds: tuple[int, ...]) -> list[StageTimes]:
    stages = stage_times(setting, candidate, way.chain, bounds)
    devices, place = setting.mesh(candidate).devices, placement_of(candidate)

    def host_seconds(num_bytes: float, stage: int) -> float:
        return setting.cost_model.transfer_host_seconds(num_bytes, devices[place[stage]])

    return offering(way.offers, stages, way.chain, bounds, host_seconds)


def _rooms(setting: Setting, candidate: Candidate, way: Way, bounds: tuple[int, ...]) -> list[float]:
    """Bytes of activations that each pipeline rank can hold."""
    return [activation_room(setting, candidate, way.memory_chain, bounds, rank) for rank in range(candidate.pp)]


def _problem(setting: Setting, candidate: Candidate, way: Way, bounds: tuple[int, ...]) -> PipelineProblem:
    rooms = _rooms(setting, candidate, way, bounds)
    stages, transfers = _stages(setting, candidate, way, bounds), hops(setting, candidate, way.chain, bounds)
    return PipelineProblem(candidate.count, placement_of(candidate), tuple(stages), tuple(transfers), tuple(rooms))
