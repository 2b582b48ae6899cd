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


def _on_one_rank(rank: int, kind: str, force: dict[str, int]) -> list[str | float]:
    """What a step gives after a change that rank 0 alone made."""
    workload = Workload(Net(), batch(0), 8, precision=WIDE, batch_size=8, name="Net")
    plan = api.plan(workload, "2xCPU", force={**force, "zero": 1}, self_test=False)
    program = api.build(plan, workload)
    program.step(program.shard_batch(batch(0)))
    if rank == 0:
        change(kind, list(program.named_parameters()))
    found: list[str | float] = []
    for step in (1, 2):
        try:
            found.append(program.step(program.shard_batch(batch(step))).item())
        except ShardwrightError as error:
            found.append(error.what)
    return found


def test_values_that_one_rank_wrote_are_brought_to_all() -> None:
    """Its part of them: the others join in, and do not wait for what never comes."""
    first, second = run_ranks(2, _on_one_rank, "set", {"dp": 2}, timeout_s=60)
    assert first == second and all(isinstance(loss, float) for loss in first)


def test_a_parameter_that_rests_on_one_copy_alone_is_refused_on_all_ranks() -> None:
    first, second = run_ranks(2, _on_one_rank, "freeze", {"dp": 2}, timeout_s=60)
    assert first == second and "a.weight requires a gradient on one rank and not on another" in str(first[0])


def test_a_stage_may_be_frozen_by_the_rank_that_holds_it() -> None:
    first, second = run_ranks(2, _on_one_rank, "freeze", {"pp": 2}, timeout_s=60)
    assert first == second and all(isinstance(loss, float) for loss in first)


def _thaw(rank: int) -> str:
    model = Net()
    model.a.requires_grad_(False)
    workload = Workload(model, batch(0), 8, precision=WIDE, batch_size=8, name="Net")
    program = api.build(api.plan(workload, "2xCPU", force={"dp": 2}, self_test=False), workload)
    if rank == 1:
        change("unfreeze", list(program.named_parameters()))
    with pytest.raises(ShardwrightError) as found:
        program.step(program.shard_batch(batch(0)))
    return found.value.what


def test_a_parameter_that_one_rank_thaws_stops_all() -> None:
    first, second = run_ranks(2, _thaw, timeout_s=60)
    assert first == second and "requires a gradient now" in first
