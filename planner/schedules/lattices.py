"""Building blocks on a lattice: each pass of a microbatch goes from rank to rank in a fixed number of units.

After Qi et al., Pipeline Parallelism with Controllable Memory (arXiv:2405.15362): a unit is one action, a block
repeats every 3 v units, v the chunks on a rank, and is given by the units between neighbouring ranks of its 2 v passes
(forwards of each chunk, then input gradients of each chunk, last first) and by the pauses between the passes. What the
passes leave free on a rank takes the weight gradients, so that least memory is held. V-Min, V-Half, ZB-V and 1F1B are
points of this family; here all of it is laid out at once, one row of an array for each block.

The order of the units is what counts: with true times it runs at a pace of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from .order_graph import Order, OrderGraph
from .problem import PipelineProblem

MAX_CHUNKS = 4
MAX_STEP = 4
MAX_BLOCKS = 60_000  # beyond, a random selection


class Lattices:
    """starts: [block, kind, stage] in units, kinds F, I, W. held_bytes: [block, rank], most at once."""

    def __init__(self, problem: PipelineProblem, rng: np.random.Generator) -> None:
        self.problem = problem
        p = problem.num_ranks
        self.chunks = problem.num_stages // p
        self.period = 3 * self.chunks
        steps, pauses = self._draw(rng)
        forward, backward = self._passes(steps, pauses)
        apart = self._apart(forward, backward)
        forward, backward = forward[apart], backward[apart]
        weight, self.held_bytes = self._weights(forward, backward)
        self.starts = np.stack([forward, backward, weight], axis=1)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Steps of 2 v passes, pauses between them, one row for each block."""
        v = self.chunks
        sides = [MAX_STEP] * (2 * v) + [self.period] * (2 * v - 1)
        if np.prod(sides, dtype=float) <= MAX_BLOCKS:
            rows = np.array(list(itertools.product(*(range(1, side + 1) for side in sides))))
        else:
            rows = np.column_stack([rng.integers(1, side + 1, MAX_BLOCKS) for side in sides])
        return rows[:, : 2 * v], rows[:, 2 * v :]

    def _passes(self, steps: np.ndarray, pauses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts of forwards and input gradients, [block, stage]."""
        p, v = self.problem.num_ranks, self.chunks
        at = np.zeros(len(steps), dtype=int)
        passes = []
        for index in range(2 * v):
            passes.append(at[:, None] + steps[:, index : index + 1] * np.arange(p))
            at = passes[-1][:, -1] + (pauses[:, index] if index < 2 * v - 1 else 0)
        return np.hstack(passes[:v]), np.hstack(passes[v:])[:, ::-1]

    def _apart(self, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
        """Blocks whose passes never meet on a rank."""
        apart = np.ones(len(forward), dtype=bool)
        for rank in range(self.problem.num_ranks):
            own = self.problem.stages_of(rank)
            phases = np.sort(np.hstack([forward[:, own], backward[:, own]]) % self.period, axis=1)
            apart &= (np.diff(phases, axis=1) > 0).all(axis=1)
        return apart

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


def regular(problem: PipelineProblem) -> bool:
    """Does each run of p stages visit every rank once?"""
    p, place = problem.num_ranks, problem.stage_rank
    return len(place) % p == 0 and all(len(set(place[c : c + p])) == p for c in range(0, len(place), p))


def lattice_orders(graph: OrderGraph, rng: np.random.Generator, count: int) -> Iterator[tuple[np.ndarray, Order]]:
    """Starts of microbatch 0 in periods and orders that fit, of up to `count` blocks: half of them the shortest, half
    drawn from the others."""
    problem = graph.problem
    if not regular(problem) or problem.num_stages > MAX_CHUNKS * problem.num_ranks:
        return
    lattices = Lattices(problem, rng)
    fitting = lattices.fitting()
    rest = fitting[count // 2 :]
    for index in [*fitting[: count // 2], *rng.permutation(rest)[: count // 2]]:
        starts = lattices.starts[index] / lattices.period
        yield starts, graph.repeated(starts, 1.0)
