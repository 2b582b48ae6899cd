"""Placements weigh what the training job adds to the ops: gradients summed once a step, and bytes of state.

The oracle fixes the placement of every parameter in turn and takes the best of all combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn

from shardwright import api
from shardwright.checking import _split_state
from shardwright.costmodel.model import CostModel
from shardwright.errors import ShardwrightError
from shardwright.ops.placement import R
from shardwright.planner.search.search import search
from shardwright.planner.sharding.sharder import Prices, Sharder
from shardwright.planner.sharding.solve.pbqp import solve
from shardwright.planner.sharding.training import Job
from shardwright.planner.sharding.variables import SUMS
from shardwright.planner.stages.setting import state_kinds
from shardwright.plans.axes import MeshShape
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Precision, Workload

WIDTH = 24


class Net(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()).square().mean()


def workload_of(hidden: int, global_batch: int = 8) -> Workload:
    with torch.device("meta"):
        model = Net(hidden)
    batch = {"x": torch.empty(global_batch, 6, WIDTH, device="meta")}
    return Workload(model, batch, global_batch, precision=Precision(*[torch.float32] * 3))


def combinations(graph: ModelGraph) -> Iterator[dict[str, int]]:
    """Every placement of every parameter on the tensor axis."""
    names = list(graph.params)
    for places in itertools.product(*([R, *range(len(graph.params[name][0]))] for name in names)):
        yield dict(zip(names, places, strict=True))


def on_tensor_ranks(wishes: Mapping[str, int] | None) -> dict[str, tuple[int, int]]:
    """Whole on the data axis."""
    return {name: (R, place) for name, place in (wishes or {}).items()}


@pytest.mark.parametrize("hidden", [48, 4096])
@pytest.mark.parametrize("global_batch", [8, 256])
def test_with_the_sums_of_gradients_the_least_of_every_placement_of_parameters_is_found(hidden, global_batch):
    """Eight samples a microbatch. Few of them in a step: large weights are split; many: their sums weigh little."""
    graph = api.capture_for_planning(workload_of(hidden))
    cost_model, key = CostModel(parse_hardware("2xCPU")), (MeshShape.of({"tp": 2}), 8)
    job = Job(state_kinds(workload_of(hidden)), global_batch)
    again = 1.0 / job.num_microbatches(1, 8)

    def least(wishes: Mapping[str, int] | None) -> float:
        sharder = Sharder(graph, cost_model, on_tensor_ranks(wishes), job=job)
        made = sharder._problem(key)[1]
        choice, proof = solve(made.problem, price=(0.0, 0.0, again))
        figures = sharder._figures(key, sharder._solved(*sharder._problem(key), Prices(0.0, 0.0, again)), 0.0)
        kinds = ("trainable_elements", "summed_elements")
        counted = [sum(getattr(cost, kind) for cost in figures.costs.values()) for kind in kinds]
        weighed = sum(rows[choice[u], SUMS] for u, rows in made.problem.weights.items())
        assert weighed == pytest.approx(sharder.sums(key[0]).of(*counted), rel=1e-6)
        return proof.objective

    assert least(None) == pytest.approx(min(map(least, combinations(graph))), rel=1e-9)


def test_large_weights_are_split_where_their_sums_would_come_every_step():
    graph, cost_model = api.capture_for_planning(workload_of(4096)), CostModel(parse_hardware("2xCPU"))
    shares = [
        Sharder(graph, cost_model, job=Job(global_batch=batch * count))
        .solve(MeshShape.of({"tp": 2}), batch)
        .split_shares["tp"]
        for batch, count in ((8, 1), (1 << 16, 10_000))
    ]
    assert shares[0]["parameters"] > 0.9
    assert shares[1]["parameters"] < 0.1 < shares[1]["activations"], "the batch is split instead"


def plan_peak(graph: ModelGraph, workload: Workload, sharder: Sharder, limit: int | None, **force: str) -> int:
    forced = {"tp": "2", **force}
    found = search(graph, sharder.cost_model, workload, sharder, force=forced, memory_limit_bytes=limit)
    return max(found.predicted.peak_bytes)


@pytest.mark.parametrize("hidden", [96, 4096])
def test_what_fits_under_some_placement_is_found(hidden):
    """On two devices of which both are forced on the tensor axis."""
    workload = workload_of(hidden)
    graph, cost_model = api.capture_for_planning(workload), CostModel(parse_hardware("2xCPU"))
    job = Job(state_kinds(workload), workload.global_batch)

    def least(wishes: Mapping[str, int]) -> int:
        split = on_tensor_ranks(wishes)
        lean = Sharder(graph, cost_model, split, job=Job(job.kinds, job.global_batch, prefer="memory"))
        return min(
            plan_peak(graph, workload, lean, None, recompute=recompute, microbatch=microbatch)
            for recompute in ("all", "none")
            for microbatch in ("1", "8")
        )

    possible = min(map(least, combinations(graph)))
    assert plan_peak(graph, workload, Sharder(graph, cost_model, job=job), int(possible * 1.001)) <= possible * 1.001
    with pytest.raises(ShardwrightError, match="nothing fits"):
        plan_peak(graph, workload, Sharder(graph, cost_model, job=job), int(possible * 0.5))


def test_a_forced_tensor_axis_splits_weights_that_do_not_fit_whole():
    """A few tokens and large weights: whole weights and sums would be faster, as activations are small."""
    workload = workload_of(1 << 16, global_batch=512)
    found = api.plan(workload, "2xCPU", force={"tp": 2}, memory_limit_bytes=120 << 20)
    assert found.predicted.split["tp"]["parameters"] > 0.9


def test_a_check_of_a_tensor_axis_splits_parameters():
    """Times of toy sizes would split the batch and keep every parameter whole."""
    forced = _split_state({"tp": "2", "pp": "1"})
    assert _split_state({"dp": "2"}) == {"dp": "2"} and _split_state({"tp": 2, "prefer": "time"})["prefer"] == "time"
    for model in ("tiny-llama", "tiny-vit"):
        found = api.plan(load_workload(f"preset:{model}", global_batch=16), "2xCPU", force=forced)
        assert found.predicted.split["tp"]["parameters"] > 0.95, model
