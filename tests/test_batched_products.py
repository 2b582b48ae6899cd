"""Attention that a model writes out in products is split by heads, and gives the numbers of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from distributed import run_ranks
from torch import fx, nn

import shardwright
from shardwright import api
from shardwright.costmodel.model import CostModel
from shardwright.plans.document import Plan
from shardwright.profiler.batched_products import copied_bytes
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.work import op_work

HEADS, WIDTH, LENGTH = 4, 16, 6


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(2, 3)).softmax(-1)
        return F.mse_loss(self.out((scores @ v).transpose(1, 2).reshape(x.shape)), y)


def _workload() -> Any:
    torch.manual_seed(0)
    batch = {name: torch.randn(4, LENGTH, WIDTH, dtype=torch.float64) for name in ("x", "y")}
    return workload_of(WrittenOut().double(), batch), batch


def _step(rank: int, plan: str) -> Any:
    workload, batch = _workload()
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    return program.forward_backward(program.shard_batch(batch)).item(), program.gradients()


def test_heads_are_split_and_the_numbers_are_those_of_one_device():
    workload, batch = _workload()
    plan = shardwright.plan(
        workload, "2xCPU", force={"tp": 2, "prefer": "memory", "sequence_parallel": "off"}, self_test=False
    )
    at = plan.placement_axes.index("tp")
    rows = [row[at] for rows in plan.placements.values() for name, row in rows.items() if name.startswith("matmul")]
    assert rows == ["S(1),S(1)->S(1)"] * 6, "two products forward, four backward"
    expected = workload.model(**batch)
    expected.backward()
    for loss, gradients in run_ranks(2, _step, plan.to_json()):
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_work_counts_the_copies_that_torch_makes():
    """Queries and keys of several samples do not lie as one stack; scores do."""
    graph = api.capture_for_planning(_workload()[0])
    nodes = [n for s in graph.segments.values() for n in s.joint.graph.nodes if "shardwright.matmul" in str(n.target)]
    first, second = nodes[:2]
    samples = graph.batch_size
    operand, scores = samples * LENGTH * WIDTH, samples * HEADS * LENGTH * LENGTH
    each = first.meta["val"].element_size()
    assert op_work(first).flops == op_work(second).flops == 2 * scores * WIDTH // HEADS
    assert op_work(first).bytes_moved == each * (2 * operand + scores + 2 * 2 * operand)
    assert op_work(second).bytes_moved == each * (2 * operand + scores + 2 * operand)
    assert copied_bytes([torch.empty(2, 3, 4, 5)]) == 0 and copied_bytes([torch.empty(2, 4, 3, 5).transpose(1, 2)]) > 0


@pytest.mark.parametrize(("head", "dtype", "is_aligned"), [
    (64, torch.bfloat16, True),
    (104, torch.float16, True),
    (108, torch.bfloat16, False),
    (150, torch.float16, False),
    (150, torch.float32, True),
])  # fmt: skip
def test_rows_of_heads_that_are_no_whole_vectors_keep_tensor_cores_out(head, dtype, is_aligned):
    """On GPUs their products take as long as published runs with heads of 108 and 150 numbers say; not on CPUs."""
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in ("queries", "keys")]
    shapes = [(2, 4, 128, head), (2, 4, head, 128)]
    for operand, shape in zip(operands, shapes, strict=True):
        operand.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    product = graph.call_function(torch.ops.shardwright.matmul.default, tuple(operands))
    product.meta["val"] = torch.empty(2, 4, 128, 128, dtype=dtype, device="meta")
    assert op_work(product).is_aligned == is_aligned
    assert CostModel(parse_hardware("8xA100-80GB")).misaligned_factor() > 1
    assert CostModel(parse_hardware("2xCPU")).misaligned_factor() == 1
