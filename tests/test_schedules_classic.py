"""GPipe, 1F1B, interleaved 1F1B: complete and free of deadlock for any counts; closed forms; torch reads the export."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.costmodel.actions import Action
from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.errors import ShardwrightError
from shardwright.schedules import (
    SCHEDULES,
    SEARCHED,
    PipelineSchedule,
    build_schedule,
    gpipe,
    interleaved_1f1b,
    one_f_one_b,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEARCHED), st.integers(1, 12), st.integers(1, 40), st.integers(1, 4), st.data())
def test_every_schedule_is_complete_and_finishes(name, p, m, v, data):
    v = v if v in SCHEDULES[name].chunks else SCHEDULES[name].chunks[0]
    schedule = build_schedule(name, p, m, v)
    schedule.check()
    times = st.floats(0.1, 3.0)
    stages = [StageTimes(data.draw(times), data.draw(times), 0.0) for _ in range(schedule.num_stages)]
    timeline = schedule.simulate(stages, Hop.latency(data.draw(st.floats(0, 1))))
    work = max(
        sum(m * (stages[s].forward_s + stages[s].backward_s) for s in schedule.stages_of_rank(r)) for r in range(p)
    )
    assert timeline.makespan_s >= work - 1e-9


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 8, 4), (8, 16, 3), (5, 15, 2)])
def test_interleaving_divides_the_bubble_by_the_chunks(p, m, v):
    schedule = interleaved_1f1b(p, m, v)
    timeline = schedule.simulate([StageTimes(1 / v, 1 / v, 1 / v, activation_bytes=1)] * (p * v))
    assert timeline.makespan_s == pytest.approx(3 * m + 3 * (p - 1) / v)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))
    assert timeline.peak_in_flight == [min(v * m, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]


@pytest.mark.parametrize(("p", "m", "v"), [(4, 9, 2), (4, 6, 2), (8, 13, 2), (4, 3, 2), (3, 1, 3), (8, 23, 4)])
def test_interleaving_takes_any_number_of_microbatches_and_still_beats_1f1b(p, m, v):
    schedule = interleaved_1f1b(p, m, v)
    schedule.check()
    ours = schedule.simulate([StageTimes(1 / v, 1 / v, 1 / v)] * (p * v)).makespan_s
    plain = one_f_one_b(p, m).simulate([StageTimes(1.0, 1.0, 1.0)] * p).makespan_s
    assert ours <= plain + 1e-9


def test_in_flight_counts_follow_the_order():
    assert one_f_one_b(4, 8).in_flight() == {0: 4, 1: 3, 2: 2, 3: 1}
    assert gpipe(2, 5).in_flight() == {0: 5, 1: 5}


def test_torch_reads_the_csv_back():
    from torch.distributed.pipelining.schedules import _Action

    schedule = interleaved_1f1b(2, 3, 2).split_backward()
    schedule.check()
    for line, actions in zip(schedule.to_torch_csv().splitlines(), schedule.ranks, strict=True):
        read = [_Action.from_str(text) for text in line.split(",")]
        assert [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in read] == [
            (a.stage, a.kind, a.microbatch) for a in actions
        ]


def test_the_plain_json_form_is_read_back():
    schedule = interleaved_1f1b(3, 5, 2)
    again = PipelineSchedule.from_judge(schedule.to_judge())
    assert (again.ranks, again.stage_rank, again.num_chunks) == (schedule.ranks, schedule.stage_rank, 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: [rows[0][1:], rows[1]],  # a forward is missing
        lambda rows: [rows[0] + rows[0][:1], rows[1]],  # one stands twice
        lambda rows: [rows[1], rows[0]],  # on the wrong ranks
        lambda rows: [rows[0][::-1], rows[1]],  # backward first
        lambda rows: [(*rows[0], Action("W", 0, 0)), rows[1]],  # a B and a W
    ],
)
def test_check_refuses_a_spoiled_schedule(spoil):
    good = one_f_one_b(2, 3)
    bad = PipelineSchedule("bad", 3, good.stage_rank, tuple(tuple(row) for row in spoil(list(good.ranks))))
    with pytest.raises(ValueError):
        bad.check()


def test_unknown_names_and_wrong_chunks_are_usage_errors_with_what_would_work():
    with pytest.raises(ShardwrightError, match="interleaved_1f1b") as caught:
        build_schedule("interleved", 2, 4, 2)
    assert caught.value.works == "--force schedule=interleaved_1f1b"
    with pytest.raises(ShardwrightError, match="takes 1 virtual"):
        build_schedule("1f1b", 2, 4, 2)
