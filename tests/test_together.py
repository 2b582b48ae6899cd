"""What rank 0 makes for all ranks, and how its failure reaches them."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import run_ranks

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.runtime.together import on_rank_0


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
