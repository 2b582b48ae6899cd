"""Proven optima against every order there is, repeated steady states, and ends annealed around them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import cells

from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.schedules import loop_placement, v_placement
from shardwright.schedules.bounds import lower_bound
from shardwright.schedules.graph import OrderGraph
from shardwright.schedules.native import binding as native
from shardwright.schedules.problem import PipelineProblem, problem_of_shares
from shardwright.schedules.synthesis.annealing import anneal
from shardwright.schedules.synthesis.exact import common_unit, solve
from shardwright.schedules.synthesis.initial_orders import library_orders
from shardwright.schedules.synthesis.steady_state import MULTIPLE, lengthened, repeats
from shardwright.schedules.synthesis.synthesize import synthesize


def every_row(graph: OrderGraph, rank: int) -> Iterator[np.ndarray]:
    """Every order of a rank's nodes within its memory, microbatches in any turn."""
    m, num_stages = graph.m, graph.num_stages
    todo = {(stage, i): 0 for stage in graph.problem.stages_of(rank) for i in range(m)}  # kinds done
    row: list[int] = []

    def extend(held: float) -> Iterator[np.ndarray]:
        if len(row) == 3 * len(todo):
            yield np.array(row, dtype=np.int32)
        for (stage, i), kind in todo.items():
            if kind == 3:
                continue
            node = (kind * num_stages + stage) * m + i
            if held + graph.change[node] <= graph.limit[rank]:
                todo[stage, i] = kind + 1
                row.append(node)
                yield from extend(held + graph.change[node])
                row.pop()
                todo[stage, i] = kind

    return extend(0.0)


def shortest_s(graph: OrderGraph) -> float:
    """By trying everything."""
    rows = [list(every_row(graph, rank)) for rank in range(graph.problem.num_ranks)]
    return min(graph.makespan_s(list(order)) for order in itertools.product(*rows))


def uneven(place: tuple[int, ...], num_ranks: int, count: int, seed: int, *, share: float) -> PipelineProblem:
    """Stages of all sizes; share: of the microbatches that a rank's memory holds, one at least."""
    rng = random.Random(seed)
    stages = tuple(
        StageTimes(*(rng.choice([0.5, 1.0, 1.3, 2.0]) for _ in range(3)), activation_bytes=rng.choice([3, 5, 1003]))
        for _ in place
    )
    room = [sum(stages[s].activation_bytes for s, rank in enumerate(place) if rank == r) for r in range(num_ranks)]
    limits = tuple(max(1.0, share * count) * most for most in room)
    return PipelineProblem(count, place, stages, (Hop(0.1, 0.3, 0.05, 0.0),) * (len(place) - 1), limits)


PROBLEMS = [
    problem_of_shares(2, loop_placement(2, 1), (1.0, 1.1, 0.7), 0.05, memory_limit=2),
    problem_of_shares(2, loop_placement(2, 1), (1.0, 0.3, 2.0), 0.4, stage_extra=(0.1, 0.3), memory_limit=1),
    problem_of_shares(2, loop_placement(2, 1), (0.7, math.pi / 3, math.e / 4), 0.1414213, memory_limit=1),
    problem_of_shares(2, loop_placement(2, 1), (1.0, 1.0, 0.0), 0.05, memory_limit=1),
    problem_of_shares(1, v_placement(2), (1.0, 1.4, 0.6), 0.1),
    uneven(loop_placement(2, 1), 2, 2, 1, share=0.75),
    uneven(loop_placement(2, 1), 2, 2, 2, share=0.5),
    uneven(v_placement(2), 2, 1, 3, share=1.0),
    uneven((0,), 1, 3, 4, share=0.7),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_optimum_is_that_of_every_order(problem):
    """To a unit where no unit divides all times."""
    graph = OrderGraph(problem)
    least_s = shortest_s(graph)
    solved = solve(graph, None, 3 * least_s, 0.0, time_limit_s=20.0)
    assert solved.order is not None and graph.fits(solved.order)
    assert least_s * (1 - 1e-9) <= solved.makespan_s <= least_s * (1 + 1e-3)
    assert least_s * (1 - 1e-3) <= solved.bound_s <= least_s * (1 + 1e-9)


@pytest.mark.parametrize("problem", cells(PROBLEMS, PROBLEMS[2::3]))
@pytest.mark.parametrize("longer", [0.0, 2e-6, 3e-5])
def test_no_known_order_lifts_the_bound_above_the_optimum(problem, longer):
    graph = OrderGraph(problem)
    least_s = shortest_s(graph)
    order = solve(graph, None, 3 * least_s, 0.0, time_limit_s=20.0).order
    again = solve(graph, order, least_s * (1 + longer), lower_bound(problem), time_limit_s=20.0)
    assert again.bound_s <= least_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("times", "transfer_s", "memory", "optimum_s"),
    [((1.0, 1.1, 0.7), 0.05, 2, 41.6), ((1.0, 1.4, 0.6), 0.1, 2, 47.0), ((1.0, 1.0, 1.0), 0.0, 2, 41.0)],
)
def test_small_pipelines_are_proven_optimal(times, transfer_s, memory, optimum_s):
    problem = problem_of_shares(8, loop_placement(4, 1), times, transfer_s, memory_limit=memory)
    found = synthesize([problem], time_limit_s=10.0)
    assert found.makespan_s == pytest.approx(optimum_s, abs=1e-9)
    assert found.gap_fraction == pytest.approx(0.0, abs=1e-9)


def test_what_is_shorter_than_the_known_order_is_found():
    graph = OrderGraph(problem_of_shares(4, v_placement(2), (1.0, 1.0, 1.0), memory_limit=2))
    known = max((order for _, order in library_orders(graph)), key=graph.makespan_s)
    known_s = graph.makespan_s(known)
    solved = solve(graph, known, known_s, 0.0, time_limit_s=5.0)
    assert solved.order is not None and solved.makespan_s < known_s


def test_without_or_tools_nothing_is_proven(monkeypatch):
    problem = problem_of_shares(4, v_placement(4), (1.0, 1.4, 0.6), memory_limit=2)
    for executable in ("/nowhere/python", "/bin/echo", None):
        monkeypatch.setattr("sys.executable", executable)
        assert solve(OrderGraph(problem), None, 40.0, 7.0, time_limit_s=1.0) is None
    found = synthesize([problem], time_limit_s=1.5)
    assert found.makespan_s > found.bound_s == lower_bound(problem)


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([0.5, 0.55, 0.35, 0.05], 0.05),
        ([1.0, 0.0, 3.0], 1.0),
        ([0.0], 1.0),
        ([0.1, 0.2, 0.7], 0.1),
        ([1.0, math.pi], None),
    ],
)
def test_common_units(values, unit):
    assert common_unit(values) == (None if unit is None else pytest.approx(unit, rel=1e-6))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**6))
def test_repeated_steady_states_are_complete_and_hold_no_more(p, v, seed):
    rng = random.Random(seed)
    times = tuple(rng.choice([0.5, 1.0, 1.3]) for _ in range(3))
    place = rng.choice([loop_placement(p, v), v_placement(p, v)])
    short, long = (
        OrderGraph(problem_of_shares(count, place, times, rng.choice([0.0, 0.1])))
        for count in (2 * p + 3, 2 * p + 3 + 2 * MULTIPLE)
    )
    for _, order in library_orders(short):
        peaks = [np.cumsum(short.change[row]).max() for row in order]
        for repeat in itertools.islice(repeats(short, order), 6):
            longer = lengthened(short, order, repeat, long)
            assert np.array_equal(np.sort(np.concatenate(longer)), np.arange(long.num_nodes))
            assert [np.cumsum(long.change[row]).max() for row in longer] == peaks


def test_ranks_without_stages_repeat_nothing():
    stages = (StageTimes(1.0, 1.0, 1.0, activation_bytes=1),) * 2
    short, long = (OrderGraph(PipelineProblem(m, (1, 2), stages, (Hop(),), (math.inf,) * 3)) for m in (6, 6 + MULTIPLE))
    order = short.by_starts(short.periodic([[0, 1], [3, 2], [5, 4]], 3.0))
    found = list(repeats(short, order))
    assert found
    for repeat in found:
        longer = lengthened(short, order, repeat, long)
        assert np.array_equal(np.sort(np.concatenate(longer)), np.arange(long.num_nodes))


def test_an_order_that_repeats_takes_one_period_more_for_each_microbatch(p=8):
    short, long = (OrderGraph(problem_of_shares(m, v_placement(p), (1.0, 1.0, 1.0))) for m in (24, 24 + 36))
    order = next(order for name, order in library_orders(short) if name == "zb_v")
    found = [long.makespan_s(lengthened(short, order, repeat, long)) for repeat in repeats(short, order)]
    assert min(found) == pytest.approx(short.makespan_s(order) + 36 * 3.0)


@pytest.mark.parametrize("compiled", [True, False])
def test_frozen_places_stay_as_they_are(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    graph = OrderGraph(problem_of_shares(12, v_placement(4), (1.0, 1.4, 0.6), 0.1, memory_limit=3))
    order = next(order for name, order in library_orders(graph) if name == "v_half")
    moved = False
    for seed, repeat in enumerate(itertools.islice(repeats(graph, order), 8)):
        found, makespan_s = anneal(graph, order, time_limit_s=0.2, seed=seed + 1, hottest_s=0.3, frozen=repeat.places)
        assert makespan_s <= graph.makespan_s(order) and graph.fits(found)
        for row, kept, places in zip(found, order, repeat.places, strict=True):
            assert row[places.start : places.stop].tolist() == kept[places.start : places.stop].tolist()
        moved |= any(not np.array_equal(row, kept) for row, kept in zip(found, order, strict=True))
    assert moved
