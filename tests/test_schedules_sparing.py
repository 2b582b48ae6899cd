"""Orders that let activations go: recomputed, or copied to host memory and back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside_judge import shared_judge

from shardwright.costmodel.actions import Action
from shardwright.costmodel.simulator import Pipeline, simulate
from shardwright.costmodel.stage_times import Hop, StageTimes, StepTimes
from shardwright.schedules import PipelineSchedule, loop_placement, v_placement
from shardwright.schedules.bounds import lower_bound
from shardwright.schedules.graph import OrderGraph
from shardwright.schedules.problem import PipelineProblem, problem_of_shares
from shardwright.schedules.schedule import SPARING
from shardwright.schedules.synthesis.recompute_offload import Sparing, spared_order, without_sparing
from shardwright.schedules.synthesis.synthesize import synthesize

INFINITE = float("inf")


def count(schedule: PipelineSchedule, kind: str) -> int:
    return sum(action.kind == kind for row in schedule.ranks for action in row)


def lets_go(schedule: PipelineSchedule) -> bool:
    return any(count(schedule, kind) for kind in SPARING)


def assert_valid(problem: PipelineProblem, found) -> None:
    found.schedule.check()
    timeline = found.schedule.simulate(problem.stages, problem.hops)
    assert timeline.makespan_s == pytest.approx(found.makespan_s, abs=1e-9)
    assert all(peak <= limit for peak, limit in zip(timeline.peak_bytes, problem.memory_limit, strict=True))
    assert lower_bound(problem) <= timeline.makespan_s + 1e-9 and 0.0 <= found.gap_fraction < 1.0


def random_problem(p: int, m: int, v: int, seed: int) -> PipelineProblem:
    rng = random.Random(seed)
    place = rng.choice([loop_placement(p, v), v_placement(p, v)])
    computes, copies = rng.choice([(True, False), (False, True), (True, True)])
    stages = tuple(
        StageTimes(
            rng.choice([0.5, 1.0, 1.3]),
            rng.choice([0.5, 1.0, 2.0]),
            rng.choice([0.0, 0.6, 1.0]),
            activation_bytes=100,
            recompute_bytes=rng.choice([60, 100]) if computes else 0,
            offload_bytes=rng.choice([80, 100]) if copies else 0,
            offload_s=rng.choice([0.2, 1.0]) if copies else 0.0,
        )
        for _ in place
    )
    limits = tuple(float(rng.choice([100, 200, 300]) + 40 * v) for _ in range(p))
    return PipelineProblem(m, place, stages, (Hop.latency(rng.choice([0.0, 0.1])),) * (p * v - 1), limits)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3), st.integers(0, 10**6))
def test_any_pipeline_gets_a_complete_order_within_memory_that_the_simulator_confirms(p, m, v, seed):
    problem = random_problem(p, m, v, seed)
    found = synthesize([problem], time_limit_s=0.3)
    assert found is not None
    assert_valid(problem, found)


@pytest.mark.skipif(shared_judge() is None, reason="the outside judge is not on this machine")
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 3), st.floats(1.0, 3.0), st.integers(0, 3))
def test_the_outside_judge_agrees_on_recomputation(p, m, v, memory, more):
    judge = shared_judge()
    times, transfer_s = (1.0, 1.4, 0.6), 0.1
    for place in {loop_placement(p, v), v_placement(p, v)}:
        problem = problem_of_shares(m, place, times, transfer_s, memory_limit=memory / v, recompute=True)
        found = synthesize([problem], time_limit_s=0.2)
        assert_valid(problem, found)
        theirs = judge.from_json(found.schedule.to_judge())
        judge.validate(theirs)
        judged = judge.simulate(theirs, judge.Times(*(tuple(t / v for _ in place) for t in times), transfer_s))
        assert judged["makespan"] == pytest.approx(found.makespan_s, abs=1e-9)
        assert judged["peak_mem"] <= memory / v + 1e-6
        again = PipelineSchedule.from_judge(found.schedule.to_judge())
        assert again.ranks == found.schedule.ranks


@pytest.mark.parametrize("place", [loop_placement(8, 1), v_placement(8)])
def test_letting_go_beats_waiting_for_memory(place):
    """At a quarter of 1F1B's memory."""
    plain = problem_of_shares(16, place, (1.0, 1.0, 1.0), memory_limit=2)
    kept = synthesize([plain], time_limit_s=0.7)
    for offer in ({"recompute": True}, {"offload_s": 0.5}):
        problem = problem_of_shares(16, place, (1.0, 1.0, 1.0), memory_limit=2, **offer)
        found = synthesize([problem], time_limit_s=1.0)
        assert_valid(problem, found)
        assert found.makespan_s < 0.85 * kept.makespan_s
        assert count(found.schedule, "R" if "recompute" in offer else "O") > 0


def test_where_memory_suffices_everything_is_kept():
    problem = problem_of_shares(16, v_placement(4), (1.0, 1.0, 1.0), memory_limit=8, recompute=True, offload_s=0.1)
    found = synthesize([problem], time_limit_s=2.0)
    assert found.gap_fraction == pytest.approx(0.0) and not lets_go(found.schedule)


def test_a_rank_must_hold_one_activation_and_what_is_left_of_the_others():
    for offer in ({"recompute": True}, {"offload_s": 0.5}):
        short = problem_of_shares(4, v_placement(2), (1.0, 1.0, 1.0), memory_limit=0.4, **offer)
        assert lower_bound(short) == INFINITE and synthesize([short]) is None
        enough = problem_of_shares(4, v_placement(2), (1.0, 1.0, 1.0), memory_limit=0.5, **offer)
        found = synthesize([enough], time_limit_s=0.5)
        assert_valid(enough, found)


WAYS = (("F", "I", "W"), ("F", "R", "I", "W"), ("F", "O", "L", "I", "W"))


def every_row(problem: PipelineProblem, rank: int) -> Iterator[tuple[Action, ...]]:
    """Every order of a rank's actions, letting go what is offered, within its memory."""
    stages, limit = problem.stages, problem.memory_limit[rank]
    places = [(stage, i) for stage in problem.stages_of(rank) for i in range(problem.num_microbatches)]
    row: list[Action] = []

    def change(kind: str, stage: StageTimes, way: tuple[str, ...]) -> float:
        once = stage.activation_bytes - (stage.recompute_bytes if "R" in way else 0)
        moved = {"F": once, "R": stage.recompute_bytes, "O": -stage.offload_bytes, "L": stage.offload_bytes}
        return -stage.activation_bytes if kind == "W" else moved.get(kind, 0.0)

    def extend(ways: tuple, at: tuple[int, ...], held: float) -> Iterator[tuple[Action, ...]]:
        if all(done == len(way) for done, way in zip(at, ways, strict=True)):
            yield tuple(row)
        for k, (way, done) in enumerate(zip(ways, at, strict=True)):
            if done < len(way):
                more = change(way[done], stages[places[k][0]], way)
                if held + more <= limit:
                    row.append(Action(way[done], *places[k]))
                    yield from extend(ways, (*at[:k], done + 1, *at[k + 1 :]), held + more)
                    row.pop()

    offered = [way for way in WAYS if "R" not in way or stages[0].recompute_bytes]
    offered = [way for way in offered if "O" not in way or stages[0].offload_bytes]
    for ways in itertools.product(offered, repeat=len(places)):
        yield from extend(ways, (0,) * len(places), 0.0)


@pytest.mark.parametrize(
    "problem",
    [
        problem_of_shares(2, (0, 1), (1.0, 1.0, 1.0), memory_limit=1, recompute=True),
        problem_of_shares(2, (0, 1), (0.3, 1.4, 0.6), 0.1, memory_limit=1, recompute=True),
        problem_of_shares(2, (0, 1), (2.0, 0.5, 0.5), memory_limit=1, recompute=True),
        problem_of_shares(2, (0, 1), (1.0, 1.0, 1.0), memory_limit=1, offload_s=0.3),
        problem_of_shares(1, v_placement(2), (1.0, 1.0, 1.0), memory_limit=0.5, recompute=True),
    ],
)
def test_the_shortest_of_every_order_is_found(problem):
    rows = [list(every_row(problem, rank)) for rank in range(problem.num_ranks)]
    best = INFINITE
    for ranks in itertools.product(*rows):
        try:
            pipeline = Pipeline(ranks, [problem.stage_rank], problem.num_microbatches)
            timeline = simulate(pipeline, StepTimes(problem.stages, problem.hops), with_memory=False)
        except RuntimeError:
            continue
        best = min(best, timeline.makespan_s)
    assert lower_bound(problem) <= best + 1e-9
    found = synthesize([problem], time_limit_s=0.8)
    assert_valid(problem, found)
    assert found.makespan_s == pytest.approx(best, abs=1e-9)
    assert lets_go(found.schedule)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(2, 8), st.integers(1, 2), st.integers(0, 10**6))
def test_copies_take_their_turns_and_backwards_wait_for_them(p, m, v, seed):
    """Starts by the definition, one action at a time, in Python and in C."""
    problem = random_problem(p, m, v, seed)
    stages = tuple(replace(s, recompute_bytes=50, offload_bytes=50, offload_s=0.7) for s in problem.stages)
    problem = replace(problem, stages=stages)
    loose = problem.keeping_all(INFINITE)
    order = synthesize([loose], time_limit_s=0.1)
    base = OrderGraph(problem)
    for way in (Sparing(1.0, 1), Sparing(), Sparing(0.3, 0, weights_first=False)):
        spared = spared_order(problem, base, base.of_actions(order.schedule.ranks), way)
        if spared is None:
            continue
        graph, own = spared
        rows = graph.actions(own)
        assert [sorted(row) for row in without_sparing(rows)] == [sorted(row) for row in order.schedule.ranks]
        in_python = max(graph.ends([row.tolist() for row in own])[1])
        assert in_python == pytest.approx(graph.makespan_s(own), abs=1e-9)
        assert in_python == pytest.approx(by_definition(problem, rows), abs=1e-9)
        schedule = PipelineSchedule("let go", m, problem.stage_rank, tuple(map(tuple, rows)))
        schedule.check()
        timeline = schedule.simulate(problem.stages, problem.hops)
        assert timeline.makespan_s == pytest.approx(in_python, abs=1e-9)
        assert all(peak <= limit for peak, limit in zip(timeline.peak_bytes, problem.memory_limit, strict=True))


def by_definition(problem: PipelineProblem, rows: list[list[Action]]) -> float:
    """Relaxed until nothing moves."""
    stages, last = problem.stages, problem.num_stages - 1
    away = {action[1:] for row in rows for action in row if action.kind == "O"}
    end: dict[tuple, float] = {action: 0.0 for row in rows for action in row}
    for kind, source in (("out", "F"), ("in", "L")):
        end |= {(kind, *a[1:]): 0.0 for row in rows for a in row if a.kind == source and a[1:] in away}
    seconds = {"I": "backward_input_s", "W": "backward_weight_s", "F": "forward_s", "R": "forward_s"}
    for _ in range(len(end) + 1):
        before = dict(end)
        for row in rows:
            clock = 0.0
            free = {"out": 0.0, "in": 0.0}
            for kind, stage, i in row:
                start = clock
                if kind == "F" and stage:
                    start = max(start, end["F", stage - 1, i] + problem.forward_hop_s(stage - 1))
                if kind == "I":
                    came = end["I", stage + 1, i] + problem.backward_hop_s(stage + 1) if stage < last else 0.0
                    start = max(start, came, end.get(("in", stage, i), 0.0))
                if kind == "O":
                    start = max(start, end["out", stage, i])
                clock = start + (getattr(stages[stage], seconds[kind]) if kind in seconds else 0.0)
                end[kind, stage, i] = clock
                link = {"F": "out", "L": "in"}.get(kind)
                if link and (stage, i) in away:
                    free[link] = max(free[link], clock) + stages[stage].offload_s
                    end[link, stage, i] = free[link]
        if end == before:
            return max(end[action] for row in rows for action in row)
    raise AssertionError("never at rest")


@pytest.mark.parametrize(
    "row",
    [
        "0F0 0I0 0R0 0W0",
        "0R0 0F0 0I0 0W0",
        "0F0 0O0 0I0 0W0",
        "0F0 0L0 0O0 0I0 0W0",
        "0F0 0O0 0L0 0R0 0I0 0W0",
        "0F0 0I0 0O0 0L0 0W0",
    ],
)
def test_what_is_let_go_must_come_back_in_time(row):
    actions = tuple(Action(text[1], 0, 0) for text in row.split())
    with pytest.raises(ValueError, match="stage 0 microbatch 0"):
        PipelineSchedule("wrong", 1, (0,), (actions,)).check()


def test_an_f_that_keeps_nothing_is_read_as_it_is_written():
    document = {"p": 1, "m": 1, "v": 1, "stage_rank": [0], "ranks": [[["F", 0, 0, 0, 0], "0R0", "0I0", "0W0"]]}
    schedule = PipelineSchedule.from_judge(document)
    schedule.check()
    assert schedule.to_judge()["ranks"] == document["ranks"]
    for entry in (["F", 0, 0, 0, 0.5], ["Q", 0, 0, 0, 0], ["F", 0, 0]):
        with pytest.raises(ValueError):
            PipelineSchedule.from_judge({**document, "ranks": [[entry]]})


def test_copies_may_take_longer_than_all_the_work():
    problem = problem_of_shares(4, v_placement(2), (1.0, 1.0, 1.0), memory_limit=0.5, offload_s=20.0)
    found = synthesize([problem], time_limit_s=0.5)
    assert_valid(problem, found)
    assert count(found.schedule, "O") > 0
