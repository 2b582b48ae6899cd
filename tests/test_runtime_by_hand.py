"""What a user changes on parameters between steps is followed, as PyTorch follows it, or refused with the reason."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from torch import nn

from shardwright import api
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload

WIDE = Precision(torch.float64, torch.float64, torch.float64)
OPTIONS = {"lr": 0.05, "weight_decay": 0.5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 16, dtype=torch.float64), nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.b(torch.tanh(self.a(x))), y)


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 6, generator=generator, dtype=torch.float64), "y": torch.arange(8) % 3}


def change(kind: str, named: list[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named:
        if kind == "set":
            with torch.no_grad():
                parameter.mul_(0.5)
        elif name.startswith("a."):
            parameter.requires_grad_(kind == "unfreeze")


def _losses(rank: int, size: int, kind: str, zero: int) -> tuple[list[float], list[float], int]:
    """Six steps, with the change before the fourth: the program's losses, PyTorch's, and refreshes beside the steps."""
    model, plain = Net(), Net()
    if kind == "unfreeze":
        model.a.requires_grad_(False)
    workload = Workload(model, batch(0), 8, precision=WIDE, batch_size=8, name="Net")
    workload = dataclasses.replace(workload, optimizer=OptimizerSpec("AdamW", torch.optim.AdamW, OPTIONS))
    plan = api.plan(workload, f"{size}xCPU", force={"dp": size, "zero": zero}, self_test=False)
    program = api.build(plan, workload)
    optimizer = torch.optim.AdamW(plain.parameters(), **OPTIONS)
    mine, theirs = [], []
    refresh = program.store.refresh
    with mock.patch.object(program.store, "refresh", side_effect=refresh) as refreshed:
        for step in range(6):
            if step == 3:
                change(kind, list(program.named_parameters()))
                change(kind, list(plain.named_parameters()))
            mine.append(program.step(program.shard_batch(batch(step))).item())
            optimizer.zero_grad()
            loss = plain(**batch(step))
            loss.backward()
            optimizer.step()
            theirs.append(loss.item())
    return mine, theirs, refreshed.call_count - 6


@pytest.mark.parametrize(("kind", "zero"), [("freeze", 1), ("set", 1), ("set", 3)])
def test_what_is_frozen_or_written_by_hand_is_followed(kind: str, zero: int) -> None:
    for mine, theirs, refreshes in run_ranks(2, _losses, 2, kind, zero):
        assert mine == pytest.approx(theirs, rel=1e-12)
        assert refreshes == (kind == "set")  # no step that nobody wrote before brings parameters anew


def test_one_process_follows_too() -> None:
    mine, theirs, _ = _losses(0, 1, "freeze", 0)
    assert mine == pytest.approx(theirs, rel=1e-12)


def test_a_parameter_planned_frozen_is_not_thawed_in_silence() -> None:
    with pytest.raises(ShardwrightError, match=r"a\.bias and 1 more requires a gradient now") as found:
        _losses(0, 1, "unfreeze", 0)
    assert found.value.exit_code == ExitCode.PLAN_MISMATCH
