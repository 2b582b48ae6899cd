"""Stage cuts: equal to brute force, quick on deep models, and a bound on what any cut reaches."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.costmodel.stage_times import StageTimes
from shardwright.planner.stages.chain import interval_maxima, interval_sums
from shardwright.planner.stages.cuts import WindowCuts, best_cuts, improve_cuts, pipeline_cost, windows
from shardwright.schedules import gpipe, one_f_one_b


def all_cuts(n: int, num_stages: int):
    for inner in itertools.combinations(range(1, n), num_stages - 1):
        yield (0, *inner, n)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_the_bottleneck_and_the_secondary_cost_are_those_of_brute_force(n, num_stages, seed):
    rng = np.random.default_rng(seed)
    costs = [np.triu(rng.integers(1, 6, (n + 1, n + 1)).astype(float), 1) for _ in range(num_stages)]
    for cost in costs:
        cost[rng.random((n + 1, n + 1)) < 0.2] = np.inf
    extra = [rng.random((n + 1, n + 1)) for _ in range(num_stages)]

    def of(table, bounds):
        return [table[s][i, j] for s, (i, j) in enumerate(itertools.pairwise(bounds))]

    found = best_cuts(lambda s: costs[s], num_stages, n, lambda s: extra[s])
    options = [(max(of(costs, b)), sum(of(extra, b))) for b in all_cuts(n, num_stages)]
    least = min(options, default=(np.inf, 0.0))
    if not np.isfinite(least[0]):
        assert found is None
        return
    assert found.bottleneck == least[0] == max(of(costs, found.bounds))
    assert sum(of(extra, found.bounds)) == pytest.approx(least[1])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_cuts_are_the_same_where_stages_see_only_the_positions_that_they_can_have(n, num_stages, seed):
    num_stages, rng = min(n, num_stages), np.random.default_rng(seed)
    costs = rng.integers(1, 6, (num_stages, n + 1, n + 1)).astype(float)
    costs[rng.random(costs.shape) < 0.1] = np.inf
    extra = rng.integers(1, 4, (n + 1, n + 1)).astype(float)
    seen = np.stack([windows(cost, num_stages)[s] for s, cost in enumerate(costs)])
    found = WindowCuts(seen, windows(extra, num_stages))
    whole = best_cuts(lambda s: costs[s], num_stages, n, lambda s: extra)
    assert found.cuts() == whole
    assert found.bottleneck == (np.inf if whole is None else whole.bottleneck)


def test_interval_tables_are_sums_and_maxima():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    sums, maxima = interval_sums(values), interval_maxima(values)
    for i in range(5):
        for j in range(i + 1, 6):
            assert sums[i, j] == values[i:j].sum() and maxima[i, j] == values[i:j].max()


def cut(forward, backward, m, p, schedule="1f1b"):
    tables = interval_sums(np.array(forward)), interval_sums(np.array(backward))
    return best_cuts(lambda s: pipeline_cost(*tables, m, s, p, schedule=schedule), p, len(forward))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 7), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["gpipe", "1f1b"]), st.integers(0, 10**6)
)
def test_pipeline_cost_bounds_the_simulated_makespan_over_all_cuts(n, p, m, schedule, seed):
    """The dynamic program's bottleneck is never above what any cut reaches, and is reached where stages can be
    equal.
    """
    if p > n:
        return
    rng = random.Random(seed)
    forward = [rng.choice([1.0, 2.0, 3.0]) for _ in range(n)]
    backward = [rng.choice([1.0, 2.0, 5.0]) for _ in range(n)]
    found = cut(forward, backward, m, p, schedule)
    make = gpipe if schedule == "gpipe" else one_f_one_b

    def simulated(bounds):
        stages = [StageTimes(sum(forward[i:j]), sum(backward[i:j]), 0.0) for i, j in itertools.pairwise(bounds)]
        return make(p, m).simulate(stages).makespan_s

    times = [simulated(bounds) for bounds in all_cuts(n, p)]
    assert found.bottleneck <= min(times) + 1e-9
    assert simulated(found.bounds) <= 1.35 * min(times)
    assert improve_cuts(found.bounds, simulated) in all_cuts(n, p)


def test_equal_stages_reach_the_bound():
    found = cut([1.0] * 8, [2.0] * 8, 12, 4)
    assert found.bounds == (0, 2, 4, 6, 8)
    assert found.bottleneck == pytest.approx((12 + 3) * 6.0)


def test_a_heavy_last_segment_gets_fewer_companions():
    found = cut([1.0] * 9 + [3.0], [2.0] * 9 + [6.0], 64, 4)
    assert found.bounds == (0, 3, 6, 9, 10)


@pytest.mark.parametrize(("n", "num_stages", "limit_s"), [(130, 64, 1.0), (1000, 64, 12.0)])
def test_deep_models_and_many_stages_are_quick(n, num_stages, limit_s):
    load = interval_sums(np.ones(n))
    begin = time.perf_counter()
    found = best_cuts(lambda s: load, num_stages, n)
    assert time.perf_counter() - begin < limit_s
    assert found.bottleneck == -(-n // num_stages)
