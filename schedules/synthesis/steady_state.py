"""Orders for many microbatches from orders for fewer: the steady state repeated.

A run of a rank's actions in which each of its stages has each kind just `count` times is a building block as it really
runs, between a warm-up and a cool-down of the true times. Running it again and again before what follows takes no more
memory than once. Each rank repeats the run nearest to one point in time; microbatches are alike, so that each stage's
are numbered as they come.

The ends around the steady state are annealed with the runs frozen, now around one run and now around another: what they
gain, the long order gains.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..graph import Order, OrderGraph
from .pool import Candidate, Starts, annealed

COUNTS = (1, 2, 3, 4)  # microbatches in a run
MULTIPLE = 12  # of each of them
MAX_POINTS = 40
LEAST = (1.5, 1.0)  # microbatches of the short order, of the ranks
MOST = 0.7  # and of the long order's
TURNS, OTHERS, POOL = 20, 8, 30  # anneals of ends, runs tried after each, and kept


@dataclass(frozen=True)
class Repeat:
    """places: of each rank's run in its row. count: the microbatches in it."""

    places: tuple[range, ...]
    count: int


def repeats(graph: OrderGraph, order: Order) -> Iterator[Repeat]:
    """None where some rank never repeats itself."""
    starts = graph.starts(order)
    rows = [row // graph.m for row in order]
    for count in COUNTS:
        lengths = [count * len(np.unique(row)) for row in rows]
        runs = [_runs(row, count) if len(row) else np.zeros(1, dtype=int) for row in rows]
        if not all(map(len, runs)):
            continue
        begins = [starts[row[run]] if len(row) else np.zeros(1) for row, run in zip(order, runs, strict=True)]
        chosen = {
            tuple(int(run[np.abs(begin - point_s).argmin()]) for run, begin in zip(runs, begins, strict=True)): None
            for point_s in np.linspace(0.0, starts.max(), MAX_POINTS)
        }
        for places in chosen:
            yield Repeat(tuple(range(at, at + n) for at, n in zip(places, lengths, strict=True)), count)


def _runs(row: np.ndarray, count: int) -> np.ndarray:
    """Where runs begin that have each value of the row `count` times."""
    values = np.unique(row)
    before = np.vstack([np.zeros(len(values), dtype=int), np.cumsum(row[:, None] == values, axis=0)])
    length = count * len(values)
    return np.flatnonzero((before[length:] - before[:-length] == count).all(axis=1))


def lengthened(short: OrderGraph, order: Order, repeat: Repeat, long: OrderGraph) -> Order:
    """An order of `long`, the same pipeline with more microbatches, a multiple of the run's."""
    times = (long.m - short.m) // repeat.count
    return [_repeated(row // short.m, run, times, long.m) for row, run in zip(order, repeat.places, strict=True)]


def _repeated(row: np.ndarray, run: range, times: int, num_microbatches: int) -> np.ndarray:
    """The run so many times more, as nodes."""
    longer = np.concatenate([row[: run.stop], np.tile(row[run.start : run.stop], times), row[run.stop :]])
    numbered = np.empty_like(longer)
    numbered[np.argsort(longer, kind="stable")] = np.arange(len(longer)) % num_microbatches
    return (longer * num_microbatches + numbered).astype(np.int32)


def fewer_microbatches(many: int, num_ranks: int) -> int:
    """Of an order to repeat the steady state of; 0 where that is not worth it."""
    for share in LEAST:
        least = int(share * num_ranks)
        fewer = least + (many - least) % MULTIPLE
        if 0 < fewer <= MOST * many:
            return fewer
    return 0


def offer_repeats(searches: Sequence[Starts], shorter: Sequence[Candidate], until: float, seed: int) -> None:
    """Long orders for each placement. shorter: orders for fewer microbatches, best first."""
    long_of = {search.graph.problem.stage_rank: search for search in searches}
    rng, turn_s = random.Random(seed), (until - time.monotonic()) / TURNS
    pool: list[tuple[float, Candidate, Repeat]] = []

    def add(short: Candidate, chosen: Iterable[Repeat]) -> None:
        search = long_of[short.graph.problem.stage_rank]
        for repeat in chosen:
            order = lengthened(short.graph, short.order, repeat, search.graph)
            makespan_s = search.graph.makespan_s(order)
            search.offer("repeated", order, makespan_s)
            pool.append((makespan_s, short, repeat))
        pool.sort(key=lambda item: item[0])
        del pool[POOL:]

    for short in shorter:
        if time.monotonic() < until:
            add(short, repeats(short.graph, short.order))
    while pool and (now := time.monotonic()) < until:
        _, short, repeat = pool[int(len(pool) * rng.random() ** 2)]
        ended = annealed(short, min(until, now + turn_s), rng, repeat.places)
        others = list(repeats(ended.graph, ended.order))
        add(ended, [repeat, *rng.sample(others, min(len(others), OTHERS))])
