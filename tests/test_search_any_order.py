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


def test_the_mean_rank_waits_for_the_positions_before_it():
    candidate = Candidate(MeshShape.of({"pp": 4}), 1, 8, "1f1b", 1, 0)
    forward, backward = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 4.0, 6.0, 8.0, 10.0])
    assert mean_wait(forward, backward, candidate, any_order=False).tolist() == [(0 + 1 + 3 + 6) / 4, 2 * 10 / 4]
    assert mean_wait(forward, backward, candidate, any_order=True).tolist() == [(0 + 0 + 1 + 1) / 4, 2 * 2 / 4]
