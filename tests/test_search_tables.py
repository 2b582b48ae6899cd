"""ZeRO's collectives around the segments of a stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planner_fakes import LLAMA_8B, Case, Sizes

from shardwright.planner.search.step_time import lower_bound, stage_times, step_seconds, tails
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.setting import Setting
from shardwright.planner.stages.zero_seconds import stage_tables
from shardwright.plans.axes import MeshShape


def tables_of(zero, dp=4, count=4, sizes=Sizes(layers=6), hardware="8xH100-80GB"):  # noqa: B008
    case = Case(sizes, hardware, 8)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    chain = setting.chain(case.sharder.solve(MeshShape.of({"dp": dp}), 2), ())
    candidate = Candidate(MeshShape.of({"pp": 8 // dp, "dp": dp}), 2 * dp, count, "1f1b", 1, zero)
    setting.memory_of = (case, chain)  # keep them alive
    return setting, candidate, chain, stage_tables(setting, candidate, chain)


def test_one_data_parallel_rank_waits_for_no_collective():
    _, _, chain, tables = tables_of(3, dp=1, count=1)
    assert np.allclose(np.triu(tables.forward_of), np.triu(chain.forward_of))
    assert np.allclose(np.triu(tables.backward_of), np.triu(chain.backward_of))
    assert not tables.reduce_s.any() and not tables.refresh_s.any()


def test_accumulation_costs_memory_traffic():
    _, _, chain, tables = tables_of(0, dp=1, count=4)
    assert (np.triu(tables.backward_of, 1) >= np.triu(chain.backward_of, 1)).all()
    assert tables.accumulate_s.sum() > 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_stage_split_in_two_never_takes_less(zero):
    _, _, chain, tables = tables_of(zero)
    n = chain.num_instances
    for i in range(n - 1):
        for j in range(i + 2, n + 1):
            for k in range(i + 1, j):
                for table in (tables.forward_of, tables.backward_of):
                    assert table[i, k] + table[k, j] >= table[i, j] * (1 - 1e-9)


def test_gathers_hide_behind_large_segments_and_show_beside_small_ones():
    _, _, chain, small = tables_of(3)
    n = chain.num_instances
    assert small.forward_of[0, n] > 2 * chain.forward_of[0, n]
    _, _, chain, large = tables_of(3, sizes=LLAMA_8B)
    n = chain.num_instances
    assert large.forward_of[0, n] < 1.1 * chain.forward_of[0, n]


def test_reductions_after_the_last_backward_are_what_the_backward_did_not_hide():
    setting, candidate, chain, tables = tables_of(0, sizes=LLAMA_8B)
    n = chain.num_instances
    left = tables.reduction_left(0, n)
    assert tables.reduce_s[0] <= left < tables.reduce_s.sum()
    times = stage_times(setting, candidate, chain, (0, 10, n))
    assert times[0].reduce_s == tables.reduction_left(0, 10)
    assert times[1].forward_s == pytest.approx(tables.forward_of[10, n] + 1e-6)  # and the prologue


def test_parameters_come_back_after_the_step_under_zero_1_and_2_only():
    for zero in range(4):
        setting, candidate, chain, _ = tables_of(zero)
        found = tails(setting, candidate, chain, (0, 3, chain.num_instances))
        assert all((tail.gather_s > 0) == (zero in (1, 2)) for tail in found)


def test_parameters_tied_over_stages_are_summed_between_them():
    plain, tied = (tables_of(0, sizes=Sizes(layers=6, tied=t)) for t in (False, True))
    ends = [tails(s, c, chain, (0, 3, chain.num_instances)) for s, c, chain, _ in (plain, tied)]
    assert all(with_sum.gather_s > without.gather_s for without, with_sum in zip(*ends, strict=True))


def _replicated(hardware: str, zero: int, *, dp: int, tp: int, count: int = 2):
    """Every rank of four with all parameters and its own samples, over the data axis, the tensor axis or both."""
    case = Case(Sizes(layers=6, hidden=512, ffn=2048), hardware, 8)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    solution = case.sharder.solve(MeshShape.of({"dp": 4}), 2)
    if tp > 1:
        costs = {name: replace(cost, summed_elements=cost.trainable_elements) for name, cost in solution.costs.items()}
        solution = replace(solution, costs=costs)
    chain = setting.chain(solution, ())
    candidate = Candidate(MeshShape.of({"pp": 2, "dp": dp, "tp": tp}), 2 * dp, count, "1f1b", 1, zero if dp > 1 else 0)
    setting.memory_of = (case, solution)  # keep them alive
    return setting, candidate, chain


@pytest.mark.parametrize("hardware", ["8xCPU", "2x4xA100-80GB", "4x2xA100-80GB"])
@pytest.mark.parametrize("count", [1, 4])
def test_parameters_whole_on_the_tensor_axis_cost_what_they_cost_on_the_data_axis(hardware, count):
    """Sums of their gradients come once a step, in one collective with those over data."""
    bounds = (0, 4, 8)
    seconds = {
        (dp, tp): step_seconds(*_replicated(hardware, 0, dp=dp, tp=tp, count=count), bounds)
        for dp, tp in ((4, 1), (1, 4), (2, 2))
    }
    unsummed = step_seconds(*_replicated(hardware, 0, dp=1, tp=1, count=count), bounds)
    assert seconds[(1, 4)] == pytest.approx(seconds[(4, 1)], rel=1e-9)
    assert seconds[(2, 2)] == pytest.approx(seconds[(4, 1)], rel=1e-9)
    assert seconds[(4, 1)] > unsummed


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_under_zero_the_tensor_axis_sums_what_a_rank_keeps(zero):
    mixed, plain = (_replicated("8xCPU", zero, dp=2, tp=tp) for tp in (2, 1))
    (setting, candidate, chain), (_, _, whole) = mixed, plain
    sums = stage_tables(setting, candidate, chain).reduce_s - stage_tables(setting, candidate, whole).reduce_s
    everything = chain.trainable_elements.sum() / 2 * setting.kinds.reduce
    assert sums.sum() == pytest.approx(setting.mesh(candidate).sum_seconds(everything, False), rel=0.5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_bound_is_below_every_simulated_step(zero):
    setting, candidate, chain, _ = tables_of(zero, dp=2, count=3)
    n = chain.num_instances
    bound = lower_bound(setting, candidate, chain)
    for k in range(1, n - 2):
        assert bound <= step_seconds(setting, candidate, chain, (0, k, k + 1, k + 2, n)) * (1 + 1e-9)
