"""A mask function of (batch, head, query, key) applied to all indices at once, without torch.vmap.

transformers applies custom mask functions by vmap, which torch.export keeps as functions without a graph. Elementwise
functions of the indices, and look-ups that give an index for each dimension of a table, are the same applied to
broadcast indices; a function that does anything else is left to vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_BINARY = ("and", "or", "xor", "add", "sub", "mul", "floordiv", "mod", "truediv")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_NAMES = (
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r", "i")),
    *(f"__{name}__" for name in (*_COMPARED, "invert", "neg", "abs")),
    *_COMPARED, "add", "sub", "mul", "abs", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
    "logical_and", "logical_or", "logical_xor", "logical_not", "minimum", "maximum", "where", "to", "bool", "long",
    "int", "clamp",
)  # fmt: skip
_ELEMENTWISE = {getattr(owner, name) for name in _NAMES for owner in (torch, torch.Tensor) if hasattr(owner, name)}
_CONSTANTS = {torch.Tensor.new_ones, torch.Tensor.new_zeros, torch.Tensor.new_full, torch.Tensor.new_tensor}
_DESCRIBED = {torch.Tensor.device.__get__, torch.Tensor.dtype.__get__, torch.Tensor.dim}  # type: ignore[attr-defined]


class NotElementwise(Exception):
    """The function must be asked index by index."""


class _OfIndices(TorchFunctionMode):
    """Inside, only what is the same for one index and for all may be computed from the indices given."""

    def __init__(self, indices: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.derived = list(indices)

    def _is_derived(self, value: Any) -> bool:
        return any(value is known for known in self.derived)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        if func in _DESCRIBED or (func in _CONSTANTS and isinstance(result, torch.Tensor) and result.dim() == 0):
            return result
        if func is torch.Tensor.__getitem__:
            same = self._looks_up(*args)
        else:
            same = func in _ELEMENTWISE and all(t.dim() == 0 or self._is_derived(t) for t in operands)
        if not same:
            raise NotElementwise
        self.derived.append(result)
        return result

    def _looks_up(self, table: torch.Tensor, index: Any) -> bool:
        """An entry of the table for each combination of indices."""
        given = index if isinstance(index, tuple) else (index,)
        # numbers stand where they are among tensors, so that all of these come first in the result, as they broadcast
        tensors = [i for i in given if isinstance(i, torch.Tensor)]
        whole = not self._is_derived(table) and len(given) == table.dim()
        return (
            whole
            and bool(tensors)
            and all((isinstance(i, int) and not isinstance(i, bool)) or isinstance(i, torch.Tensor) for i in given)
            and all(self._is_derived(i) and not i.is_floating_point() and i.dtype != torch.bool for i in tensors)
        )


def at_all_indices(mask_function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """The same function, of broadcast indices. It raises NotElementwise where it would not be the same."""

    def seen(*indices: torch.Tensor) -> torch.Tensor:
        with _OfIndices(indices):
            found = mask_function(*indices)
        if not (isinstance(found, torch.Tensor) and found.dim() == len(indices)):
            raise NotElementwise
        return found

    return seen
