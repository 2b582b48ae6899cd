"""One candidate under each of its placements: the least simulated step that fits, and what is proven of all.

Placements (memory/options.py) are looked at fastest first, each with as little recomputation as lets it fit
(stage_recompute.py), until the bound of those left is above the best. Cuts that fit without recomputation though they
are uneven may be faster than even ones with some, so of a rank with several stages both are priced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import ExitCode, ShardwrightError
from ..memory.least_work import least_work_s
from ..memory.limits import fits, worst_host_need
from ..memory.options import Ladder
from ..memory.rank_bytes import mean_bytes, placements_of, quick_peaks, state_share
from ..memory.too_large import is_too_large
from ..space.candidates import Candidate
from ..stages.chain import Between, Chain, Recompute
from .outcome import Outcome
from .stage_recompute import (
    LadderCuts,
    least_recomputation,
    lowest_rungs,
    nothing_fits,
    rungs_of,
    standing_loads,
    standing_on,
)
from .state import MemoryPool, SearchState
from .step_time import (
    busiest_path_s,
    estimate,
    find_cuts,
    level_ranks,
    levelled_estimate,
    lower_bound,
    order_bound,
    stage_loads,
    step_seconds,
)

LEAST_GAIN = 1.01  # of a step over its bound for which other placements are asked for


@dataclass(frozen=True)
class _Fit:
    """Cuts that fit. bottleneck_s: no cuts that fit go below, 0 where that is not known. free: memory binds nothing."""

    bounds: tuple[int, ...]
    recompute: Recompute
    bottleneck_s: float = 0.0
    free: bool = False


def score(state: SearchState, candidate: Candidate, ladders: Sequence[Ladder]) -> Outcome:
    """Fastest placements, recomputation and cuts, with their simulated step. Looks no further where that cannot win.

    bound_s of the outcome: infinite where it is proven that nothing fits.
    """
    return _Scoring(state, candidate, ladders).run()


def score_alone(state: SearchState, candidate: Candidate) -> Outcome:
    """A candidate of its own, outside its group."""
    solution = state.solve(candidate)
    if solution is None:
        return state.outcomes[candidate]
    return score_in_pool(state, candidate, state.pool(candidate, solution))


def score_in_pool(state: SearchState, candidate: Candidate, pool: MemoryPool) -> Outcome:
    """Placements that keep less are asked for where the fastest cannot have their best cuts."""
    outcome = _score_pool(state, candidate, pool)
    return _score_leanest(state, candidate, pool) if outcome.fits is False else outcome


def _score_pool(state: SearchState, candidate: Candidate, pool: MemoryPool) -> Outcome:
    outcome = score(state, candidate, pool.ladders)
    if not outcome.tight or pool.widened:
        return outcome
    fastest = rungs_of(state.setting, pool.ladders[0])[0]
    worth_s = LEAST_GAIN * lower_bound(state.setting, candidate, fastest)
    if (outcome.step_s is None or outcome.step_s > worth_s) and state.may_win(worth_s) and state.widen(pool):
        return score(state, candidate, pool.ladders)
    return outcome


def _score_leanest(state: SearchState, candidate: Candidate, pool: MemoryPool) -> Outcome:
    """Before a candidate is said not to fit: placements of least bytes in its own proportion of state."""
    if candidate.mesh.inner_part.num_devices > 1 and pool.widened:
        own, share = pool.solved_for, state_share(state.setting, candidate)
        found = state.sharder.leanest(own.mesh.of_stage, own.local_batch, state_share=share)
        solutions = [ladder.solution for ladder in pool.ladders]
        if found is not None and not any(solution is found for solution in solutions):
            ladders = state.ladders([*solutions, found])
            if any(ladder.solution is found for ladder in ladders):
                pool.ladders = ladders
                return score(state, candidate, ladders)
    return state.outcomes[candidate]


def mean_fits(state: SearchState, candidate: Candidate, ladder: Ladder, in_flight: int | None = None) -> bool:
    """May the mean rank fit without recomputation? in_flight: in place of what the candidate's schedule holds at
    once."""
    chain = rungs_of(state.setting, ladder)[0]
    return mean_bytes(state.setting, candidate, chain, in_flight) <= state.setting.most(candidate)


def least_of_each(
    state: SearchState, candidate: Candidate, ladders: Sequence[Ladder], in_flight: int | None = None
) -> list[tuple[Ladder, Chain | Between]]:
    """Of each placements under which the mean rank may fit, with the least recomputation that this asks for."""
    found = [(ladder, least_recomputation(state.setting, candidate, ladder, in_flight)) for ladder in ladders]
    return [(ladder, least) for ladder, least in found if least is not None]


class _Scoring:
    def __init__(self, state: SearchState, candidate: Candidate, ladders: Sequence[Ladder]) -> None:
        self.state, self.setting, self.candidate, self.ladders = state, state.setting, candidate, ladders
        self.outcome = state.outcomes[candidate]
        self.best: Outcome | None = None
        self.search_bound_s = self.bound_s = math.inf
        self.fits = self.too_slow = self.tight = self.is_narrowed = False

    def run(self) -> Outcome:
        for ladder in self.ladders:
            self._price(ladder)
        outcome = self._with_bounds(self.best or self.outcome)
        if self.best is None:
            if not self.fits and not self.too_slow:
                outcome = self._described_misfit(outcome)
            self.outcome = outcome
        self.state.record(self.outcome)
        return outcome

    def _with_bounds(self, outcome: Outcome) -> Outcome:
        search_bound_s = outcome.search_bound_s
        if self.search_bound_s < math.inf:
            search_bound_s = max(search_bound_s, self.search_bound_s)
        return replace(
            outcome,
            tight=self.tight,
            too_slow=self.too_slow,
            bound_s=max(self.outcome.bound_s, self.bound_s),
            search_bound_s=search_bound_s,
        )

    def _price(self, ladder: Ladder) -> None:
        state, setting, candidate = self.state, self.setting, self.candidate
        least = least_recomputation(setting, candidate, ladder)
        if least is None or isinstance(least, Between):
            self.tight = True
        if least is None:
            return
        least_s = lower_bound(setting, candidate, least)
        if self.best is not None and least_s >= (self.best.step_s or 0.0):
            self._bound(ladder, least_s)
            return
        rungs = rungs_of(setting, ladder.every_step)
        work_s = busiest_path_s(setting, candidate, rungs[0], least_work_s(setting, candidate, rungs))
        least_s = max(least_s, work_s)
        if not state.may_win(max(estimate(setting, candidate, least, work_s), least_s)):
            self.too_slow = True
            self._bound(ladder, least_s)
            return
        found, is_proven = self._cuts(ladder)
        self.tight = self.tight or not any(fit.free for fit in found)
        if found or not is_proven:
            self._bound(ladder, max(least_s, min((fit.bottleneck_s for fit in found), default=0.0)))
        self.fits = self.fits or bool(found)
        for fit in found:
            self._simulate(ladder, fit)

    def _worth_s(self) -> float:
        """Only a step below may be of use."""
        best, state = self.best, self.state
        least = [math.inf if best is None else best.step_s or 0.0]
        if state.incumbent is not None:
            least.append((state.incumbent.step_s or 0.0) * state.tolerance)
        return min(least)

    def _bound(self, ladder: Ladder, seconds: float) -> None:
        self.search_bound_s = min(self.search_bound_s, seconds)
        self.bound_s = min(self.bound_s, seconds * ladder.solution.proven_share)

    def _simulate(self, ladder: Ladder, fit: _Fit) -> None:
        setting, candidate = self.setting, self.candidate
        bounds, chain = fit.bounds, setting.chain(ladder.solution, fit.recompute)
        if self.state.forced.cuts is None and self._may_be_levelled(chain, bounds):
            bounds = level_ranks(setting, candidate, chain, bounds)
        peak_bytes = int(quick_peaks(setting, candidate, chain, bounds).max())
        at_least_s = order_bound(setting, candidate, chain, bounds)
        if not self.state.may_win(at_least_s):
            if self.best is None:
                at_least_s = max(self.outcome.search_bound_s, at_least_s)
                self.outcome = replace(self.outcome, fits=True, peak_bytes=peak_bytes, search_bound_s=at_least_s)
            return
        if self.best is not None and at_least_s >= (self.best.step_s or 0.0):
            return
        step_s = step_seconds(setting, candidate, chain, bounds)
        if self.best is None or step_s < (self.best.step_s or 0.0):
            self.best = Outcome(
                candidate,
                search_bound_s=self.outcome.search_bound_s,
                step_s=step_s,
                bounds=bounds,
                recompute=fit.recompute,
                solution=ladder.solution,
                peak_bytes=peak_bytes,
                fits=True,
                recompute_all=ladder.is_all(fit.recompute),
            )

    def _may_be_levelled(self, chain: Chain, bounds: tuple[int, ...]) -> bool:
        """May it be of use to move the cuts?"""
        load = stage_loads(self.setting, self.candidate, chain, bounds)
        return levelled_estimate(self.setting, self.candidate, load) < self._worth_s()

    def _cuts(self, ladder: Ladder) -> tuple[list[_Fit], bool]:
        """Cuts that fit, the most promising first; of one stage on a rank the best alone. And, where there are none, is
        it proven that none fit?"""
        setting, candidate = self.setting, self.candidate
        first = rungs_of(setting, ladder)[0]
        if self.state.forced.cuts is not None or candidate.num_stages == 1:
            bounds = (0, *self._forced_positions(), first.num_instances)
            found = self._under([bounds], ladder)
            return found, not self.is_narrowed
        if nothing_fits(setting, candidate, ladder):
            return [], True
        free = find_cuts(setting, candidate, first, ignore_memory=True)
        if free is None:
            return [], True
        bounded = candidate.schedule in ("gpipe", "1f1b")
        if fits(setting, candidate, first, free.bounds):
            return [_Fit(free.bounds, ladder.rungs[0], free.bottleneck if bounded else 0.0, free=True)], True
        if candidate.num_stages == candidate.pp and len(placements_of(candidate)) == 1:
            search = LadderCuts(setting, candidate, ladder, self._worth_s())
            cuts = search.find()
            self.too_slow = self.too_slow or (cuts is None and search.is_narrowed)
            found = self._under([cuts.bounds] if cuts is not None else [], ladder)
            if cuts is not None and bounded and not ladder.is_free:  # positions may do with less than the rungs
                found = [replace(fit, bottleneck_s=cuts.bottleneck) for fit in found]
            return found, cuts is None and not search.is_narrowed
        cuts = None if is_too_large(setting, candidate, first) else find_cuts(setting, candidate, first)
        found = self._under([free.bounds, *([cuts.bounds] if cuts is not None else [])], ladder)
        if not found:
            cuts = find_cuts(setting, candidate, setting.chain(ladder.solution, ladder.rungs[-1]))
            found = self._under([cuts.bounds] if cuts is not None else [], ladder)
        return found, False

    def _under(self, cuts: Sequence[tuple[int, ...]], ladder: Ladder) -> list[_Fit]:
        """Those that fit and may be of use, with as little recomputation as they need."""
        setting, candidate, found = self.setting, self.candidate, []
        for bounds in dict.fromkeys(cuts):
            heights = lowest_rungs(setting, candidate, ladder, bounds)
            if heights is None:
                continue
            load = standing_loads(setting, candidate, ladder, bounds, heights)
            if levelled_estimate(setting, candidate, load) >= self._worth_s():
                self.too_slow = self.is_narrowed = True
                continue
            recompute = standing_on(setting, candidate, ladder, bounds, heights)
            found.append(_Fit(bounds, recompute, free=recompute == ladder.rungs[0]))
        return found

    def _forced_positions(self) -> list[int]:
        body = self.setting.shape.instances
        place = {index: position for position, index in enumerate(body)}
        cuts = self.state.forced.cuts or ()
        missing = [cut for cut in cuts if place.get(cut, 0) == 0]
        if missing:
            raise ShardwrightError(
                f"--force cuts: no stage can begin at segment instance {missing[0]}",
                means=f"stages begin at one of the instances {body[1]} to {body[-1]}",
                change="--force cuts",
                works=f"--force cuts={body[len(body) // 2]}",
                exit_code=ExitCode.CONTRADICTION,
            )
        return [place[cut] for cut in cuts]

    def _described_misfit(self, outcome: Outcome) -> Outcome:
        """With the missing bytes, the peak of the worst rank, and which that is, with most recomputation and even
        cuts."""
        setting, candidate = self.setting, self.candidate
        leanest, recompute = min(
            ((ladder, rung) for ladder in self.ladders for rung in ladder.rungs),
            key=lambda one: mean_bytes(setting, candidate, setting.chain(one[0].solution, one[1])),
        )
        found = replace(outcome, fits=False, recompute=recompute, recompute_all=leanest.is_all(recompute))
        chain = setting.chain(leanest.solution, recompute)
        cuts = find_cuts(setting, candidate, chain, ignore_memory=True)
        if cuts is not None:
            peaks = quick_peaks(setting, candidate, chain, cuts.bounds)
            lacking = peaks - setting.limits(candidate)
            worst = int(lacking.argmax())
            missing = max(int(lacking[worst]), 0)
            host = worst_host_need(setting, candidate, chain, cuts.bounds)
            if host.missing_bytes > missing:
                rank, needed, limit = host
                return replace(
                    found,
                    lacks_host=True,
                    missing_bytes=host.missing_bytes,
                    peak_bytes=needed,
                    worst_rank=rank,
                    limit_bytes=limit,
                )
            found = replace(
                found,
                missing_bytes=missing,
                peak_bytes=int(peaks[worst]),
                worst_rank=worst,
                solution=leanest.solution,
                bounds=cuts.bounds,
            )
        return replace(found, limit_bytes=setting.limit(candidate, found.worst_rank))
