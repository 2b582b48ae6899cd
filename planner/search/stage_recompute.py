"""On which rung of a ladder of recomputation each stage stands (memory/options.py), and the cuts that this allows.

A stage recomputes as little as lets it fit. Under 1F1B the first stages hold most microbatches, so they recompute most
and run fewer positions (the two decisions that AdaPipe, ASPLOS 2024, takes together). Of a rank
with one stage the cost of a run of positions is then known before the cuts are, and stages/cuts.py finds the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...costmodel.segment import Workspace
from ...schedules.published.library import SCHEDULES
from ..memory.beside import beside_of
from ..memory.limits import worst_host_need
from ..memory.options import Ladder
from ..memory.rank_bytes import (
    IntervalBytes,
    first_in_mean,
    interval_bytes,
    mean_share,
    profile_table,
    quick_peaks,
    shared_bytes,
    stages_by_rank,
)
from ..memory.too_large import is_too_large
from ..space.candidates import Candidate
from ..stages.chain import Between, Chain, Recompute, interval_sums, levels_of, recompute_of
from ..stages.cuts import Cuts, WindowCuts, around_of, pipeline_cost, windows
from ..stages.setting import Setting
from ..stages.zero_seconds import stage_tables
from .step_time import secondary, stage_loads


def least_recomputation(
    setting: Setting, candidate: Candidate, ladder: Ladder, in_flight: int | None = None
) -> Chain | Between | None:
    """The least under which the mean rank may fit: what bounds are computed from. None where no cuts fit.

    in_flight: in place of what the candidate's schedule holds at once."""
    ladder = ladder.every_step
    chains = rungs_of(setting, ladder)
    rung = first_in_mean(setting, candidate, chains, in_flight)
    if rung is None or rung == 0:
        return None if rung is None else chains[0]
    before, chain = chains[rung - 1 : rung + 1]
    share = mean_share(setting, candidate, (before, chain), in_flight) if ladder.is_divided[rung] else 0.0
    return Between(before, chain, share)


def rungs_of(setting: Setting, ladder: Ladder) -> tuple[Chain, ...]:
    return setting.once(_rungs_of, ladder, setting, ladder)


def _rungs_of(setting: Setting, ladder: Ladder) -> tuple[Chain, ...]:
    return tuple(setting.chain(ladder.solution, rung) for rung in ladder.rungs)


def nothing_fits(setting: Setting, candidate: Candidate, ladder: Ladder) -> bool:
    """Is it proven that no cuts fit, wherever the stages stand?"""
    return is_too_large(setting, candidate, setting.once(_leanest, ladder, setting, ladder))


def _leanest(setting: Setting, ladder: Ladder) -> Chain:
    """Keeps as little as the last rung, with no more workspace than any choice of recomputation needs."""
    first, last = (setting.chain(ladder.solution, ladder.rungs[k]) for k in (0, -1))
    least: dict[str, Workspace] = {}
    for name in set(ladder.shape.segments):
        cost = ladder.solution.costs[name]
        rows = [cost.held_at(point) for point in (None, *cost.recompute_points)]
        sizes = [(row.forward, row.backward, row.backward_made, row.end) for row in rows]
        least[name] = Workspace(*map(min, zip(*sizes, strict=True)))

    def column(kind: str) -> np.ndarray:
        return np.array([float(getattr(least[name], kind)) for name in ladder.shape.segments])

    return replace(
        first,
        activation_bytes=np.minimum(first.activation_bytes, last.activation_bytes),
        forward_workspace_bytes=column("forward"),
        written_workspace_bytes=column("backward"),
        made_workspace_bytes=column("backward_made"),
        end_workspace_bytes=column("end"),
    )


# ---------------------------------------------------------------------- cuts


@dataclass
class _Rung:
    """One rung, of a candidate of one stage a rank."""

    chain: Chain
    held: IntervalBytes
    backward_of: np.ndarray
    plain_of: np.ndarray  # the same without ZeRO's collectives
    is_divided: bool


class LadderCuts:
    """Best cuts of a candidate with one stage on a rank, each stage on the lowest rung on which it fits.

    worth_s: steps that take as long are of no use. is_narrowed: were stages left out for that?"""

    def __init__(self, setting: Setting, candidate: Candidate, ladder: Ladder, worth_s: float = np.inf) -> None:
        self.setting, self.candidate, self.ladder, self.worth_s = setting, candidate, ladder, worth_s
        self.is_narrowed = False
        self.size = len(ladder.shape.segments) - candidate.num_stages + 1
        self.after = np.triu(np.ones((self.size, self.size), dtype=bool))
        self._rungs: list[_Rung] = []
        self._chains = rungs_of(setting, ladder)

    def find(self) -> Cuts | None:
        setting, candidate, count = self.setting, self.candidate, self.candidate.num_stages
        if self.size < 1:
            return None
        mesh, chain = setting.mesh(candidate), self._rung(0).chain
        tables = stage_tables(setting, candidate, chain)
        around = around_of(tables.load_of, min(mesh.scales))
        in_flight = profile_table(candidate.schedule, candidate.pp, candidate.count, 1).max(axis=1)[:, 0]
        limits = setting.limits(candidate)
        costs = np.empty((count, self.size, self.size))
        for stage in range(count):
            rows, columns = self._window(stage)

            def seconds(backward: np.ndarray, stage: int = stage, rows: slice = rows, columns: slice = columns) -> Any:
                return pipeline_cost(
                    tables.forward_of[rows, columns],
                    backward,
                    candidate.count,
                    stage,
                    count,
                    schedule=candidate.schedule,
                    scale=mesh.scales[stage],
                    around=(around[0][rows], around[1][:, columns]),
                )

            useful = self.after
            if self.worth_s < np.inf:
                useful = useful & (seconds(tables.backward_of[rows, columns]) < self.worth_s)
                self.is_narrowed = self.is_narrowed or not np.array_equal(useful, self.after)
            costs[stage] = seconds(self._backward(stage, int(in_flight[stage]), float(limits[stage]), useful))
        return WindowCuts(costs, windows(secondary(mesh, chain)(0), count)).cuts()

    def _window(self, stage: int) -> tuple[slice, slice]:
        return slice(stage, stage + self.size), slice(stage + 1, stage + 1 + self.size)

    def _rung(self, at: int) -> _Rung:
        while at >= len(self._rungs):
            k = len(self._rungs)
            chain = self._chains[k]
            tables = stage_tables(self.setting, self.candidate, chain)
            self._rungs.append(
                _Rung(
                    chain=chain,
                    held=interval_bytes(self.setting, self.candidate, chain),
                    backward_of=tables.backward_of,
                    plain_of=interval_sums(chain.backward_s + tables.accumulate_s),
                    is_divided=self.ladder.is_divided[k],
                )
            )
        return self._rungs[at]

    def _backward(self, stage: int, in_flight: int, limit: float, left: np.ndarray) -> np.ndarray:
        """[i, j] of the stage's window -> seconds of its backward; infinite where it fits on no rung. left: which to
        look at."""
        window = self._window(stage)
        seconds = np.full((self.size, self.size), np.inf)
        for k in range(len(self.ladder.rungs)):
            rung = self._rung(k)
            fits = left & (rung.held.with_in_flight(in_flight, window) <= limit)
            if fits.any():
                if rung.is_divided:
                    where = np.argwhere(fits).T + np.array([[stage], [stage + 1]])
                    seconds[fits] = self._climbing(k, in_flight, limit, where)
                else:
                    seconds[fits] = rung.backward_of[window][fits]
                left = left & ~fits
                if not left.any():
                    break
        return seconds

    def _climbing(self, at: int, in_flight: int, limit: float, where: np.ndarray) -> np.ndarray:
        """Of stages between two rungs, [first position, end] each: so many of their positions rise as must, the first
        ones."""
        below, rung = self._rungs[at - 1], self._rungs[at]
        low, high, (start, stop) = below.held, rung.held, where
        room = (limit - high.reserve) / high.slack - (high.lasting + high.pipeline + high.pipeline_each)[start, stop]
        rises = self.ladder.risers[at]
        places, before = np.flatnonzero(rises) + 1, np.concatenate([[0], np.cumsum(rises)])
        count = np.maximum(before[stop] - before[start], 1)
        least, most = np.ones_like(count), count
        while (least < most).any():
            middle = (least + most) // 2
            turn = places[np.minimum(before[start] + middle, len(places)) - 1]  # behind the last one that rises
            turn = np.clip(turn, start, stop)
            behind = below.chain.kept_of[turn, stop]
            work = np.maximum(high.workspace[start, turn] - behind, low.workspace[turn, stop])
            kept = rung.chain.kept_of[start, turn] + behind + rung.chain.prologue_bytes_of[start, stop]
            fits = in_flight * kept + work <= room
            least, most = np.where(fits, least, middle + 1), np.where(fits, middle, most)
            least = np.minimum(least, most)
        plain = below.plain_of[start, stop] + most / count * (rung.plain_of - below.plain_of)[start, stop]
        return np.maximum(below.backward_of[start, stop], plain)


# ---------------------------------------------------------------------- recomputation under given cuts


def recomputation(setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...]) -> Recompute | None:
    """As little as lets every rank fit under these cuts; None where it does not."""
    heights = lowest_rungs(setting, candidate, ladder, bounds)
    return None if heights is None else standing_on(setting, candidate, ladder, bounds, heights)


def lowest_rungs(setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...]) -> list[int] | None:
    """Of each rank the lowest rung on which it fits under these cuts; None where one does not.

    Where two directions share the stages, all stand on one rung."""
    limits, heights = setting.limits(candidate), np.full(candidate.pp, -1)
    for rung, chain in enumerate(rungs_of(setting, ladder)):
        if rung == 0 and candidate.on_host and worst_host_need(setting, candidate, chain, bounds).missing_bytes:
            return None  # of state, whatever is recomputed
        fits = quick_peaks(setting, candidate, chain, bounds) <= limits
        heights[fits & (heights < 0)] = rung
        if SCHEDULES[candidate.schedule].directions == 2:
            heights[:] = rung if fits.all() else -1
        if (heights >= 0).all():
            return list(map(int, heights))
    return None


def standing_loads(
    setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...], heights: Sequence[int]
) -> np.ndarray:
    """Of each stage, the seconds of a forward and a backward at least, where its rank stands so high."""
    stages = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)
    rungs = [height - 1 if ladder.is_divided[height] else height for height in heights]
    loads = np.empty(candidate.num_stages)
    for rung in set(rungs):
        chain = rungs_of(setting, ladder)[rung]
        here = np.unique(stages[:, np.array(rungs) == rung])
        loads[here] = stage_loads(setting, candidate, chain, bounds)[here]
    return loads


def standing_on(
    setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...], heights: list[int]
) -> Recompute:
    """As little as lets every rank fit. heights: of lowest_rungs."""
    return _Standing(setting, candidate, ladder, bounds).on(heights)


class _Standing:
    """Which positions recompute what, once it is known on which rung each rank fits."""

    def __init__(self, setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...]) -> None:
        self.setting, self.candidate, self.ladder, self.bounds = setting, candidate, ladder, bounds
        self.stages = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)
        self.profiles = profile_table(candidate.schedule, candidate.pp, candidate.count, candidate.virtual_stages)

    def on(self, heights: list[int]) -> Recompute:
        whole = [np.array(levels_of(self.ladder.shape, rung)) for rung in self.ladder.rungs]
        alike = len(set(heights)) == 1 and not self.ladder.is_divided[heights[0]]
        if alike or SCHEDULES[self.candidate.schedule].directions == 2:
            return self.ladder.rungs[heights[0]]
        levels = whole[0].copy()
        for rank, height in enumerate(heights):
            own = np.concatenate([np.arange(self.bounds[s], self.bounds[s + 1]) for s in self.stages[:, rank]])
            rising = own
            if self.ladder.is_divided[height]:
                rising = own[self.ladder.risers[height][own]]
                levels[own] = whole[height - 1][own]
                rising = rising[: self._fewest(rank, height, rising)]
            levels[rising] = whole[height][rising]
        return recompute_of(levels.tolist())

    def _fewest(self, rank: int, height: int, rising: np.ndarray) -> int:
        """Of the rank's positions that may rise to this rung, how many must; all of them do."""
        lower, upper = (self.setting.chain(self.ladder.solution, self.ladder.rungs[k]) for k in (height - 1, height))
        held = interval_bytes(self.setting, self.candidate, lower)
        limit = self.setting.limits(self.candidate)[rank]
        few, enough = 0, len(rising)
        while enough - few > 1:
            middle = (few + enough) // 2
            if self._peak(held, rank, (lower, upper), rising[:middle]) <= limit:
                enough = middle
            else:
                few = middle
        return enough

    def _peak(self, held: IntervalBytes, rank: int, chains: tuple[Chain, Chain], rising: np.ndarray) -> float:
        """Bytes of the rank where these positions are as in the second chain."""
        lower, upper = chains
        below, above = (beside_of(self.setting, self.candidate, chain) for chain in chains)
        kept, beside = lower.activation_bytes.copy(), below.with_rising(above, rising)
        kept[rising] = upper.activation_bytes[rising]
        runs = [(self.bounds[s], self.bounds[s + 1]) for s in self.stages[:, rank]]
        prologue = lower.prologue_bytes_of
        activation = np.array([[kept[i:j].sum() + prologue[i, j] + shared_bytes(lower, i, j)] for i, j in runs])
        most = np.array([[sum(beside.of_stage(kept[i:j], i, j).values())] for i, j in runs])
        one = slice(rank, rank + 1)
        return float(held.peaks_of(self.bounds, self.profiles[one], self.stages[:, one], activation, most)[0])
