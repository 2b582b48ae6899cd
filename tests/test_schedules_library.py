"""Every schedule of the library: complete for any counts, and the closed forms of its paper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.errors import ShardwrightError
from shardwright.schedules import SCHEDULES, SEARCHED, PipelineSchedule, build_schedule, one_f_one_b
from shardwright.schedules.published.library import canonical_name
from shardwright.schedules.published.v_blocks import STEPS, chunks_in_turn, v_block
from shardwright.schedules.published.zero_bubble import two_bp


def uniform(schedule, times=(1.0, 1.0, 1.0)):
    v = schedule.num_chunks
    stages = [StageTimes(*(t / v for t in times), activation_bytes=1)] * schedule.num_stages
    return schedule.simulate(stages)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2), st.data())
def test_every_schedule_is_complete_and_free_of_deadlock_for_any_counts(name, p, m, more, data):
    chunks = SCHEDULES[name].chunks
    schedule = build_schedule(name, p, m, chunks[min(more, len(chunks) - 1)])
    schedule.check()
    assert schedule.name == name and schedule.splits_backward == (SCHEDULES[name].splits_backward)
    times = st.floats(0.1, 3.0)
    stages = [StageTimes(data.draw(times), data.draw(times), 0.5) for _ in range(schedule.num_stages)]
    timeline = schedule.simulate(stages, Hop.latency(data.draw(st.floats(0, 1))))
    assert timeline.makespan_s >= max(timeline.busy_s) - 1e-9
    held = max(timeline.peak_in_flight)
    assert held <= m * len(schedule.stages_of_rank(0))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16), (8, 23), (5, 11)])
def test_zero_bubble_h1_and_h2_have_the_papers_bubbles_and_memory(p, m):
    h1, h2 = (uniform(build_schedule(name, p, m)) for name in ("zb_h1", "zb_h2"))
    assert h1.makespan_s == pytest.approx(3 * m + p - 1)  # (p-1)(F + I - W)
    assert h1.peak_bytes == [p] * p  # as much as 1F1B's first rank
    assert h2.makespan_s == pytest.approx(3 * m + p - 1)
    spans = [ends[-1] - starts[0] for starts, ends in zip(h2.starts, h2.ends, strict=True)]
    assert spans == pytest.approx([3 * m] * p)  # (p-1)(F + I - 2 W) = 0: never idle once begun
    assert h2.peak_bytes == [min(m, 2 * p - 1)] * p


@pytest.mark.parametrize(("p", "m"), [(2, 6), (4, 8), (4, 16), (6, 12)])
def test_zb_v_waits_for_its_first_input_alone_at_1f1bs_memory(p, m):
    timeline = uniform(build_schedule("zb_v", p, m, 2))
    assert timeline.makespan_s <= 3 * m + (p - 1) / 2 + 0.5
    assert max(timeline.peak_bytes) / 2 <= p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16), (5, 7), (4, 3)])
def test_zb_v_is_as_short_as_the_order_in_phases_and_hides_transfers_as_well(p, m):
    phased, schedule = chunks_in_turn(p, m), build_schedule("zb_v", p, m, 2)
    phased.check()
    assert uniform(schedule).makespan_s <= uniform(phased).makespan_s
    if m >= 2 * p:
        assert schedule.ranks == phased.ranks
        assert uniform(phased).makespan_s == pytest.approx(3 * m + (p - 1) / 2)


@pytest.mark.parametrize("p", [4, 8, 12, 16])
def test_the_v_blocks_trade_memory_for_time(p):
    peaks = {name: v_block(name, p).peak / 2 for name in STEPS}
    assert peaks["v_min"] <= p / 3 + 1.5 and peaks["v_half"] <= 0.75 * p + 0.5 and peaks["zb_v"] == p
    times = {}
    for name in STEPS:
        schedule = build_schedule(name, p, 3 * p, 2)
        timeline = uniform(schedule)
        assert max(timeline.peak_bytes) / 2 <= peaks[name]
        times[name] = timeline.makespan_s
    assert times["zb_v"] <= times["v_half"] <= times["v_min"] < uniform(one_f_one_b(p, 3 * p)).makespan_s


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 11), (8, 16), (6, 30)])
def test_dualpipe_v_holds_half_a_microbatch_more_than_1f1b(p, m):
    timeline = uniform(build_schedule("dualpipe_v", p, m, 2))
    assert max(timeline.peak_bytes) / 2 <= p + 0.5
    assert timeline.makespan_s <= 3 * m + (p - 1) / 2 + 1e-9  # no more than the wait for the first input, in sequence


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 2), (4, 4, 3), (8, 16, 2)])
def test_breadth_first_has_interleavings_bubble_and_gpipes_memory(p, m, v):
    timeline = uniform(build_schedule("breadth_first", p, m, v))
    assert timeline.makespan_s == pytest.approx(3 * m + 3 * (p - 1) / v)
    assert timeline.peak_bytes == [m * v] * p


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16)])
def test_waves_beat_1f1b_within_its_memory(p, m):
    plain = uniform(one_f_one_b(p, m), (1.0, 2.0, 0.0))
    for waves in (1, 2):
        timeline = uniform(build_schedule("hanayo", p, m, 2 * waves), (1.0, 2.0, 0.0))
        assert timeline.makespan_s < plain.makespan_s
        assert max(timeline.peak_bytes) / (2 * waves) <= p


@pytest.mark.parametrize("p", [2, 4, 6, 8, 16])
def test_chimera_with_as_many_microbatches_as_ranks_has_the_papers_bubble(p):
    schedule = build_schedule("chimera", p, p)
    stages = [StageTimes(1.0, 1.0, 0.0, activation_bytes=1)] * p
    assert schedule.simulate(stages).makespan_s == pytest.approx(2 * p + p - 2)


@pytest.mark.parametrize("p", [4, 8])
def test_two_directions_beat_one(p):
    m = p
    plain = uniform(one_f_one_b(p, m), (1.0, 2.0, 0.0)).makespan_s
    chimera, bitpipe = (build_schedule(name, p, m, SCHEDULES[name].chunks[0]) for name in ("chimera", "bitpipe"))
    assert uniform(chimera, (1.0, 2.0, 0.0)).makespan_s < plain
    assert uniform(bitpipe, (1.0, 2.0, 0.0)).makespan_s < uniform(chimera, (1.0, 2.0, 0.0)).makespan_s
    assert len(chimera.stages_of_rank(0)) == 2 and len(bitpipe.stages_of_rank(0)) == 4  # doubled weights
    assert chimera.direction == [0] * (m // 2) + [1] * (m // 2)
    again = PipelineSchedule.from_judge(chimera.to_judge())
    again.check()
    assert again.ranks == chimera.ranks and again.rank_of(0, m - 1) == p - 1


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b", "hanayo"]), st.integers(1, 6), st.integers(1, 12))
def test_2bp_is_never_slower_than_the_whole_backward(name, p, m):
    schedule = build_schedule(name, p, m, SCHEDULES[name].chunks[0])
    split = two_bp(schedule)
    split.check()
    assert uniform(split).makespan_s <= uniform(schedule).makespan_s + 1e-9
    assert uniform(split).makespan_s < uniform(schedule).makespan_s or p == 1


def test_every_entry_cites_its_source():
    assert all("arXiv:" in entry.citation for entry in SCHEDULES.values())
    assert set(SEARCHED) <= set(SCHEDULES)


def test_names_are_found_in_other_spellings():
    assert canonical_name("ZB-V") == "zb_v" and canonical_name("V-Half") == "v_half"
    assert canonical_name("interleaved") == "interleaved_1f1b" and canonical_name("two-bp") == "1f1b_2bp"
    with pytest.raises(ShardwrightError) as caught:
        canonical_name("zbh1")
    assert caught.value.works == "--force schedule=zb_h1"
    with pytest.raises(ShardwrightError):
        canonical_name("zb_v", SEARCHED)
