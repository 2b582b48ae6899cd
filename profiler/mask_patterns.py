"""Which pattern a mask function of transformers draws, found by asking it, not by its name.

A mask function takes (batch, head, query, key) indices and says whether the query sees the key. It is asked with
numbers that are not tensors, so that nothing is traced, and so that a function which reads a tensor (padding, packed
sequences, image tokens) fails at once and stays an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_ALL_ROWS_UP_TO = 1024  # tokens; longer masks are compared on sampled rows
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class MaskPattern:
    """causal: query i sees keys j <= i. window w > 0: also i - j < w and, where not causal, j - i < w; 0: no window."""

    causal: bool = False
    window: int = 0

    @property
    def is_full(self) -> bool:
        return not self.causal and not self.window

    def visible(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        distance = queries - keys
        seen = distance >= 0 if self.causal else np.ones(np.broadcast(queries, keys).shape, dtype=bool)
        if self.window:
            seen = seen & (distance < self.window) & (distance > -self.window)
        return seen


class _Indices:
    """Integers or booleans in a numpy array, with as much of a tensor's face as index arithmetic needs."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)
        self.device = None

    def new_ones(self, shape: Any, dtype: Any = None) -> _Indices:
        return _Indices(np.ones(shape, dtype=bool))

    def new_zeros(self, shape: Any, dtype: Any = None) -> _Indices:
        return _Indices(np.zeros(shape, dtype=bool))

    def to(self, *_: Any, **__: Any) -> _Indices:
        return self

    def abs(self) -> _Indices:
        return _Indices(np.abs(self.values))

    __abs__ = abs

    def __invert__(self) -> _Indices:
        return _Indices(~self.values)


def _operator(name: str) -> Callable[[_Indices, Any], _Indices]:
    def apply(self: _Indices, other: Any) -> _Indices:
        if not isinstance(other, (_Indices, int, bool)):
            raise TypeError(f"{name} with {type(other).__name__}")  # a tensor: the mask depends on data
        values = other.values if isinstance(other, _Indices) else other
        return _Indices(getattr(self.values, name)(values))

    return apply


for _name in ("le", "lt", "ge", "gt", "eq", "ne", "add", "radd", "sub", "rsub", "and", "rand", "or", "ror", "floordiv",
              "mod", "mul", "rmul"):  # fmt: skip
    setattr(_Indices, f"__{_name}__", _operator(f"__{_name}__"))


def recognise(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0
) -> MaskPattern | None:
    """The pattern of a mask [q_length, kv_length], or None where it is another or depends on data.

    Up to 1024 queries every entry is compared; beyond, whole rows: the first and last ones, those about the window's
    edge, and 64 spread over the rest.
    """
    if not (q_offset == 0 and kv_offset == 0 and isinstance(q_length, int) and isinstance(kv_length, int)):
        return None

    def ask(rows: np.ndarray) -> np.ndarray:
        keys = np.arange(kv_length)
        seen = mask_function(_Indices(0), _Indices(0), _Indices(rows[:, None]), _Indices(keys[None, :]))
        return np.broadcast_to(np.asarray(seen.values, dtype=bool), (len(rows), kv_length))

    try:
        last = min(q_length, kv_length) - 1
        first_row, last_row = ask(np.array([0, last]))
        if not first_row.any() or not last_row.any():
            return None
        lowest = int(np.argmax(last_row))
        highest = int(kv_length - 1 - np.argmax(first_row[::-1]))
        pattern = MaskPattern(causal=highest == 0 and kv_length > 1, window=0 if lowest == 0 else last - lowest + 1)
        if not pattern.causal and pattern.window == 0 and highest < kv_length - 1:
            pattern = MaskPattern(window=highest + 1)  # symmetric, and wider than it is long to the left
        rows = _rows_to_compare(q_length, pattern.window)
        same = bool((ask(rows) == pattern.visible(rows[:, None], np.arange(kv_length)[None, :])).all())
    except Exception:  # whatever a function that wants tensors raises
        return None
    return pattern if same else None


def _rows_to_compare(q_length: int, window: int) -> np.ndarray:
    if q_length <= _ALL_ROWS_UP_TO:
        return np.arange(q_length)
    edges = [0, 1, 2, q_length - 2, q_length - 1, *range(max(0, window - 2), min(q_length, window + 3))]
    spread = np.linspace(0, q_length - 1, _SAMPLED_ROWS).astype(int)
    return np.unique(np.concatenate([np.array(edges), spread]))
