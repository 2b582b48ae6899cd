"""Sharded graphs run on imaginary ranks, in one process: each rank's graph node by node, collectives in lock step.

A mesh is a list of MeshAxis sizes, outermost first; rank r has the coordinates of row-major order. Ranks whose graphs
disagree on the next collective would hang a real job: here they fail an assertion.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import fx

from shardwright.ops.placement import P
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.shard import local_offset, local_shape

c10d = torch.ops._c10d_functional
COLLECTIVES = {
    c10d.all_reduce.default,
    c10d.all_reduce_.default,
    c10d.all_gather_into_tensor.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_to_all_single.default,
}


def mesh(sizes: dict[str, int]) -> list[tuple[MeshAxis, ...]]:
    """Each rank's view of the axes. Groups are named axis[coordinates on the other axes]."""
    ranks = []
    for coordinates in itertools.product(*map(range, sizes.values())):
        axes = []
        for k, (name, size) in enumerate(sizes.items()):
            others = [str(c) for j, c in enumerate(coordinates) if j != k]
            axes.append(MeshAxis(name, size, coordinates[k], f"{name}[{','.join(others)}]"))
        ranks.append(tuple(axes))
    return ranks


def cut(tensor: torch.Tensor, places: Sequence[int], axes: Sequence[MeshAxis]) -> torch.Tensor:
    """This rank's part. Of a partial sum: random summands, the last of which completes it."""
    for k, (place, axis) in enumerate(zip(places, axes, strict=True)):
        if place == P and axis.size > 1:
            tensor = _summand(tensor, k, axis)
    sizes, starts = local_shape(tensor.shape, tuple(places), axes), local_offset(tensor.shape, tuple(places), axes)
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor.clone()


def _summand(tensor: torch.Tensor, k: int, axis: MeshAxis) -> torch.Tensor:
    draws = [
        torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(97 * k + i))
        for i in range(axis.size - 1)
    ]
    return draws[axis.index] if axis.index < axis.size - 1 else tensor - sum(draws)


def join(
    parts: list[torch.Tensor], places: Sequence[int], ranks: list[tuple[MeshAxis, ...]], check_copies: bool = True
) -> torch.Tensor:
    """The whole tensor. Innermost axis first; copies must be the same on all ranks."""
    sizes = [axis.size for axis in ranks[0]]
    for place, size in zip(reversed(places), reversed(sizes), strict=True):
        groups = [parts[i : i + size] for i in range(0, len(parts), size)]
        parts = [_join_one(group, place, check_copies) for group in groups]
    (whole,) = parts
    return whole


def _join_one(group: list[torch.Tensor], place: int, check_copies: bool) -> torch.Tensor:
    if place >= 0:
        return torch.cat(group, place)
    if place == P:
        return torch.stack(group).sum(0)
    for other in group[1:] if check_copies else ():
        torch.testing.assert_close(other, group[0], rtol=1e-10, atol=1e-10, equal_nan=True)
    return group[0]


def run(
    graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]], ranks: list[tuple[MeshAxis, ...]]
) -> list[list[Any]]:
    """Results of each rank's graph."""
    tasks = [_steps(graph, args) for graph, args in zip(graphs, inputs, strict=True)]
    asked = [next(task) for task in tasks]
    while True:
        if all(kind == "done" for kind, _ in asked):
            return [list(result) for _, result in asked]
        assert all(kind == "collective" for kind, _ in asked), "a rank waits in a collective that others never enter"
        answers = _answers([call for _, call in asked], ranks)
        asked = [task.send(answer) for task, answer in zip(tasks, answers, strict=True)]


def _steps(graph: fx.GraphModule, args: Sequence[Any]) -> Generator[tuple[str, Any], Any, None]:
    env: dict[fx.Node, Any] = {}
    given = iter(args)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given, None)  # arguments that may be left out stand last
            continue
        operands, keywords = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if node.op == "output":
            yield "done", operands[0]
        elif node.target in COLLECTIVES:
            assert operands[0].is_contiguous(), "collectives take contiguous tensors"
            env[node] = yield "collective", (node.target, *operands)
        elif node.target is c10d.wait_tensor.default:
            env[node] = operands[0]
        elif node.target is operator.getitem:
            env[node] = operands[0][operands[1]]
        else:
            env[node] = node.target(*operands, **keywords)


def _answers(calls: list[tuple[Any, ...]], ranks: list[tuple[MeshAxis, ...]]) -> list[torch.Tensor]:
    answers: list[torch.Tensor] = [torch.empty(0)] * len(calls)
    groups: dict[str, list[int]] = {}
    in_place: list[tuple[torch.Tensor, int]] = []
    for rank, call in enumerate(calls):
        groups.setdefault(call[-1], []).append(rank)
    for name, members in groups.items():
        size = next(axis.size for axis in ranks[members[0]] if axis.group == name)
        assert len(members) == size, f"{len(members)} of {size} ranks are in {name}"
        asked = [calls[rank] for rank in members]
        for other in asked[1:]:
            assert _same_op(other[0], asked[0][0]) and other[2:] == asked[0][2:], (
                f"ranks disagree: {asked[0][0]}, {other[0]}"
            )
            assert other[1].shape == asked[0][1].shape, (
                f"{other[0]}: {tuple(other[1].shape)}, {tuple(asked[0][1].shape)}"
            )
        for place, rank in enumerate(members):
            answers[rank] = _collective(asked[0][0], [call[1] for call in asked], asked[0][2:], place)
            if calls[rank][0] is c10d.all_reduce_.default:
                in_place.append((calls[rank][1], rank))
    for tensor, rank in in_place:
        answers[rank] = tensor.copy_(answers[rank])
    return answers


def _same_op(first: Any, second: Any) -> bool:
    """Whether a rank writes over its input is its own affair."""
    sums = (c10d.all_reduce.default, c10d.all_reduce_.default)
    return first is second or (first in sums and second in sums)


def _collective(op: Any, tensors: list[torch.Tensor], options: tuple[Any, ...], place: int) -> torch.Tensor:
    if op in (c10d.all_reduce.default, c10d.all_reduce_.default):
        stacked = torch.stack(tensors)
        return stacked.amax(0) if options[0] == "max" else stacked.sum(0)
    if op is c10d.all_gather_into_tensor.default:
        return torch.cat(tensors, 0)
    if op is c10d.reduce_scatter_tensor.default:
        return torch.stack(tensors).sum(0).chunk(len(tensors), 0)[place].clone()
    return torch.cat([tensor.chunk(len(tensors), 0)[place] for tensor in tensors], 0)
