"""Sharding rules of the user's own ops: `shardwright.register_sharding` and the proof that a rule is right.

A rule has the form that torch.distributed.tensor.experimental.register_sharding takes: called with the op's arguments
(tensors as meta tensors), it returns a list of (placements of the results, placements of the arguments), in DTensor's
Shard, Replicate and Partial; None stands for an argument that is no tensor. Each row says: where the arguments lie so,
the op on each rank's own part gives the results' parts that lie so. The row that is whole everywhere is always there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import ShardwrightError
from ..profiler.op_view import OpView
from .catalog import CUSTOM, place_of
from .placement import P, R, can_shard, shard_size, shard_start, to_text
from .strategy import Strategy

Row = tuple[Sequence[Any], Sequence[Any]]
Rule = Callable[..., Iterable[Row]] | Iterable[Row]
TOLERANCE = 1e-9  # relative, in float64
MESH_SIZES = (2, 3)


def register_sharding(op: Any, rule: Rule | None = None, *, examples: Iterable[Sequence[Any]] = ()) -> Any:
    """Add a rule for an op: an overload, a packet (all its overloads), a torch.library custom op, or "namespace::name".

    rule: see above; a list where it is the same for all arguments; left out, the call is a decorator of the rule.
    examples: arguments to prove the rule on at once (check_sharding). Call it where the op is defined, so that every
    process that plans has it; a plan holds the placements themselves, and runs where no rule is registered.

    Raises ShardwrightError: no such op, a rule that is neither callable nor a list, or one that is wrong.
    """
    if rule is None:

        def decorator(given: Rule) -> Rule:
            register_sharding(op, given, examples=examples)
            return given

        return decorator
    if not callable(rule) and not isinstance(rule, (list, tuple)):
        raise ShardwrightError(
            f"the rule of {op} is a {type(rule).__name__}",
            means="a rule is a function of the op's arguments, or a list of rows",
            change="register_sharding",
            works="register_sharding(op, [([Shard(0)], [Shard(0), None])])",
        )
    kept = rule if callable(rule) else list(rule)
    overloads = _overloads(op)
    for arguments in examples:
        check_sharding(overloads[0], kept, *arguments)
    for overload in overloads:
        CUSTOM[overload] = partial(_of_view, kept)
    return rule


def check_sharding(op: Any, rule: Rule, *args: Any, mesh_sizes: Sequence[int] = MESH_SIZES, **kwargs: Any) -> int:
    """Prove every row of a rule on these arguments, on the CPU, for each mesh size.

    Floating-point arguments are taken in float64. The whole result must be what the parts make, to 1e-9 relative.
    Returns how many rows could be tried (dimensions too short for a mesh are left out).
    Raises ShardwrightError for the first row that is wrong.
    """
    overload = _overloads(op)[0]
    args, kwargs = pytree.tree_map_only(torch.Tensor, _wide, (args, kwargs))
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    expected = _results(overload(*args, **kwargs))
    tried = 0
    for row, size in itertools.product(_strategies(rule, str(overload), args, kwargs, len(expected)), mesh_sizes):
        places = [*zip(row.inputs, tensors, strict=True), *zip(row.outputs, expected, strict=True)]
        if any(p >= 0 and (p >= t.dim() or not can_shard(t.shape[p], size)) for p, t in places):
            continue
        tried += 1
        problem = _disprove(overload, row, args, kwargs, expected, size)
        if problem:
            raise ShardwrightError(
                f"the sharding rule of {overload} is wrong: {_text(row)} on {size} ranks: {problem}",
                means="a plan that uses this row would compute other numbers",
                change="the rule's row",
                works="Partial() for a result that sums over a sharded dimension, or leave the row out",
            )
    return tried


# --------------------------------------------------------------------------- rows


def _overloads(op: Any) -> list[torch._ops.OpOverload]:
    found = getattr(op, "_opoverload", op)  # a torch.library custom op
    if isinstance(found, str):
        namespace, _, name = found.partition("::")
        found = getattr(getattr(torch.ops, namespace), name.partition(".")[0], None) if name else None
    if isinstance(found, torch._ops.OpOverload):
        return [found]
    if isinstance(found, torch._ops.OpOverloadPacket):
        return [getattr(found, name) for name in found.overloads()]
    raise ShardwrightError(
        f"{op!r} is no registered op",
        means="rules belong to ops that the dispatcher knows",
        change="register_sharding's first argument",
        works='torch.ops.mylib.my_op, the result of torch.library.custom_op, or "mylib::my_op"',
    )


def _of_view(rule: Rule, view: OpView) -> list[Strategy]:
    """What the catalog asks: the rule on an op of a captured graph."""

    def meta(node: fx.Node) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), node.meta.get("val"))

    args, kwargs = fx.node.map_arg((view.args, view.kwargs), meta)
    return list(_strategies(rule, str(view.op), args, kwargs, len(view.outputs)))


def _strategies(rule: Rule, name: str, args: Any, kwargs: Any, num_outputs: int) -> list[Strategy]:
    rows = rule(*args, **kwargs) if callable(rule) else rule
    count = sum(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs)))
    found = []
    for row in rows:
        outputs, inputs = row
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        given = [p for p in inputs if p is not None]
        places = [tuple(place_of(p) for p in side) for side in (given, outputs)]
        if len(given) != count or len(outputs) != num_outputs or None in (*places[0], *places[1]):
            raise ShardwrightError(
                f"the sharding rule of {name} has a row {row} for {count} tensor arguments and {num_outputs} results",
                means="a row gives one placement for each result and each tensor argument, "
                "Shard(dim), Replicate() or Partial()",
                change="the rule's row",
                works=f"([Shard(0)] * {num_outputs}, [Shard(0)] * {count})",
            )
        found.append(Strategy(*places))  # type: ignore[arg-type]
    return found


def _text(row: Strategy) -> str:
    return f"{', '.join(map(to_text, row.inputs))} -> {', '.join(map(to_text, row.outputs))}"


# --------------------------------------------------------------------------- the proof


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _results(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [v for v in value if isinstance(v, torch.Tensor)]


def _disprove(op: Any, row: Strategy, args: Any, kwargs: Any, expected: list[torch.Tensor], size: int) -> str:
    """What is wrong with a row on imaginary ranks, or ''."""
    parts: list[list[torch.Tensor]] = []
    for rank in range(size):
        places = iter(row.inputs)
        local = pytree.tree_map_only(torch.Tensor, partial(_next_part, places, rank, size), (args, kwargs))
        try:
            parts.append(_results(op(*local[0], **local[1])))
        except Exception as error:
            return f"rank {rank} fails with {type(error).__name__}: {error}"
    for k, (place, whole) in enumerate(zip(row.outputs, expected, strict=True)):
        mine = [part[k] for part in parts]
        if place == R and any(not _same(other, mine[0]) for other in mine[1:]):
            return f"result {k} is said to be whole, and differs between ranks"
        joined = mine[0] if place == R else sum(mine[1:], mine[0]) if place == P else torch.cat(mine, place)
        if joined.shape != whole.shape:
            return f"result {k} comes out as {tuple(joined.shape)} for {tuple(whole.shape)}"
        if not _same(joined, whole):
            difference = (joined.double() - whole.double()).abs().max().item()
            return f"result {k} of shape {tuple(whole.shape)} differs by up to {difference:.2g}"
    return ""


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True)


def _next_part(places: Iterator[int], rank: int, size: int, tensor: torch.Tensor) -> torch.Tensor:
    return _part(tensor, next(places), rank, size)


def _part(tensor: torch.Tensor, place: int, rank: int, size: int) -> torch.Tensor:
    """A rank's part; of a partial sum a random summand, the last of which completes it."""
    if place == P:
        draws = [
            torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(i))
            for i in range(size - 1)
        ]
        return draws[rank] if rank < size - 1 else tensor - sum(draws)
    if place == R:
        return tensor.clone()
    start, length = shard_start(tensor.shape[place], size, rank), shard_size(tensor.shape[place], size, rank)
    return tensor.narrow(place, start, length).clone()
