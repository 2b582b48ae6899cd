"""What is planned is what runs: ops that depend on the size of the batch, losses in float32 under half precision."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from matrix import cells
from torch import nn

import shardwright
from shardwright.api import capture_for_planning
from shardwright.errors import ShardwrightError
from shardwright.passes.fuse import fuse_model
from shardwright.profiler.models import with_precision
from shardwright.profiler.workload import Precision, Workload
from shardwright.tasks import whole_gradients

DOUBLE = Precision(torch.float64, torch.float64, torch.float64)
WIDTH, CLASSES = 6, 5


class Branching(nn.Module):
    """Other ops for batches of odd sizes, and others again for a single sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(x)
            x = x + (torch.tanh(h) if len(x) % 2 == 0 else h.tanh().mul(2.0).div(2.0))
        return F.cross_entropy(self.head(x), y)


def batch_of(size: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    return {"x": x, "y": torch.randint(CLASSES, (size,), generator=generator)}


def test_ops_that_depend_on_the_batch_size_are_planned_as_they_run() -> None:
    model = Branching().double()
    workload = Workload(model=model, example_batch=batch_of(8), global_batch=8, precision=DOUBLE)
    plan = shardwright.plan(workload, "1xCPU", force={"microbatch": 4})
    program = shardwright.build(plan, workload)
    for size in (8, 5):  # 5: a microbatch of 4, and one of a single sample
        assert program.forward_backward(batch_of(size)).item() == pytest.approx(
            model(**batch_of(size)).item(), rel=1e-9
        )
        model.zero_grad()
        model(**batch_of(size)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(program.gradients()[name], parameter.grad, rtol=1e-9, atol=1e-12)


class BranchingWide(Branching):
    """As wide as its microbatch: sizes alone do not tell which dimension of a weight's gradient holds samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)


def _gradients_of_wide(rank: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    model, batch = BranchingWide().double(), _wide_batch()
    workload = Workload(model=model, example_batch=batch, global_batch=8, precision=DOUBLE)
    plan = shardwright.plan(workload, "2xCPU", force={"dp": 2, "pp": 1, "zero": 3, "microbatch": 4})
    program = shardwright.build(plan, workload)
    program.forward_backward(program.shard_batch(batch))
    made = [row[key][0] for row in plan.placements.values() for key in row if key.startswith("mm")]
    return made, whole_gradients(program)


def _wide_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    return {"x": x, "y": torch.randint(CLASSES, (8,), generator=generator)}


def test_a_gradient_that_lies_in_shards_is_summed_over_the_data_axis() -> None:
    made, found = run_ranks(2, _gradients_of_wide)[0]
    assert any(text.endswith(("->S(0)", "->S(1)")) for text in made)
    model = BranchingWide().double()
    model(**_wide_batch()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.RMSNorm(64, 1e-6), nn.RMSNorm(8, 1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x)[..., :8])


class Norms(nn.Module):
    """Two norms of different widths in one segment."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pair(x)).square().mean()


def test_just_the_norms_that_were_fused_are_fused_again() -> None:
    batch = {"x": torch.randn(4, 64)}
    float32 = Precision(torch.float32, torch.float32, torch.float32)
    graph = capture_for_planning(Workload(model=Norms(), example_batch=batch, global_batch=4, precision=float32))
    once, fusions = fuse_model(graph, lambda dtype: lambda flops, saved: flops < 2000)
    again, repeated = fuse_model(graph, lambda dtype: lambda flops, saved: True, only=fusions)
    assert len(fusions) == 1 and fusions[0].endswith("rms_norm x1, of norms 1")
    assert repeated == fusions and _ops(once) == _ops(again)


def _ops(graph: Any) -> Counter[str]:
    return Counter(str(node.target) for segment in graph.segments.values() for node in segment.joint.graph.nodes)


LOSSES: dict[str, Any] = {
    "cross_entropy": lambda out, b: F.cross_entropy(out, b["y"]),
    "negative_log": lambda out, b: F.nll_loss(F.log_softmax(out, -1), b["y"]),
    "squared": lambda out, b: F.mse_loss(out, F.one_hot(b["y"], CLASSES).to(out.dtype)),
    "summed": lambda out, b: F.smooth_l1_loss(out, out.new_ones(()).expand_as(out), reduction="sum") / 7,
}


OF_DTYPES = [(name, dtype) for name in LOSSES for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), cells(OF_DTYPES, OF_DTYPES[::2] + OF_DTYPES[1:2]))
def test_losses_of_half_precision_are_taken_in_float32_as_autocast_takes_them(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    batch = {"input": torch.randn(8, WIDTH), "y": torch.randint(CLASSES, (8,))}
    float32 = Precision(torch.float32, torch.float32, torch.float32)
    workload = Workload(model=model, example_batch=batch, global_batch=8, precision=float32, loss=LOSSES[name])
    half = with_precision(workload, dtype)
    program = shardwright.build(shardwright.plan(half, "1xCPU"), half)
    found = program.evaluate({**batch, "input": batch["input"].to(dtype)})
    with torch.autocast("cpu", dtype), torch.no_grad():
        logits = model(batch["input"])
    expected = LOSSES[name](logits.float(), batch)  # as autocast on accelerators, whose list is the longer one
    assert logits.dtype == dtype
    assert program.graph.values[program.graph.loss].dtype == found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_complex_parameters_are_widened_with_the_others() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    workload = Workload(model=model, example_batch={"input": torch.ones(2, 2)}, global_batch=2)
    assert with_precision(workload, torch.float64).model.phase.dtype == torch.complex128
    assert with_precision(workload, torch.bfloat16).model.phase.dtype == torch.complex64


class Flat(nn.Module):
    """Samples and positions in one dimension, which a tensor axis splits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = hidden + torch.tanh(self.mid(hidden))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def _of_short_batch(rank: int, force: dict[str, Any], size: int) -> tuple[float, dict[str, torch.Tensor], float]:
    workload = Workload(Flat().double(), flat_batch(8), 8, precision=DOUBLE, name="flat")
    program = shardwright.build(shardwright.plan(workload, "2xCPU", force=force, self_test=False), workload)
    part = program.shard_batch(flat_batch(size))
    return program.forward_backward(part).item(), program.gradients(), program.evaluate(part).item()


def flat_batch(size: int) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(11, (size, 5), generator=torch.Generator().manual_seed(size))}


@pytest.mark.parametrize("size", [3, 7])
def test_a_short_microbatch_that_a_tensor_axis_cannot_split_evenly_is_placed_anew(size: int) -> None:
    force = {"pp": 1, "tp": 2, "prefer": "memory", "global_microbatch": 4}
    model = Flat().double()
    loss = model(**flat_batch(size))
    loss.backward()
    for found, gradients, evaluated in run_ranks(2, _of_short_batch, force, size):
        assert found == pytest.approx(loss.item(), rel=1e-12) == evaluated
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-14)


class PartsBySize(nn.Module):
    """A loop over a module list that a single sample does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks if len(x) > 1 else ():
            x = torch.tanh(block(x))
        return self.head(x).square().mean()


def test_a_short_microbatch_with_other_parts_is_refused_by_that_reason() -> None:
    workload = Workload(PartsBySize().double(), {"x": torch.randn(4, 4).double()}, 4, precision=DOUBLE, name="parts")
    program = shardwright.build(shardwright.plan(workload, "1xCPU", force={"global_microbatch": 2}), workload)
    with pytest.raises(ShardwrightError, match=r"parts has other parts for x \(1, 4\)"):
        program.step(program.shard_batch({"x": torch.randn(3, 4).double()}))
