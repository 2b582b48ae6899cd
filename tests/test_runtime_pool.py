"""The worker processes and the forked ranks that the distributed tests run on."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, run_ranks
from forked import fork_ranks


def _sum_of_ranks(rank: int, scale: float) -> tuple[float, int]:
    value = torch.tensor([rank * scale])
    dist.all_reduce(value)
    return value.item(), os.getpid()


def _fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.all_reduce(torch.zeros(1))


def _die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def test_results_come_back_by_rank_and_processes_are_used_again() -> None:
    first = run_ranks(2, _sum_of_ranks, 2.0)
    second = run_ranks(2, _sum_of_ranks, 3.0)
    assert [value for value, _ in first] == [2.0, 2.0]
    assert [value for value, _ in second] == [3.0, 3.0]
    assert [pid for _, pid in first] == [pid for _, pid in second]


def test_a_failing_rank_is_named_and_the_pool_lives_on() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank one is unwell"):
        run_ranks(2, _fail_on_one)
    with pytest.raises(RankFailed, match="exit code 7"):
        run_ranks(2, _die_on_one)
    assert time.monotonic() - start < 20
    assert run_ranks(2, _sum_of_ranks, 1.0)[0][0] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are spawned")
def test_forked_ranks_have_what_the_test_process_has_and_leave_nothing() -> None:
    seen: list[int] = [3]
    assert fork_ranks(2, lambda rank: rank + seen[0]) == [3, 4]
    with pytest.raises(RankFailed, match="rank one is unwell"):
        fork_ranks(2, _fail_on_one)
    with pytest.raises(RankFailed, match="exit code 7"):
        fork_ranks(2, _die_on_one)
