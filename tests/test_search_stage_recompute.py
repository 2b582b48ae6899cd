"""Each stage recomputes what its own memory asks for: beside all cuts and all choices of each position."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from compared import assert_same_numbers, compared, plan_once
from planner_fakes import Case, Sizes

from shardwright.planner.memory.least_work import least_work_s
from shardwright.planner.memory.limits import fits
from shardwright.planner.memory.options import Ladder, ladders
from shardwright.planner.memory.rank_bytes import quick_peaks, stages_by_rank
from shardwright.planner.search.stage_recompute import LadderCuts, least_recomputation, recomputation, rungs_of
from shardwright.planner.search.step_time import busiest_path_s, lower_bound, stage_loads, step_seconds
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import KEPT, NOTHING
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape
from shardwright.plans.document import MemoryPolicy

SMALL, DEEP = (Sizes(layers=layers, hidden=256, ffn=1024, vocab=400) for layers in (4, 24))


def limited(
    schedule: str, pp: int, chunks: int, share: float, sizes: Sizes = SMALL
) -> tuple[Setting, Candidate, Ladder]:
    """A setting whose limit lies so far between all recomputed and nothing recomputed, under even cuts."""
    case = Case(sizes, f"{pp}xCPU", 6)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    candidate = Candidate(MeshShape.of({"pp": pp}), 1, 6, schedule, chunks, 0)
    (ladder,) = ladders(setting.shape, [case.sharder.solve(MeshShape.of(), 1)], "auto")
    n, count = len(setting.shape.instances), candidate.num_stages
    even = tuple(round(k * n / count) for k in range(count + 1))
    least, most = (
        quick_peaks(setting, candidate, setting.chain(ladder.solution, ladder.rungs[k]), even).max() for k in (-1, 0)
    )
    setting.memory_limit_bytes = int(least + share * (most - least))
    return setting, candidate, ladder


def all_that_fit(setting: Setting, candidate: Candidate, ladder: Ladder) -> list[float]:
    """Simulated steps, over all cuts and all choices of each position."""
    n, found = len(setting.shape.instances), []
    cuts = [(0, *inner, n) for inner in itertools.combinations(range(1, n), candidate.num_stages - 1)]
    for levels in itertools.product((KEPT, 0), repeat=n):
        chain = setting.chain(ladder.solution, levels if any(level != KEPT for level in levels) else NOTHING)
        found += [step_seconds(setting, candidate, chain, c) for c in cuts if fits(setting, candidate, chain, c)]
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("schedule", "pp"), [("1f1b", 3), ("1f1b", 2), ("gpipe", 2)])
def test_no_cuts_and_choices_beat_those_found_and_none_goes_below_the_bounds(schedule, pp, share):
    setting, candidate, ladder = limited(schedule, pp, 1, share)
    cuts = LadderCuts(setting, candidate, ladder).find()
    found = recomputation(setting, candidate, ladder, cuts.bounds)
    chain = setting.chain(ladder.solution, found)
    assert fits(setting, candidate, chain, cuts.bounds)
    best_s = min(all_that_fit(setting, candidate, ladder))
    assert cuts.bottleneck <= best_s * (1 + 1e-9)
    assert step_seconds(setting, candidate, chain, cuts.bounds) <= 1.01 * best_s
    least = least_recomputation(setting, candidate, ladder)
    assert lower_bound(setting, candidate, least) <= best_s * (1 + 1e-9)
    rungs = rungs_of(setting, ladder)
    work_s = least_work_s(setting, candidate, rungs)
    assert busiest_path_s(setting, candidate, rungs[0], work_s) <= best_s * (1 + 1e-9)


def busiest_rank_s(setting: Setting, candidate: Candidate, ladder: Ladder) -> float:
    """Least seconds of a microbatch on the rank that works most, over all cuts and choices that fit."""
    n, found = len(setting.shape.instances), []
    of_rank = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages).T
    for levels in itertools.product((KEPT, 0), repeat=n):
        chain = setting.chain(ladder.solution, levels if any(level != KEPT for level in levels) else NOTHING)
        for inner in itertools.combinations(range(1, n), candidate.num_stages - 1):
            cuts = (0, *inner, n)
            if fits(setting, candidate, chain, cuts):
                load = stage_loads(setting, candidate, chain, cuts)
                found.append(max(load[list(stages)].sum() for stages in of_rank))
    return min(found)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("schedule", "pp", "chunks"), [("1f1b", 3, 1), ("gpipe", 2, 1), ("interleaved_1f1b", 2, 2)])
def test_the_busiest_rank_works_no_less_than_is_said(schedule, pp, chunks, share):
    setting, candidate, ladder = limited(schedule, pp, chunks, share)
    rungs = rungs_of(setting, ladder)
    said, least = least_work_s(setting, candidate, rungs), busiest_rank_s(setting, candidate, ladder)
    mean = (rungs[0].forward_s + rungs[0].backward_s).sum() / pp
    assert mean * (1 - 1e-9) <= said <= least * (1 + 1e-9)


def test_little_memory_makes_the_busiest_rank_work_longer_than_the_mean():
    """Ranks of 1F1B that hold many microbatches recompute, or leave work to those that hold few."""
    said = []
    for share in (0.0, 0.2, 0.4, 1.0):
        setting, candidate, ladder = limited("1f1b", 3, 1, share, DEEP)
        said.append(least_work_s(setting, candidate, rungs_of(setting, ladder)))
    assert said == sorted(said, reverse=True)
    assert said[0] > 1.1 * said[-1]


@pytest.mark.parametrize(("schedule", "pp", "chunks"), [("1f1b", 2, 1), ("zb_v", 2, 2), ("interleaved_1f1b", 2, 2)])
def test_one_position_less_and_a_rank_does_not_fit(schedule, pp, chunks):
    setting, candidate, ladder = limited(schedule, pp, chunks, 0.4)
    n, count = len(setting.shape.instances), candidate.num_stages
    bounds = tuple(round(k * n / count) for k in range(count + 1))
    found = recomputation(setting, candidate, ladder, bounds)
    limits = setting.limits(candidate)
    assert (quick_peaks(setting, candidate, setting.chain(ladder.solution, found), bounds) <= limits).all()
    assert 0 < sum(level != KEPT for level in found) < n
    last = max(k for k, rises in enumerate(ladder.risers) if any(rises[i] and found[i] != KEPT for i in range(n)))
    for position in np.flatnonzero(ladder.risers[last]):
        if found[position] != KEPT:
            less = tuple(KEPT if k == position else level for k, level in enumerate(found))
            chain = setting.chain(ladder.solution, less if any(level != KEPT for level in less) else NOTHING)
            assert not (quick_peaks(setting, candidate, chain, bounds) <= limits).all()


def test_the_first_stage_recomputes_more_than_the_last_and_the_numbers_stay(tmp_path: Path) -> None:
    """Under 1F1B the first of two stages holds two microbatches, the last one."""
    spec = {"model": "preset:tiny-llama", "global_batch": 8, "seq_len": 128, "layers": 4}
    force = {"pp": "2", "schedule": "1f1b", "microbatch": "2"}

    def plan(recompute: str, limit_bytes: int | None = None):
        choice = {**force, "recompute": recompute}
        return plan_once(spec, "2xCPU", choice, memory_limit_bytes=limit_bytes)

    most, least = (plan(recompute).predicted.peak_bytes[0] for recompute in ("none", "all"))
    made = plan("auto", (most + least) // 2)
    policy, where = made.memory_policy, [stage.segments for stage in made.stages]
    made_again = [sum(policy.choice(made.segments[i], i) != "none" for i in indices) for indices in where]
    assert made_again[0] > made_again[1]
    assert made.predicted.peak_bytes[0] <= (most + least) // 2
    assert_same_numbers(compared(made, tmp_path))


def test_instances_of_one_segment_may_recompute_otherwise_and_the_numbers_stay(tmp_path: Path) -> None:
    """Whole, in part, and not at all, in one stage, with a backward that is split where nothing is made again."""
    spec = {"model": "preset:tiny-llama", "global_batch": 8, "seq_len": 32, "layers": 4}
    made = plan_once(spec, "2xCPU", {"pp": "2", "schedule": "zb_h1", "recompute": "none"})
    blocks = [i for i, name in enumerate(made.segments) if made.segments.count(name) > 1]
    part = tuple(op for op in made.placements[made.segments[blocks[0]]] if op.startswith("mm"))[:2]
    policy = MemoryPolicy(recompute=made.memory_policy.recompute, instances={blocks[0]: "all", blocks[1]: part})
    changed = made.model_copy(update={"memory_policy": policy})
    assert policy.recomputed(made.segments)[made.segments[blocks[0]]] == "2 ops in 1 of 4, all in 1 of 4"
    assert_same_numbers(compared(changed, tmp_path))
