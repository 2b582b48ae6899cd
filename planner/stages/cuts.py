"""Stage cuts: a chain of n segment instances into S contiguous stages, by dynamic programming.

For stage s over positions i..j-1 let c_s(i, j) be its cost, infinite where it does not fit in the memory of its ranks.
With f_s(j) the least bottleneck of the first s stages over the first j positions,

    f_0(0) = 0        f_{s+1}(j) = min over i < j of max(f_s(i), c_s(i, j))        answer f_S(n)

Among the cuts that reach this bottleneck a second pass of the same shape takes the one with the least sum of a
secondary cost (transfers over the cuts, then evenness). Costs are matrices, so each stage is one vectorised O(n^2)
step.

The cost of a stage may count what comes before it: see `pipeline_cost`, whose bottleneck is a lower bound on the
makespan over all cuts, and the makespan itself where stages are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

ROUNDING = 1 + 1e-12  # of a bottleneck that is compared with what it was found from


@dataclass(frozen=True)
class Cuts:
    """bounds: S+1 positions, stage s runs bounds[s]..bounds[s+1]-1. bottleneck: greatest stage cost."""

    bounds: tuple[int, ...]
    bottleneck: float

    @property
    def stages(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))


def best_cuts(
    cost: Callable[[int], np.ndarray],
    num_stages: int,
    num_instances: int,
    secondary: Callable[[int], np.ndarray] | None = None,
) -> Cuts | None:
    """cost(s)[i, j]: what stage s costs over positions i..j-1 (inf: not allowed). None where no cut is allowed.

    Every stage gets at least one position.
    """
    n = num_instances
    if num_stages > n:
        return None
    allowed = _after(n)
    masked: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # stages may share one matrix
    tables = []
    for stage in range(num_stages):
        table = cost(stage)
        if id(table) not in masked:
            masked[id(table)] = table, np.where(allowed, table, np.inf)
        tables.append(masked[id(table)][1])
    bottleneck = _bottleneck([_window(table, num_stages, stage) for stage, table in enumerate(tables)])
    if not math.isfinite(bottleneck):
        return None
    limit = bottleneck * ROUNDING
    nothing = np.zeros((n + 1, n + 1))
    priced: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    parts = []
    for stage, table in enumerate(tables):
        extra = secondary(stage) if secondary is not None else nothing
        key = (id(table), id(extra))
        if key not in priced:
            priced[key] = extra, np.where(table <= limit, extra, np.inf)
        parts.append(_window(priced[key][1], num_stages, stage))
    return Cuts(_cheapest(parts), bottleneck)


class WindowCuts:
    """best_cuts, of stages whose costs are given at once. costs: [stage, i, j] as in windows."""

    def __init__(self, costs: np.ndarray, secondary: np.ndarray) -> None:
        window = costs.shape[1]
        self._costs = np.where(np.triu(np.ones((window, window), dtype=bool)), costs, np.inf)
        self._secondary = secondary
        self.bottleneck = _bottleneck(self._costs)

    def cuts(self) -> Cuts | None:
        if not math.isfinite(self.bottleneck):
            return None
        within = self._costs <= self.bottleneck * ROUNDING
        return Cuts(_cheapest(np.where(within, self._secondary, np.inf)), self.bottleneck)


def windows(table: np.ndarray, num_stages: int) -> np.ndarray:
    """[stage, i, j] -> table[stage + i, stage + 1 + j], no copy: every stage gets a position, so stage s begins at one
    of the positions s..n-S+s, and ends one further on at least."""
    size = len(table) - num_stages
    down, right = table.strides
    shape, strides = (num_stages, size, size), (down + right, down, right)
    return np.lib.stride_tricks.as_strided(table[:, 1:], shape, strides, writeable=False)


def _window(table: np.ndarray, num_stages: int, stage: int) -> np.ndarray:
    size = len(table) - num_stages
    return table[stage : stage + size, stage + 1 : stage + 1 + size]


@cache
def _after(num_instances: int) -> np.ndarray:
    """[i, j] -> is i < j?"""
    return np.triu(np.ones((num_instances + 1, num_instances + 1), dtype=bool), 1)


def _bottleneck(parts: Sequence[np.ndarray] | np.ndarray) -> float:
    """f_S(n). parts: of each stage its window, infinite where a stage would be empty."""
    best = np.full(len(parts[0]), np.inf)
    best[0] = 0.0
    for part in parts:
        best = np.minimum.reduce(np.maximum(best[:, None], part), axis=0)
    return float(best[-1])


def _cheapest(parts: Sequence[np.ndarray] | np.ndarray) -> tuple[int, ...]:
    """Bounds of the least sum over the stages of their windows' entries."""
    columns, choices = np.arange(len(parts[0])), []
    total = np.full(len(columns), np.inf)
    total[0] = 0.0
    for part in parts:
        through = total[:, None] + part
        choice = through.argmin(axis=0)
        choices.append(choice)
        total = through[choice, columns]
    bounds = [len(parts) + len(columns) - 1]
    for stage in reversed(range(len(parts))):
        bounds.append(stage + int(choices[stage][bounds[-1] - stage - 1]))
    return tuple(reversed(bounds))


def pipeline_cost(
    forward_of: np.ndarray,
    backward_of: np.ndarray,
    num_microbatches: int,
    stage: int,
    num_stages: int,
    *,
    schedule: str,
    scale: float = 1.0,
    around: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """[i, j] -> seconds that the pipeline takes at least, if stage `stage` runs positions i..j-1; one stage on a rank.

    forward_of, backward_of: [i, j] -> seconds over positions i..j-1; a run split in two never takes less than whole.
    T = forward and backward of all positions, L = F + B those of the stage, m microbatches, p stages:

    gpipe  T + (m-1) L
    1f1b   before the stage's first forward, all forwards before it; after its last backward, all backwards before it:
           earlier positions' L + m L. And the first backward comes back to it only after T less the backwards before
           it, when at most p - s forwards are done: T - L + m B + (1 + max(0, m - (p - s))) F. T counts the other
           stages as they are at least: positions before and after the stage.

    scale: this rank's time over that of the rank that the tables were made for. around: L of the positions before each
    i and of those from each j on, as around_of gives them, in place of the tables' own.
    """
    m = num_microbatches
    forward, backward = forward_of * scale, backward_of * scale
    before, after = around_of(forward_of + backward_of) if around is None else around
    if schedule == "gpipe":
        return before + after + m * (forward + backward)
    in_flight = min(m, num_stages - stage)
    second = before + after + m * backward + (1 + m - in_flight) * forward
    return np.maximum(before + m * (forward + backward), second)


def around_of(load_of: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """[i, 0] -> load of positions 0..i-1, and [0, j] -> load of positions j..n-1. scale: the least of any rank."""
    each = load_of * scale
    return each[0, :][:, None], each[:, -1][None, :]


def improve_cuts(
    bounds: tuple[int, ...], score: Callable[[tuple[int, ...]], float], max_rounds: int = 8
) -> tuple[int, ...]:
    """Hill climbing: move single cuts by one position while the score falls. score: inf where not allowed."""
    best, best_score = bounds, score(bounds)
    for _ in range(max_rounds):
        moved = False
        for index in range(1, len(best) - 1):
            for step in (-1, 1):
                trial = (*best[:index], best[index] + step, *best[index + 1 :])
                if not trial[index - 1] < trial[index] < trial[index + 1]:
                    continue
                value = score(trial)
                if value < best_score * (1 - 1e-9):
                    best, best_score, moved = trial, value, True
        if not moved:
            break
    return best
