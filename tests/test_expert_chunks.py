"""Tokens that go to experts in chunks: gradients of experts are summed as each chunk ends, in float32 at least."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import all_tensors, peak_of

from shardwright.costmodel.experts import ExpertSizes, chunks_scratch_bytes, expert_scratch_bytes
from shardwright.passes import expert_dispatch, expert_routes
from shardwright.profiler.expert_ops import run_experts, run_experts_backward

TOKENS, CHOICES, EXPERTS = 256, 2, 4


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, whose messages are its own."""

    def sent(out: torch.Tensor, given: torch.Tensor, *_: Any, **__: Any) -> Any:
        out.copy_(given)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(expert_routes, "dist", SimpleNamespace(all_to_all_single=sent))
    monkeypatch.setattr(expert_routes._torch, "group_by_name", lambda name: None)


def _operands(hidden: int, inner: int, dtype: torch.dtype, has_biases: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOICES] for _ in range(TOKENS)])
    shapes = [(2 * inner, hidden), (hidden, inner), (2 * inner,), (hidden,)][: 4 if has_biases else 2]
    weights = [made(EXPERTS, *shape) / 4 for shape in shapes]
    return [made(TOKENS, hidden), made(TOKENS, hidden), index, made(TOKENS, CHOICES).abs(), *weights]


def _place(chunks: int) -> list[Any]:
    return list(expert_routes.Place([0], [EXPERTS], 0, chunks=chunks))


def _in_chunks(chunks: int, grad: torch.Tensor, *given: Any) -> list[torch.Tensor]:
    """Gradients of hidden, weight and the experts."""
    _, pre, rows = expert_dispatch._forward(*given, "silu", *_place(chunks))
    return list(expert_dispatch._backward(grad, *given, "silu", *_place(chunks), pre, rows))


@pytest.mark.parametrize("has_biases", [False, True])
def test_gradients_of_four_chunks_in_bf16_are_as_close_as_one_rounding(has_biases: bool) -> None:
    operands = _operands(32, 32, torch.bfloat16, has_biases)
    grad, hidden, index, weight, *experts = [t.double() if t.is_floating_point() else t for t in operands]
    _, pre = run_experts(hidden, index, weight, experts, "silu")
    exact = run_experts_backward(grad, hidden, index, weight, experts, pre, "silu")[2:]
    one, four = (_in_chunks(chunks, *operands)[2:] for chunks in (1, 4))
    for expected, whole, parts in zip(exact, one, four, strict=True):
        assert parts.dtype == torch.bfloat16
        rounding = (expected.to(torch.bfloat16).double() - expected).norm()
        off, off_of_one = ((found.double() - expected).norm() for found in (parts, whole))
        assert off <= off_of_one + rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [32, 256])
def test_what_is_alive_in_chunks_is_no_more_than_is_counted(hidden: int, dtype: torch.dtype) -> None:
    """Experts as large as what comes to them, and much smaller."""
    inner = hidden
    grad, *given = _operands(hidden, inner, dtype)
    experts = given[3:]
    sizes = ExpertSizes(hidden, 2 * inner, inner, dtype, "silu", False)
    of_weights = [(float(t.numel() * t.element_size()), t.element_size()) for t in experts]

    def beside(call: Callable[[], Any]) -> int:
        results: list[torch.Tensor] = []
        live = peak_of(lambda: results.extend(call()), all_tensors())
        return live.peak_bytes - live.begun_bytes - sum(t.numel() * t.element_size() for t in results)

    for chunks in (2, 4):
        _, pre, rows = expert_dispatch._forward(*given, "silu", *_place(chunks))
        forward = beside(lambda n=chunks: expert_dispatch._forward(*given, "silu", *_place(n)))
        of_gradients = (grad, *given, "silu", *_place(chunks), pre, rows)
        backward = beside(lambda operands=of_gradients: expert_dispatch._backward(*operands))
        choices = TOKENS * CHOICES
        assert forward <= expert_scratch_bytes(choices, sizes, is_backward=False)
        said = expert_scratch_bytes(choices, sizes, is_backward=True) + chunks_scratch_bytes(of_weights, chunks)
        assert backward <= said


def test_what_chunks_hold_is_of_sums_in_float32_and_one_part() -> None:
    assert chunks_scratch_bytes([(200.0, 2), (100.0, 2)], 1) == 0.0
    assert chunks_scratch_bytes([(200.0, 2), (100.0, 2)], 4) == 300.0 + 200.0
    assert chunks_scratch_bytes([(400.0, 4), (200.0, 4)], 4) == 400.0
