"""A check that does nothing but raise is taken to pass, and no part of it to say more than that."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from split_modules import workload_of
from torch import nn

import shardwright
from shardwright.errors import ShardwrightError
from shardwright.profiler.capture import capture

Check = Callable[[torch.Tensor, torch.Tensor], None]
STRICT = False


def both_are_bad(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (h > -9).any() and (h > 1e3).any():
        raise ValueError("some are large")


def one_of_two(h: torch.Tensor, ids: torch.Tensor) -> None:
    assert (h > 1e12).any() or (h < 1e3).all()


def not_either(h: torch.Tensor, ids: torch.Tensor) -> None:
    if not ((h.mean() > 1e9) or bool((h < 1e3).all())):
        raise ValueError("some are large")


def between(h: torch.Tensor, ids: torch.Tensor) -> None:
    if 1e3 < h.max() < 1e12:
        raise ValueError("large")


def nested(h: torch.Tensor, ids: torch.Tensor) -> None:
    if ((h > 1e3).any() or (h < -1e3).any()) and not (STRICT or (h > 1e12).any()):
        raise ValueError("large")


def decided_by_a_setting(h: torch.Tensor, ids: torch.Tensor) -> None:
    if ((h > -9).any() and STRICT) or (h > 1e3).any():
        raise ValueError("large")


def of_whole_numbers_too(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (ids > 2).any() and (h > 1e3).any():
        raise ValueError("large")


def last_of_two(h: torch.Tensor, ids: torch.Tensor) -> None:
    if h.dim() == 2 and (h > 1e3).any():
        raise ValueError("large")


def any_of_three(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (h > 1e3).any() or not (h < 1e3).all() or bool(h.mean() > 1e3):
        raise ValueError("large")


def named(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (large := (h > 1e3).any()) or not (-1e3 < h.max() < 1e3):
        raise ValueError(large)


def of_a_list(h: torch.Tensor, ids: torch.Tensor) -> None:
    if any((row > 1e3).any() for row in h.unbind(1)):
        raise ValueError("large")


def a_number_that_is_no_truth_value(h: torch.Tensor, ids: torch.Tensor) -> None:
    assert (h < 1e3).sum()


def largest_of_two(h: torch.Tensor, ids: torch.Tensor) -> None:
    if max(h.mean(), h.mean() + 1) > 1e9:
        raise ValueError("large")


def first_of_two(h: torch.Tensor, ids: torch.Tensor) -> None:
    if sorted([h.mean(), h.mean() * 2])[0] > 1e9:
        raise ValueError("large")


def a_choice_inside(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (h > 1e3).any() if h.mean() > -9 else (h > 2e3).any():
        raise ValueError("large")


class Checks(nn.Module):
    def __init__(self, check: Check) -> None:
        super().__init__()
        self.linear, self.check = nn.Linear(6, 5), check
        with torch.no_grad():
            self.linear.weight.abs_()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        self.check(h, ids)
        return (h.square().mean(1) * ids).mean() * (2 if ids.sum() else 1)


def entries(scale: float = 1.0, ids: int = 1) -> dict[str, torch.Tensor]:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    return {"x": scale * x, "ids": torch.full((4,), ids)}


PASSING = [
    both_are_bad, one_of_two, not_either, between, nested, decided_by_a_setting, of_whole_numbers_too, last_of_two,
    any_of_three, named, of_a_list, largest_of_two, a_number_that_is_no_truth_value,
]  # fmt: skip


@pytest.mark.parametrize("check", PASSING, ids=lambda check: check.__name__)
def test_the_check_as_a_whole_is_verified(check: Check) -> None:
    workload = workload_of(Checks(check), entries())
    program = shardwright.build(shardwright.plan(workload, "1xCPU", self_test=False), workload, self_test=False)
    passed, refused = [], []
    for scale in (1.0, -1.0, -1e2, 1e6, -1e6, 1e15):
        for ids in (1, 2, 3):
            batch = entries(scale, ids)
            try:
                expected = workload.model(**batch).item()  # type: ignore[operator]
            except (ValueError, AssertionError):
                refused.append((scale, ids))
                with pytest.raises(ShardwrightError, match=r"the question at .*test_checks_of_data.py:\d+"):
                    program.forward_backward(program.shard_batch(batch))
                continue
            passed.append((scale, ids))
            found = program.forward_backward(program.shard_batch(batch)).item()
            assert found == pytest.approx(expected, rel=1e-9)
    assert len(passed) > 6 and len(refused) >= 2


@pytest.mark.parametrize("check", [first_of_two, a_choice_inside], ids=lambda check: check.__name__)
def test_what_chooses_inside_a_check_is_refused_by_line(check: Check) -> None:
    check(torch.zeros(4, 5), torch.ones(4))  # passes in eager
    with pytest.raises(ShardwrightError, match=r"data") as refused:
        capture(workload_of(Checks(check), entries()))
    assert "test_checks_of_data.py" in str(refused.value)


def guarded(h: torch.Tensor, ids: torch.Tensor) -> None:
    if (ids > 1).any() and h[ids > 1].max() > 1e3:
        raise ValueError("large")


def test_a_part_that_only_its_condition_makes_possible_is_not_asked() -> None:
    """The condition is then a path, as the example batch takes it."""
    workload = workload_of(Checks(guarded), entries())
    program = shardwright.build(shardwright.plan(workload, "1xCPU", self_test=False), workload, self_test=False)
    program.forward_backward(program.shard_batch(entries(1e6)))
    with pytest.raises(ShardwrightError, match="the question at"):
        program.forward_backward(program.shard_batch(entries(1.0, 2)))


class Writes(nn.Module):
    """Its checks count calls, write to activations or draw numbers, and eager skips some of that."""

    def __init__(self, check: str) -> None:
        super().__init__()
        self.linear, self.check, self.steps = nn.Linear(6, 5), check, 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def step(self) -> bool:
        self.steps += 1
        return self.steps > 99

    def counted(self, h: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return h.max() > 1e3

    @property
    def stepped(self) -> bool:
        return self.step()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = self.linear(x) * (1 + self.calls)
        getattr(self, self.check)(h, ids)
        return (h.square().mean(1) * ids).mean() * (1 + self.calls)

    def counts(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if self.training and self.calls.add_(1) > 99:
            raise ValueError("too many")

    def counts_large_ones(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and self.calls.add_(1) > 99:
            raise ValueError("too many")

    def counts_large_whole_numbers(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if ids.max() > 5 and self.calls.add_(1) > 99:
            raise ValueError("too many")

    def counts_in_between(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if 99 < self.calls.add_(1) < 999:
            raise ValueError("too many")

    def writes(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and h.mul_(2).max() > 3e6:
            raise ValueError("large")

    def writes_to_given(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and torch.add(h, 1, out=h).max() > 3e6:
            raise ValueError("large")

    def draws(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if self.training and torch.rand(()) > 2:
            raise ValueError("unlucky")

    def draws_for_large_ones(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and torch.rand(()) > 0.5:
            raise ValueError("unlucky")

    def steps_for_large_ones(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and self.step():
            raise ValueError("too many")

    def property_for_large_ones(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if h.max() > 1e6 and self.stepped:
            raise ValueError("too many")

    def uses_up_an_iterator(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        rest = iter([False, True])
        if h.max() > 1e6 and any(rest):
            raise ValueError("large")
        h.mul_(len(list(rest)))

    def decides_by_what_it_then_changes(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if self.steps < 1 and self.counted(h):
            raise ValueError("large")
        self.steps = 0

    def casts_to_the_same(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if ids.max() > 5 and h.to(h.dtype).max() > 1e6 and self.calls.add_(1) > 99:
            raise ValueError("large")


# Which part of a test is asked is known where instructions have places, and a comparison does not ask by itself.
KNOWN_PARTS = ["counts", "draws"] if (3, 11) <= sys.version_info < (3, 13) else []
AS_IN_EAGER = ["counts_large_whole_numbers", "casts_to_the_same", *KNOWN_PARTS]
REFUSED = [
    "counts_large_ones", "counts_in_between", "writes", "writes_to_given", "draws_for_large_ones",
    "steps_for_large_ones", "property_for_large_ones", "uses_up_an_iterator", "decides_by_what_it_then_changes",
]  # fmt: skip


@pytest.mark.parametrize("check", AS_IN_EAGER)
def test_a_check_that_writes_or_draws_does_so_as_often_as_in_eager(check: str) -> None:
    workload = workload_of(Writes(check), entries())
    program = shardwright.build(shardwright.plan(workload, "1xCPU", self_test=False), workload, self_test=False)
    for _ in range(2):
        expected = workload.model(**entries()).item()  # type: ignore[operator]
        found = program.forward_backward(program.shard_batch(entries())).item()
        assert found == pytest.approx(expected, rel=1e-9)
    assert program.state_dict()["buffer.calls"] == workload.model.calls  # type: ignore[union-attr]


@pytest.mark.parametrize("check", REFUSED)
def test_what_may_do_more_than_give_a_value_is_not_run_again(check: str) -> None:
    workload = workload_of(Writes(check), entries())
    with pytest.raises(ShardwrightError, match=r"data") as refused:
        capture(workload)
    assert "test_checks_of_data.py" in str(refused.value)
