"""Optimizer state in host memory: the numbers, the bytes and the checkpoints are those of state on the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from runtime_toy import make_batch, make_plan, make_program, make_toy

from shardwright.plans.document import MemoryPolicy, Plan
from shardwright.profiler.workload import OptimizerSpec, Precision
from shardwright.runtime import stepping
from shardwright.runtime.host_link import HostGradients, HostLink
from shardwright.runtime.offload import HostMemory
from shardwright.runtime.program import Program

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, max_grad_norm=0.5)
SGD = OptimizerSpec("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}, state_tensors=1)
POST = dataclasses.replace(ADAM, post_validation=True)
WIDE = Precision(compute=torch.float32, master=torch.float64, grad_reduce=torch.float64)


def on_host(plan: Plan) -> Plan:
    return plan.model_copy(update={"memory_policy": MemoryPolicy(optimizer_state="host")})


def trained(program: Program, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and what the parameters come to."""
    losses = []
    for step in range(steps):
        losses.append(float(program.step(program.shard_batch(make_batch(16, seed=step)))))
    return losses, {name: program.store.whole(p.detach()).clone() for name, p in program.named_parameters()}


def both_agree(layout: dict[str, Any], spec: OptimizerSpec, precision: Precision | None = None) -> float:
    """Largest difference between state on the device and on the host, relative to the largest entry."""
    dtype = torch.float64 if precision is None else precision.compute
    toy = make_toy(num_blocks=4, dtype=dtype)
    changes: dict[str, Any] = {"optimizer": spec} | ({} if precision is None else {"precision": precision})
    plan = make_plan(toy, **layout)
    before = stepping.SUBGROUP_ELEMENTS
    stepping.SUBGROUP_ELEMENTS = 200  # several
    try:
        (kept, first), (away, second) = (
            trained(make_program(toy, placed, **changes)) for placed in (plan, on_host(plan))
        )
    finally:
        stepping.SUBGROUP_ELEMENTS = before
    worst = max(abs(a - b) / abs(a) for a, b in zip(kept, away, strict=True))
    for name, value in first.items():
        worst = max(worst, float((value - second[name]).abs().max() / value.abs().max()))
    return worst


@pytest.mark.parametrize("spec", [ADAM, SGD, POST], ids=["clipped AdamW", "SGD", "post-validation"])
@pytest.mark.parametrize("precision", [None, WIDE], ids=["one copy", "master copies"])
def test_a_process_alone_steps_on_the_host_with_the_devices_numbers(
    spec: OptimizerSpec, precision: Precision | None
) -> None:
    assert both_agree({"microbatch": 4, "count": 4}, spec, precision) <= 1e-12


LAYOUTS = [
    {"dp": 2, "zero": 0, "count": 2, "microbatch": 8},
    {"dp": 2, "zero": 1, "count": 2, "microbatch": 8},
    {"dp": 2, "zero": 2, "count": 2, "microbatch": 8},
    {"dp": 2, "zero": 3, "count": 2, "microbatch": 8},
    {"tp": 2},
    {"pp": 2},
]


def _agree_on_ranks(rank: int, layouts: list[dict[str, Any]]) -> list[float]:
    return [both_agree(layout, spec) for layout in layouts for spec in (ADAM,)]


def test_ranks_step_on_the_host_with_the_devices_numbers() -> None:
    for worst in run_ranks(2, _agree_on_ranks, LAYOUTS):
        assert max(worst) <= 1e-12, worst


def test_only_what_computes_is_counted_on_the_device() -> None:
    toy = make_toy(num_blocks=4, dtype=torch.float32)
    program = make_program(toy, on_host(make_plan(toy)), optimizer=ADAM, precision=WIDE)
    trained(program, 1)
    elements = sum(p.numel() for p in toy.model.parameters())
    trains = sum(p.numel() for p in toy.model.parameters() if p.requires_grad)
    differentiated = sum(toy.model.get_parameter(n).numel() for n, s in program.store.specs.items() if s.has_grad)
    assert program.store.param_bytes() == 4 * elements
    assert program.memory._optimizer_bytes == 0
    assert program.store.host_bytes() == 8 * trains + 8 * differentiated  # master copies and gradients
    stepped = [p for p in program.store.local_parameters.values() if p.requires_grad]
    assert stepped and all(p.dtype == torch.float64 for p in stepped)


def test_a_checkpoint_goes_from_either_setting_to_the_other(tmp_path: Path) -> None:
    toy = make_toy(num_blocks=2, dtype=torch.float64)
    plan = make_plan(toy)
    whole, _ = trained(make_program(toy, plan, optimizer=ADAM), 4)
    for first, second in ((plan, on_host(plan)), (on_host(plan), plan)):
        program = make_program(toy, first, optimizer=ADAM)
        begun, _ = trained(program, 2)
        program.save(tmp_path / "checkpoint")
        resumed = make_program(toy, second, optimizer=ADAM)
        resumed.load(tmp_path / "checkpoint")
        rest = [float(resumed.step(resumed.shard_batch(make_batch(16, seed=step)))) for step in (2, 3)]
        assert [*begun, *rest] == pytest.approx(whole, rel=1e-12)


def test_a_scheduler_and_a_frozen_parameter_count_on_the_host() -> None:
    toy = make_toy(num_blocks=2, dtype=torch.float64)
    found = []
    for plan in (make_plan(toy), on_host(make_plan(toy))):
        program = make_program(toy, plan, optimizer=ADAM)
        assert program.optimizer is not None
        scheduler = torch.optim.lr_scheduler.StepLR(program.optimizer, step_size=1, gamma=0.5)
        losses = []
        for step in range(3):
            if step == 1:
                next(iter(program.store.parameters.values())).requires_grad_(False)
            losses.append(float(program.step(program.shard_batch(make_batch(16, seed=step)))))
            scheduler.step()
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_hook_of_the_users_is_called_once_a_step() -> None:
    toy = make_toy(num_blocks=2, dtype=torch.float64)
    program = make_program(toy, on_host(make_plan(toy)), optimizer=ADAM)
    calls: list[int] = []
    assert program.optimizer is not None
    program.optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    trained(program, 2)
    assert len(calls) == 2


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_a_link_moves_in_chunks_adds_on_the_host_and_casts_on_the_way_back(device: str) -> None:
    link = HostLink(HostMemory(torch.device(device)), chunk_bytes=64, num_buffers=2)
    sums = HostGradients(link, torch.float64)
    for _ in range(2):  # the second time in the same memory
        for factor in (1.0, 2.0):
            sums.add("w", factor * torch.arange(35.0, device=device).view(5, 7).t())
        total = sums.take()["w"]
        link.settle()
        assert torch.equal(total, 3.0 * torch.arange(35.0, dtype=torch.float64).view(5, 7).t())
        assert sums.take() == {} and link.num_bytes() == 0
    target = torch.empty(7, 5, device=device)
    link.send(total, target)
    link.arrive()
    assert torch.equal(target.cpu(), total.float())
