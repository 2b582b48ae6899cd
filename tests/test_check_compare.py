"""What check holds two gradients to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shardwright.checking import TOLERANCE
from shardwright.profiler.workload import Precision, Workload
from shardwright.tasks import beyond_rounding, compare

WIDE = Precision(torch.float64, torch.float64, torch.float64)


def errors(found: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, dtype=torch.float64)) for name in expected})
    for name, value in expected.items():
        model[name].grad = torch.full((2,), value, dtype=torch.float64)
    given = {name: torch.full((2,), value, dtype=torch.float64) for name, value in found.items()}
    return compare(given, SimpleNamespace(model=model), None)


@pytest.mark.parametrize("grad", [0.0, 1e-17, -3e-16])
def test_a_gradient_that_cancels_may_differ_by_roundings_of_the_largest(grad: float) -> None:
    assert errors({"w": 1.0, "b": grad + 5e-15}, {"w": 1.0, "b": grad})["b"] <= TOLERANCE
    assert errors({"w": 1.0, "b": grad + 5e-14}, {"w": 1.0, "b": grad})["b"] > TOLERANCE


@pytest.mark.parametrize("grad", [1.0, 1e-3, 2e-6])
def test_any_other_is_held_to_its_own_digits(grad: float) -> None:
    assert errors({"w": 1.0, "b": grad * (1 + 1e-10)}, {"w": 1.0, "b": grad})["b"] <= TOLERANCE
    assert errors({"w": 1.0, "b": grad * (1 + 2e-9)}, {"w": 1.0, "b": grad})["b"] > TOLERANCE


def test_a_gradient_that_one_side_lacks_is_wrong() -> None:
    assert errors({"w": 1.0}, {"w": 1.0, "b": 1.0})["b"] == float("inf")


def test_a_sparse_gradient_is_compared_by_its_values() -> None:
    table = nn.Embedding(4, 2, sparse=True).double()
    table(torch.tensor([1, 3])).sum().backward()
    dense = torch.zeros(4, 2, dtype=torch.float64)
    dense[[1, 3]] = 1.0
    assert compare({"weight": dense}, SimpleNamespace(model=table), None) == {"weight": 0.0}
    assert compare({"weight": 2 * dense}, SimpleNamespace(model=table), None) == {"weight": 1.0}


class Cancels(nn.Module):
    """The gradient of the bias is a sum of large terms that is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        terms = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e6
        self.register_buffer("terms", terms - terms.mean())
        self.bias, self.scale, self.plain = (
            nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.0, 1.3, 2.0)
        )

    def forward(self) -> torch.Tensor:
        return (self.bias * self.terms * self.scale).sum() + self.plain


def test_a_gradient_that_is_rounding_alone_is_compared_by_how_far_rounding_moves_it() -> None:
    model = Cancels()
    run = lambda of: (of.model.zero_grad(), of.model().backward())  # noqa: E731
    workload = Workload(model, {}, 1, precision=WIDE)
    run(workload)
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    for change, good in ((1e-8, True), (1e-6, False)):
        found = {name: grad.clone() for name, (_, grad) in before.items()}
        found["bias"] += change
        found["plain"] *= 1 + 2e-9
        errors = compare(found, workload, None)
        assert errors["bias"] > TOLERANCE
        errors = beyond_rounding(errors, found, workload, run)
        assert (errors["bias"] <= TOLERANCE) is good
        assert errors["plain"] > TOLERANCE, "one that has digits is held to them"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and torch.equal(parameter.grad, before[name][1])


class OnAKink(nn.Module):
    """Rounding moves relu(a - b) to either side: its gradient is all or nothing, and of no size beside the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.plain = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(3))

    def forward(self) -> torch.Tensor:
        return 1e-8 * torch.relu(self.a - self.b).sum() + self.plain.sum()


def test_a_gradient_on_a_kink_is_not_rounding_alone() -> None:
    model = OnAKink()
    run = lambda of: (of.model.zero_grad(), of.model().backward())  # noqa: E731
    workload = Workload(model, {}, 1, precision=WIDE)
    run(workload)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    found["a"] += 1e-8
    errors = beyond_rounding(compare(found, workload, None), found, workload, run)
    assert errors["a"] > TOLERANCE
