"""What every order pays, beside published orders with all their cuts and choices of recomputation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from planner_fakes import Case, Sizes

from shardwright.planner.memory.limits import fits
from shardwright.planner.memory.options import ladders
from shardwright.planner.memory.rank_bytes import mean_bytes, quick_peaks
from shardwright.planner.search.any_order import held_bound, mean_wait
from shardwright.planner.search.stage_recompute import rungs_of
from shardwright.planner.search.step_time import least_tail, lower_bound, step_seconds
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import KEPT, NOTHING
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape
from shardwright.schedules.published.library import SCHEDULES

ORDERS = (("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("zb_h2", 1), ("chimera", 1), ("interleaved_1f1b", 2), ("zb_v", 2))


def small(count: int = 4) -> tuple[Setting, Candidate]:
    case = Case(Sizes(layers=4, hidden=256, ffn=1024, vocab=200), "2xCPU", count)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    setting.sharder = case.sharder
    return setting, Candidate(MeshShape.of({"pp": 2}), 1, count, "1f1b", 1, 0)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.7, 1.0])
def test_no_order_beats_the_bound_of_all_orders_whatever_is_recomputed(share):
    setting, base = small()
    (ladder,) = ladders(setting.shape, [setting.sharder.solve(MeshShape.of(), 1)], "auto")
    n = len(setting.shape.instances)
    least, most = (
        quick_peaks(setting, base, setting.chain(ladder.solution, ladder.rungs[k]), (0, n // 2, n)).max()
        for k in (-1, 0)
    )
    setting.memory_limit_bytes = int(0.9 * least + share * (most - 0.9 * least))
    rungs, found = rungs_of(setting, ladder), [np.inf]
    for (name, chunks), levels in itertools.product(ORDERS, itertools.product((KEPT, 0), repeat=n)):
        candidate = replace(base, schedule=name, virtual_stages=chunks)
        chain = setting.chain(ladder.solution, levels if any(level != KEPT for level in levels) else NOTHING)
        for inner in itertools.combinations(range(1, n), candidate.num_stages - 1):
            cuts = (0, *inner, n)
            if fits(setting, candidate, chain, cuts):
                found.append(step_seconds(setting, candidate, chain, cuts))
    held_s = held_bound(setting, base, rungs, least_tail(setting, base, rungs[0]))
    assert max(held_s, lower_bound(setting, base, rungs[0], any_order=True)) <= min(found) * (1 + 1e-9)


def test_less_memory_asks_for_longer_steps_of_deep_pipelines():
    case = Case(Sizes(layers=32, hidden=256, ffn=1024, vocab=200), "8xCPU", 16)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    (ladder,) = ladders(setting.shape, [case.sharder.solve(MeshShape.of(), 1)], "auto")
    candidate, rungs = Candidate(MeshShape.of({"pp": 8}), 1, 16, "1f1b", 1, 0), rungs_of(setting, ladder)
    bounds = []
    most, least = (mean_bytes(setting, candidate, rungs[0], in_flight) for in_flight in (8, 1))
    for share in (1.0, 0.4, 0.2, 0.0):
        setting.forget()
        setting.memory_limit_bytes = int(least + share * (most - least))
        bounds.append(held_bound(setting, candidate, rungs_of(setting, ladder), 0.0))
    assert bounds == sorted(bounds) and bounds[-1] > 1.05 * bounds[0]


@pytest.mark.parametrize("weight_s", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("pp", "count"), [(4, 8), (4, 16), (8, 32)])
def test_no_published_order_beats_its_own_bound_or_that_of_all(pp, count, weight_s):
    """Orders that defer the weights' part of the backward fill the drain of the pipeline with it."""
    case = Case(Sizes(layers=14), f"{pp}xCPU", count)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    whole = setting.chain(case.sharder.solve(MeshShape.of(), 1), NOTHING)
    ones, nothing = np.ones(whole.num_instances), np.zeros(whole.num_instances)
    chain = replace(
        whole,
        forward_s=ones,
        backward_input_s=ones,
        backward_weight_s=weight_s * ones,
        forward_comm_s=nothing,
        backward_comm_s=nothing,
    )
    for name, schedule in SCHEDULES.items():
        candidate = Candidate(MeshShape.of({"pp": pp}), 1, count, name, schedule.chunks[0], 0)
        if candidate.num_stages <= whole.num_instances:
            n, parts = whole.num_instances, candidate.num_stages
            cuts = tuple(round(k * n / parts) for k in range(parts + 1))
            step_s = step_seconds(setting, candidate, chain, cuts) * (1 + 1e-9)
            assert lower_bound(setting, candidate, chain) <= step_s, name
            assert lower_bound(setting, candidate, chain, any_order=True) <= step_s, name
            tail_s = least_tail(setting, candidate, chain)
            assert held_bound(setting, candidate, (chain,), tail_s) <= step_s, name


def test_the_mean_rank_waits_for_the_positions_before_it():
    candidate = Candidate(MeshShape.of({"pp": 4}), 1, 8, "1f1b", 1, 0)
    forward, backward = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 4.0, 6.0, 8.0, 10.0])
    assert mean_wait(forward, backward, candidate, any_order=False).tolist() == [(0 + 1 + 3 + 6) / 4, 2 * 10 / 4]
    assert mean_wait(forward, backward, candidate, any_order=True).tolist() == [(0 + 0 + 1 + 1) / 4, 0.0]
    split = replace(candidate, schedule="zb_h1")
    assert mean_wait(forward, backward, split, any_order=False).tolist() == [(0 + 1 + 3 + 6) / 4, 0.0]
