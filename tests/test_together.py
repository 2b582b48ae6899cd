"""What rank 0 makes for all ranks, and how its failure reaches them."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import run_ranks

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.runtime.together import of_all_ranks, on_every_rank, on_rank_0


def _make(rank: int, failure: Exception | None) -> Any:
    def make() -> str:
        if failure is not None:
            raise failure
        return f"made by {rank}"

    try:
        return on_rank_0(make)
    except ShardwrightError as error:
        return error.lines(), error.exit_code


def test_what_rank_0_makes_is_everyones() -> None:
    assert run_ranks(2, _make, None) == ["made by 0", "made by 0"]


@pytest.mark.parametrize("failure", [KeyError("table"), AssertionError(), TypeError("no such argument")])
def test_whatever_rank_0_fails_with_is_an_error_on_every_rank(failure: Exception) -> None:
    found = run_ranks(2, _make, failure)
    assert found[0] == found[1]
    lines, code = found[0]
    assert code == ExitCode.INTERNAL and len(lines) == 4
    assert "test_together.py:" in lines[0] and type(failure).__name__ in lines[0]


def test_an_error_in_four_parts_arrives_as_it_is() -> None:
    failure = ShardwrightError("a", means="b", change="c", works="d", exit_code=ExitCode.UNSUPPORTED_MODEL)
    assert run_ranks(2, _make, failure) == [(failure.lines(), ExitCode.UNSUPPORTED_MODEL)] * 2


def _each(rank: int, failing: tuple[int, ...], failure: Exception) -> Any:
    def make() -> str:
        if rank in failing:
            raise failure
        return f"made by {rank}"

    try:
        made = on_every_rank(make, others="elsewhere: ")
    except ShardwrightError as error:
        made = error.lines()[0]
    return made, of_all_ranks(rank)  # nobody was left waiting


def test_each_has_its_own_result_where_none_fails() -> None:
    assert run_ranks(2, _each, (), KeyError()) == [("made by 0", [0, 1]), ("made by 1", [0, 1])]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ShardwrightError("a label is out of range"), "a label is out of range"),
        (FileNotFoundError(2, "No such file", "/data/x"), "cannot use /data/x: No such file"),
        (ZeroDivisionError("by zero"), "rank 1 failed at"),
    ],
)
def test_what_one_rank_fails_with_stops_all(failure: Exception, said: str) -> None:
    (first, _), (second, _) = run_ranks(2, _each, (1,), failure)
    assert second.startswith(said) and first == f"elsewhere: {second}"


@pytest.mark.parametrize("together", [on_rank_0, on_every_rank])
def test_what_the_system_refuses_is_an_error_in_four_parts_in_one_process_too(together: Any) -> None:
    def make() -> None:
        raise PermissionError(13, "Permission denied", "/data/x")

    with pytest.raises(ShardwrightError, match="cannot use /data/x: Permission denied") as caught:
        together(make)
    assert len(caught.value.lines()) == 4
