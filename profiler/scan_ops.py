"""shardwright::scan: the scan of a transformers state-space or linear-attention layer as one operator.

Three functions of transformers' modeling files, each the same in all files that have it:

    mamba2_chunk_scan              structured state-space duality (Mamba-2, Nemotron-H, Bamba, Zamba2, Falcon-H1, ...)
    mamba_selective_scan           selective scan (Mamba, Jamba, ...)
    torch_chunk_gated_delta_rule   Gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo hybrid, ...)

Written out, they are a loop over steps or chunks, or matrices of a chunk's size squared for each head. The operator's
kernel is the function itself, called at run time; its backward is one operator too, which runs the function again and
differentiates it, so that only the scan's inputs are kept. Letters: B samples, T steps, H heads, G groups of heads.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .reference_dtype import float64_throughout

SLOTS = 8  # tensors of a call: five that are always there, and three that may be
Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class ScanKind:
    """tensors: names in the order of the slots, with the dimension of the heads (or channels) of each, None where all
    heads read the whole. samples: those whose first dimension is B. final: the flag that also asks for the state."""

    tensors: Mapping[str, int | None]
    samples: frozenset[str]
    heads_of_result: int
    final: str


KINDS: dict[str, ScanKind] = {
    "mamba2_chunk_scan": ScanKind(
        {"hidden_states": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0, "dt_bias": 0, "initial_states": 1},
        frozenset({"hidden_states", "dt", "B", "C", "initial_states"}), 2, "return_final_states",
    ),
    "mamba_selective_scan": ScanKind(
        {"hidden_states": 1, "dt": 1, "A": 0, "B": None, "C": None, "D": 0, "z": 1, "delta_bias": 0},
        frozenset({"hidden_states", "dt", "B", "C", "z"}), 1, "return_last_state",
    ),
    "torch_chunk_gated_delta_rule": ScanKind(
        {"query": 2, "key": 2, "value": 2, "g": 2, "beta": 2, "initial_state": 1},
        frozenset({"query", "key", "value", "g", "beta", "initial_state"}), 2, "output_final_state",
    ),
}  # fmt: skip
originals: dict[str, Callable[..., Any]] = {}  # while a model is captured: what stands under a function's name else


def kind_of(function: str) -> ScanKind:
    return KINDS[function.partition(":")[2]]


def find(function: str) -> Callable[..., Any]:
    """'mamba2:mamba2_chunk_scan' -> that function of transformers.models.mamba2.modeling_mamba2."""
    family, _, name = function.partition(":")
    if function in originals:
        return originals[function]
    if not family.isidentifier() or name not in KINDS:
        raise ValueError(f"{function!r} names no scan of transformers")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _call(function: str, tensors: Tensors, options: str) -> torch.Tensor:
    given = {name: t for name, t in zip(kind_of(function).tensors, tensors, strict=False) if t is not None}
    with float64_throughout(given.values()):
        out = find(function)(**given, **json.loads(options))
    return out[0] if isinstance(out, tuple) else out


def _forward(*arguments: Any) -> torch.Tensor:
    *tensors, function, options = arguments
    return _call(function, tensors, options).contiguous()


def _backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, function, options = arguments
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        out = _call(function, leaves, options)
    there = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(out, there, grad.to(out.dtype), allow_unused=True))
    found = [None if leaf is None else next(grads) for leaf in leaves]
    return tuple(
        None if t is None else (torch.zeros_like(t) if g is None else g).contiguous()
        for t, g in zip(tensors, found, strict=True)
    )


def _forward_fake(*arguments: Any) -> torch.Tensor:
    *tensors, function, _ = arguments
    name = function.partition(":")[2]
    if name == "torch_chunk_gated_delta_rule":
        return tensors[2].new_empty(tensors[2].shape, dtype=tensors[0].dtype)
    hidden = tensors[0]
    if name == "mamba2_chunk_scan":
        return hidden.new_empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    dtype = hidden.dtype
    for other in (tensors[5], tensors[6]):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return hidden.new_empty(hidden.shape, dtype=dtype)


def _backward_fake(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.new_empty(t.shape) for t in arguments[:SLOTS])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.function, ctx.options = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*scan_backward(grad, *ctx.saved_tensors, ctx.function, ctx.options), None, None)


_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_TENSORS = ", ".join([f"Tensor x{k}" for k in range(5)] + [f"Tensor? x{k}" for k in range(5, SLOTS)])
_GRADS = ", ".join([f"Tensor grad{k}" for k in range(5)] + [f"Tensor? grad{k}" for k in range(5, SLOTS)])
_LIBRARY.define(f"scan({_TENSORS}, str function, str options) -> Tensor")
_LIBRARY.define(f"scan_backward(Tensor grad, {_TENSORS}, str function, str options) -> ({_GRADS})")
_LIBRARY.impl("scan", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("shardwright::scan", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("shardwright::scan_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("shardwright::scan", _gradients, setup_context=_setup_context, lib=_LIBRARY)
scan = torch.ops.shardwright.scan.default
scan_backward = torch.ops.shardwright.scan_backward.default


@register_flop_formula(torch.ops.shardwright.scan)
def scan_flops(*arguments: Any, **__: Any) -> int:
    """A multiply and an add count as two. Chunks of c steps; N and P: sizes of a head's state.

    mamba2   c (N + P) inside a chunk, 2 N P to and from the state, for each step and head
    delta    c (3 N + 2 P) inside a chunk, with the triangular system, 3 N P for the state
    mamba    4 N for each step and channel
    """
    first, function, options = arguments[0], arguments[SLOTS], arguments[SLOTS + 1]
    name, chunk = function.partition(":")[2], json.loads(options).get("chunk_size", 64)
    if name == "mamba_selective_scan":
        return 2 * 4 * math.prod(first) * arguments[2][-1]
    if name == "mamba2_chunk_scan":
        rows, n, p = math.prod(first[:3]), arguments[3][-1], first[3]
        return 2 * rows * (chunk * (n + p) + 2 * n * p)
    value = arguments[2]
    rows, n, p = math.prod(value[:3]), first[3], value[3]
    return 2 * rows * (chunk * (3 * n + 2 * p) + 3 * n * p)


@register_flop_formula(torch.ops.shardwright.scan_backward)
def scan_backward_flops(grad: Any, *arguments: Any, **_: Any) -> int:
    """The forward again, and twice that for the gradients."""
    return 3 * scan_flops(*arguments)
