"""Random operators: rand_uniform, rand_normal, rand_keep, bernoulli and dropout, each a pure function of its key.

All take key, an int64 tensor [seed, step, microbatch, random_base] (make_key), and rng_index, the number of the
operator within its segment. global_shape and offset say which box of the whole tensor the result is: the whole shape
and zeros where nothing is sharded. Whoever shards a graph must fill them in; the numbers then do not depend on how it
was sharded.

On an NVIDIA GPU a Triton kernel does the work, elsewhere the reference. uniform, bernoulli and dropout give the same
bits on both; normal is made of the same integers, and differs by the rounding of logarithm, sine and cosine (a few
units in the last place).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import generator
from .library import define, differentiable
from .lowering import triton_for

_SHAPES = "SymInt[] global_shape, SymInt[] offset"
_NEW = f"Tensor key, SymInt[] local_shape, {_SHAPES}, int rng_index, ScalarType dtype, Device device"

Shape = Sequence[int]


def _rand_uniform(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    kernels = triton_for(device)
    make = generator.uniform if kernels is None else kernels.uniform
    return make(key, local_shape, global_shape, offset, rng_index, dtype, device)


def _rand_normal(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    kernels = triton_for(device)
    make = generator.normal if kernels is None else kernels.normal
    return make(key, local_shape, global_shape, offset, rng_index, dtype, device)


def _new_fake(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    return torch.empty(tuple(local_shape), dtype=dtype, device=device)


def keep_mask(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    p: float,
    device: torch.device,
) -> torch.Tensor:
    """bool: what dropout keeps. Not an operator: attention makes its blocks of the mask with it."""
    kernels = triton_for(device)
    make = generator.keep_mask if kernels is None else kernels.keep_mask
    return make(key, local_shape, global_shape, offset, rng_index, p, device)


def _rand_keep(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
    p: float,
) -> torch.Tensor:
    """1 where dropout with probability p keeps the element, else 0."""
    return keep_mask(key, local_shape, global_shape, offset, rng_index, p, device).to(dtype)


def _keep_fake(
    key: torch.Tensor,
    local_shape: Shape,
    global_shape: Shape,
    offset: Shape,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
    p: float,
) -> torch.Tensor:
    return torch.empty(tuple(local_shape), dtype=dtype, device=device)


rand_uniform = define(f"rand_uniform({_NEW}) -> Tensor", _rand_uniform, _new_fake)
rand_keep = define(f"rand_keep({_NEW}, float p) -> Tensor", _rand_keep, _keep_fake)
rand_normal = define(f"rand_normal({_NEW}) -> Tensor", _rand_normal, _new_fake)


def _bernoulli(
    probs: torch.Tensor, key: torch.Tensor, rng_index: int, global_shape: Shape, offset: Shape
) -> torch.Tensor:
    """1 where the element's uniform number in float32 is below probs, else 0, in probs' dtype."""
    sample = _rand_uniform(key, probs.shape, global_shape, offset, rng_index, torch.float32, probs.device)
    return (sample < probs.contiguous()).to(probs.dtype)


def _bernoulli_fake(
    probs: torch.Tensor, key: torch.Tensor, rng_index: int, global_shape: Shape, offset: Shape
) -> torch.Tensor:
    return probs.new_empty(probs.shape)


bernoulli = define(
    f"bernoulli(Tensor probs, Tensor key, int rng_index, {_SHAPES}) -> Tensor", _bernoulli, _bernoulli_fake
)
# as aten::bernoulli has it, the sample carries no gradient
differentiable(bernoulli, lambda ctx, grad: (None,) * 5, lambda ctx, inputs, output: None)


def _dropout(
    input: torch.Tensor, key: torch.Tensor, p: float, rng_index: int, global_shape: Shape, offset: Shape
) -> torch.Tensor:
    kernels = triton_for(input.device)
    apply = generator.dropout if kernels is None else kernels.dropout
    return apply(input, key, p, rng_index, global_shape, offset)


def _dropout_fake(
    input: torch.Tensor, key: torch.Tensor, p: float, rng_index: int, global_shape: Shape, offset: Shape
) -> torch.Tensor:
    return input.new_empty(input.shape)


dropout = define(
    f"dropout(Tensor input, Tensor key, float p, int rng_index, {_SHAPES}) -> Tensor", _dropout, _dropout_fake
)


def _dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, key, *ctx.options = inputs
    ctx.save_for_backward(key)


def _dropout_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Dropout is linear in its input: its gradient is the same operator, and no mask is saved."""
    (key,) = ctx.saved_tensors
    return dropout(grad, key, *ctx.options), *(None,) * 5


differentiable(dropout, _dropout_gradient, _dropout_setup)
