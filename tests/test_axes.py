"""An axis is a role: one that is registered is planned with, run and explained, and nothing else names it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from compared import planned_and_ran
from torch import nn

import shardwright
from shardwright.errors import ShardwrightError
from shardwright.ops.placement import P, R, route
from shardwright.plans.axes import AxisRole, Carries, MeshShape, placement_axes, registered, roles
from shardwright.plans.document import Mesh, Plan

# Two axes that there are not, with the axis that each stands outside of: a second one that carries the batch, twice as
# dear as its links say, and a second one that cuts parameters, also along dimensions that the first cuts, whose ranks
# run no op that gives a partial sum.
COPIES = AxisRole("copies", Carries.BATCH, "copies: the batch split once more", params_whole=True, grads_partial=True,
                  shares=True, cost=lambda kind, num_bytes, seconds: 2.0 * seconds)  # fmt: skip
COLUMNS = AxisRole("columns", Carries.FEATURES, "columns: layers split once more", shares=True,
                   allows=lambda strategy: P not in strategy.outputs)  # fmt: skip
ADDED = {"copies": (COPIES, "dp"), "columns": (COLUMNS, "tp")}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks, self.head = nn.Embedding(16, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _workload() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = {name: torch.randint(16, (8, 3)) for name in ("ids", "labels")}
    return workload_of(Model(), batch), batch


def _step(added: str, force: dict[str, Any]) -> list[Any]:
    """(plan, loss, gradients, cuts of parameters) of each of four ranks."""
    workload, batch = _workload()
    with registered(*ADDED[added]):
        return planned_and_ran(workload, 4, force, _ran, batch)


def _ran(rank: int, plan: Plan, workload: Any, batch: dict[str, torch.Tensor]) -> Any:
    program = shardwright.build(Plan.model_validate_json(plan.to_json()), workload)
    loss = program.forward_backward(program.shard_batch(batch))
    return plan, loss.item(), program.gradients(), {name: spec.cuts for name, spec in program.store.specs.items()}


def _assert_as_on_one_device(results: Any, sizes: dict[str, int]) -> None:
    workload, batch = _workload()
    model = workload.model
    expected = model(**batch)
    expected.backward()
    for plan, loss, gradients, _ in results:
        assert {axis: dict(plan.mesh)[axis] for axis in sizes} == sizes
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("zero", "extent"), [(0, None), (3, None), (3, "2/4")])
def test_a_second_axis_that_carries_the_batch_plans_and_runs(zero: int, extent: str | None) -> None:
    force = {"pp": 1, "copies": 2, "dp": 2, "zero": zero, "microbatch": 1}
    if extent is not None:
        force["zero_extent"] = extent
    results = _step("copies", force)
    _assert_as_on_one_device(results, {"copies": 2, "dp": 2, "tp": 1})
    assert all(row[:2] == ["P", "P"] for row in _of(results[0][0], "param_grad"))


def test_a_second_axis_that_cuts_parameters_shares_their_dimensions() -> None:
    results = _step("columns", {"pp": 1, "columns": 2, "tp": 2, "prefer": "memory"})
    _assert_as_on_one_device(results, {"columns": 2, "dp": 1, "tp": 2})
    plan, _, _, cuts = results[0]
    assert cuts["blocks.0.up.weight"] == (("columns", dim := cuts["blocks.0.up.weight"][0][1]), ("tp", dim))
    results_of_ops = [row[1].split("->")[1].split("@")[0].split(",") for row in _of(plan, "") if "->" in row[1]]
    assert results_of_ops and not any("P" in places for places in results_of_ops)


def test_both_kinds_of_parallelism_work_beside_a_second_one() -> None:
    results = _step("columns", {"pp": 1, "columns": 2, "dp": 2, "zero": 1, "prefer": "memory"})
    _assert_as_on_one_device(results, {"columns": 2, "dp": 2, "tp": 1})


def _of(plan: Plan, start: str) -> list[list[str]]:
    return [row for rows in plan.placements.values() for key, row in rows.items() if key.startswith(start)]


def test_an_axis_that_is_gone_is_known_to_nobody() -> None:
    with registered(COPIES, "dp"):
        assert placement_axes()[0] == "copies"
        kept = Mesh.of(MeshShape.of({"copies": 2})).model_dump()
    assert "copies" not in placement_axes()
    with pytest.raises(ValueError, match="no such axis"):
        Mesh(**kept)
    with pytest.raises(ShardwrightError, match="unknown force key 'copies'"):
        shardwright.plan("preset:tiny-llama", "4xCPU", global_batch=8, force={"copies": 2})


def test_axes_stand_in_the_order_that_storage_needs() -> None:
    with pytest.raises(ValueError, match="stages come first"), registered(COLUMNS, "dp"):
        pass
    kinds = [role.carries for role in roles()]
    assert kinds[0] is Carries.STAGES and kinds[-1] is Carries.FEATURES


def test_the_experts_axis_divides_the_ranks_that_carry_the_batch() -> None:
    shape = MeshShape.of({"pp": 2, "dp": 4, "ep": 2, "tp": 2})
    assert shape.num_devices == 16 and shape.size("ep") == 2 and Mesh.of(shape).num_devices == 16
    with pytest.raises(ValueError, match="ep=3 does not divide the 4 ranks that carry the batch"):
        MeshShape.of({"dp": 4, "ep": 3})


def test_state_is_kept_in_copies_of_neighbours() -> None:
    shape, copies, shards = MeshShape.of({"pp": 2, "dp": 8, "tp": 2}).in_copies(4)
    assert [size for size in shape.sizes if size > 1] == [2, 2, 4, 2]
    assert (shape.size(copies), shape.size(shards), shape.num_devices) == (2, 4, 32)


def test_an_axis_cuts_and_joins_only_what_no_axis_inside_it_cuts() -> None:
    places = (R, P, 0, 1)
    for before, after in itertools.product(itertools.product(places, repeat=3), repeat=2):
        steps = route(before, after)
        if any(b >= 0 and a == P for b, a in zip(before, after, strict=True)):
            assert steps is None
            continue
        assert steps is not None
        current = list(before)
        for k, source, target in steps:
            assert current[k] == source
            assert not {place for place in (source, target) if place >= 0} & set(current[k + 1 :])
            current[k] = target
        assert tuple(current) == after
