"""How each operator of this folder may be split over one mesh axis, as plain data for a planner.

    SHARDING_RULES[op](args, kwargs, outputs) -> rows

args and kwargs are the call's, each tensor given as an fx.Node with meta["val"], a tensor or a shape tuple; outputs
are the results, likewise, None where the operator returns none. A row is (placement of each output..., placement of
each tensor operand...), operands in the order of the call and only those that are there. All replicated comes first.
A row whose `even` is True holds only where the sizes divide by the axis.

What a row cannot say, and the rewriting pass must do: random operators draw by place in the whole tensor, so a pass
that splits one must set global_shape (rng_shape) to the whole tensor's shape and offset (rng_offset) to where this
rank's shard begins, and for rand_uniform, rand_normal and rand_keep also local_shape to the shard's. The random key is
always replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .attention import attention, attention_backward
from .random import bernoulli, dropout, rand_keep, rand_normal, rand_uniform
from .rms_norm import add_rms_norm, add_rms_norm_backward, rms_norm

WHOLE, SUM = Replicate(), Partial()


class Row(tuple[Placement | None, ...]):
    """Placements of outputs, then of tensor operands; None for an output that is not there."""

    even: bool = False

    @classmethod
    def of(cls, outputs: Sequence[Placement | None], operands: Sequence[Placement], even: bool = False) -> Row:
        row = cls((*outputs, *operands))
        row.even = even
        return row


Rule = Callable[[Sequence[Any], Mapping[str, Any], Sequence[Any]], list[Row]]


def shape_of(argument: Any) -> tuple[int, ...]:
    """Of an fx.Node with meta["val"], a tensor, or a shape."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(value)


def _bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in op._schema.arguments]
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _splittable(shape: Sequence[int]) -> list[int]:
    return [dim for dim, size in enumerate(shape) if size > 1]


def _mask_place(mask: Any, dim: int) -> tuple[Placement, Placement]:
    """Of a mask and of its gradient where the scores are split on dim: whole, and a sum, where it is broadcast."""
    if mask is None:
        return WHOLE, WHOLE
    shape = shape_of(mask)
    own = dim - (4 - len(shape))
    return (Shard(own), Shard(own)) if own >= 0 and shape[own] > 1 else (WHOLE, SUM)


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any], backward: bool) -> list[Row]:
    """Samples; heads; and query rows where no row's mask depends on its number.

    Split heads take their key heads along; a single key head, which all share, stays whole, and its gradient is a sum.
    """
    call = _bind(attention_backward if backward else attention, args, kwargs)
    query, key, mask = shape_of(call["query"]), shape_of(call["key"]), call["mask"]
    rows: list[Row] = []

    def add(dim: int | None, keys: Placement, keys_grad: Placement, even: bool = False) -> None:
        queries = WHOLE if dim is None else Shard(dim)
        mask_place, mask_grad = (WHOLE, WHOLE) if dim is None else _mask_place(mask, dim)
        operands = [queries, keys, keys, *([mask_place] if mask is not None else [])]
        operands += [WHOLE] if call["rng_key"] is not None else []
        if backward:
            grad_mask = mask_grad if call["mask_needs_grad"] and mask is not None else None
            rows.append(
                Row.of((queries, keys_grad, keys_grad, grad_mask), (queries, *operands, queries, queries), even)
            )
        else:
            rows.append(Row.of((queries, queries), operands, even))

    add(None, WHOLE, WHOLE)
    if query[0] > 1:
        add(0, Shard(0), Shard(0))
    if query[1] > 1 and key[1] > 1:
        add(1, Shard(1), Shard(1), even=query[1] != key[1])
    if query[1] > 1 and key[1] == 1:
        add(1, WHOLE, SUM)
    if query[2] > 1 and not call["causal"] and call["window"] <= 0:
        add(2, WHOLE, SUM)
    return rows


def _attention_forward(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    return _attention(args, kwargs, outputs, backward=False)


def _attention_backward(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    return _attention(args, kwargs, outputs, backward=True)


def _new_random(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    shape = args[1]  # local_shape
    return [Row.of([place], [WHOLE]) for place in (WHOLE, *map(Shard, _splittable(shape)))]


def _bernoulli(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    shape = shape_of(_bind(bernoulli, args, kwargs)["probs"])
    return [Row.of([place], [place, WHOLE]) for place in (WHOLE, *map(Shard, _splittable(shape)))]


def _dropout(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    """Any dimension; and linear, so that a sum passes through."""
    shape = shape_of(_bind(dropout, args, kwargs)["input"])
    return [Row.of([place], [place, WHOLE]) for place in (WHOLE, *map(Shard, _splittable(shape)), SUM)]


def _rows_of_norm(shape: Sequence[int]) -> list[Placement]:
    return [WHOLE, *map(Shard, _splittable(shape[:-1]))]


def _add_rms_norm(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    shape = shape_of(_bind(add_rms_norm, args, kwargs)["x"])
    return [Row.of([place] * 3, [place, place, WHOLE]) for place in _rows_of_norm(shape)]


def _rms_norm(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    shape = shape_of(_bind(rms_norm, args, kwargs)["x"])
    return [Row.of([place] * 2, [place, WHOLE]) for place in _rows_of_norm(shape)]


def _add_rms_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Row]:
    """Split rows leave the weight's gradient a sum; sums of both upstream gradients pass, as it is linear in them."""
    call = _bind(add_rms_norm_backward, args, kwargs)
    num_upstream = 1 if call["grad_sum"] is None else 2
    rows = [
        Row.of([place, WHOLE if place == WHOLE else SUM], [place] * (num_upstream + 2) + [WHOLE])
        for place in _rows_of_norm(shape_of(call["sum"]))
    ]
    return [*rows, Row.of([SUM, SUM], [SUM] * num_upstream + [WHOLE] * 3)]


SHARDING_RULES: dict[torch._ops.OpOverload, Rule] = {
    attention: _attention_forward,
    attention_backward: _attention_backward,
    rand_uniform: _new_random,
    rand_normal: _new_random,
    rand_keep: _new_random,
    bernoulli: _bernoulli,
    dropout: _dropout,
    add_rms_norm: _add_rms_norm,
    add_rms_norm_backward: _add_rms_norm_backward,
    rms_norm: _rms_norm,
}
