"""Orders to start a search from: published schedules, building blocks repeated, and list scheduling.

All with split backwards, on a given placement and within its memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np

from ..graph import Order, OrderGraph
from ..problem import PipelineProblem
from ..published.classic import breadth_first, gpipe, interleaved_1f1b, one_f_one_b
from ..published.dual_pipe import dualpipe_v
from ..published.v_blocks import PERIOD, STEPS, v_block, v_schedule
from ..published.waves import hanayo
from ..published.zero_bubble import two_bp, zb_h1, zb_h2
from ..schedule import PipelineSchedule, loop_placement, v_placement
from .building_blocks import THRIFTS, Block, block_starts, draw_block, mutate_block, plain_blocks
from .lattices import lattice_orders

MAX_LATTICES = 400
MAX_LISTED_ACTIONS = 8000  # what one list takes is about 5 us an action
POOL = 10
BY_LATTICE = 0.3  # of the lists
JUSTIFIED = {"lattice": 0.8, "block": 0.1}  # shares
FRESH = 0.35  # of the others are by new blocks


def library_orders(graph: OrderGraph) -> Iterator[tuple[str, Order]]:
    """Published schedules of this placement that fit, their backwards split."""
    for schedule in _library(graph.problem):
        order = graph.of_actions(schedule.split_backward().ranks)
        if graph.fits(order):
            yield schedule.name, order
    p = graph.problem.num_ranks
    if graph.problem.stage_rank == v_placement(p, 2):
        for name in STEPS:
            block = v_block(name, p)
            order = graph.by_starts(graph.periodic((block.forward, block.backward, block.weight), PERIOD))
            if graph.fits(order):
                yield name, order


def _library(problem: PipelineProblem) -> Iterator[PipelineSchedule]:
    p, m, v = problem.num_ranks, problem.num_microbatches, problem.num_stages // problem.num_ranks
    short = 3 * problem.num_stages * m <= MAX_LISTED_ACTIONS
    place = problem.stage_rank
    if place == loop_placement(p, v):
        yield gpipe(p, m, v) if v == 1 else breadth_first(p, m, v)
        plain = one_f_one_b(p, m) if v == 1 else interleaved_1f1b(p, m, v)
        yield plain
        yield two_bp(plain)
        if v == 1:
            yield zb_h1(p, m)
            yield zb_h2(p, m)
    if v > 1 and place == v_placement(p, v):
        if short and v % 2 == 0 and _holds(problem, p if m >= 2 * p else min(m, p) / 2):
            yield hanayo(p, m, v)  # a rank holds p microbatches; where there are fewer than 2 p, at least half of them
        if v == 2:
            yield dualpipe_v(p, m)
            if short:
                yield from (v_schedule(name, p, m) for name in STEPS)


def _holds(problem: PipelineProblem, microbatches: float) -> bool:
    return all(
        microbatches * sum(problem.stages[stage].activation_bytes for stage in problem.stages_of(rank)) <= limit
        for rank, limit in enumerate(problem.memory_limit)
    )


class ListSearch:
    """Repeated lattices; then lists by plain blocks, by random ones, by changes of the best and by the lattices."""

    def __init__(self, graph: OrderGraph, seed: int) -> None:
        self.graph, self.seed, self.rng = graph, seed, random.Random(seed)
        self.chunks = -(-graph.num_stages // graph.problem.num_ranks)
        self.plain = plain_blocks(self.chunks)
        self.pool: list[tuple[float, Block]] = []  # the best, with their makespans
        self.lattices: list[tuple[float, np.ndarray]] = []  # makespans and starts of microbatch 0, in periods

    def lattice_orders(self, deadline: float) -> Iterator[tuple[str, Order, float]]:
        """With their kinds; until then at most: all as they are, which is quick, then justified."""
        repeated: list[Order] = []
        for starts, order in lattice_orders(self.graph, self.seed, MAX_LATTICES):
            makespan_s = self.graph.makespan_s(order)
            repeated.append(order)
            self.lattices.append((makespan_s, starts))
            yield "lattice", order, makespan_s
            if time.monotonic() > deadline:
                break
        self.lattices.sort(key=lambda item: item[0])
        for order in repeated:
            if time.monotonic() > deadline:
                break
            if (justified := self.graph.justified(order)) is not None:
                yield "justified lattice", *justified

    def step(self) -> tuple[str, Order, float] | None:
        """One more list, with its kind; None where it comes to no end."""
        rng = self.rng
        if not self.plain and self.lattices and rng.random() < BY_LATTICE:
            return self._justified("lattice", self._by_lattice())
        if self.plain:
            block = self.plain.pop(0)
        elif len(self.pool) < POOL or rng.random() < FRESH:
            block = draw_block(self.chunks, rng)
        else:
            block = mutate_block(rng.choice(self.pool[: POOL // 2])[1], rng)
        starts, period_s = block_starts(self.graph.problem, block)
        found = self.graph.listed(
            self.graph.periodic(starts, period_s),
            patience=block.patience,
            in_order=block.in_order,
            thrift_s=block.thrift * period_s,
        )
        if found is not None and (len(self.pool) < POOL or found[1] < self.pool[-1][0]):
            self.pool.append((found[1], block))
            self.pool.sort(key=lambda item: item[0])
            del self.pool[POOL:]
        return self._justified("block", found)

    def _by_lattice(self) -> tuple[Order, float] | None:
        rng = self.rng
        starts = self.lattices[int(len(self.lattices) * rng.random() ** 2)][1]
        period_s = max(self.graph.problem.work_s)
        return self.graph.listed(
            self.graph.periodic(starts * period_s, period_s),
            patience=rng.choice((0.0, 1.0)),
            in_order=rng.random() < 0.8,
            thrift_s=rng.choice(THRIFTS) * period_s,
        )

    def _justified(self, kind: str, found: tuple[Order, float] | None) -> tuple[str, Order, float] | None:
        """Of lattices mostly, as they gain most."""
        if found is None:
            return None
        if self.rng.random() < JUSTIFIED[kind]:
            justified = self.graph.justified(found[0])
            return (kind, *found) if justified is None else (f"justified {kind}", *justified)
        return (kind, *found)
