"""The expert axis: experts cut over a part of the data ranks, tokens sent to them, the numbers of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright.plans.document import Plan

WIDTH, INNER, EXPERTS, CHOICES = 8, 6, 4, 2
expert_mlp = torch.ops.shardwright.expert_mlp


class Experts(nn.Module):
    """kind: "uneven" has every token choose the first two experts, so that ranks without them get nothing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.flatten(0, 1)
        scores = self.router(hidden)
        if self.kind == "uneven":
            scores = scores + torch.tensor([30.0, 20.0, -20.0, -20.0], dtype=x.dtype, device=x.device)
        weight, index = scores.softmax(-1).topk(CHOICES, dim=-1)
        out, _ = expert_mlp(hidden, index, weight, self.gate_up, self.down, "silu")
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self, kind: str = "even", layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.blocks = nn.ModuleList(Experts(kind) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def _workload(kind: str = "even", layers: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = {name: torch.randint(16, (8, 3)) for name in ("ids", "labels")}
    return workload_of(Model(kind, layers), batch), batch


def _step(rank: int, kind: str, layers: int, plan: str) -> Any:
    workload, batch = _workload(kind, layers)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    loss = program.forward_backward(program.shard_batch(batch))
    return loss.item(), program.gradients(), {name: tuple(s.cuts) for name, s in program.store.specs.items()}


def _planned(kind: str, num_devices: int, force: dict[str, Any], layers: int = 2) -> Plan:
    workload, _ = _workload(kind, layers)
    return shardwright.plan(workload, f"{num_devices}xCPU", force=force, self_test=False)


def _assert_as_on_one_device(kind: str, plan: Plan, layers: int = 2) -> None:
    results = run_ranks(plan.mesh.num_devices, _step, kind, layers, plan.to_json())
    workload, batch = _workload(kind, layers)
    expected = workload.model(**batch)
    expected.backward()
    for loss, gradients, cuts in results:
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
        is_cut = {name for name, cut in cuts.items() if ("ep", 0) in cut}
        assert is_cut == {name for name in cuts if name.endswith(("gate_up", "down"))}


def _rows_of(plan: Plan, start: str, axis: str = "ep") -> list[str]:
    at = plan.placement_axes.index(axis)
    return [row[at] for rows in plan.placements.values() for key, row in rows.items() if key.startswith(start)]


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_dispatched_tokens_give_the_numbers_of_one_device(kind: str, zero: int) -> None:
    plan = _planned(kind, 2, {"dp": 2, "ep": 2, "experts": "dispatch", "zero": zero})
    assert plan.mesh.dp == 2 and plan.mesh.ep == 2 and plan.mesh.num_devices == 2
    _assert_as_on_one_device(kind, plan)
