"""Over microbatches and data ranks, a loss is that of the model as written on the whole batch."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compared import planned_and_ran
from global_losses import CLASSES, EACH, LOSSES, OVER, SAMPLES, Small, batch_of
from matrix import cells
from torch import nn

import shardwright
from shardwright.api import capture_for_planning
from shardwright.plans.document import Plan
from shardwright.profiler.batch_dims import with_batch_dims
from shardwright.profiler.batches import resize_batch
from shardwright.profiler.capture import capture
from shardwright.profiler.workload import Precision, Workload
from shardwright.reference import forward_backward

DOUBLE = Precision(torch.float64, torch.float64, torch.float64)


@functools.cache
def workload_of(*names: str) -> Workload:
    dims = {"x": 0, "t": 0, "m": 0, "c": None, "n": None}
    model, batch = Small(*names), batch_of()
    return Workload(model=model, example_batch=batch, global_batch=SAMPLES, precision=DOUBLE, batch_dims=dims)


def _step(force: dict[str, Any], *names: str, empty: bool = False, evaluates: bool = True) -> list[Any]:
    """(plan, loss, gradients, loss of an evaluation) of each rank; all have what was captured here."""
    return planned_and_ran(
        workload_of(*names), 2 if "dp" in force or "pp" in force else 1, force, _ran, empty, evaluates
    )


def _ran(rank: int, plan: Plan, workload: Workload, empty: bool, evaluates: bool) -> Any:
    program = shardwright.build(plan, workload)
    batch = program.shard_batch(batch_of(1, empty))
    evaluated = program.evaluate(batch).item() if evaluates else None
    return plan, program.forward_backward(batch).item(), program.gradients(), evaluated


def assert_is_the_whole_batchs(found: Any, *names: str, empty: bool = False) -> None:
    plan, loss, gradients, evaluated = found
    assert plan.microbatch.count > 1
    model = Small(*names)
    expected = model(**batch_of(1, empty))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert evaluated in (None, pytest.approx(expected.item(), rel=1e-9))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


EVERY = [(name, what) for name in LOSSES for what in ("trained", "evaluated")]
# evaluation takes the same totals: it is seen on every fourth, and on several ranks below
HERE = [row for k, row in enumerate(EVERY) if row[1] == "trained" or k % 8 == 1]


@pytest.mark.parametrize(("name", "what"), cells(EVERY, HERE))
def test_a_loss_over_microbatches_is_that_of_the_batch(name: str, what: str) -> None:
    (found,) = _step({"microbatch": 2}, name, evaluates=what == "evaluated")
    assert found[0].loss_over == OVER[name]
    assert_is_the_whole_batchs(found, name)


MEANS = ["ignored", "class_weights", "clamped", "means", "two"]


@pytest.mark.parametrize("force", [{"dp": 2, "zero": 2, "microbatch": 2}, {"pp": 2, "microbatch": 2}])
def test_losses_count_over_data_ranks_and_stages(force: dict[str, Any]) -> None:
    for found in _step(force, *MEANS):
        assert_is_the_whole_batchs(found, *MEANS)


def test_a_rank_and_a_microbatch_without_a_label_count_nothing() -> None:
    for found in _step({"dp": 2, "microbatch": 1}, "ignored", "counted", empty=True):
        assert_is_the_whole_batchs(found, "ignored", "counted", empty=True)


@pytest.mark.parametrize("name", EACH)
def test_what_is_neither_mean_nor_sum_of_samples_is_said_to_be_so(name: str) -> None:
    assert capture_for_planning(workload_of(name)).loss_over == "each"


MIXED = ["ignored", "masked", "squared"]


def _of_microbatches(size: int) -> Any:
    """(loss, gradients): every microbatch's own, averaged by its samples."""
    model, batch = Small(*MIXED), batch_of(1)
    loss = torch.zeros((), dtype=torch.float64)
    for start in range(0, SAMPLES, size):
        part = {name: t[start : start + size] if name in "xtm" else t for name, t in batch.items()}
        loss = loss + model(**part) * (len(part["x"]) / SAMPLES)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "force", [{"microbatch": 2}, {"dp": 2, "zero": 2, "microbatch": 2}, {"pp": 2, "microbatch": 2}]
)
def test_in_a_loss_of_each_microbatch_every_mean_is_the_microbatchs_own(force: dict[str, Any]) -> None:
    for plan, loss, gradients, evaluated in _step(force, *MIXED):
        assert plan.loss_over == "each" and plan.microbatch.count > 1
        expected, wanted = _of_microbatches(plan.microbatch.size)
        assert loss == pytest.approx(expected, rel=1e-9) and evaluated == pytest.approx(expected, rel=1e-9)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


class Checked(Small):
    def forward(self, x: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        if batch["t"].max() >= CLASSES:
            raise ValueError("a label is out of range")
        return super().forward(x, **batch)


@pytest.mark.parametrize(("name", "over"), [("sum", "sum"), ("ignored", "mean"), ("squared", "each")])
def test_a_check_of_the_data_leaves_what_a_loss_is_over(name: str, over: str) -> None:
    workload = dataclasses.replace(workload_of(name), model=Checked(name))
    assert capture_for_planning(workload).loss_over == over


def test_a_count_is_planned_on_the_stage_that_reads_it(tmp_path: Path) -> None:
    plan = shardwright.plan(workload_of("ignored"), "2xCPU", force={"pp": 2, "microbatch": 2})
    graph = capture_for_planning(workload_of("ignored"))
    ((part, _),) = graph.totals.values()
    counting = next(inst.index for inst in graph.instances if part in inst.outputs)
    assert [counting in stage.segments for stage in plan.stages] == [False, True]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").loss_over == "mean"


def test_every_capture_separates_the_same_totals() -> None:
    workload = with_batch_dims(workload_of(*MEANS))
    planned, one = capture_for_planning(workload), capture(resize_batch(workload, 1))
    assert planned.totals == one.totals and planned.input_names == one.input_names


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        hidden.register_hook(lambda grad: -grad)  # which no tensor takes where no gradient flows
        return F.cross_entropy(self.last(hidden), labels)


def test_the_reference_counts_targets_with_gradients_on() -> None:
    batch = {"x": torch.randn(4, 4, dtype=torch.float64), "labels": torch.tensor([0, 1, -100, 2])}
    model = _Hooked().double()
    workload = Workload(model=model, example_batch=batch, global_batch=4, precision=DOUBLE)
    loss = forward_backward(workload, batch, step=0, microbatch_size=2)
    assert loss.item() == pytest.approx(model(**batch).item(), rel=1e-9)


class _Scaled(torch.autograd.Function):
    """Its backward knows the batch's size."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.size = len(x)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient / ctx.size


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, beta)
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, beta = ctx.saved_tensors
        gate = torch.sigmoid(beta * x)
        slope = gate * (1 - gate)
        return gradient * (gate + beta * x * slope), (gradient * x * x * slope).sum()


def _first_rows_zero(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:2] = 0
    return gradient


class _OwnBackward(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.beta = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.tensor(1.5))
        self.kind = kind
        hooks = {"norm": lambda g: g / (g.norm() + 0.1), "rows": _first_rows_zero, "scale": lambda g: 0.5 * g.t().t()}
        if kind in hooks:
            self.first.weight.register_hook(hooks[kind])
        self.double()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.kind == "turned":
            h.register_hook(lambda g: g.flip(0))
        h = _Swish.apply(h, self.beta) if self.kind == "swish" else _Scaled.apply(h) if self.kind == "size" else h
        return F.cross_entropy(self.last(h), t) + 0 * self.beta


def _own(kind: str) -> Workload:
    torch.manual_seed(1)
    batch = {"x": torch.randn(8, 6, dtype=torch.float64), "t": torch.tensor([0, 1, -100, 2, 0, -100, -100, 1])}
    return Workload(model=_OwnBackward(kind), example_batch=batch, global_batch=8, precision=DOUBLE)


@pytest.mark.parametrize(
    ("kind", "over"),
    [("swish", "mean"), ("rows", "mean"), ("scale", "mean"), ("norm", "each"), ("size", "each"), ("turned", "each")],
)
def test_what_an_own_backward_makes_of_the_batch_tells_what_the_loss_is_over(kind: str, over: str) -> None:
    workload = with_batch_dims(_own(kind))
    assert capture_for_planning(workload).loss_over == over
    program = shardwright.build(
        shardwright.plan(workload, "1xCPU", force={"microbatch": 2}, self_test=False), workload, self_test=False
    )
    loss = program.forward_backward(workload.example_batch).item()
    model, expected = _OwnBackward(kind), 0.0
    size = 2 if over == "each" else 8
    for start in range(0, 8, size):
        part = model(**{name: t[start : start + size] for name, t in workload.example_batch.items()}) * size / 8
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, rel=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(program.gradients()[name], parameter.grad, rtol=1e-9, atol=1e-12)


class _Stale(nn.Module):
    """Reads what its last forward left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("left", torch.zeros(6))
        self.double()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.left
        self.left = h.detach().mean(0)
        return F.cross_entropy(self.last(h), t)


def test_a_microbatch_reads_the_buffers_that_the_last_one_left() -> None:
    batch = {"x": torch.randn(8, 6, dtype=torch.float64), "t": torch.tensor([0, 1, 1, 2, 0, 2, 2, 1])}
    workload = with_batch_dims(Workload(model=_Stale(), example_batch=batch, global_batch=8, precision=DOUBLE))
    plan = shardwright.plan(workload, "1xCPU", force={"microbatch": 2}, self_test=False)
    loss = shardwright.build(plan, workload, self_test=False).forward_backward(batch).item()
    model = _Stale()
    expected = sum(model(x=batch["x"][k : k + 2], t=batch["t"][k : k + 2]).item() / 4 for k in range(0, 8, 2))
    assert loss == pytest.approx(expected, rel=1e-9)
    again = dataclasses.replace(workload, model=_Stale())
    assert forward_backward(again, batch, microbatch_size=2).item() == pytest.approx(expected, rel=1e-9)
