"""Synthesized schedules: complete, within memory, never below the bound, never behind the library."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside_judge import shared_judge

from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.schedules import SCHEDULES, build_schedule, loop_placement, v_placement
from shardwright.schedules.bounds import lower_bound
from shardwright.schedules.graph import OrderGraph
from shardwright.schedules.native import binding as native
from shardwright.schedules.problem import PipelineProblem, problem_of_shares
from shardwright.schedules.synthesis.annealing import anneal
from shardwright.schedules.synthesis.initial_orders import library_orders
from shardwright.schedules.synthesis.lattices import Lattices
from shardwright.schedules.synthesis.synthesize import synthesize

needs_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in ("cc", "gcc", "clang")), reason="no C compiler"
)


def random_problem(p: int, m: int, v: int, rng: random.Random, limited: bool = True) -> PipelineProblem:
    """Random times, transfers and memory, on a loop, a V or stages placed at random."""
    num_stages = p * v
    shuffled = [rng.randrange(p) for _ in range(num_stages)]
    placement = rng.choice([loop_placement(p, v), v_placement(p, v), tuple(shuffled)])
    times = [0.0, 0.5, 1.0, 1.3, 2.0]
    stages = tuple(
        StageTimes(
            rng.choice(times[1:]), rng.choice(times[1:]), rng.choice(times), activation_bytes=rng.choice([50, 100])
        )
        for _ in range(num_stages)
    )
    one = rng.choice([0.0, 0.1, 0.7])
    hops = tuple(Hop.latency(one if rng.random() < 0.5 else rng.choice([0.0, 0.1, 0.7])) for _ in range(num_stages - 1))
    problem = PipelineProblem(m, placement, stages, hops, (float("inf"),) * p)
    if not limited or rng.random() < 0.3:
        return problem
    least = max(sum(stages[s].activation_bytes for s in problem.stages_of(r)) for r in range(p))
    limit = least + rng.choice([0, 50, 200, 1000])
    return PipelineProblem(m, placement, stages, hops, (float(limit),) * p)


def assert_valid(problem: PipelineProblem, found) -> None:
    """Against the simulator, the bound and, where it is on this machine, the outside judge."""
    found.schedule.check()
    timeline = found.schedule.simulate(problem.stages, problem.hops)
    assert timeline.makespan_s == pytest.approx(found.makespan_s, abs=1e-9)
    assert all(peak <= limit for peak, limit in zip(timeline.peak_bytes, problem.memory_limit, strict=True))
    assert lower_bound(problem) - 1e-9 <= found.makespan_s
    assert 0.0 <= found.gap_fraction < 1.0
    judge = shared_judge()
    sizes = {stage.activation_bytes for stage in problem.stages}
    if judge is None or len(set(problem.stage_rank)) < problem.num_ranks:
        return  # it wants work on every rank
    theirs = judge.from_json(found.schedule.to_judge())
    judge.validate(theirs)
    if len({hop.forward_latency_s for hop in problem.hops}) > 1:
        return  # it takes one transfer time
    stages, transfer_s = problem.stages, problem.hops[0].forward_latency_s if problem.hops else 0.0
    times = judge.Times(
        tuple(stage.forward_s for stage in stages),
        tuple(stage.backward_input_s for stage in stages),
        tuple(stage.backward_weight_s for stage in stages),
        transfer_s,
    )
    judged = judge.simulate(theirs, times)
    assert judged["makespan"] == pytest.approx(found.makespan_s, abs=1e-9)
    if len(sizes) == 1:
        held = [peak * theirs.v * max(sizes) for peak in judged["peak_mem_dev"]]
        assert all(one <= limit + 1e-6 for one, limit in zip(held, problem.memory_limit, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_any_pipeline_gets_a_complete_order_within_memory_that_the_simulator_confirms(p, m, v, seed):
    problem = random_problem(p, m, v, random.Random(seed))
    found = synthesize([problem], time_limit_s=0.2)
    assert found is not None
    assert_valid(problem, found)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 4),
    st.tuples(*[st.floats(0.2, 2.0)] * 3),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.floats(1.0, 16.0),
)
def test_the_outside_judge_agrees_on_shares_and_their_memory(p, m, v, times, transfer_s, memory):
    for place in {loop_placement(p, v), v_placement(p, v)}:
        problem = problem_of_shares(m, place, times, transfer_s, stage_extra=(0.15, 0.4), memory_limit=memory)
        assert_valid(problem, synthesize([problem], time_limit_s=0.1))


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3), st.integers(0, 10**6))
def test_justified_orders_fit_and_are_never_longer(p, m, v, seed):
    rng = random.Random(seed)
    graph = OrderGraph(random_problem(p, m, v, rng))
    starts = np.array([[rng.random() * 5 for _ in range(graph.num_stages)] for _ in range(3)])
    order, makespan_s = graph.listed(graph.periodic(starts, 3.0), thrift_s=rng.choice([-1.0, 0.0, 2.0]))
    better, better_s = graph.justified(order)
    assert graph.fits(better) and better_s <= makespan_s + 1e-9
    assert max(graph.ends([row.tolist() for row in better])[1]) == pytest.approx(better_s, abs=1e-9)
    assert [sorted(row) for row in better] == [sorted(row) for row in order]


def test_no_room_for_one_microbatch_is_no_schedule():
    problem = problem_of_shares(4, v_placement(2), (1.0, 1.0, 1.0), memory_limit=0.5)
    assert synthesize([problem], time_limit_s=0.1) is None


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 6), st.integers(1, 14), st.floats(0.2, 2.0), st.floats(0.2, 2.0), st.sampled_from([0.0, 0.2]))
def test_nothing_of_the_library_that_fits_is_faster(p, m, input_s, weight_s, transfer_s):
    times = (1.0, input_s, weight_s)
    placements = [loop_placement(p, 1), loop_placement(p, 2), v_placement(p)]
    problems = [problem_of_shares(m, place, times, transfer_s, memory_limit=p) for place in placements]
    found = synthesize(problems, time_limit_s=0.5)
    for name, entry in SCHEDULES.items():
        chunks = entry.chunks[0]
        if entry.directions > 1 or chunks > 2:
            continue
        schedule = build_schedule(name, p, m, chunks)
        problem = next(q for q in problems if q.stage_rank == schedule.stage_rank)
        timeline = schedule.simulate(problem.stages, problem.hops)
        if max(timeline.peak_bytes) <= problem.memory_limit[0]:
            assert found.makespan_s <= timeline.makespan_s + 1e-9, name


@pytest.mark.parametrize(
    ("placement", "times", "transfer_s", "memory", "optimum_s"),
    [
        (loop_placement(4, 1), (1.0, 1.1, 0.7), 0.05, 4, 27.2),
        (loop_placement(4, 1), (1.0, 1.4, 0.6), 0.1, 2, 47.0),
        (v_placement(4), (1.0, 1.0, 1.0), 0.0, 2, 29.5),
        (v_placement(4), (1.0, 1.1, 0.7), 0.05, 2, 31.9),
        (v_placement(4), (1.0, 1.4, 0.6), 0.1, 3, 30.3),
    ],
)
def test_optima_that_constraint_programming_proved_are_found(placement, times, transfer_s, memory, optimum_s):
    problem = problem_of_shares(8, placement, times, transfer_s, memory_limit=memory)
    found = synthesize([problem], time_limit_s=2.0)
    assert_valid(problem, found)
    assert found.makespan_s == pytest.approx(optimum_s, abs=1e-9)


def test_placements_compete():
    """A last stage that weighs more suits the loop, where it does not share a rank with the first."""
    place = {name: make(4, 2) for name, make in (("loop", loop_placement), ("v", v_placement))}
    problems = [
        problem_of_shares(8, one, (1.0, 1.0, 1.0), stage_extra=(0.15, 0.4), memory_limit=4) for one in place.values()
    ]
    assert synthesize(problems, time_limit_s=1.0).schedule.stage_rank == place["loop"]


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**6))
def test_searches_in_c_and_in_python_agree_on_every_order(p, m, v, seed):
    rng = random.Random(seed)
    graph = OrderGraph(random_problem(p, m, v, rng))
    starts = np.array([[rng.random() * 5 for _ in range(graph.num_stages)] for _ in range(3)])
    starts[1] += 10
    listed = graph.listed(graph.periodic(starts, 3.0))
    assert listed is not None
    order, makespan_s = listed
    assert graph.fits(order)
    assert max(graph.ends([row.tolist() for row in order])[1]) == pytest.approx(makespan_s, abs=1e-12)
    better, better_s = anneal(graph, order, time_limit_s=0.02, seed=seed, hottest_s=0.3)
    assert graph.fits(better) and better_s <= makespan_s + 1e-9
    assert max(graph.ends([row.tolist() for row in better])[1]) == pytest.approx(better_s, abs=1e-12)


def test_without_a_c_compiler_the_search_runs_in_python(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    problem = problem_of_shares(8, v_placement(4), (1.0, 1.4, 0.6), 0.1, memory_limit=3)
    found = synthesize([problem], time_limit_s=2.0)
    assert_valid(problem, found)
    assert found.makespan_s < 33.0


@needs_compiler
def test_the_c_searches_compile():
    assert native.library() is not None


def test_lattices_are_what_they_say(p=4):
    """Repeated, a block holds what it is said to hold, and V-Min, V-Half and ZB-V are among them."""
    problem = problem_of_shares(24, v_placement(p), (1.0, 1.0, 1.0))
    graph, lattices = OrderGraph(problem), Lattices(problem, np.random.default_rng(0))
    peaks = set()
    for index in lattices.fitting():
        order = graph.by_starts(graph.periodic(lattices.starts[index], float(lattices.period)))
        held = [np.cumsum(graph.change[row]).max() for row in order]
        assert held == list(lattices.held_bytes[index])
        peaks.add(max(held) / 2)
    assert min(peaks) <= p / 3 + 1.5 and p / 2 + 1 in peaks and p in peaks


def test_library_orders_are_those_of_their_placement():
    names = {}
    for place in (loop_placement(4, 1), loop_placement(4, 2), v_placement(4)):
        graph = OrderGraph(problem_of_shares(8, place, (1.0, 1.0, 1.0)))
        names[place] = {name for name, _ in library_orders(graph)}
    assert {"gpipe", "1f1b", "zb_h1", "zb_h2"} <= names[loop_placement(4, 1)]
    assert {"interleaved_1f1b", "breadth_first"} <= names[loop_placement(4, 2)]
    assert {"zb_v", "v_half", "v_min", "dualpipe_v", "hanayo"} <= names[v_placement(4)]
