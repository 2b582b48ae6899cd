"""The user's own autograd.Functions, captured with the backward that they wrote.

torch.export traces the forward of a Function and forgets its backward. So while a model is exported each call becomes
one op, shardwright::autograd_function, that names the Function and its other arguments. When the joint graph of a
segment is traced the op calls the Function itself, and autograd runs its backward: both end in the graph as plain ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from ..errors import ExitCode, ShardwrightError

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_LIBRARY.define("autograd_function(Tensor[] tensors, str key) -> Tensor[]")


@dataclass(frozen=True)
class _Call:
    """A Function with all its arguments but the tensors."""

    function: type[Function]
    leaves: tuple[Any, ...]  # None where a tensor stands
    is_tensor: tuple[bool, ...]
    tree: Any

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if t else leaf for leaf, t in zip(self.leaves, self.is_tensor, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return _apply(self.function, *args, **kwargs)


_calls: dict[str, _Call] = {}
_is_single: dict[str, bool] = {}  # results by key: one tensor, or a tuple
_original = Function.__dict__["apply"]


def _apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _original.__get__(None, function)(*args, **kwargs)


def _kernel(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    found = _calls[key](tensors)
    _is_single[key] = isinstance(found, torch.Tensor)
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    if not all(isinstance(result, torch.Tensor) for result in results):
        raise ShardwrightError(
            f"{_calls[key].function.__qualname__} returns {', '.join(type(r).__name__ for r in results)}",
            means="an autograd.Function whose results are not all tensors cannot be captured",
            change="its forward",
            works="return tensors only",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )
    return results


_LIBRARY.impl("autograd_function", _kernel, "CompositeImplicitAutograd")


@contextlib.contextmanager
def recorded_functions() -> Iterator[None]:
    """Inside, calls of Functions that are not torch's own are recorded as ops."""

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if cls.__module__.partition(".")[0] == "torch" or not tensors:
            return _apply(cls, *args, **kwargs)
        is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        others = tuple(None if t else leaf for leaf, t in zip(leaves, is_tensor, strict=True))
        call = _Call(cls, others, is_tensor, tree)
        key = f"{cls.__module__}.{cls.__qualname__}{others}"
        _calls[key] = call
        results = torch.ops.shardwright.autograd_function(tensors, key)
        return results[0] if _is_single[key] else tuple(results)

    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = _original  # type: ignore[method-assign]
