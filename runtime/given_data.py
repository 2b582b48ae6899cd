"""Values that a user gives to a parameter by `parameter.data = tensor`, and not in the memory of the segments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import ShardwrightError


def take_data(held: Iterable[tuple[str, nn.Parameter, torch.UntypedStorage, torch.Tensor]]) -> None:
    """Copy them to where the segments read them, and let the parameter be that memory again. held: the name, the
    parameter, its storage when it was made, and the memory.

    Raises ShardwrightError, before it takes any, where that does nothing, as with DTensors, or the shape is another."""
    given: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
    for name, parameter, storage, memory in held:
        is_same = parameter.untyped_storage()._cdata == storage._cdata
        if isinstance(parameter, DTensor):
            if not is_same:
                raise _data_of_dtensor(name)
        elif parameter.shape != memory.shape:
            raise _another_shape(name, tuple(parameter.shape), tuple(memory.shape))
        elif not is_same or _place(parameter) != _place(memory):
            given.append((parameter, parameter.clone() if is_same else parameter, memory))
    for parameter, values, memory in given:
        memory.copy_(values)
        parameter.data = memory


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Within its storage."""
    return int(tensor.storage_offset()), tensor.stride()


def _data_of_dtensor(name: str) -> ShardwrightError:
    return ShardwrightError(
        f"{name}.data was given another tensor",
        means="the parameter is a DTensor, whose values that does not change",
        change="parameter.data = tensor",
        works="with torch.no_grad(): parameter.copy_(tensor)",
    )


def _another_shape(name: str, given: tuple[int, ...], held: tuple[int, ...]) -> ShardwrightError:
    return ShardwrightError(
        f"{name}.data was given a tensor of shape {given}; the parameter has {held}",
        means="the program computes what was captured, with the shape that it had then",
        change="parameter.data = tensor",
        works=f"a tensor of shape {held}, or a plan of the model with the new shape",
    )
