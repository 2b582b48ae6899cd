"""The one place where operators of namespace `shardwright` are defined.

Low-level torch.library is used rather than torch.library.custom_op: it costs tens of microseconds less per call,
which a step of a small model would feel. Each operator gets a kernel for every backend, a fake kernel, and, where it
has a gradient, a backward that is itself one operator, so that a traced joint graph shows one node forward and one
node backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "shardwright"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines shardwright::SCHEMA with one kernel for all backends and a fake one for tracing. Returns the overload."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiable(op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)


def not_differentiable(op: torch._ops.OpOverload, why: str) -> None:
    """A derivative asked of op is an error that says why, rather than a gradient that is silently missing."""

    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise NotImplementedError(f"{op.name()}: {why}")

    torch.library.register_autograd(op, backward, lib=_LIBRARY)
