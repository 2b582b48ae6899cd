"""Everything in float64, also where a model's own code casts down (norms, softmax, rotary tables, the loss).

A float64 model that rounds to float32 inside cannot be compared to 1e-9: a last bit that differs before the cast may be
a float32 bit after it. Checks therefore run both the captured program and the single-device model inside `widened()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return torch.Tensor.to(args[0], torch.float64)
        if any(isinstance(argument, torch.dtype) for argument in args):
            args = tuple(
                torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument
                for argument in args
            )
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Inside, a cast to float32, bfloat16 or float16 is a cast to float64, and new tensors are float64 by default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)
