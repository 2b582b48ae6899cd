"""Experts on an axis that cuts them: which tensors are theirs, and what sending tokens to them takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from ...costmodel.experts import (
    CHUNKS,
    DEVICE,
    ExpertSizes,
    Work,
    copies_of_token,
    expert_scratch_bytes,
    goes_by_hosts,
    in_turns_s,
)
from ...ops.expert_rules import is_dispatch, is_expert_op, weights_at
from ...ops.placement import R
from ...ops.strategy import Strategy
from ...plans.axes import MeshShape, expert_axes
from ...profiler.cluster import Cluster
from ...profiler.device import GroupLink
from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import is_getitem
from ...profiler.op_view import is_op, origin, view_of
from ...profiler.slots import PARAM, kind_of
from .mesh import Axis, Mesh, Sizes

Result = tuple[fx.Node, int]


def expert_results(graph: ModelGraph) -> frozenset[Result]:
    """Parameters that expert ops alone read, what is made of them on the way there, and their gradients."""
    segments = [segment for segment in graph.segments.values() if segment.joint is not None]
    return frozenset(result for segment in segments for result in _of_segment(segment))


def most_experts(graph: ModelGraph) -> int:
    """The experts of a layer that has the fewest, of those that may be split; 0 where the model has none."""
    split = expert_results(graph)
    weights = [node for node in _ops(graph) if all(origin(w) in split for w in _weights(node))]
    return min((_weights(node)[0].meta["val"].shape[0] for node in weights), default=0)


def _ops(graph: ModelGraph) -> Iterator[fx.Node]:
    for segment in graph.segments.values():
        if segment.joint is None:  # of a graph that was not captured
            continue
        yield from (node for node in segment.joint.graph.nodes if is_op(node) and is_expert_op(node))


def _weights(node: fx.Node) -> list[fx.Node]:
    """Operands of an expert op that hold experts."""
    operands = view_of(node).operands
    return [operands[k] for k in weights_at(node)]


def expert_scratch(node: fx.Node, share: float) -> float:
    """Bytes that an expert op holds for itself. share: of the choices of the example batch, on this rank."""
    operands = view_of(node).operands
    is_backward = weights_at(node).start > 3
    hidden, index = (operand.meta["val"] for operand in operands[is_backward : is_backward + 2])
    first, down, *biases = (weight.meta["val"] for weight in _weights(node))  # [E, A, H], [E, H, I]
    activation = str(node.args[-1])
    sizes = ExpertSizes(hidden.shape[-1], first.shape[1], down.shape[2], hidden.dtype, activation, bool(biases))
    return expert_scratch_bytes(share * index.numel(), sizes, is_backward=is_backward)


def _of_segment(segment: Segment) -> set[Result]:
    known: dict[fx.Node, bool] = {}

    def is_of_experts(node: fx.Node) -> bool:
        """A parameter, or made of nothing else, that only expert ops read."""
        if node not in known:
            known[node] = False
            source, _ = origin(node)
            made = kind_of(source.name) == PARAM if source.op == "placeholder" else _is_made_of(source, is_of_experts)
            known[node] = made and all(_is_read_by_experts(user, node, is_of_experts) for user in node.users)
        return known[node]

    found: set[Result] = set()
    for node in segment.joint.graph.nodes:
        if not (is_op(node) and is_expert_op(node)):
            continue
        weights = [operand for operand in _weights(node) if is_of_experts(operand)]
        for operand in weights:
            found |= {origin(above) for above in (operand, *_above(operand))}
        if weights_at(node).start > 3:
            gradients = range(2, 2 + len(weights_at(node)))
            found |= {(node, k) for k in gradients}
            found |= {result for getitem in node.users if getitem.args[1] in gradients for result in _below(getitem)}
    return found


def _is_made_of(node: fx.Node, holds: Callable[[fx.Node], bool]) -> bool:
    return is_op(node) and bool(view_of(node).operands) and all(map(holds, view_of(node).operands))


def _is_read_by_experts(user: fx.Node, node: fx.Node, holds: Callable[[fx.Node], bool]) -> bool:
    if user.op == "output":
        return False
    if is_getitem(user):
        return all(_is_read_by_experts(other, user, holds) for other in user.users)
    if is_expert_op(user):
        return node in _weights(user)
    return all(_is_read_by_experts(other, user, holds) for other in user.users)


def _above(node: fx.Node) -> Iterator[fx.Node]:
    source, _ = origin(node)
    for operand in view_of(source).operands if is_op(source) else ():
        yield operand
        yield from _above(operand)


def _below(node: fx.Node) -> Iterator[Result]:
    """What a gradient of experts goes through to where it leaves."""
    for user in node.users:
        if is_op(user) and len(view_of(user).operands) == 1:
            yield user, 0
            yield from _below(user)


# --------------------------------------------------------------------------- costs


def expert_ranks_per_host(graph: ModelGraph, cluster: Cluster, shape: MeshShape) -> int:
    """How many ranks of the axis that cuts experts share a host, where tokens go to each host once; else 1."""
    (axis,) = expert_axes()
    if shape.size(axis) == 1:
        return 1
    return by_hosts(graph, cluster.axis_links(shape.within(cluster.num_devices, axis).factors, axis))


def by_hosts(graph: ModelGraph, links: GroupLink) -> int:
    """The same of a group with these links."""
    choices = [view_of(node).inputs[weights_at(node).start - 2].shape[1] for node in _ops(graph)]
    per_host = links.ranks_per_host
    return per_host if choices and goes_by_hosts(min(choices), links.size, per_host) else 1


def row_bytes(operands: Sequence[Sizes], *, again: bool = False) -> tuple[float, float]:
    """Bytes of a token that are sent to a rank, and back. operands: of an expert op. again: does a backward send tokens
    with their gradients? Else those that came in the forward are still there."""
    first = [sizes.num_bytes / max(sizes.shape[0], 1) for sizes in operands]
    if not _has_gradient(operands):
        hidden, index, weight, *_ = first
        return hidden + index / 2 + weight, hidden  # choices travel as 32-bit numbers
    grad, hidden, index, weight, *_ = first
    return grad + again * hidden + index / 2 + weight, hidden + weight


def _has_gradient(operands: Sequence[Sizes]) -> bool:
    """Of an expert op, does a gradient stand first? The fourth operand is then the choices' weights, [N, K]."""
    return len(operands[3].shape) == 2


def dispatched(mesh: Mesh, strategies: Sequence[Strategy]) -> tuple[Axis, int] | None:
    """The axis along which tokens are sent to experts, and into how many parts other axes cut each rank's."""
    at = next(
        (k for k, (a, s) in enumerate(zip(mesh.axes, strategies, strict=True)) if a.size > 1 and is_dispatch(s)), None
    )
    if at is None:
        return None
    parts = 1
    for axis, strategy in zip(mesh.axes, strategies, strict=True):
        parts *= axis.size if strategy.lowering.startswith("own_experts") else 1
    return mesh.axes[at], parts


def least_dispatch_s(mesh: Mesh, node: fx.Node, listed: Sequence[Strategy]) -> float:
    """Of an expert op whose tokens are sent, whatever else is chosen: tokens split over all axes that may split them,
    experts over all others. listed: its strategies."""
    option = _least_option(mesh, listed)
    view = view_of(node)
    operands = [mesh.sizes(*origin(n)) for n in view.operands]
    results = [mesh.sizes(node, k) for k in range(len(view.outputs))]
    moved = sum(
        sizes.num_bytes / mesh.shares(tuple(s.inputs[k] for s in option)) for k, sizes in enumerate(operands)
    ) + mesh.moved_bytes(node, option, results)
    batched = any(any(sizes.batched) for sizes in (*operands, *results))
    return dispatch_s(mesh, option, operands, mesh.op_s(node, mesh.share(option, batched), moved))


def _least_option(mesh: Mesh, listed: Sequence[Strategy]) -> list[Strategy]:
    tokens = next(s for s in listed if not s.lowering and s.inputs[0] >= 0)
    sent = next(s for s in listed if is_dispatch(s))
    cut = next(s for s in listed if s.lowering.startswith("own_experts"))
    return [sent if axis.role.cuts_experts else cut if axis.role.cuts_params else tokens for axis in mesh.axes]


def dispatch_s(
    mesh: Mesh, strategies: Sequence[Strategy], operands: Sequence[Sizes], compute_s: float, *, again: bool = False
) -> float:
    """What sending tokens to experts and back adds to the seconds of the experts' products. The rank that most tokens
    go to has the others wait. compute_s: of those products, which pass beside messages of other chunks. again: as
    row_bytes has it."""
    found = dispatched(mesh, strategies)
    if found is None:
        return 0.0
    axis, _ = found
    chunks = mesh.expert_chunks
    there, back = _messages(mesh, strategies, operands, again)
    each_s = compute_s / chunks
    if _has_gradient(operands):  # half of the products are of the experts' own gradients, which nobody waits for
        products = [Work(DEVICE, each_s / 2), back[0], Work(DEVICE, each_s / 2, False), *back[1:]]
    else:
        products = [Work(DEVICE, each_s), *back]
    # each further chunk reads the experts anew, and in the backward adds its gradients of them to the others'
    experts = sum(sizes.num_bytes / axis.size for sizes in operands if sizes.of_experts)
    again_s = (chunks - 1) * mesh.memory_s((2.0 if _has_gradient(operands) else 0.5) * experts)
    counts_s = axis.collective_s("all_to_all", 8.0 * chunks * axis.size**2 * (2 if axis.hops else 1))
    return counts_s + in_turns_s([*there, *products], chunks) - compute_s + again_s


def came_bytes(mesh: Mesh, strategies: Sequence[Strategy], operands: Sequence[Sizes]) -> float:
    """Of the tokens that a rank's experts have from the others, on average. operands: of a forward."""
    found = dispatched(mesh, strategies)
    if found is None:
        return 0.0
    axis, parts = found
    copies = copies_of_token(operands[1].shape[1], axis.size, parts)
    return operands[0].num_bytes / mesh.shares(tuple(s.inputs[0] for s in strategies)) * copies


def _messages(
    mesh: Mesh, strategies: Sequence[Strategy], operands: Sequence[Sizes], again: bool
) -> tuple[list[Work], list[Work]]:
    """Of a chunk on its way to experts, and back: each packed or summed on the device, and sent."""
    axis, parts = dispatched(mesh, strategies)  # type: ignore[misc]
    at = 1 + _has_gradient(operands)
    shares = [s.inputs[at - 1] for s in strategies]
    others = mesh.shares(tuple(R if a is axis else p for a, p in zip(mesh.axes, shares, strict=True)))
    tokens, num_choices = operands[at].shape[0] / others / mesh.expert_chunks, operands[at].shape[1]
    bytes_there, bytes_back = row_bytes(operands, again=again)
    there: list[Work] = []
    back: list[Work] = []
    for k, (ranks, group, collective_s) in enumerate(axis.hops or ((axis.size, axis.size, axis.collective_s),)):
        # what a rank sends on is what came to it: as many rows as go to `ranks` of those where the tokens are
        sent = tokens * copies_of_token(num_choices, ranks, parts) * mesh.imbalance / (axis.size // group)
        memory_s = [mesh.memory_s(2 * sent * num_bytes / group) for num_bytes in (bytes_there, bytes_back)]
        message_s = [collective_s("all_to_all", sent * num_bytes) for num_bytes in (bytes_there, bytes_back)]
        link = DEVICE if mesh.on_cpu else f"hop {k}"  # messages of CPUs take what products do
        there += [Work(DEVICE, memory_s[0]), Work(link, message_s[0])]
        back[:0] = [Work(link, message_s[1]), Work(DEVICE, memory_s[1])]
    return there, back


def chunks_of_tokens(mesh: Mesh, ops: Iterable[tuple[fx.Node, Sequence[Strategy], int]]) -> int:
    """Of CHUNKS, that by which expert ops take least, where their tokens are sent. ops: with their strategies, and how
    often each runs."""
    listed = list(ops)

    def seconds(chunks: int) -> float:
        on = replace(mesh, expert_chunks=chunks)
        return sum(count * least_dispatch_s(on, node, strategies) for node, strategies, count in listed)

    return min(CHUNKS, key=seconds)
