"""The simulator agrees with the closed forms, with an independent longest-path oracle and with the outside judge."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outside_judge import shared_judge

from shardwright.costmodel.actions import Action, parse_action
from shardwright.costmodel.simulator import Deadlock, Pipeline, simulate
from shardwright.costmodel.stage_times import Hop, StageTimes, StepTimes, Tail
from shardwright.costmodel.trace import Trace, busy_seconds, mean_action_seconds, merge, to_chrome
from shardwright.schedules import gpipe, interleaved_1f1b, loop_placement, one_f_one_b, v_placement
from shardwright.schedules.schedule import PipelineSchedule


def longest_path_makespan(schedule: PipelineSchedule, stages: list[StageTimes], latency_s: float) -> float:
    """Oracle: relax start times until nothing moves. Slow and plain."""
    last = schedule.num_stages - 1
    at = {tuple(a): (r, i) for r, row in enumerate(schedule.ranks) for i, a in enumerate(row)}
    end = {key: 0.0 for key in at}

    def seconds(a):
        t = stages[a[1]]
        return {"F": t.forward_s, "I": t.backward_input_s, "W": t.backward_weight_s, "B": t.backward_s}[a[0]]

    def backward(stage, i):
        return next(key for key in (("B", stage, i), ("I", stage, i)) if key in at)

    for _ in range(len(at) + 1):
        moved = False
        for key, (rank, index) in at.items():
            kind, stage, i = key
            before = [(tuple(schedule.ranks[rank][index - 1]), 0.0)] if index else []
            if kind == "F" and stage:
                other = ("F", stage - 1, i)
                before.append((other, latency_s if at[other][0] != rank else 0.0))
            if kind in "BI" and stage < last:
                other = backward(stage + 1, i)
                before.append((other, latency_s if at[other][0] != rank else 0.0))
            value = max((end[k] + c for k, c in before), default=0.0) + seconds(key)
            if value > end[key] + 1e-12:
                end[key], moved = value, True
        if not moved:
            return max(end.values())
    raise AssertionError("cycle")


def random_schedule(p: int, m: int, v: int, rng: random.Random) -> PipelineSchedule:
    """A random feasible order, by random list scheduling."""
    placement = rng.choice([loop_placement, v_placement])(p, v)
    ready = [[] for _ in range(p)]
    ready[placement[0]] += [Action("F", 0, i) for i in range(m)]
    ranks = [[] for _ in range(p)]
    while any(ready):
        rank = rng.choice([r for r in range(p) if ready[r]])
        kind, stage, i = action = ready[rank].pop(rng.randrange(len(ready[rank])))
        ranks[rank].append(action)
        if kind == "F" and stage < p * v - 1:
            ready[placement[stage + 1]].append(Action("F", stage + 1, i))
        elif kind == "F":
            ready[rank].append(Action(rng.choice("BI"), stage, i))
        else:
            if kind == "I":
                ready[rank].append(Action("W", stage, i))
            if kind in "BI" and stage:
                ready[placement[stage - 1]].append(Action(rng.choice("BI"), stage - 1, i))
    return PipelineSchedule("random", m, placement, tuple(map(tuple, ranks)))


def random_times(n: int, rng: random.Random) -> list[StageTimes]:
    return [StageTimes(*(rng.choice([0.5, 1.0, 1.3, 2.0]) for _ in range(3)), activation_bytes=100) for _ in range(n)]


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize("p", [1, 2, 3, 8])
@pytest.mark.parametrize("m", [1, 2, 8, 19])
def test_bubble_of_gpipe_and_1f1b_is_the_closed_form(make, p, m):
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=1)] * p
    timeline = make(p, m).simulate(stages)
    assert timeline.makespan_s == pytest.approx(3.0 * (m + p - 1))
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
    held = [m] * p if make is gpipe else [min(m, p - r) for r in range(p)]
    assert timeline.peak_bytes == held == timeline.peak_in_flight


def test_gpipe_pays_each_transfer_once_in_each_direction():
    stages = [StageTimes(1.0, 1.0, 1.0)] * 4
    assert gpipe(4, 6).simulate(stages, Hop.latency(0.25)).makespan_s == pytest.approx(3 * 9 + 2 * 3 * 0.25)


def test_a_busy_link_delays_the_next_transfer():
    """Two ranks, transfers slower than compute: the link, not the compute, sets the pace."""
    stages = [StageTimes(1.0, 1.0, 0.0), StageTimes(1.0, 1.0, 0.0)]
    timeline = gpipe(2, 4).simulate(stages, Hop(forward_occupancy_s=3.0))
    # a forward, four transfers of 3 after each other, a forward, four backwards, and the first stage's last backward
    assert timeline.makespan_s == pytest.approx(1 + 4 * 3 + 1 + 4 + 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.7]))
def test_any_feasible_order_gets_the_longest_path(p, m, v, seed, latency_s):
    rng = random.Random(seed)
    schedule, stages = random_schedule(p, m, v, rng), random_times(p * v, rng)
    schedule.check()
    timeline = schedule.simulate(stages, Hop.latency(latency_s))
    assert timeline.makespan_s == pytest.approx(longest_path_makespan(schedule, stages, latency_s), abs=1e-9)
    for row_starts, row_ends in zip(timeline.starts, timeline.ends, strict=True):
        assert all(start >= end - 1e-12 for start, end in zip(row_starts[1:], row_ends, strict=False))


@pytest.mark.skipif(shared_judge() is None, reason="the outside judge is not on this machine")
def test_the_outside_judge_agrees():
    judge = shared_judge()
    rng = random.Random(0)
    for _ in range(150):
        p, v, m = rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 9)
        kind = rng.choice(["random", "gpipe", "1f1b", "interleaved"])
        schedule = {
            "random": lambda p=p, m=m, v=v: random_schedule(p, m, v, rng),
            "gpipe": lambda p=p, m=m, v=v: gpipe(p, m),
            "1f1b": lambda p=p, m=m, v=v: one_f_one_b(p, m),
            "interleaved": lambda p=p, m=m, v=v: interleaved_1f1b(p, m, v),
        }[kind]()
        stages = random_times(schedule.num_stages, rng)
        latency_s = rng.choice([0.0, 0.1, 0.7])
        theirs = judge.from_json(schedule.to_judge())
        judge.validate(theirs)
        times = judge.Times(*(tuple(getattr(s, k) for s in stages) for k in
                              ("forward_s", "backward_input_s", "backward_weight_s")), latency_s)  # fmt: skip
        result = judge.simulate(theirs, times)
        timeline = schedule.simulate(stages, Hop.latency(latency_s))
        assert timeline.makespan_s == pytest.approx(result["makespan"], abs=1e-9)
        assert timeline.bubble_fraction == pytest.approx(result["bubble_frac"], abs=1e-9)
        held = [peak / 100 / schedule.num_chunks for peak in timeline.peak_bytes]
        assert held == pytest.approx(result["peak_mem_dev"])


def test_a_wrong_order_is_reported_as_a_deadlock_with_the_waiting_actions():
    ranks = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]]
    with pytest.raises(Deadlock) as caught:
        simulate(Pipeline(ranks, [(0, 1)], 1), StepTimes([StageTimes(1, 1, 1)] * 2))
    assert caught.value.waiting == {0: Action("B", 0, 0), 1: Action("B", 1, 0)}


def test_once_a_step_reductions_show_only_where_nothing_hides_them():
    """The reduction of the second chunk runs beside the first chunk's backwards."""
    stages = [StageTimes(1.0, 1.0, 1.0, reduce_s=0.5)] * 4
    schedule = interleaved_1f1b(2, 4, 2)
    alone = schedule.simulate([StageTimes(1.0, 1.0, 1.0)] * 4).makespan_s
    timeline = schedule.simulate(stages, with_events=True)
    assert timeline.makespan_s == pytest.approx(alone + 0.5)
    assert timeline.exposed_comm_s == pytest.approx([0.5, 0.5])
    assert sum(event.kind == "reduce" for event in timeline.extra) == 4
    # one that is longer than the other chunk's backwards holds up the next
    slow = [StageTimes(1.0, 1.0, 1.0, reduce_s=50.0)] * 4
    assert gpipe(1, 2).simulate(slow[:1]).makespan_s == pytest.approx(2 * 3 + 50)
    assert schedule.simulate(slow).makespan_s > alone + 50.0


def test_the_tail_waits_for_all_ranks_under_clipping():
    stages = [StageTimes(1.0, 1.0, 1.0)] * 2
    tails = [Tail(optimizer_s=5.0), Tail(optimizer_s=1.0)]
    schedule = one_f_one_b(2, 2)
    assert schedule.simulate(stages, tails=tails).makespan_s == pytest.approx(9 + 5)
    tails = [Tail(optimizer_s=1.0), Tail(optimizer_s=3.0)]
    assert schedule.simulate(stages, tails=tails).makespan_s == pytest.approx(7 + 3)
    assert schedule.simulate(stages, tails=tails, wait_for_all=True).makespan_s == pytest.approx(9 + 3)


def test_memory_follows_recompute_and_split_backward():
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=100, recompute_bytes=90)]
    ranks = [[Action(k, 0, i) for k, i in (("F", 0), ("F", 1), ("R", 0), ("B", 0), ("R", 1), ("I", 1), ("W", 1))]]
    assert simulate(Pipeline(ranks, [(0,)], 2), StepTimes(stages)).peak_bytes == [20 + 90]
    split = [StageTimes(1.0, 1.0, 1.0, activation_bytes=10)]
    ranks = [[Action(k, 0, i) for k, i in (("F", 0), ("I", 0), ("F", 1), ("I", 1), ("W", 0), ("W", 1))]]
    assert simulate(Pipeline(ranks, [(0,)], 2), StepTimes(split)).peak_bytes == [20]


def test_copies_to_host_memory_run_beside_compute():
    ranks = [
        [Action(k, 0, i) for k, i in ([("F", 0), ("F", 1), ("O", 0), ("L", 0), ("I", 0), ("W", 0), ("I", 1), ("W", 1)])]
    ]
    pipeline = Pipeline(ranks, [(0,)], 2)
    copied = StageTimes(1.0, 1.0, 1.0, activation_bytes=10, offload_bytes=8, offload_s=1.5)
    timeline = simulate(pipeline, StepTimes([copied]), with_events=True)
    assert timeline.ends[0] == pytest.approx([1.0, 2.0, 2.5, 2.5, 5.0, 6.0, 7.0, 8.0])
    assert [(e.kind, e.start_s, e.end_s) for e in timeline.extra] == [("offload", 1.0, 2.5), ("load", 2.5, 4.0)]
    assert timeline.peak_bytes == [20]
    # without a time of its own a copy takes none
    assert simulate(pipeline, StepTimes([StageTimes(1.0, 1.0, 1.0)])).makespan_s == pytest.approx(6.0)


def test_64_ranks_and_512_microbatches_take_under_two_seconds():
    schedule = one_f_one_b(64, 512)
    begin = time.perf_counter()
    timeline = schedule.simulate([StageTimes(1.0, 1.4, 0.6, activation_bytes=1)] * 64, Hop.latency(0.1))
    assert time.perf_counter() - begin < 2.0
    assert timeline.peak_in_flight[0] == 64


def test_traces_of_both_kinds_share_one_file():
    timeline = one_f_one_b(2, 3).simulate([StageTimes(1.0, 1.0, 1.0)] * 2, Hop.latency(0.1), with_events=True)
    predicted = timeline.trace(model="toy")
    assert predicted.makespan_s == pytest.approx(timeline.makespan_s)
    assert busy_seconds(predicted, 0) == pytest.approx(timeline.busy_s[0])
    assert mean_action_seconds(predicted)["F", 0] == pytest.approx(1.0)
    again = Trace.from_json(predicted.to_json())
    assert again == Trace(predicted.source, predicted.events, {"model": "toy"})
    halves = [Trace("measured", tuple(predicted.of_rank(rank))) for rank in range(2)]
    assert merge(halves).events == predicted.events
    rows = to_chrome([predicted, merge(halves)])["traceEvents"]
    names = [row["args"]["name"] for row in rows if row["name"] == "process_name"]
    assert sorted(names) == ["rank 0 measured", "rank 0 predicted", "rank 1 measured", "rank 1 predicted"]
    assert sum(row["ph"] == "X" for row in rows) == 2 * len(predicted.events)


def test_actions_print_and_parse():
    assert str(Action("B", 12, 3)) == "12B3" and parse_action("12B3") == Action("B", 12, 3)
    with pytest.raises(ValueError):
        parse_action("F12")
