"""Building blocks on a lattice: each pass of a microbatch goes from rank to rank in a fixed number of units.

After Qi et al., Pipeline Parallelism with Controllable Memory (arXiv:2405.15362): a unit is one action, a block
repeats every 3 v units, v the chunks on a rank, and is given by the units between neighbouring ranks of its 2 v passes
(forwards of each chunk, then input gradients of each chunk, last first) and by the pauses between the passes. Every
second pass may change its units at one rank: memory then lies between those of two blocks (their appendix A). What the
passes leave free on a rank takes the weight gradients, so that least memory is held. V-Min, V-Half, ZB-V and 1F1B are
points of this family; here all of it is laid out at once, one row of an array for each block.

The order of the units is what counts: with true times it runs at a pace of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..graph import Order, OrderGraph
from ..problem import PipelineProblem

MAX_CHUNKS = 4
MAX_STEP = 4
MAX_TURNED_STEP = 5
MAX_BLOCKS = 60_000  # of one step a pass, and of two: beyond, a random selection


class Lattices:
    """starts: [block, kind, stage] in units, kinds F, I, W. held_bytes: [block, rank], most at once."""

    def __init__(self, problem: PipelineProblem, rng: np.random.Generator) -> None:
        self.problem = problem
        p = problem.num_ranks
        self.chunks = problem.num_stages // p
        self.period = 3 * self.chunks
        v = self.chunks
        self.way = np.array([*problem.stage_rank, *reversed(problem.stage_rank)]).reshape(2 * v, p)  # of each pass
        even, turned = self._laid_out(*self._even(rng)), self._laid_out(*self._turned(rng))
        passes = np.concatenate([even, turned])
        forward = passes[:, :v].reshape(len(passes), v * p)
        backward = passes[:, v:].reshape(len(passes), v * p)[:, ::-1]
        weight, self.held_bytes = self._weights(forward, backward)
        self.starts = np.stack([forward, backward, weight], axis=1)

    def _even(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Steps of the 2 v passes [block, pass], the same behind the rank [block] where they could change, pauses."""
        v = self.chunks
        rows = _rows([range(1, MAX_STEP + 1)] * (2 * v) + self._pauses(), rng)
        steps = rows[:, : 2 * v]
        return steps, steps, np.zeros(len(rows), dtype=int), rows[:, 2 * v :]

    def _turned(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Every second pass slows down or speeds up at some rank, the others take one step a rank."""
        v, p = self.chunks, self.problem.num_ranks
        each = range(1, MAX_TURNED_STEP + 1)
        rows = _rows([range(2), each, each, range(1, p - 1), *self._pauses()], rng)
        rows = rows[rows[:, 1] != rows[:, 2]]
        changing = np.arange(2 * v) % 2 == rows[:, :1]
        steps, later = (np.where(changing, rows[:, index : index + 1], 1) for index in (1, 2))
        return steps, later, rows[:, 3], rows[:, 4:]

    def _pauses(self) -> list[range]:
        return [range(1, self.period + 1)] * (2 * self.chunks - 1)

    def _laid_out(self, steps: np.ndarray, later: np.ndarray, turn: np.ndarray, pauses: np.ndarray) -> np.ndarray:
        """Starts [block, pass, position] of the blocks whose passes never meet on a rank. turn: from this rank on,
        steps are `later`."""
        p = self.problem.num_ranks
        lower = np.minimum(self.way[:, 1:], self.way[:, :-1])  # of the ranks on both sides of each step
        behind = lower[:, None, :] >= np.arange(p)[None, :, None]
        taken = np.cumsum(np.pad(behind, ((0, 0), (0, 0), (1, 0))), axis=2)  # [pass, turn, position]: later steps
        first = np.zeros_like(steps)  # starts of the passes
        for index in range(1, len(self.way)):
            end = first[:, index - 1] + self._way_to(steps, later, turn, taken, index - 1, p - 1)
            first[:, index] = end + pauses[:, index - 1]
        for rank in range(p):
            starts = [
                first[:, index] + self._way_to(steps, later, turn, taken, index, position)
                for index, position in zip(*np.nonzero(self.way == rank), strict=True)
            ]
            apart = (np.diff(np.sort(np.column_stack(starts) % self.period, axis=1), axis=1) > 0).all(axis=1)
            steps, later, turn, first = steps[apart], later[apart], turn[apart], first[apart]
        columns = [
            [first[:, index] + self._way_to(steps, later, turn, taken, index, position) for position in range(p)]
            for index in range(len(self.way))
        ]
        return np.array(columns).transpose(2, 0, 1)

    @staticmethod
    def _way_to(
        steps: np.ndarray, later: np.ndarray, turn: np.ndarray, taken: np.ndarray, index: int, position: int
    ) -> np.ndarray:
        """Units from the start of a pass to a position."""
        behind = taken[index, turn, position]
        return steps[:, index] * (position - behind) + later[:, index] * behind

    def _weights(self, forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts of the weight gradients [block, stage] in the units left free, bytes held [block, rank]."""
        num_ranks, stages = self.problem.num_ranks, self.problem.stages
        weight = np.zeros_like(forward)
        held = np.zeros((len(forward), num_ranks))
        units = np.arange(self.period)
        for rank in range(num_ranks):
            own = self.problem.stages_of(rank)
            sizes = [stages[stage].activation_bytes for stage in own]
            taken = np.zeros((len(forward), self.period), dtype=bool)
            for stage in own:
                for passes in (forward, backward):
                    np.put_along_axis(taken, passes[:, stage : stage + 1] % self.period, True, axis=1)
            free = np.argsort(taken, axis=1, kind="stable")[:, : len(own)]  # phases nothing else takes
            least = np.full(len(forward), np.inf)
            for order in itertools.permutations(range(len(own))):
                ends, alive = [], np.zeros((len(forward), self.period))
                for slot, stage, size in zip(order, own, sizes, strict=True):
                    after = backward[:, stage] + 1
                    ends.append(after + (free[:, slot] - after) % self.period)
                    born, gone = forward[:, stage : stage + 1], ends[-1][:, None] + 1
                    alive += size * ((units - born) // self.period - (units - gone) // self.period)
                peak = alive.max(axis=1)
                better = peak < least
                least[better] = peak[better]
                weight[np.ix_(better, own)] = np.column_stack(ends)[better]
            held[:, rank] = least
        return weight, held

    def fitting(self) -> np.ndarray:
        """Indices of the blocks that fit, the shortest first."""
        fits = (self.held_bytes <= np.array(self.problem.memory_limit)).all(axis=1)
        indices = np.flatnonzero(fits)
        return indices[np.argsort(self.starts[indices, 1, 0], kind="stable")]


def _rows(sides: Sequence[range], rng: np.random.Generator) -> np.ndarray:
    """Every choice of one value from each side, or MAX_BLOCKS at random."""
    if np.prod([len(side) for side in sides], dtype=float) <= MAX_BLOCKS:
        return np.array(list(itertools.product(*sides)), dtype=int).reshape(-1, len(sides))
    return np.column_stack([rng.integers(side.start, side.stop, MAX_BLOCKS) for side in sides])


def regular(problem: PipelineProblem) -> bool:
    """Does each run of p stages visit every rank once?"""
    p, place = problem.num_ranks, problem.stage_rank
    return len(place) % p == 0 and all(len(set(place[c : c + p])) == p for c in range(0, len(place), p))


@lru_cache(maxsize=32)
def _lattices(problem: PipelineProblem, seed: int) -> Lattices:
    return Lattices(problem, np.random.default_rng(seed))


def lattice_orders(graph: OrderGraph, seed: int, count: int) -> Iterator[tuple[np.ndarray, Order]]:
    """Starts of microbatch 0 in periods and orders that fit, of up to `count` blocks: the shortest and others drawn at
    random, in turn."""
    problem = graph.problem
    if not regular(problem) or problem.num_stages > MAX_CHUNKS * problem.num_ranks:
        return
    lattices = _lattices(replace(problem, num_microbatches=1), seed)  # however many there are
    fitting = lattices.fitting()
    drawn = np.random.default_rng(seed).permutation(fitting)
    for index in list(dict.fromkeys(np.column_stack([fitting, drawn]).reshape(-1).tolist()))[:count]:
        starts = lattices.starts[index] / lattices.period
        yield starts, graph.by_starts(graph.periodic(starts, 1.0))
