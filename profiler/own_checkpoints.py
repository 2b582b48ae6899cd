"""torch.utils.checkpoint in the user's model: captured through.

What is kept for the backward and what is computed again is the plan's own decision, so a checkpointed part is captured
as if it were not. What checkpointing itself changes stays: with use_reentrant=True a part none of whose arguments takes
a gradient has none, as in PyTorch; and the forward context of context_fn is entered, unless it is only the one that
says what selective checkpointing keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _torch


def _reentrant(original: Any, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """In place of CheckpointFunction.apply."""
    takes_gradient = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    with contextlib.nullcontext() if takes_gradient else torch.no_grad():
        return function(*args)


def _resumed(
    original: Any,
    fn: Callable[..., Any],
    preserve_rng_state: bool = True,
    context_fn: Callable[[], tuple[Any, Any]] = _torch.no_checkpoint_contexts,
    *args: Any,
    **kwargs: Any,
) -> Iterator[None]:
    """In place of checkpoint's generator: it is resumed before and after the part runs."""
    context, _ = context_fn()
    if _torch.is_selection(context):
        context = contextlib.nullcontext()
    with context:
        yield


@contextlib.contextmanager
def captured_through() -> Iterator[None]:
    """Inside, checkpoint() runs its part as it is."""
    with _torch.checkpoint_replaced(_resumed, _reentrant):
        yield
