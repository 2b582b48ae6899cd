"""One candidate under each of its memory options: the least simulated step that fits, and what is proven of all.

Options (memory/options.py) are looked at fastest first. One that fits only with uneven cuts may take longer than a
slower one with even cuts, so each is priced by its own simulated step until the bound of those left is above the best.
An option whose best cuts fit as they would without any limit ends those of the same placements: more recomputation
only takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import ExitCode, ShardwrightError
from ..memory.limits import fits, worst_host_need
from ..memory.options import MemoryOption
from ..memory.rank_bytes import mean_bytes, quick_peaks, state_share
from ..memory.too_large import is_too_large
from ..space.candidates import Candidate
from ..stages.chain import Chain
from .outcome import Outcome
from .state import MemoryPool, SearchState
from .step_time import estimate, find_cuts, level_ranks, lower_bound, order_bound, step_seconds

LEAST_GAIN = 1.01  # of a step over its bound for which other placements are asked for


@dataclass(frozen=True)
class _Fit:
    """Cuts that fit. bottleneck_s: no cuts that fit go below, 0 where that is not known. free: memory binds nothing."""

    bounds: tuple[int, ...]
    bottleneck_s: float
    free: bool


def score(state: SearchState, candidate: Candidate, options: Sequence[MemoryOption]) -> Outcome:
    """Fastest option, its cuts, its simulated step. Looks no further where that cannot win.

    bound_s of the outcome: infinite where it is proven that nothing fits.
    """
    return _Scoring(state, candidate, options).run()


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
    outcome = score(state, candidate, pool.options)
    if not outcome.tight or pool.widened:
        return outcome
    fastest = state.setting.chain(pool.options[0].solution, pool.options[0].recompute)
    worth_s = LEAST_GAIN * lower_bound(state.setting, candidate, fastest)
    if (outcome.step_s is None or outcome.step_s > worth_s) and state.may_win(worth_s) and state.widen(pool):
        return score(state, candidate, pool.options)
    return outcome


def _score_leanest(state: SearchState, candidate: Candidate, pool: MemoryPool) -> Outcome:
    """Before a candidate is said not to fit: placements of least bytes in its own proportion of state."""
    if candidate.mesh.inner_part.num_devices > 1 and pool.widened:
        own, share = pool.solved_for, state_share(state.setting, candidate)
        found = state.sharder.leanest(own.mesh.of_stage, own.local_batch, state_share=share)
        solutions = {id(option.solution): option.solution for option in pool.options}
        if found is not None and id(found) not in solutions:
            options = state.options([*solutions.values(), found])
            if any(option.solution is found for option in options):
                pool.options = options
                return score(state, candidate, options)
    return state.outcomes[candidate]


def mean_fits(state: SearchState, candidate: Candidate, option: MemoryOption, in_flight: int | None = None) -> bool:
    """May the mean rank fit? If not, no cuts do. in_flight: in place of what the candidate's schedule holds at once."""
    chain = state.setting.chain(option.solution, option.recompute)
    return mean_bytes(state.setting, candidate, chain, in_flight) <= state.setting.most(candidate)


def first_options(state: SearchState, candidate: Candidate, options: Sequence[MemoryOption]) -> list[MemoryOption]:
    """Of each placements the fastest option under which the mean rank may fit."""
    found: dict[int, MemoryOption] = {}
    for option in options:
        if id(option.solution) not in found and mean_fits(state, candidate, option):
            found[id(option.solution)] = option
    return list(found.values())


class _Scoring:
    def __init__(self, state: SearchState, candidate: Candidate, options: Sequence[MemoryOption]) -> None:
        self.state, self.setting, self.candidate, self.options = state, state.setting, candidate, options
        self.outcome = state.outcomes[candidate]
        self.best: Outcome | None = None
        self.search_bound_s = self.bound_s = math.inf
        self.fits = self.too_slow = self.tight = False

    def run(self) -> Outcome:
        done: set[int] = set()  # placements whose other options only take longer
        for option in self.options:
            if id(option.solution) not in done and self._price(option):
                done.add(id(option.solution))
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

    def _price(self, option: MemoryOption) -> bool:
        """Are the other options of these placements slower, whatever fits?"""
        state, setting, candidate = self.state, self.setting, self.candidate
        if not mean_fits(state, candidate, option):
            self.tight = True
            return False
        chain = setting.chain(option.solution, option.recompute)
        least_s = lower_bound(setting, candidate, chain)
        if self.best is not None and least_s >= (self.best.step_s or 0.0):
            self._bound(option, least_s)
            return True
        if not state.may_win(estimate(setting, candidate, chain)):
            self.too_slow = True
            self._bound(option, least_s)
            return True
        fit = self._cuts(chain)
        self.tight = self.tight or fit is None or not fit.free
        if fit is None:
            if candidate.virtual_stages > 1 and state.forced.cuts is None:
                self._bound(option, least_s)  # other cuts might fit
            return False
        self.fits = True
        self._bound(option, max(least_s, fit.bottleneck_s))
        self._simulate(option, chain, fit)
        return fit.free

    def _bound(self, option: MemoryOption, seconds: float) -> None:
        self.search_bound_s = min(self.search_bound_s, seconds)
        self.bound_s = min(self.bound_s, seconds * option.solution.proven_share)

    def _simulate(self, option: MemoryOption, chain: Chain, fit: _Fit) -> None:
        setting, candidate = self.setting, self.candidate
        bounds = fit.bounds
        if self.state.forced.cuts is None:
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
                recompute=option.recompute,
                solution=option.solution,
                peak_bytes=peak_bytes,
                fits=True,
                recompute_all=option.recompute_all,
            )

    def _cuts(self, chain: Chain) -> _Fit | None:
        setting, candidate = self.setting, self.candidate
        if self.state.forced.cuts is not None or candidate.num_stages == 1:
            bounds = (0, *self._forced_positions(), chain.num_instances)
            return _Fit(bounds, 0.0, True) if fits(setting, candidate, chain, bounds) else None
        if is_too_large(setting, candidate, chain):
            return None
        free = find_cuts(setting, candidate, chain, ignore_memory=True)
        if free is None:
            return None
        bounded = candidate.schedule in ("gpipe", "1f1b")
        if fits(setting, candidate, chain, free.bounds):
            return _Fit(free.bounds, free.bottleneck if bounded else 0.0, True)
        cuts = find_cuts(setting, candidate, chain)
        if cuts is None or not fits(setting, candidate, chain, cuts.bounds):
            return None
        return _Fit(cuts.bounds, cuts.bottleneck if bounded else 0.0, False)

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

    def _mean_bytes(self, option: MemoryOption) -> float:
        return mean_bytes(self.setting, self.candidate, self.setting.chain(option.solution, option.recompute))

    def _described_misfit(self, outcome: Outcome) -> Outcome:
        """With the missing bytes, the peak of the worst rank, and which that is, under the leanest option and even
        cuts."""
        leanest = min(self.options, key=self._mean_bytes)
        found = replace(outcome, fits=False, recompute=leanest.recompute, recompute_all=leanest.recompute_all)
        chain = self.setting.chain(leanest.solution, leanest.recompute)
        cuts = find_cuts(self.setting, self.candidate, chain, ignore_memory=True)
        if cuts is not None:
            peaks = quick_peaks(self.setting, self.candidate, chain, cuts.bounds)
            lacking = peaks - self.setting.limits(self.candidate)
            worst = int(lacking.argmax())
            missing = max(int(lacking[worst]), 0)
            host = worst_host_need(self.setting, self.candidate, chain, cuts.bounds)
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
        return replace(found, limit_bytes=self.setting.limit(self.candidate, found.worst_rank))
