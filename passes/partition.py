"""A joint graph becomes a forward and a backward graph, and with them what is kept in between.

Kept are the memories (not the views) of forward results that the backward reads; parameters, buffers and the random
key are handed to both. What is recomputed is not kept: the backward makes it again from what is. Where that is
everything, only inputs are kept and the forward runs again inside the backward. Views, constants and whatever derives
from parameters by views alone are made anew in the backward in any case.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..profiler.graph import Segment
from ..profiler.nodes import needed_for
from ..profiler.op_view import origin
from ..profiler.slots import BUFFER, GRADIENTS, INPUT, LASTING, TANGENT, kind_of, slot_name
from ..profiler.work import is_free, is_view

aten = torch.ops.aten
Recompute = bool | Collection[str]


def partition(
    joint: fx.GraphModule, segment: Segment, recompute: Recompute
) -> tuple[fx.GraphModule, fx.GraphModule | None, list[str]]:
    """(forward, backward or None, names of what is kept), with the signatures of passes.program.SegmentProgram.

    recompute: everything (True), nothing, or the captured ops named, and "NODE.K>kept" for a form that is brought
    about again from the producer's own.
    """
    graph = joint.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    both = [n for n in placeholders if kind_of(n.name) in LASTING]
    inputs = [n for n in placeholders if kind_of(n.name) == INPUT]
    tangents = [n for n in placeholders if kind_of(n.name) == TANGENT]
    results = dict(
        zip(segment.signature.results, next(n for n in reversed(graph.nodes) if n.op == "output").args[0], strict=True)
    )
    forward_results = [v for k, v in results.items() if kind_of(k) not in GRADIENTS]
    backward_results = [v for k, v in results.items() if kind_of(k) in GRADIENTS]
    if not any(isinstance(v, fx.Node) for v in backward_results):
        return extract(joint, [*both[:-1], *inputs, both[-1]], forward_results), None, []
    kept = _kept(graph, backward_results, _recomputed(recompute))
    written = {slot_name(BUFFER, slot) for slot in segment.mutated_buffers}
    read = needed_for(backward_results, set(kept).__contains__) if recompute else set()
    copies = [n for n in both if n.name in written and n in read]
    forward = extract(joint, [*both[:-1], *inputs, both[-1]], [*forward_results, *kept, *copies], clone=set(copies))
    # a buffer that the forward overwrites is read by the recomputation as it was before
    renamed = {n: f"before_{n.name}" for n in copies}
    backward = extract(joint, [*both, *kept, *copies, *tangents], backward_results, renamed=renamed)
    return forward, backward, [n.name for n in [*kept, *copies]]


def _recomputed(recompute: Recompute) -> Callable[[fx.Node], bool]:
    """Is the result of a node of the forward made again?"""
    if isinstance(recompute, bool):
        return lambda node: recompute
    names = frozenset(recompute)

    def is_again(node: fx.Node) -> bool:
        if is_view(origin(node)[0]):
            return True  # whose memory it is, is decided where it was made
        return node.meta.get("form", node.meta.get("of")) in names

    return is_again


def _kept(graph: fx.Graph, wanted: list[Any], is_again: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Walk back from the gradients; stop at what must be kept.

    An op that runs again reads what its operands were made from: of a result that is kept, the producer's own form, or
    the one that is kept for the backward, from which the other forms are brought about again.
    """
    kept: dict[fx.Node, None] = {}
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(n, False) for n in wanted if isinstance(n, fx.Node)]  # (node, does an op that runs again read it)
    while stack:
        node, inside = stack.pop()
        if (node, inside) in seen:
            continue
        seen.add((node, inside))
        if node.op == "placeholder":
            if kind_of(node.name) == INPUT:
                kept[node] = None
            continue
        runs_again = node.meta.get("phase") == "forward" and not is_free(node)
        if runs_again and not is_again(node) and not (inside and _is_passing(node)):
            if node.target is operator.getitem or not isinstance(_results(node), list):
                kept[node] = None
                continue
        reads = inside or (runs_again and not is_view(origin(node)[0]))
        stack.extend((source, reads) for source in node.all_input_nodes)
    order = {n: i for i, n in enumerate(graph.nodes)}
    return sorted(kept, key=lambda n: order[n])


def _is_passing(node: fx.Node) -> bool:
    """A form that only readers in the forward ask for."""
    return bool(node.meta.get("moves")) and "form" not in node.meta


def _results(node: fx.Node) -> Any:
    """A list for ops with several results, which are kept one by one through their getitems."""
    users = list(node.users)
    return users if users and all(u.target is operator.getitem for u in users) else None


def extract(
    joint: fx.GraphModule,
    arguments: list[fx.Node],
    wanted: list[Any],
    clone: set[fx.Node] | None = None,
    renamed: dict[fx.Node, str] | None = None,
) -> fx.GraphModule:
    """The part of the graph that computes `wanted` from `arguments`."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    renamed = renamed or {}
    for node in arguments:
        new = graph.placeholder(renamed[node] if node in renamed and node in env else node.name)
        new.meta = dict(node.meta)
        env[node] = new  # the later of two wins: a kept copy stands for the buffer
    needed = needed_for(wanted, env.__contains__)
    for node in joint.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, lambda n: env[n])
    results: list[fx.Node | None] = []
    for node in wanted:
        if not isinstance(node, fx.Node):
            results.append(None)
        elif clone and node in clone:
            results.append(graph.call_function(aten.clone.default, (env[node],)))
            results[-1].meta = dict(node.meta)  # type: ignore[union-attr]
        else:
            results.append(env[node])
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph)
