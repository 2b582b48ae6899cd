"""A budget of memory alone on one device: torch.compile's option, and the decorator's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardwright
from shardwright.backend import BackendOptions
from shardwright.errors import ShardwrightError
from shardwright.runtime.memory import peak_of
from shardwright.units import GIB

WIDTH, LAYERS, BATCH = 32, 6, 256


def build(breaks: bool = False) -> nn.Module:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[: LAYERS // 2]:
                x = x + torch.tanh(nn.functional.gelu(layer(x)) * 0.5)
            if breaks:
                torch._dynamo.graph_break()
            for layer in self.layers[LAYERS // 2 :]:
                x = x + torch.tanh(nn.functional.gelu(layer(x)) * 0.5)
            return x.square().mean()

    return Net().double()


def step_bytes(model: nn.Module, compiled: nn.Module) -> int:
    """Most that a step holds: what lasts, and what one forward and backward allocate, once all is compiled."""
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        compiled(x).backward()
    model.zero_grad()
    lasting = sum(p.numel() * p.element_size() for p in model.parameters())
    return lasting + peak_of(lambda: compiled(x).backward())


@pytest.mark.parametrize("breaks", [False, True], ids=["one graph", "two graphs"])
def test_a_compiled_step_keeps_to_its_budget_with_the_gradients_of_the_model(breaks: bool) -> None:
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = build(breaks)
    model(x).backward()
    expected = [p.grad for p in model.parameters()]
    torch._dynamo.reset()
    free = step_bytes(model, torch.compile(model, backend="shardwright"))
    for share in (1.1, 0.85) if breaks else (1.1, 0.6):
        torch._dynamo.reset()
        options = {"memory_gib": share * free / GIB, "state_tensors": 0}
        compiled = torch.compile(model, backend="shardwright", options=options)
        assert step_bytes(model, compiled) <= share * free * 1.01
        model.zero_grad()
        compiled(x).backward()
        for found, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(found.grad, wanted, rtol=1e-12, atol=1e-15)


def test_what_no_recomputation_makes_fit_is_refused_with_numbers() -> None:
    model, x = build(), torch.randn(BATCH, WIDTH, dtype=torch.float64)
    for gib, match in ((1e-5, "2 optimizer tensors take"), (3e-4, "forward and backward hold at least")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=match):
            torch.compile(model, backend="shardwright", options={"memory_gib": gib})(x)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "20", True, 1e30])
def test_what_is_no_number_of_gib_is_refused(value: object) -> None:
    with pytest.raises(ShardwrightError, match="memory_gib"):
        BackendOptions.parse({"memory_gib": value})
    with pytest.raises(ShardwrightError, match="memory_gib"):
        shardwright.parallelize(memory_gib=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -5, 1.5, True, "lots", "0GiB"])
def test_what_is_no_amount_of_bytes_is_refused(value: object) -> None:
    with pytest.raises(ShardwrightError):
        BackendOptions.parse({"activation_limit": value})
    with pytest.raises(ShardwrightError):
        shardwright.parallelize(memory_limit=value)  # type: ignore[arg-type]
    with pytest.raises(ShardwrightError):
        BackendOptions.parse({"state_tensors": -1})


def test_one_memory_takes_one_limit() -> None:
    with pytest.raises(ShardwrightError, match="two limits"):
        shardwright.parallelize(memory_limit="1GiB", memory_gib=1)


def test_the_decorator_keeps_to_a_budget_alone() -> None:
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    make = lambda: build()  # noqa: E731
    free = shardwright.parallelize(make, hardware="1xCPU", self_test=False)()
    losses = [float(free.step({"x": x})) for _ in range(2)]
    budget = 0.8 * max(free.plan.predicted.peak_bytes)
    held = shardwright.parallelize(make, hardware="1xCPU", memory_gib=budget / GIB, self_test=False)()
    assert [float(held.step({"x": x})) for _ in range(2)] == pytest.approx(losses, rel=1e-12)
    assert max(held.plan.predicted.peak_bytes) <= budget and held.program.memory.peak_bytes <= budget
