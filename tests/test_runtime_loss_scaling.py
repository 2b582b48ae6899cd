"""Dynamic loss scaling under float16: torch.amp.GradScaler's scales, skipped steps and parameters, on all ranks."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from distributed import run_ranks
from runtime_toy import make_batch, make_plan, make_program, make_toy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright import api
from shardwright.errors import ShardwrightError
from shardwright.profiler.models import load_workload, reload_workload
from shardwright.profiler.workload import LossScaling, OptimizerSpec, Precision, Workload
from shardwright.runtime.loss_scaling import LossScaler
from shardwright.runtime.parameters import local_tensor

RULE = LossScaling(initial=2.0**19, growth=2.0, backoff=0.5, growth_interval=2)
HALF = Precision(torch.float16, torch.float32, torch.float32, RULE)
ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def squared_error(output: torch.Tensor, batch) -> torch.Tensor:
    return (output.float() - batch["y"].float()).square().mean()


def batches(count: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = [
        {"x": torch.randn(8, 8, generator=generator).half(), "y": torch.randn(8, 4, generator=generator).half()}
        for _ in range(count)
    ]
    found[7]["x"] *= 3e4  # overflows in the second layer, whatever the scale
    return found


def by_grad_scaler(loss) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """(scale, parameters) after each step of plain PyTorch: float32 parameters, cast for each step."""
    torch.manual_seed(0)
    model = Net().half()
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", RULE.initial, RULE.growth, RULE.backoff, RULE.growth_interval)
    found = []
    for batch in batches():
        optimizer.zero_grad()
        output = torch.func.functional_call(model, {n: p.half() for n, p in masters.items()}, (batch["x"],))
        scaler.scale(loss(output, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), {n: p.detach().clone() for n, p in masters.items()}))
    return found


@pytest.mark.parametrize("loss", [squared_error])
def test_scales_and_parameters_are_those_of_torchs_grad_scaler(loss) -> None:
    torch.manual_seed(0)
    workload = Workload(Net().half(), batches()[0], global_batch=8, loss=loss, optimizer=ADAM, precision=HALF)
    assert workload.optimizer.skip_nonfinite
    program = api.build(api.plan(workload, "1xCPU", force={"microbatch": 8}), workload)
    scales = []
    for batch, (scale, parameters) in zip(batches(), by_grad_scaler(loss), strict=True):
        program.step(program.shard_batch(batch))
        scales.append(program.scaler.scale)
        assert program.scaler.scale == scale
        for name, parameter in program.named_parameters():
            torch.testing.assert_close(parameter.detach(), parameters[name], rtol=1e-5, atol=1e-6)
    assert min(scales) < RULE.initial and any(b > a for a, b in itertools.pairwise(scales)), scales


def test_the_scale_stays_within_float32_and_grows_only_after_steps_in_a_row() -> None:
    scaler = LossScaler(LossScaling(initial=2.0**126, growth_interval=2))
    scales = []
    for finite in (True, True, True, True, False, True, False, True, True):
        scaler.update(finite)
        scales.append(math.log2(scaler.scale))
    assert scales == [126, 127, 127, 127, 126, 126, 125, 125, 126]


def _train(rank: int, layout: dict, post_validation: bool, spoiled: tuple[int, int]) -> dict[str, Any]:
    """Five steps; `spoiled`: rank and step that get no finite gradient."""
    toy = make_toy(dtype=torch.float16)
    spec = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2, post_validation=post_validation)
    program = make_program(toy, make_plan(toy, **layout), optimizer=spec, precision=HALF)
    program.scaler.state[0] = 2.0**7
    scales = []
    for step in range(5):
        program.forward_backward(program.shard_batch(make_batch(16, seed=step)))
        if (rank, step) == spoiled:
            for grad in program.gradients(full=False).values():
                grad.mul_(math.inf)
        program.optimizer_step()
        program.settle()
        scales.append(program.scaler.scale)
    return {"scales": scales, "state": {k: local_tensor(t).clone() for k, t in program.state_dict().items()}}


@pytest.mark.parametrize("layout", [{"pp": 2}, {"dp": 2, "zero": 3}], ids=str)
def test_an_infinity_on_one_rank_backs_off_on_all(layout: dict) -> None:
    waiting = run_ranks(2, _train, layout, False, (1, 2))
    ahead = run_ranks(2, _train, layout, True, (1, 2))
    for here, there in zip(waiting, ahead, strict=True):
        assert here["scales"] == [2.0**7, 2.0**8, 2.0**7, 2.0**7, 2.0**8] == there["scales"]
        assert here["state"].keys() == there["state"].keys()
        for key, value in here["state"].items():
            assert torch.equal(value, there["state"][key]) and value.isfinite().all(), key


def test_the_scale_is_in_the_checkpoint(tmp_path) -> None:
    toy = make_toy(dtype=torch.float16)
    make = lambda: make_program(toy, make_plan(toy), optimizer=ADAM, precision=HALF)  # noqa: E731
    program, other = make(), make()
    program.scaler.state.copy_(torch.tensor([4.0, 1.0]))
    program.step(program.shard_batch(make_batch(16)))
    program.save(tmp_path / "step")
    other.load(tmp_path / "step")
    assert other.scaler.state.tolist() == program.scaler.state.tolist() == [8.0, 0.0]
    # a checkpoint of a run in another dtype has none: the scale stays
    wide = make_program(toy, make_plan(toy), optimizer=ADAM, precision=Precision(torch.float16, loss_scaling=None))
    wide.step(wide.shard_batch(make_batch(16)))
    wide.save(tmp_path / "wide")
    other.load(tmp_path / "wide")
    assert other.scaler.scale == 8.0


def test_an_optimizer_in_float16_is_refused_under_a_scaled_loss() -> None:
    toy = make_toy(dtype=torch.float16)
    with pytest.raises(ShardwrightError, match="updated in float16"):
        make_program(toy, make_plan(toy), precision=Precision(torch.float16, torch.float16, torch.float16))


@pytest.mark.parametrize("rule", [LossScaling(), RULE, None])
def test_the_rule_travels_with_the_workload(rule: LossScaling | None) -> None:
    workload = load_workload("preset:mlp", precision=Precision(torch.float16, loss_scaling=rule))
    assert reload_workload(copy.deepcopy(workload.spec)).precision == workload.precision


class _HostTraffic(TorchDispatchMode):
    """Fails on what would make a host wait for its device: a value read back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_neither_reads_back_nor_copies_a_tensor_made_on_the_host(monkeypatch, max_grad_norm) -> None:
    toy = make_toy()
    spec = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2, "fused": True}, 2, max_grad_norm)
    program = make_program(toy, make_plan(toy), optimizer=spec)
    part = program.shard_batch(make_batch(16))
    program.step(part)
    made = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda *args, device=None, **rest: made(*args, **rest) if device is None else pytest.fail()
    )
    with _HostTraffic():
        program.step(part)
