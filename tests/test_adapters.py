"""Adapters beside a frozen base: what is frozen has its own dtype and nothing besides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planner_fakes import Case, Sizes
from torch import nn

import shardwright
from shardwright.planner.memory.beside import beside_of
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import NOTHING
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape
from shardwright.plans.document import Plan
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload

WIDTH, RANK, LAYERS, BATCH = 64, 2, 3, 8


class Adapted(nn.Module):
    """A frozen linear layer in bfloat16, and a low-rank addition to it in float32."""

    def __init__(self, base: torch.dtype, adapter: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, dtype=base).requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False, dtype=adapter)
        self.up = nn.Linear(RANK, WIDTH, bias=False, dtype=adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + self.up(self.down(x.to(self.up.weight.dtype))).to(x.dtype))


class Net(nn.Module):
    def __init__(self, base: torch.dtype, adapter: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(base, adapter) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.to(self.layers[0].up.weight.dtype).square().mean()


def workload(base: torch.dtype = torch.bfloat16, adapter: torch.dtype = torch.float32) -> Workload:
    torch.manual_seed(0)
    return Workload(
        model=Net(base, adapter),
        example_batch={"x": torch.randn(BATCH, WIDTH, dtype=base)},
        global_batch=BATCH,
        optimizer=OptimizerSpec("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        precision=Precision(base, adapter, adapter),
    )


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, Workload]:
    job = workload()
    return shardwright.plan(job, "1xCPU", force={"microbatch": 2, "recompute": "none"}), job


def test_the_plan_counts_each_parameter_in_its_own_dtype_and_state_of_adapters_alone(planned) -> None:
    found = planned[0].predicted.memory
    base, adapters = LAYERS * (WIDTH + 1) * WIDTH, LAYERS * 2 * RANK * WIDTH
    assert found["parameters"] == 2 * base + 4 * adapters
    assert found["gradients"] == 4 * adapters and found["optimizer"] <= 8 * adapters
    assert found["gradient_buffers"] <= 4 * adapters / LAYERS


def test_frozen_weights_have_no_gradient_no_state_and_no_product_in_the_backward(planned) -> None:
    plan, job = planned
    program = shardwright.build(plan, job, self_test=False)
    batch = {"x": torch.randn(BATCH, WIDTH, dtype=torch.bfloat16)}
    program.forward_backward(program.shard_batch(batch))
    trained = {name for name, p in program.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in job.model.named_parameters() if p.requires_grad}
    program.optimizer_step()
    assert program.optimizer is not None and len(program.optimizer.state) == 2 * LAYERS
    assert all(state["momentum_buffer"].dtype == torch.float32 for state in program.optimizer.state.values())
    for segment in program.graph.segments.values():
        gradients = [node for node in segment.joint.graph.nodes if node.op == "call_function"]
        square = [n for n in gradients if str(n.target) == "aten.mm.default" and n.meta["val"].shape == (WIDTH, WIDTH)]
        assert not square  # the gradient of a base weight would be one


def test_adapters_train_as_in_plain_pytorch() -> None:
    job = workload(torch.float64, torch.float64)
    plan = shardwright.plan(job, "1xCPU", force={"microbatch": 2, "optimizer_state": "host"})
    program = shardwright.build(plan, job, self_test=False)
    torch.manual_seed(2)
    batches = [torch.randn(BATCH, WIDTH, dtype=torch.float64) for _ in range(3)]
    found = [float(program.step(program.shard_batch({"x": x}))) for x in batches]
    model = workload(torch.float64, torch.float64).model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    expected = []
    for x in batches:
        losses = [model(part) / 4 for part in x.split(2)]
        optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        optimizer.step()
        expected.append(float(sum(losses).detach()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_buffers_of_gradients_are_as_large_as_what_is_trained() -> None:
    case = Case(Sizes(layers=4), "4xCPU", 4)
    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    chain = setting.chain(case.sharder.solve(MeshShape.of({"dp": 4}), 1), NOTHING)
    adapted = replace(chain, trainable_elements=chain.param_elements / 100)
    found = beside_of(setting, Candidate(MeshShape.of({"dp": 4}), 1, 1, "1f1b", 1, 3), adapted)
    assert (found.gathered == 2 * chain.param_elements).all()
    assert found.packed == pytest.approx(4 * chain.param_elements / 100)
