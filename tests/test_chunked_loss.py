"""Cross entropy of a linear layer's rows, some at a time: the same numbers, without logits of all rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import largest_difference, workload_of
from forked import fork_ranks
from torch import nn

import shardwright
from shardwright import api
from shardwright.costmodel.losses import LossCall
from shardwright.kernels import linear_cross_entropy as module
from shardwright.kernels.linear_cross_entropy import linear_cross_entropy
from shardwright.passes.fuse import fuse_model
from shardwright.plans.document import Plan
from shardwright.profiler.capture import capture

pytestmark = pytest.mark.usefixtures("shared_captures")
CLASSES, LENGTH = 6000, 8


class Model(nn.Module):
    """between: what a model does with its logits before the loss."""

    def __init__(self, between: str, bias: bool = True) -> None:
        super().__init__()
        self.between = between
        self.table, self.norm = nn.Embedding(CLASSES, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, CLASSES, bias=bias)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(self.norm(x))
        if self.between == "shifted":
            logits, labels = logits[:, :-1].contiguous().float().double(), labels[:, 1:]
        if self.between == "read twice":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + logits.logsumexp(-1).square().mean()
        if self.between == "capped":
            logits = 3 * (logits / 3).tanh()
        if self.between == "smoothed":
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        if self.between == "summed":
            return F.cross_entropy(logits.view(-1, CLASSES), labels.reshape(-1), reduction="sum")
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _workload(between: str, bias: bool = True) -> Any:
    torch.manual_seed(0)
    batch = {name: torch.randint(CLASSES, (4, LENGTH)) for name in ("ids", "labels")}
    batch["labels"][1, :5] = -100
    return workload_of(Model(between, bias), batch), batch


_planned_workload = functools.cache(_workload)


def _fused(workload: Any) -> tuple[Any, list[str]]:
    return fuse_model(
        capture(workload), lambda dtype: lambda flops, saved: False, chunks_loss=lambda rows, classes, itemsize: True
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_loss_and_gradients_are_those_of_the_whole(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rows_at_once", lambda *_: rows)
    torch.manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((37, 8), (19, 8), (19,))
    )
    target = torch.randint(19, (37,))
    target[::5] = -100
    given = [hidden, weight, *([offset] if bias else [])]
    found, _ = linear_cross_entropy(hidden, weight, offset if bias else None, target, -100, torch.float64)
    expected = F.cross_entropy(F.linear(*given), target, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(37, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(found, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("between", ["nothing", "shifted", "summed"])
def test_a_loss_is_found_through_what_takes_rows_as_they_are(between: str) -> None:
    workload, _ = _workload(between)
    graph, done = _fused(workload)
    assert [text.split(": ")[1] for text in done] == ["chunked_loss x1"]
    assert largest_difference(workload, graph) < 1e-12
    whole = CLASSES * (LENGTH - 1)
    nodes = list(graph.segments.values())[-1].joint.graph.nodes
    values = [n.meta["val"] for n in nodes if "val" in n.meta]
    assert all(v.numel() < 4 * whole for v in values if isinstance(v, torch.Tensor) and v.dim() > 1)


@pytest.mark.parametrize("between", ["read twice", "capped", "smoothed"])
def test_logits_that_are_more_than_the_rows_of_a_loss_stay(between: str) -> None:
    assert _fused(_workload(between)[0])[1] == []


def _step(rank: int, bias: bool, plan: str) -> Any:
    workload, batch = _planned_workload("nothing", bias)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    loss = program.forward_backward(program.shard_batch(batch))
    return loss.item(), program.gradients()


@pytest.mark.parametrize(
    ("force", "bias"),
    [
        ({"dp": 2, "zero": 3}, True),
        ({"tp": 2, "head.weight": "colwise"}, True),
        ({"tp": 2, "head.weight": "colwise"}, False),
        ({"cp": 2}, False),
    ],
    ids=str,
)
def test_it_is_exact_on_every_axis(force: dict[str, Any], bias: bool) -> None:
    workload, batch = _planned_workload("nothing", bias)
    plan = shardwright.plan(workload, "2xCPU", force={"loss": "chunked", **force}, self_test=False)
    assert any("chunked_loss" in text for text in plan.fusions)
    found = [row for rows in plan.placements.values() for key, row in rows.items() if key == "linear_cross_entropy"]
    assert any("S(0)" in text for row in found for text in row)
    results = fork_ranks(2, _step, bias, plan.to_json())
    workload, batch = _workload("nothing", bias)
    expected = workload.model(**batch)
    expected.backward()
    for loss, gradients in results:
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_its_scratch_is_some_rows_of_logits() -> None:
    graph, _ = _fused(_workload("nothing")[0])
    calls = [LossCall.read(n) for s in graph.segments.values() for n in s.joint.graph.nodes]
    forward, backward = (call for call in calls if call is not None)
    rows, classes = 4 * LENGTH, CLASSES
    assert forward.scratch(rows * 8 * 8, classes * 8 * 8, "gpu") == rows * classes * 4 * 8
    assert backward.scratch(rows * 8 * 8, classes * 8 * 8, "gpu") == rows * classes * 3 * 8 + classes * 8 * 8
    many = forward.scratch((1 << 30) * 8, classes * 8 * 8, "gpu")
    assert many <= 4 * module.CHUNK_BYTES["gpu"] + 1


def test_a_sequence_whose_logits_fill_a_device_is_planned_so() -> None:
    class Cost:
        class cluster:
            @staticmethod
            def worst_device() -> Any:
                return type("Device", (), {"memory_bytes": 80 << 30})

    graph = type("Graph", (), {"batch_size": 11})
    asked = api._chunks_loss(graph, Cost, always=False)  # type: ignore[arg-type]
    assert asked(11 * 131072, 128256, 4) and not asked(11 * 8192, 128256, 4)
    assert api._chunks_loss(graph, Cost, always=True)(11 * 64, 128, 4)  # type: ignore[arg-type]
