"""Amounts of memory as users write them in Python: "600MiB", bytes, or a number of GiB."""

from __future__ import annotations

import math
from typing import Any

from .errors import ShardwrightError
from .units import GIB, MAX_BYTES, parse_bytes


def byte_amount(value: Any, name: str) -> int | None:
    """ "600MiB", or bytes. None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ShardwrightError(str(error), change=name, works=f"{name}='600MiB'") from None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_BYTES:
        raise ShardwrightError(
            f"{name}={value!r} is not an amount of memory",
            means="it takes a text with its unit, or a positive whole number of bytes",
            change=name,
            works=f"{name}='600MiB'",
        )
    return value


def gib_amount(value: Any, name: str = "memory_gib") -> int | None:
    """A number of GiB, in bytes. None stays None."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 1 <= value * GIB <= MAX_BYTES:
        raise ShardwrightError(
            f"{name}={value!r} is not an amount of memory",
            means="it takes a positive number of GiB",
            change=name,
            works=f"{name}=20",
        )
    return int(value * GIB)
