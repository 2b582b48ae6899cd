"""No list of actions is started that could block: sends and receives are placed, then walked with bounded buffers."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.costmodel.actions import parse_action
from shardwright.errors import ShardwrightError
from shardwright.runtime.orders import forward_order
from shardwright.runtime.transfers import SEND_FORWARD, Action, communicating_lists, verify, with_transfers
from shardwright.schedules import SCHEDULES, PipelineSchedule, build_schedule

TWO_STAGES = build_schedule("1f1b", 2, 2)


def _action(text: str) -> Action:
    for kind in ("SEND_F", "RECV_F", "SEND_B", "RECV_B"):
        if kind in text:
            stage, microbatch = text.split(kind)
            return Action(kind, int(stage), int(microbatch))
    return parse_action(text)


def _lists(*rows: str) -> list[list[Action]]:
    return [[_action(text) for text in row.split()] for row in rows]


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    num_ranks=st.integers(1, 6),
    num_microbatches=st.integers(1, 14),
    buffered=st.integers(0, 2),
)
@settings(max_examples=120, deadline=None)
def test_lists_of_the_library_never_block(name: str, num_ranks: int, num_microbatches: int, buffered: int) -> None:
    schedule = build_schedule(name, num_ranks, num_microbatches, SCHEDULES[name].chunks[0])
    lists = with_transfers(schedule)
    verify(schedule, lists, buffered)
    for row, made in zip(schedule.ranks, lists, strict=True):
        assert [a for a in made if a.kind in "FBIW"] == list(row)
    crossings = sum(
        schedule.rank_of(stage, k) != schedule.rank_of(stage + 1, k)
        for stage in range(schedule.num_stages - 1)
        for k in range(num_microbatches)
    )
    assert sum(a.kind == SEND_FORWARD for row in lists for a in row) == crossings


@given(num_ranks=st.integers(1, 5), num_microbatches=st.integers(1, 9), place=st.sampled_from(["zb_v", "hanayo"]))
@settings(max_examples=30, deadline=None)
def test_evaluation_never_blocks(num_ranks: int, num_microbatches: int, place: str) -> None:
    order = forward_order(build_schedule(place, num_ranks, 2, 2).stage_rank, num_microbatches)
    order.check()
    communicating_lists(order)


def test_two_ranks_that_send_first_need_a_buffer() -> None:
    lists = _lists(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    )
    with pytest.raises(ShardwrightError, match="rank 0 has 0SEND_F1 where rank 1 has 1SEND_B0"):
        verify(TWO_STAGES, lists, buffered=5)


def test_the_actions_at_which_ranks_wait_are_named() -> None:
    ring = PipelineSchedule("ring", 2, (0, 1, 2), build_schedule("gpipe", 3, 2).ranks)
    lists = _lists(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F0 1F0 1RECV_B0 1B0 1SEND_F0 1RECV_F1 1F1 1SEND_F1 1SEND_B0 1RECV_B1 1B1 1SEND_B1",
        "2RECV_F0 2F0 2B0 2SEND_B0 2RECV_F1 2F1 2B1 2SEND_B1",
    )
    with pytest.raises(ShardwrightError, match="unlike orders: rank 1 has 1RECV_B0 where rank 2 has 2RECV_F0"):
        verify(ring, lists)
    lists = _lists(
        "0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1F1 1RECV_F1 1B1 1SEND_B1",
    )
    with pytest.raises(ShardwrightError, match=r"would wait for ever: rank 0 at 0SEND_F1, rank 1 at 1F1"):
        verify(TWO_STAGES, lists)
    with pytest.raises(ShardwrightError, match=r"would wait for ever: rank 0 at 0B1, rank 1 at 1F1"):
        verify(TWO_STAGES, lists, buffered=1)


def test_an_order_that_no_transfers_can_serve_is_refused() -> None:
    rows = ([parse_action(t) for t in row.split()] for row in ("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"))
    schedule = PipelineSchedule("crossed", 2, (0, 1), tuple(map(tuple, rows)))
    with pytest.raises(ShardwrightError, match=r"would wait for ever: rank 0 at 0B0, rank 1 at 1F1"):
        communicating_lists(schedule)


def test_verification_takes_time_linear_in_the_lists() -> None:
    seconds = []
    for count in (64, 512):
        schedule = build_schedule("1f1b", 64, count)
        started = time.process_time()
        communicating_lists(schedule)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 8 * 4 * seconds[0]  # eight times the actions; quadratic would be 64
