"""Exact elimination of what the pairwise reductions leave: bucket elimination over tables of several variables.

A variable is removed by adding up all tables that mention it and taking the least over its options, which leaves a
table over its neighbours (Dechter 1999, "Bucket elimination: a unifying framework for reasoning", section 4). The work
is exponential in the width of the order only; the order is greedy, the smallest next table first, and whoever asks is
told beforehand whether the tables stay small enough.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TABLE = 1 << 22  # entries of the largest table
MAX_WORK = 1 << 26  # entries of all tables


@dataclass
class Factor:
    """A cost over several variables: one axis of the table for each, in the order of scope."""

    scope: tuple[int, ...]
    table: np.ndarray


def plan_order(
    sizes: Mapping[int, int], neighbours: Mapping[int, Sequence[int]], most: int = MAX_WORK
) -> list[int] | None:
    """An order of elimination with no more than `most` entries in all tables, or None. sizes: options of each
    variable."""
    around = {u: set(vs) for u, vs in neighbours.items()}
    weight = {u: math.prod(sizes[v] for v in vs) for u, vs in around.items()}
    order, work = [], 0
    waiting = [(weight[u] * sizes[u], u) for u in around]
    heapq.heapify(waiting)
    while around:
        table, u = heapq.heappop(waiting)
        if u not in around or table != weight[u] * sizes[u]:  # its table has changed since
            continue
        work += table
        if table > MAX_TABLE or work > most:
            return None
        order.append(u)
        touched = around.pop(u)
        for v in touched:
            around[v] |= touched
            around[v] -= {u, v}
        for v in touched:
            weight[v] = math.prod(sizes[w] for w in around[v])
            heapq.heappush(waiting, (weight[v] * sizes[v], v))
    return order


def eliminate(order: Sequence[int], factors: Sequence[Factor]) -> tuple[float, dict[int, int]]:
    """(least sum of the factors, an option of each variable that reaches it)."""
    pool = dict(enumerate(factors))
    made = len(pool)
    holding: dict[int, list[int]] = defaultdict(list)  # variable -> the factors that mention it, in the order made
    for index, factor in pool.items():
        for v in factor.scope:
            holding[v].append(index)
    constant, trail = 0.0, []
    for u in order:
        mine = [pool.pop(index) for index in holding[u] if index in pool]
        scope = tuple(dict.fromkeys([u, *(v for f in mine for v in f.scope)]))
        total = _sum(mine, scope)
        trail.append((u, scope[1:], total.argmin(axis=0)))
        least = total.min(axis=0)
        if scope[1:]:
            pool[made] = Factor(scope[1:], least)
            for v in scope[1:]:
                holding[v].append(made)
            made += 1
        else:
            constant += float(least)
    choice: dict[int, int] = {}
    for u, others, best in reversed(trail):
        choice[u] = int(best[tuple(choice[v] for v in others)])
    return constant, choice


def _sum(factors: Sequence[Factor], scope: tuple[int, ...]) -> np.ndarray:
    at = {v: i for i, v in enumerate(scope)}
    total: np.ndarray | None = None
    for factor in sorted(factors, key=lambda f: f.table.size):
        order = sorted(range(len(factor.scope)), key=lambda i: at[factor.scope[i]])
        shape = [1] * len(scope)
        for v, size in zip(factor.scope, factor.table.shape, strict=True):
            shape[at[v]] = size
        part = factor.table.transpose(order).reshape(shape)
        total = part if total is None else total + part
    assert total is not None
    return total
