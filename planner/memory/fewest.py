"""The least seconds of recomputation under which a pipeline rank fits, position by position: a small integer program.

A ladder (options.py) is climbed in steps that several positions take together, and the last of them may free more than
is missing. Under given cuts what is best can be said exactly. Position t of the rank stands on one of its segment's
levels l (x_tl = 1), takes s_tl seconds and keeps k_tl bytes of each microbatch:

    least      sum of s_tl x_tl
    one        sum over l of x_tl = 1                           of each position
    kept       S_t = S_(t-1) + sum over l of k_tl x_tl          up to t, in its stage
    in flight  A >= sum over the rank's stages of n * S_end     of each row of microbatches n that are held at once
    beside     W >= c_tm + sum over l of w_tlm x_tl + S_t - S_end   of each moment m of t, as beside.py counts: what
                                                                is behind t keeps nothing then
    room       A + W <= what the limit leaves

What two positions keep once is counted by whoever keeps it first on the same level everywhere, so the answer is weighed
anew as the chain that it makes; what it then misses is taken from the room, and the program solved again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from ...schedules.published.library import SCHEDULES
from ..solver import solve_model
from ..space.candidates import Candidate
from ..stages.chain import KEPT, NOTHING, Recompute, levels_of, recompute_of
from ..stages.setting import Setting
from .beside import Beside, beside_of
from .options import Ladder
from .rank_bytes import interval_bytes, profile_table, quick_peaks, shared_bytes, stages_by_rank

GAP = 1e-3
SECONDS, ALL_SECONDS = 2.0, 6.0  # of one program, and of those of all ranks: the rest stay as they were
TRIES = 3
MIB = float(1 << 20)
LEAST_GAIN = 1e-6  # of a rank's seconds: less is none


@dataclass(frozen=True)
class _Level:
    """Of every position on this level of its segment, or on its last one."""

    seconds: np.ndarray
    kept: np.ndarray
    beside: Beside

    def of(self, position: int) -> tuple[float, ...]:
        arrays = (self.seconds, self.kept, self.beside.forward, self.beside.backward, self.beside.end)
        return tuple(float(array[position]) for array in arrays)


def fewest_seconds(
    setting: Setting, candidate: Candidate, ladder: Ladder, bounds: tuple[int, ...], recompute: Recompute
) -> Recompute:
    """recompute: fits under these cuts. Each rank's positions on levels of least seconds, where that is less."""
    levels = np.array(levels_of(ladder.shape, recompute))
    if not ladder.is_free or (levels == KEPT).all() or SCHEDULES[candidate.schedule].directions == 2:
        return recompute
    tables = _tables(setting, candidate, ladder)
    stages = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)
    stop_at = time.monotonic() + ALL_SECONDS
    for rank in range(candidate.pp):
        if time.monotonic() > stop_at:
            break
        runs = tuple((bounds[s], bounds[s + 1]) for s in stages[:, rank].tolist())
        levels = _Rank(setting, candidate, ladder, bounds, tables, rank, runs).improved(levels)
    return recompute_of(levels.tolist())


def _tables(setting: Setting, candidate: Candidate, ladder: Ladder) -> dict[int, _Level]:
    costs = ladder.solution.costs
    last = np.array([len(costs[name].recompute_points) - 1 for name in ladder.shape.segments])
    found = {}
    for level in range(KEPT, int(last.max(initial=KEPT)) + 1):
        chain = setting.chain(ladder.solution, recompute_of(np.minimum(level, last).tolist()))
        beside = beside_of(setting, candidate, chain)
        found[level] = _Level(chain.forward_s + chain.backward_s, chain.activation_bytes, beside)
    return found


@dataclass
class _Rank:
    """runs: positions of its stages, chunk by chunk."""

    setting: Setting
    candidate: Candidate
    ladder: Ladder
    bounds: tuple[int, ...]
    tables: dict[int, _Level]
    rank: int
    runs: tuple[tuple[int, int], ...]

    def improved(self, levels: np.ndarray) -> np.ndarray:
        own = np.concatenate([np.arange(i, j) for i, j in self.runs])
        if (levels[own] == KEPT).all():
            return levels
        limit = float(self.setting.limits(self.candidate)[self.rank])
        spent_s, room = self._seconds(levels, own), limit
        for _ in range(TRIES):
            found = self._solved(levels, own, room)
            if found is None or self._seconds(found, own) >= spent_s * (1.0 - LEAST_GAIN):
                break
            over = self._peak(found) - limit
            if over <= 0:
                return found
            room -= over
        return levels

    def _seconds(self, levels: np.ndarray, own: np.ndarray) -> float:
        return float(sum(self.tables[int(levels[k])].seconds[k] for k in own))

    def _peak(self, levels: np.ndarray) -> float:
        chain = self.setting.chain(self.ladder.solution, recompute_of(levels.tolist()))
        return float(quick_peaks(self.setting, self.candidate, chain, self.bounds)[self.rank])

    def _options(self, position: int) -> list[int]:
        """Levels that no other of the position's is as good as in all."""
        count = len(self.ladder.solution.costs[self.ladder.shape.segments[position]].recompute_points)
        figures = {level: self.tables[level].of(position) for level in range(KEPT, count)}
        kept: list[int] = []
        for level, own in sorted(figures.items(), key=lambda pair: pair[1]):
            if not any(all(a <= b for a, b in zip(figures[other], own, strict=True)) for other in kept):
                kept.append(level)
        return kept

    def _solved(self, levels: np.ndarray, own: np.ndarray, limit: float) -> np.ndarray | None:
        """Levels of all positions, those of the rank changed; None where none fits, as counted here."""
        options = {int(k): self._options(int(k)) for k in own}
        model = pulp.LpProblem("recomputation", pulp.LpMinimize)
        chosen = {
            (k, level): pulp.LpVariable(f"x_{k}_{level}", cat="Binary") for k, of_k in options.items() for level in of_k
        }
        scale = 1.0 / max(self._seconds(levels, own), 1e-30)
        model += pulp.lpSum(scale * self.tables[level].seconds[k] * x for (k, level), x in chosen.items())
        for k, of_k in options.items():
            model += pulp.lpSum(chosen[k, level] for level in of_k) == 1
        self._add_bytes(model, chosen, options, limit)
        solved = solve_model(model, time_limit_s=SECONDS, gap=GAP)
        if solved.status not in ("optimal", "feasible"):
            return None
        found = levels.copy()
        for (k, level), x in chosen.items():
            if (x.value() or 0.0) > 0.5:
                found[k] = level
        return found

    def _add_bytes(
        self, model: pulp.LpProblem, chosen: dict[tuple[int, int], Any], options: dict[int, list[int]], limit: float
    ) -> None:
        """In MiB, as sizes of bytes and of seconds are far apart."""
        first = self.setting.chain(self.ladder.solution, NOTHING)
        held = interval_bytes(self.setting, self.candidate, first)
        lasting = sum(float(held.lasting[run] + held.pipeline[run]) for run in self.runs)
        room = (limit - held.reserve) / held.slack - lasting
        in_flight, beside = pulp.LpVariable("in_flight"), pulp.LpVariable("beside", lowBound=0)
        model += in_flight + beside <= room / MIB
        ends = []
        for run in dict.fromkeys(self.runs):
            ends.append(self._add_stage(model, chosen, options, run, beside, float(held.pipeline_each[run])))
        end_of = dict(zip(dict.fromkeys(self.runs), ends, strict=True))
        c = self.candidate
        more = {run: float(first.prologue_bytes_of[run]) + shared_bytes(first, *run) for run in self.runs}
        for row in profile_table(c.schedule, c.pp, c.count, c.virtual_stages)[self.rank]:
            pairs = zip(row.tolist(), self.runs, strict=True)
            model += in_flight >= pulp.lpSum(n * (end_of[run] + more[run] / MIB) for n, run in pairs)

    def _add_stage(
        self,
        model: pulp.LpProblem,
        chosen: dict[tuple[int, int], Any],
        options: dict[int, list[int]],
        run: tuple[int, int],
        beside: Any,
        each: float,
    ) -> Any:
        """Returns what a microbatch keeps of the stage. each: bytes held beside by one stage at a time."""
        start, stop = run
        so_far = [pulp.LpVariable(f"kept_{k}", lowBound=0) for k in range(start, stop)]
        for place, k in enumerate(range(start, stop)):
            own = pulp.lpSum(self.tables[level].kept[k] / MIB * chosen[k, level] for level in options[k])
            model += so_far[place] == own + (so_far[place - 1] if place else 0.0)
        moments = self.tables[KEPT].beside.moments(start, stop)
        for place, k in enumerate(range(start, stop)):
            for kind, constant in moments:
                alive = 0.0
                if kind:
                    sizes = {level: getattr(self.tables[level].beside, kind)[k] / MIB for level in options[k]}
                    alive = pulp.lpSum(size * chosen[k, level] for level, size in sizes.items())
                model += beside >= (constant[place] + each) / MIB + alive + so_far[place] - so_far[-1]
        return so_far[-1]
