"""Ops that the planner does not know: rules of the user's own, proven on the CPU, and what happens without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compared import assert_same_numbers, compared, plan_once
from custom_ops import KINDS, cube, twice_plus
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard

import shardwright
from shardwright.errors import ShardwrightError
from shardwright.ops.catalog import CUSTOM, strategies
from shardwright.ops.strategy import Strategy


def plan_of(kind: str, **force: object) -> Any:
    spec = {"model": f"custom_ops:net_{KINDS.index(kind)}", "kind": "factory", "global_batch": 8}
    return plan_once(spec, "4xCPU", force)


@pytest.mark.parametrize("kind", KINDS)
def test_ops_of_every_origin_compute_the_same(kind: str, tmp_path: Path) -> None:
    plan = plan_of(kind, pp=1, dp=2, tp=2)
    found = compared(plan, tmp_path)
    assert_same_numbers(found)
    assert len(found["gradients"]) == 4


def test_an_op_without_a_rule_is_planned_whole_and_listed_with_its_cost_and_line() -> None:
    rows = [row for row in plan_of("library").conservative_ops if "twice_plus" in row.op]
    assert rows and all(row.cost_s > 0 for row in rows)
    assert any("custom_ops.py" in row.source for row in rows)


def test_an_op_with_the_name_of_one_of_the_kernels_is_planned_as_any_other() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            return self.norm(torch.ops.shardwright_tests.rms_norm(h, self.first.bias)).square().mean()

    workload = shardwright.Workload(Normed(), {"x": torch.randn(8, 8)}, global_batch=8)
    plan = shardwright.plan(workload, "2xCPU", force={"dp": 1, "pp": 1, "tp": 2})
    assert any(row.op.startswith("shardwright_tests.rms_norm") for row in plan.conservative_ops)


@pytest.fixture
def no_rules() -> Any:
    kept = dict(CUSTOM)
    yield
    CUSTOM.clear()
    CUSTOM.update(kept)


def test_a_registered_rule_is_used(no_rules: None, tmp_path: Path) -> None:
    rule = [([Shard(d)], [Shard(d), Shard(d), None]) for d in range(2)]
    shardwright.register_sharding(twice_plus, rule, examples=[(torch.randn(5, 4), torch.randn(5, 4), 0.5)])
    plan = plan_of("library", pp=1, dp=2, tp=2)
    assert not any("twice_plus" in row.op for row in plan.conservative_ops)
    texts = [v for rows in plan.placements.values() for k, v in rows.items() if k.startswith("twice_plus")]
    assert texts and texts[0][0] == "S(0),S(0)->S(0)", "the batch stays split"
    CUSTOM.clear()  # the plan holds the placements: running it needs no rule
    assert_same_numbers(compared(plan, tmp_path))


@pytest.mark.parametrize(
    "op", [cube, "shardwright_tests::cube", torch.ops.shardwright_tests.cube, torch.ops.shardwright_tests.cube.default]
)
def test_ops_are_named_in_any_way(op: Any, no_rules: None) -> None:
    @shardwright.register_sharding(op)
    def rule(x: torch.Tensor) -> list[Any]:
        return [([Shard(d)], [Shard(d)]) for d in range(x.ndim)]

    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    given.meta["val"] = torch.empty(4, 3, device="meta")
    node = graph.call_function(torch.ops.shardwright_tests.cube.default, (given,))
    node.meta["val"] = torch.empty(4, 3, device="meta")
    found, known = strategies(node)
    assert known and {Strategy((0,), (0,)), Strategy((1,), (1,))} <= set(found)


def test_the_checker_proves_right_rows_on_uneven_sizes() -> None:
    x, w = torch.randn(7, 5), torch.randn(5, 6)
    rows = [
        ([Shard(0)], [Shard(0), Replicate()]),
        ([Shard(1)], [Replicate(), Shard(1)]),
        ([Partial()], [Shard(1), Shard(0)]),
        ([Partial()], [Partial(), Replicate()]),
    ]
    assert shardwright.check_sharding(torch.ops.aten.mm, rows, x, w) == 8  # each on 2 and on 3 ranks


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (([Shard(0)], [Shard(1), Shard(0)]), "comes out as"),
        (([Replicate()], [Shard(1), Shard(0)]), "differs between ranks"),
        (([Partial()], [Replicate(), Replicate()]), "differs by up to"),
        (([Shard(0)], [Replicate(), Shard(0)]), "fails with"),
    ],
)
def test_the_checker_names_the_wrong_row(row: Any, says: str) -> None:
    with pytest.raises(ShardwrightError, match=says):
        shardwright.check_sharding(torch.ops.aten.mm.default, [row], torch.randn(6, 6), torch.randn(6, 6))


@pytest.mark.parametrize(
    ("op", "rule", "says"),
    [
        ("nobody::nothing", [], "no registered op"),
        (cube, 3, "is a int"),
        (cube, [([Shard(0)], [Shard(0), Shard(0)])], "1 tensor arguments"),
    ],
)
def test_mistakes_are_told(op: Any, rule: Any, says: str, no_rules: None) -> None:
    with pytest.raises(ShardwrightError, match=says):
        shardwright.register_sharding(op, rule, examples=[(torch.randn(4, 4),)])
