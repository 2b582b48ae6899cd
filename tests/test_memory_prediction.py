"""The ledger's peak beside the live tensor bytes of the running program, and what counts those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from live_bytes import all_tensors, peak_of

import shardwright
from shardwright.costmodel.experts import ExpertSizes, expert_scratch_bytes
from shardwright.data import make_batch
from shardwright.planner.report.timeline import memory_ledgers
from shardwright.profiler.expert_ops import run_experts, run_experts_backward
from shardwright.profiler.gates import traced_gate
from shardwright.profiler.models import load_workload


def test_live_bytes_are_counted_once_for_each_storage_until_it_is_freed() -> None:
    kept = torch.zeros(1000)
    others = all_tensors()

    def work() -> None:
        first = torch.ones(1000)  # 4000 bytes
        view = first.view(10, 100).t()
        second = view + 1  # 8000
        del first, view, second
        torch.ones(500)  # 2000

    live = peak_of(work, [tensor for tensor in others if tensor is not kept])
    assert live.begun_bytes == 4000 and live.peak_bytes == 12000
    assert sorted(size for size, _ in live.at_peak) == [4000, 4000, 4000]


@pytest.mark.parametrize("recompute", ["none", "selective", "all"])
@pytest.mark.usefixtures("shared_captures")
def test_the_prediction_is_what_a_program_holds_and_not_below(recompute: str) -> None:
    before = all_tensors()
    workload = load_workload("preset:tiny-llama", global_batch=16, seq_len=32, precision="fp32")
    plan = shardwright.plan(workload, "1xCPU", force={"recompute": recompute, "microbatch": 8}, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    batch = program.shard_batch(make_batch(workload, 16, seed=1))
    program.step(batch)
    live = peak_of(lambda: program.step(batch), [*before, *batch.values()])
    (ledger,) = memory_ledgers(plan)
    predicted = sum(size for kind, size in ledger.worst.items.items() if kind != "reserve")
    assert live.peak_bytes <= predicted <= 1.02 * live.peak_bytes


def predicted_and_live(rank: int, ranks: int, force: dict[str, Any]) -> tuple[int, int]:
    """Bytes of this rank in the second step of a GPT-2 with dropout in its attention."""
    before = all_tensors()
    workload = load_workload("preset:tiny-gpt2", global_batch=16, seq_len=32, precision="fp32")
    plan = shardwright.plan(workload, f"{ranks}xCPU", force=force, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    batch = program.shard_batch(make_batch(workload, 16, seed=1))
    program.step(batch)
    live = peak_of(lambda: program.step(batch), [*before, *(v for v in batch.values() if isinstance(v, torch.Tensor))])
    ledger = memory_ledgers(plan)[rank if plan.mesh.pp > 1 else 0]
    return sum(size for kind, size in ledger.worst.items.items() if kind != "reserve"), live.peak_bytes


@pytest.mark.parametrize(
    ("ranks", "force"),
    [
        (1, {"recompute": "none", "microbatch": 8}),
        (2, {"recompute": "none", "microbatch": 4, "pp": 2, "schedule": "1f1b"}),
        (2, {"recompute": "none", "microbatch": 4, "dp": 2, "zero": 3}),
    ],
)
def test_what_attention_with_dropout_holds_inside_itself_is_predicted(ranks: int, force: dict[str, Any]) -> None:
    found = run_ranks(ranks, predicted_and_live, ranks, force)
    predicted, live = max(found, key=lambda sizes: sizes[1])
    assert live <= predicted <= 1.03 * live


def _interleaved(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("hidden", [64, 256])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("kind", ["silu", "interleaved"])
@pytest.mark.parametrize("is_backward", [False, True])
def test_an_expert_op_holds_no_more_than_is_counted_beside_its_results(
    is_backward: bool, kind: str, has_biases: bool, hidden: int
) -> None:
    tokens, choices, experts, inner = 1024, 2, 4, 128
    activation = "silu" if kind == "silu" else traced_gate(_interleaved, 2 * inner, torch.float32)
    assert activation is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    weight = torch.rand(tokens, choices, generator=generator)
    shapes = [(2 * inner, hidden), (hidden, inner), (2 * inner,), (hidden,)][: 4 if has_biases else 2]
    weights = [torch.randn(experts, *shape, generator=generator) for shape in shapes]
    out, pre = run_experts(x, index, weight, weights, activation)
    before = all_tensors()
    results: list[torch.Tensor] = []

    def work() -> None:
        if is_backward:
            results.extend(run_experts_backward(out, x, index, weight, weights, pre, activation))
        else:
            results.extend(run_experts(x, index, weight, weights, activation))

    live = peak_of(work, before)
    beside = live.peak_bytes - live.begun_bytes - sum(t.numel() * t.element_size() for t in results)
    sizes = ExpertSizes(hidden, 2 * inner, inner, torch.float32, activation, has_biases)
    said = expert_scratch_bytes(tokens * choices, sizes, is_backward=is_backward)
    assert beside <= said <= (1.5 if activation == "silu" else 1.6) * beside
