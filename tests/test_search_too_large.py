"""The proof that no cuts of a chain fit, beside all cuts there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from planner_fakes import Case, Sizes

from shardwright.planner.memory.rank_bytes import in_flight_profiles, quick_peaks
from shardwright.planner.memory.too_large import is_too_large, least_held
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import Chain, whole_segments
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape


def least_peak(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """Of the worst rank, over all cuts."""
    n = chain.num_instances
    inner = itertools.combinations(range(1, n), candidate.num_stages - 1)
    return min(float(quick_peaks(setting, candidate, chain, (0, *cuts, n)).max()) for cuts in inner)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", [(), ("block",)])
@pytest.mark.parametrize(
    ("schedule", "pp", "chunks", "count"),
    [("1f1b", 4, 1, 8), ("gpipe", 2, 1, 4), ("interleaved_1f1b", 2, 3, 6), ("zb_h1", 4, 1, 8), ("zb_v", 2, 2, 6)],
)
def test_no_cuts_fit_where_that_is_said_and_it_is_said_of_little_memory(schedule, pp, chunks, count, recompute, tied):
    case = Case(Sizes(layers=8, hidden=256, ffn=1024, tied=tied), f"{2 * pp}xCPU", 2 * count)
    solution = case.sharder.solve(MeshShape.of({"dp": 2}), 1)
    said = []
    for zero, share in itertools.product(range(4), (0.5, 0.8, 0.95, 1.0)):
        candidate = Candidate(MeshShape.of({"pp": pp, "dp": 2}), 2, count, schedule, chunks, zero)
        setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
        chain = setting.chain(solution, whole_segments(setting.shape, solution, recompute))
        least = least_peak(setting, candidate, chain)
        setting.memory_limit_bytes = int(np.ceil(share * least))
        found = is_too_large(setting, candidate, chain)
        assert not (found and share == 1.0)
        said.append(found)
    assert all(said[::4])  # of half the memory


def test_a_rank_holds_so_many_microbatches_however_its_chunks_share_the_activations():
    shares = np.random.default_rng(0).dirichlet((1.0, 1.0, 1.0), 500)
    held = least_held("interleaved_1f1b", 4, 16, 3)
    for rank, moments in enumerate(in_flight_profiles("interleaved_1f1b", 4, 16, 3)):
        least = (shares @ moments.T).max(axis=1).min()
        assert 0.9 * least <= held[rank] <= least
