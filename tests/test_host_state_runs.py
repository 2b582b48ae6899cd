"""Plans with the state of the optimizer in host memory are carried out: the same losses within less memory."""

from __future__ import annotations

import torch
from torch import nn

import shardwright
from shardwright.plans.document import Plan
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload
from shardwright.runtime.program import Program

WIDTH, LAYERS, BATCH = 48, 12, 4
WIDE = Precision(compute=torch.float32, master=torch.float64, grad_reduce=torch.float64)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def workload() -> Workload:
    torch.manual_seed(0)
    model = Net()
    return Workload(
        model=model,
        example_batch={"x": torch.randn(BATCH, WIDTH), "y": torch.randn(BATCH, WIDTH)},
        global_batch=BATCH,
        loss=lambda out, batch: (out - batch["y"]).square().mean(),
        optimizer=OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-3}, 2, 1.0),
        precision=WIDE,
    )


def losses_of(plan: Plan, job: Workload, limit_bytes: int | None = None) -> tuple[list[float], Program]:
    program = shardwright.build(plan, job, self_test=False)
    program.memory.limit_bytes = limit_bytes
    batches = [{name: torch.randn(BATCH, WIDTH) for name in ("x", "y")} for _ in range(3)]
    return [float(program.step(program.shard_batch(batch))) for batch in batches], program


def test_state_three_times_the_budget_trains_within_it_with_the_same_losses() -> None:
    job = workload()
    elements = sum(p.numel() for p in job.model.parameters())
    budget = elements * (4 + 8 + 16) // 3  # parameters, master copies and two moments
    whole_batch = {"microbatch": BATCH}  # sums of the same order, whatever the devices' figures
    plan = shardwright.plan(job, "1xCPU", force={"optimizer_state": "host", **whole_batch}, memory_limit_bytes=budget)
    assert max(plan.predicted.peak_bytes) <= budget and plan.predicted.host_bytes > budget
    torch.manual_seed(1)
    found, program = losses_of(plan, job, budget)
    assert program.memory.peak_bytes <= budget
    torch.manual_seed(1)
    whole, kept = losses_of(shardwright.plan(job, "1xCPU", force=whole_batch), job)
    assert kept.memory.peak_bytes > 3 * budget and found == whole


def test_what_takes_more_than_its_limit_is_stopped_by_name() -> None:
    job = workload()
    plan = shardwright.plan(job, "1xCPU")
    try:
        losses_of(plan, job, 1 << 20)
    except shardwright.ShardwrightError as error:
        assert "1.00 MiB" in error.what
    else:
        raise AssertionError("nothing was refused")
