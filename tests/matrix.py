"""Which of many combinations a test runs: some by default, all with SHARDWRIGHT_FULL_MATRIX=1 (`make test-all`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
FULL = bool(os.environ.get("SHARDWRIGHT_FULL_MATRIX"))


def except_in_full(every: Sequence[T], large: Sequence[T]) -> list[T]:
    """All but the large ones, which take as long as the others together."""
    return [one for one in every if FULL or one not in large]
