"""Copies of a model that do what it does: copy.deepcopy and new parameters lose the hooks that a parameter carries.

And what a run of the model itself leaves as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def copy_model(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    carry_hooks(model, copied)
    return copied


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """To each parameter of target, where it has none, the hooks that the source's of the same name has."""
    for name, parameter in source.named_parameters():
        carry_hooks_of(parameter, target.get_parameter(name))


def carry_hooks_of(source: torch.Tensor, target: torch.Tensor) -> None:
    if source is target:
        return
    if target.requires_grad and not target._backward_hooks:
        for hook in (source._backward_hooks or {}).values():
            target.register_hook(hook)
    if target.requires_grad and not getattr(target, "_post_accumulate_grad_hooks", None):
        for hook in (getattr(source, "_post_accumulate_grad_hooks", None) or {}).values():
            target.register_post_accumulate_grad_hook(hook)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, what the forward writes to buffers, or binds in their place, is undone afterwards."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer.copy_(value)
