"""Everything in float64, also where a model's own code casts down (norms, softmax, rotary tables, the loss).

A float64 model that rounds to float32 inside cannot be compared to 1e-9: a last bit that differs before the cast may be
a float32 bit after it. Checks therefore run both the captured program and the single-device model inside `widened()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _NARROW


class _Widen(TorchFunctionMode):
    """Inside the model's forward every narrow dtype that is named becomes float64.

    Outside it (the loss, and the work of torch's own tracing, whose dtypes must stay) only where a float64 tensor would
    be narrowed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if self.depth == 0 and not (isinstance(first, torch.Tensor) and first.dtype == torch.float64):
            return func(*args, **kwargs)
        if func in _CASTS:
            return torch.Tensor.to(args[0], torch.float64)
        if any(_is_narrow(argument) for argument in args):
            args = tuple(torch.float64 if _is_narrow(argument) else argument for argument in args)
        if _is_narrow(kwargs.get("dtype")):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextlib.contextmanager
def float64_throughout(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, what widened() does in a model's forward, where one of the tensors is float64; else nothing."""
    if not any(tensor.dtype == torch.float64 for tensor in tensors):
        yield
        return
    mode = _Widen()
    mode.depth = 1
    with mode:
        yield


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside, a cast to float32, bfloat16 or float16 that the model or its loss makes is a cast to float64.

    New tensors in the model's forward are float64 by default.
    """
    mode = _Widen()
    defaults: list[torch.dtype] = []

    def enter(*_: Any) -> None:
        mode.depth += 1
        defaults.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)

    def leave(*_: Any) -> None:
        mode.depth -= 1
        torch.set_default_dtype(defaults.pop())

    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        while defaults:
            leave()
