"""The certificate: no plan that a force reaches is faster than what was found by more than the stated gap."""

from __future__ import annotations

import pytest
import torch
from planner_fakes import Case, Sizes

from shardwright.errors import ShardwrightError
from shardwright.profiler.workload import Precision
from shardwright.units import GIB, MIB

FLOAT32 = Precision(torch.float32, torch.float32, torch.float32)
LONG = Sizes(24, 2048, 5632, 512, 32000, 8192)
SHORT = Sizes(6, 2048, 5632, 512, 32000, 2048)
FORCES = (
    *({"pp": pp} for pp in (1, 2, 4)),
    *({"tp": tp} for tp in (2, 4)),
    *({"zero": zero, "recompute": "all"} for zero in (0, 3)),
    *({"pp": 2, "schedule": name} for name in ("1f1b", "gpipe", "zb_h2", "zb_v", "interleaved_1f1b")),
    *({"pp": pp, "microbatch": 4, "recompute": "none"} for pp in (1, 2)),
    {"tp": 1, "microbatch": 2},
)


def hold_for(case: Case, force: dict[str, object]) -> None:
    """The claim of this file, for one force besides those that the free plan was given."""
    try:
        forced = case.search(**force)
    except ShardwrightError:
        return
    free = case.search()
    step_s, certificate = free.predicted.step_s, free.certificate
    assert certificate.lower_bound_s <= forced.predicted.step_s * (1 + 1e-9), force
    assert forced.predicted.step_s >= step_s * (1 - certificate.gap_fraction) * (1 - 1e-9), force
    assert certificate.status == "feasible" or forced.predicted.step_s >= step_s * (1 - 2e-3), force


@pytest.mark.parametrize("extra", [{"recompute": "all"}, {"recompute": "none"}])
def test_memory_options_are_compared_by_their_steps_not_taken_in_order(extra):
    """Without recomputation only stages of 3 to 7 layers fit: slower than even ones that recompute all."""
    case = Case(LONG, "8xH100-80GB", 32, memory_limit_bytes=int(10.2 * GIB))
    force = {"pp": 8, "dp": 1, "tp": 1, "microbatch": 1, "schedule": "1f1b"}
    free, forced = case.search(**force), case.search(**force, **extra)
    assert free.predicted.step_s <= forced.predicted.step_s * (1 + 1e-9)
    assert free.certificate.lower_bound_s <= forced.predicted.step_s


@pytest.mark.parametrize(
    ("sizes", "hardware", "limit_bytes", "options"),
    [
        (Sizes(layers=4, vocab=500), "4xCPU", 9 * MIB, {"precision": FLOAT32}),
        (Sizes(layers=6, vocab=4000), "8xCPU", 16 * MIB, {"precision": FLOAT32}),
        (SHORT, "8x1xA100-40GB", 16 * GIB, {}),
        (SHORT, "1x4xH100-80GB", 12 * GIB, {}),
    ],
)
def test_no_force_is_faster_than_the_stated_gap_allows(sizes, hardware, limit_bytes, options):
    case = Case(sizes, hardware, 8, memory_limit_bytes=limit_bytes, **options)
    found = case.search()
    _check_runner_ups(found)
    assert "context axes" in found.certificate.not_searched
    case.search = _remembering(case.search, found)
    for force in FORCES:
        hold_for(case, force)


def _check_runner_ups(found):
    """None is faster and no larger than the plan that was chosen; none stands there twice."""
    timed = [row for row in found.considered if row.step_s is not None]
    step_s, peak_bytes = found.predicted.step_s, max(found.predicted.peak_bytes)
    assert not [row for row in timed if row.step_s < step_s * (1 - 1e-6) and row.peak_bytes <= peak_bytes]
    assert len({row.model_dump_json() for row in found.considered}) == len(found.considered)


def _remembering(search, found):
    """The free plan is searched once."""
    return lambda **force: search(**force) if force else found
