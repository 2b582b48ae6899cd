"""Local search on the order of actions: annealing over moves on the critical path.

An action on the critical path that starts when its neighbour on the rank ends is moved past it, or some places
further; everything else keeps its order. Moves that break memory are refused, those that close a cycle never finish and
are refused too (van Laarhoven et al., Job Shop Scheduling by Simulated Annealing, Operations Research 40(1), 1992). A
share of the moves is made for all microbatches alike: a building block changes as a whole.

annealing.c does it fast; the Python below does the same where there is no C compiler.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import numpy as np

from ..graph import INFINITE, Order, OrderGraph
from ..native import binding as native

COOLING = 100.0  # of the first to the last temperature
MAX_STEP = 24  # places that an action is moved by, at most
SLACK_S = 1e-9


def anneal(
    graph: OrderGraph,
    order: Order,
    *,
    time_limit_s: float,
    seed: int,
    hottest_s: float,
    bound_s: float = 0.0,
    repeated: float = 0.1,
    frozen: Sequence[range] = (),
) -> tuple[Order, float]:
    """(order, makespan), never worse than what it is given, which must fit and be able to finish.

    hottest_s: a move that makes the makespan this much longer is taken with probability 1/e at first. repeated: share
    of evaluated moves that are for all microbatches alike. frozen: places of each row that stay as they are; the
    graph's where none are given.
    """
    frozen = frozen or graph.frozen(order)
    settings = native.Settings(hottest_s, hottest_s / COOLING, bound_s, time_limit_s, repeated, seed)
    pipeline = graph.pipeline(order, frozen)
    found = native.anneal(pipeline, settings)
    return _anneal_in_python(graph, order, settings, frozen) if found is None else (pipeline.order(), found)


def _anneal_in_python(
    graph: OrderGraph, order: Order, settings: native.Settings, frozen: Sequence[range]
) -> tuple[Order, float]:
    rng = random.Random(settings.seed)
    rows = [row.tolist() for row in order]
    end, clocks = graph.ends(rows)
    best, current = (list(map(list, rows)), max(clocks)), max(clocks)
    began = time.monotonic()
    while best[1] > settings.bound_s * (1 + 1e-9):
        share = (time.monotonic() - began) / max(settings.time_limit_s, 1e-9)
        if share >= 1.0:
            break
        temperature_s = settings.hottest_s * (settings.coldest_s / settings.hottest_s) ** share
        pairs = [pair for pair in _critical_pairs(graph, rows, end, rng) if _free(pair, frozen)]
        if not pairs:
            break
        rank, index = rng.choice(pairs)
        kept = rows[rank]
        low, high = _segment(len(kept), index, frozen[rank]) if frozen else (0, len(kept))
        moved = _moved(kept[low:high], index - low, settings.repeated, graph.m, rng)
        rows[rank] = kept[:low] + moved + kept[high:]
        makespan_s = INFINITE
        if np.cumsum(graph.change[rows[rank]]).max() <= graph.limit[rank]:
            new_end, clocks = graph.ends(rows)
            makespan_s = max(clocks)
        if makespan_s <= current - temperature_s * math.log(1.0 - rng.random()):
            current, end = makespan_s, new_end
            if makespan_s < best[1] * (1 - 1e-12):
                best = (list(map(list, rows)), makespan_s)
        else:
            rows[rank] = kept
    return [np.array(row, dtype=np.int32) for row in best[0]], best[1]


def _free(pair: tuple[int, int], frozen: Sequence[range]) -> bool:
    rank, index = pair
    return not frozen or index + 1 < frozen[rank].start or index >= frozen[rank].stop


def _segment(length: int, index: int, frozen: range) -> tuple[int, int]:
    """The places on this side of the frozen ones."""
    return (0, frozen.start) if index < frozen.start else (frozen.stop, length)


def _critical_pairs(
    graph: OrderGraph, rows: list[list[int]], end: list[float], rng: random.Random
) -> list[tuple[int, int]]:
    """(rank, index) of neighbours index, index+1 that follow each other on one critical path for no other reason than
    their order."""
    seconds, before, own, lag, place = graph.seconds, graph.before, graph.own, graph.lag, graph.rank
    position = {node: index for row in rows for index, node in enumerate(row)}
    node = max((row[-1] for row in rows if row), key=end.__getitem__)
    pairs: list[tuple[int, int]] = []
    while True:
        start_s = end[node] - seconds[node]
        rank, index, source = int(place[node]), position[node], int(before[node])
        previous = rows[rank][index - 1] if index else -1
        by_rank = previous >= 0 and end[previous] >= start_s - SLACK_S
        by_data = source >= 0 and end[source] + lag[node] >= start_s - SLACK_S
        if start_s <= SLACK_S or not (by_rank or by_data):
            return pairs
        if by_rank and previous not in (source, *own[node].tolist()):
            pairs.append((rank, index - 1))
        node = source if by_data and (not by_rank or rng.random() < 0.5) else previous


def _moved(row: list[int], index: int, repeated: float, m: int, rng: random.Random) -> list[int]:
    """The row with one action moved past its neighbour or further, or with the same swap for all microbatches."""
    moved = list(row)
    if rng.random() >= repeated:
        step = 1
        while step < MAX_STEP and rng.random() < 0.5:
            step += 1
        if rng.random() < 0.5:
            moved.insert(max(0, index + 1 - step), moved.pop(index + 1))
        else:
            moved.insert(min(len(row) - 1, index + step), moved.pop(index))
        return moved
    (one, i), (other, j) = divmod(row[index], m), divmod(row[index + 1], m)
    at = 0
    while at + 1 < len(row):
        (a, k), (b, n) = divmod(moved[at], m), divmod(moved[at + 1], m)
        if (a, b, n - k) == (one, other, j - i):
            moved[at], moved[at + 1] = moved[at + 1], moved[at]
            at += 1
        at += 1
    return moved
