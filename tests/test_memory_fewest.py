"""Recomputation position by position: beside every choice of all positions, and never below what bounds say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from planner_fakes import Case, Sizes

from shardwright.costmodel.segment import RecomputePoint
from shardwright.planner.interfaces import ShardingSolution
from shardwright.planner.memory.fewest import fewest_seconds
from shardwright.planner.memory.least_work import least_work_s
from shardwright.planner.memory.limits import fits
from shardwright.planner.memory.options import Ladder, ladders
from shardwright.planner.memory.rank_bytes import quick_peaks
from shardwright.planner.search.stage_recompute import least_recomputation, recomputation, rungs_of
from shardwright.planner.search.step_time import busiest_path_s, lower_bound, step_seconds
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import KEPT, points_of, recompute_of
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape

SIZES = Sizes(layers=4, hidden=256, ffn=1024, vocab=400)
SHARES = {"some": 0.75, "more": 0.35}  # of what a segment saves, at points between nothing and all


def with_points(solution: ShardingSolution) -> ShardingSolution:
    """Two cheap points before that of the whole segment."""
    costs = {}
    for name, cost in solution.costs.items():
        (whole,) = cost.recompute_points
        spare = cost.saved_bytes - whole.saved_bytes
        between = tuple(
            RecomputePoint((name,), whole.seconds * part, 0.0, whole.saved_bytes + int(share * spare))
            for (name, share), part in zip(SHARES.items(), (0.05, 0.3), strict=True)
        )
        costs[name] = replace(cost, recompute_points=(*between, whole)) if spare > 0 else cost
    return replace(solution, costs=costs)


def limited(schedule: str, pp: int, share: float) -> tuple[Setting, Candidate, Ladder, tuple[int, ...]]:
    """A limit so far between all and nothing recomputed, under even cuts."""
    case = Case(SIZES, f"{pp}xCPU", 4)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    candidate = Candidate(MeshShape.of({"pp": pp}), 1, 4, schedule, 1, 0)
    (ladder,) = ladders(setting.shape, [with_points(case.sharder.solve(MeshShape.of(), 1))], "auto")
    n = len(setting.shape.instances)
    bounds = tuple(round(k * n / pp) for k in range(pp + 1))
    chains = [setting.chain(ladder.solution, ladder.rungs[k]) for k in (-1, 0)]
    least, most = (quick_peaks(setting, candidate, chain, bounds).max() for chain in chains)
    setting.memory_limit_bytes = int(least + share * (most - least))
    return setting, candidate, ladder, bounds


def every_choice(setting: Setting, ladder: Ladder) -> list[tuple[int, ...]]:
    costs = ladder.solution.costs
    counts = [len(costs[name].recompute_points) for name in setting.shape.segments]
    return [recompute_of(levels) for levels in itertools.product(*(range(KEPT, count) for count in counts))]


def seconds(setting: Setting, ladder: Ladder, recompute: tuple[int, ...]) -> float:
    return sum(p.seconds for p in points_of(setting.shape, ladder.solution, recompute) if p is not None)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 1), ("1f1b", 2)])
def test_no_choice_of_all_positions_recomputes_less_and_none_goes_below_the_bounds(schedule, pp, share):
    setting, candidate, ladder, bounds = limited(schedule, pp, share)
    first = recomputation(setting, candidate, ladder, bounds)
    found = fewest_seconds(setting, candidate, ladder, bounds, first)
    assert fits(setting, candidate, setting.chain(ladder.solution, found), bounds)
    spent = seconds(setting, ladder, found)
    assert spent <= seconds(setting, ladder, first) * (1 + 1e-9)
    least_s, best_step_s = np.inf, np.inf
    for choice in every_choice(setting, ladder):
        chain = setting.chain(ladder.solution, choice)
        again_s = seconds(setting, ladder, choice)
        if (pp == 1 and again_s < least_s) or pp > 1:
            if fits(setting, candidate, chain, bounds):
                least_s = min(least_s, again_s)
                best_step_s = min(best_step_s, step_seconds(setting, candidate, chain, bounds))
    assert spent <= least_s * 1.002 + 1e-12
    least = least_recomputation(setting, candidate, ladder)
    assert lower_bound(setting, candidate, least) <= best_step_s * (1 + 1e-9)
    rungs = rungs_of(setting, ladder.every_step)
    work_s = least_work_s(setting, candidate, rungs)
    assert busiest_path_s(setting, candidate, rungs[0], work_s) <= best_step_s * (1 + 1e-9)


def test_what_the_last_rung_of_a_ladder_frees_too_much_is_taken_back():
    """Of some limit the ladder recomputes more than it must, and the program does not."""
    gains = []
    for share in np.linspace(0.05, 0.95, 7):
        setting, candidate, ladder, bounds = limited("1f1b", 1, float(share))
        first = recomputation(setting, candidate, ladder, bounds)
        found = fewest_seconds(setting, candidate, ladder, bounds, first)
        gains.append(seconds(setting, ladder, first) - seconds(setting, ladder, found))
    assert min(gains) >= 0 and sum(gain > 0 for gain in gains) >= 3, gains


def test_what_is_forced_stays():
    setting, candidate, ladder, bounds = limited("1f1b", 1, 0.5)
    for forced in ("all", "selective"):
        (other,) = ladders(setting.shape, [ladder.solution], forced)
        assert fewest_seconds(setting, candidate, other, bounds, other.rungs[0]) == other.rungs[0]
