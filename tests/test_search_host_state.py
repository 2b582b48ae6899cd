"""Plans with the optimizer's state in host memory: where they are found, what they hold and what they take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_fakes import Case, Sizes

from shardwright.costmodel import memory
from shardwright.costmodel.memory import Extents, StageState, StateBytes
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.units import GIB

pytestmark = pytest.mark.usefixtures("shared_captures")

LLAMA_7B = Sizes(32, 4096, 11008, 4096, 32000, 2048)  # 6.74e9 parameters
MIXED = StateBytes(compute=2, master=4, reduce=4, state_tensors=2, single_copy=False, step_tensors=0)
STAGE = StageState(1000, 900, 10, 100, 60)


@pytest.mark.parametrize(
    ("ranks", "zero", "gradients", "on_their_way", "host"),
    [
        (1, 0, 60 * 4, 100 * 2, 900 * 16),  # partial sums over the tensor axis wait for the end of the step
        (4, 0, 900 * 4, 0, 900 * 16),  # all wait for the other ranks
        (4, 1, (900 + 225) * 4, 0, 225 * 16),
        (4, 3, 15 * 4, 0, 225 * 16),
    ],
)
def test_the_device_keeps_of_the_state_what_other_ranks_add_to(ranks, zero, gradients, on_their_way, host):
    found = memory.state_memory(STAGE, MIXED, ranks, zero, 8, "gpu", on_host=True)
    assert (found.optimizer, found.step_temporaries) == (0, 0)
    assert (found.gradients, found.leaving_each, found.host) == (gradients, on_their_way, host)
    assert found.parameters == (250 if zero == 3 else 1000) * 2


def test_a_host_steps_over_copies_even_where_computing_is_as_precise():
    single = StateBytes(4, 4, 4, 2, single_copy=True, step_tensors=0)
    assert memory.state_memory(STAGE, single, 1, 0, 8, "gpu", on_host=True).host == 900 * (4 + 8 + 4)


def test_copies_on_other_parts_of_the_data_axis_add_to_gradients_first():
    assert memory.leave_early(8, 3, Extents(8, 8, 8)) and memory.leave_early(1, 0, Extents())
    assert not memory.leave_early(8, 3, Extents(4, 4, 4)) and not memory.leave_early(8, 3, Extents(2, 2, 8))
    assert not memory.leave_early(8, 1, Extents(1, 1, 8))


def test_one_card_fine_tunes_7b_with_its_state_on_the_host():
    case = Case(LLAMA_7B, "1x1xRTX4090", 8)
    found = case.search()
    assert found.candidate.on_host and found.memory_policy.optimizer_state == "host"
    predicted = found.predicted
    assert max(predicted.peak_bytes) <= predicted.memory_limit_bytes < 24 * GIB
    assert predicted.memory["optimizer"] == 0 < predicted.host_bytes <= predicted.host_limit_bytes < 128 * GIB
    elements = 6.74e9
    assert predicted.host_bytes == pytest.approx(16 * elements + 2**29, rel=0.01)
    # AdamW reads a gradient of 4 bytes and 12 of state, writes 12 and the parameter of 2, at 100 GB/s
    assert predicted.tail_s[0] == pytest.approx(30 * elements / 100e9, rel=0.02)
    assert all(row.optimizer_state == "host" for row in found.considered if row.step_s is not None)


def test_a_host_that_is_too_small_is_named_with_its_bytes():
    with pytest.raises(ShardwrightError) as caught:
        Case(replace(LLAMA_7B, layers=39, seq=512), "1x1xRTX4090", 8).search()
    assert caught.value.exit_code == ExitCode.DOES_NOT_FIT
    assert "of host memory" in caught.value.what and "GiB missing" in caught.value.what


def test_state_that_is_kept_on_the_device_by_force_is_what_to_let_go():
    case = Case(LLAMA_7B, "1x1xRTX4090", 8)
    with pytest.raises(ShardwrightError) as caught:
        case.search(optimizer_state="device")
    assert (caught.value.change, caught.value.works) == ("--force optimizer_state", "--force optimizer_state=host")


@pytest.mark.parametrize("hardware", ["2x1xA100-40GB", "1x2xH100-80GB"])
def test_the_search_takes_the_faster_of_both_where_memory_is_short(hardware):
    def step_s(**force):
        try:
            return Case(LLAMA_7B, hardware, 16).search(**force).predicted.step_s
        except ShardwrightError as error:
            assert error.exit_code == ExitCode.DOES_NOT_FIT
            return float("inf")

    both = step_s(optimizer_state="device"), step_s(optimizer_state="host")
    assert step_s() <= 1.011 * min(both)  # closer than the cost model can tell


def test_where_there_is_room_no_such_plan_is_looked_at():
    sizes = Sizes(layers=4)
    free, fixed = (Case(sizes, "4xH100-80GB", 8).search(**force) for force in ({}, {"optimizer_state": "device"}))
    assert free.num_candidates == fixed.num_candidates and not free.candidate.on_host


def test_hosts_of_unknown_memory_are_refused_by_name():
    with pytest.raises(ShardwrightError, match="nothing is known of the memory of the host") as caught:
        Case(Sizes(), "2xA100-40GB", 8, knows_host=False).search(optimizer_state="host")
    assert caught.value.exit_code == ExitCode.CONTRADICTION
