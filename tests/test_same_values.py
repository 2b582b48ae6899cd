"""Ranks that drew other weights, or another batch, train rank 0's model all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright import cli
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload
from shardwright.runtime.same_values import _digest, take_rank_0s

F64 = Precision(torch.float64, torch.float64, torch.float64)
UNSEEDED = """
import numpy, random, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.down(self.up(x).relu()) * x.mean(), labels)

def factory():
    scale = random.random() + numpy.random.rand()
    return Net(), {"x": scale * torch.randn(4, 6), "labels": torch.zeros(4, dtype=torch.int64)}
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("order", torch.randperm(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))[:, self.order].square().cumsum(1).mean()


def _train(rank: int, zero: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    model = Net().double()
    torch.manual_seed(7)
    x = torch.randn(4, 4, dtype=torch.float64)
    sgd = OptimizerSpec("SGD", torch.optim.SGD, {"lr": 0.1}, 0)
    workload = Workload(model=model, example_batch={"x": x}, global_batch=4, precision=F64, optimizer=sgd)
    plan = shardwright.plan(workload, "2xCPU", force={"dp": 2, "zero": zero}, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    program.step(program.shard_batch({"x": x}))
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in program.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in found.items()}


def test_replicas_start_from_the_values_of_rank_0() -> None:
    torch.manual_seed(0)
    model = Net().double()
    torch.manual_seed(7)
    model(torch.randn(4, 4, dtype=torch.float64)).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters()}
    for found in run_ranks(2, _train, 0):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def _with_other_layouts(rank: int) -> list[list[float]]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(rank)
        model.bias.fill_(rank)
    model.register_buffer("graph", torch.eye(2).to_sparse())
    model.register_buffer("rows", torch.eye(2).to_sparse_csr())
    model.register_buffer("mask", torch.full((1, 2), 1.0 + rank).expand(3, 2))
    take_rank_0s(model, torch.device("cpu"))
    assert model.graph.is_sparse and model.rows.layout == torch.sparse_csr
    return [model.weight.tolist(), model.mask.tolist()]


def test_expanded_and_sparse_buffers_are_no_obstacle() -> None:
    assert run_ranks(2, _with_other_layouts) == [[[[0.0, 0.0]] * 2, [[1.0, 1.0]] * 3]] * 2


def test_the_order_of_entries_counts() -> None:
    assert _digest(torch.tensor([1, 2, 3])) != _digest(torch.tensor([2, 1, 3]))
    long = torch.randperm(1000)
    assert _digest(long) != _digest(long.flip(0)) and _digest(long) == _digest(long.clone())
    assert _digest(torch.tensor([1 + 2j, torch.nan])) == _digest(torch.tensor([1 + 2j, torch.nan]))


@pytest.mark.usefixtures("forked")
def test_a_factory_without_a_seed_is_checked_as_one_with(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unseeded.py").write_text(UNSEEDED)
    assert cli.main(["check", "unseeded.py:factory", "--hardware", "2xCPU", "--force", "dp=2"]) == 0
