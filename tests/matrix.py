"""Which cells of a matrix `make test` runs: each claim on each kind of cell once; `make test-all` runs all of them.

    @pytest.mark.parametrize(("model", "layout"), cells(every, here))

The other cells carry the marker `repetition`: conftest.py leaves them out, counts them, and says so at the end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

FULL = bool(os.environ.get("SHARDWRIGHT_FULL_MATRIX"))


def cells(every: Sequence[Any], here: Sequence[Any]) -> list[Any]:
    """Parameters of every cell; those that are not `here` are left to `make test-all`."""
    missing = [cell for cell in here if cell not in every]
    assert not missing, f"no such cells: {missing}"
    return [_cell(cell, () if cell in here else (pytest.mark.repetition,)) for cell in every]


def _cell(values: Any, marks: Sequence[Any]) -> Any:
    return pytest.param(*(values if isinstance(values, tuple) else (values,)), marks=marks)
