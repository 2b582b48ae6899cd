"""The joint forward+backward graph of one segment, traced once with fake tensors.

Its placeholders and results are the slots of slots.py; a result is None where there is no gradient. Every node carries
meta['val'] (a fake tensor), meta['phase'] ('forward' or 'backward'), and for forward nodes the user's stack trace.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .autograd_functions import InterpretOpaquely, see_through
from .decompositions import DECOMPOSITIONS
from .failing_gradient import without_gradient
from .fold import RANDOM_INDEX_ARG, Piece
from .functional import copy, without_writes, writes_or_restrides
from .graph import Segment
from .nodes import value
from .random_ops import refuse_random
from .slots import BUFFER, INPUT, KEY, LASTING, PARAM, TANGENT, JointSignature, kind_of, slot_name, slot_names
from .work import is_view

aten = torch.ops.aten


def forward_module(
    piece: Piece, mutated: Sequence[fx.Node], key: fx.Node
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The piece as a module of its own: params, buffers, inputs, key -> outputs, new values of written buffers.

    Device arguments are set to the CPU: the graph is device-free until it is built for one.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for kind, nodes in ((PARAM, piece.params), (BUFFER, piece.buffers), (INPUT, piece.inputs), (KEY, [key])):
        for i, node in enumerate(nodes):
            env[node] = graph.placeholder(slot_name(kind, i) if kind != KEY else KEY)
            env[node].meta["val"] = value(node)
    for node in piece.nodes:
        new = graph.node_copy(node, lambda n: env[n])
        if "device" in new.kwargs:
            new.kwargs = {**new.kwargs, "device": torch.device("cpu")}
        new.args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in new.args)
        if node.meta.get("random"):
            position = RANDOM_INDEX_ARG[node.target._schema.name.split("::")[1]]  # type: ignore[union-attr]
            new.args = (*new.args[:position], piece.random_index(node), *new.args[position + 1 :])
        env[node] = new
    graph.output(tuple(env[n] for n in [*piece.outputs, *mutated]))
    return fx.GraphModule(torch.nn.Module(), graph), piece.outputs, list(mutated)


def fake_like(node_value: Any, mode: FakeTensorMode) -> Any:
    """A fake CPU tensor with the shape, strides and dtype of a traced value."""
    if not isinstance(node_value, torch.Tensor):
        return node_value
    with mode:
        return torch.empty_strided(node_value.shape, node_value.stride(), dtype=node_value.dtype, device="cpu")


def trace_joint(
    forward: fx.GraphModule, signature: JointSignature, arguments: Sequence[Any], outputs: Sequence[Any]
) -> fx.GraphModule:
    """arguments: fake tensors of the signature's arguments; outputs: likewise, of what the forward returns of them."""
    num_arguments = len(signature.arguments)
    boundary: list[str] = []

    def joint(*flat: Any) -> tuple[Any, ...]:
        leaves, tangents = list(flat[:num_arguments]), list(flat[num_arguments:])
        wrt = []
        for position, wanted in signature.differentiated:
            if wanted:
                leaves[position] = leaves[position].detach().requires_grad_()
                wrt.append(leaves[position])
        with torch.enable_grad():
            with fx.traceback.preserve_node_meta():
                results = fx.Interpreter(forward).run(*leaves)
            outs = signature.of_outputs(results)
            updates = list(results[len(outs) :])
        boundary.append(_torch.last_traced_node_name())
        taking = zip((outs[k] for k in signature.tangents), tangents, strict=True)
        pairs = [(out, tangent) for out, tangent in taking if out.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wrt, [t for _, t in pairs], allow_unused=True)
            if wrt and pairs
            else [None] * len(wrt)
        )
        grads = [next(found) if wanted else None for _, wanted in signature.differentiated]
        return (*[o.detach() if isinstance(o, torch.Tensor) else o for o in outs],
                *[u.detach() for u in updates], *grads)  # fmt: skip

    mode = next((t.fake_mode for t in arguments if isinstance(t, FakeTensor)), None)
    tangents = [fake_like(outputs[k], mode) for k in signature.tangents] if mode else []
    flat_args = [*arguments, *tangents]
    with mode if mode is not None else _torch.null_context():
        if _mutates(forward):
            forward = _functional(forward, arguments)
        try:
            traced = make_fx(joint, decomposition_table=DECOMPOSITIONS, tracing_mode="real")(*flat_args)
            if writes_or_restrides(traced.graph):
                traced, boundary = without_writes(traced, flat_args, boundary[0])
        except (RuntimeError, NotImplementedError) as error:
            raise without_gradient(forward, arguments, error) or error from None
    _refuse_lost_writes(traced)
    refuse_random(traced.graph)
    _name_placeholders(traced, signature, boundary[0])
    _clean(traced)
    _view_again(traced)
    return traced


def retrace(segment: Segment, forward: fx.GraphModule) -> Segment:
    """The segment with another forward of the same signature: what a pass over forward graphs leaves behind."""
    placeholders = {node.name: node for node in segment.joint.graph.nodes if node.op == "placeholder"}
    arguments = [value(placeholders[name]) for name in segment.signature.arguments]
    outputs = segment.signature.of_outputs(flatten_outputs(segment.joint.graph))
    joint = trace_joint(forward, segment.signature, arguments, [value(n) for n in outputs])
    return dataclasses.replace(segment, forward=forward, joint=joint)


def _mutates(forward: fx.GraphModule) -> bool:
    return any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in forward.graph.nodes)


def _refuse_lost_writes(traced: fx.GraphModule) -> None:
    """Some of autograd's own formulas write to memory that is read under another name (that of as_strided does); a
    graph does not show who reads it."""
    for node in traced.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and not node.users:
            raise ShardwrightError(
                f"a gradient writes in place ({target}), and nothing shows who reads it",
                means="the graph of the gradient would not be that of the model, so it is not planned",
                change="the op whose gradient this is, mostly one that changes strides (as_strided)",
                works="reshape, expand or indexing in its place",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )


def _functional(forward: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """Writes into views (x[:, 0] = y) as scatters: one more trace, only where such writes exist."""
    run = torch.func.functionalize(InterpretOpaquely(forward).run, remove="mutations")
    with torch.no_grad():
        found = make_fx(run, decomposition_table={aten.copy.default: copy}, tracing_mode="real")(*args)
    see_through(found)
    return found


def _name_placeholders(traced: fx.GraphModule, signature: JointSignature, last: str) -> None:
    names = [*signature.arguments, *slot_names(TANGENT, len(signature.tangents))]
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    phase = "forward"
    for node in traced.graph.nodes:
        node.meta["phase"] = "forward" if node.op == "placeholder" else phase
        if node.name == last:
            phase = "backward"
    for node, name in zip(placeholders, names, strict=True):
        node.meta["phase"] = "backward" if kind_of(name) == TANGENT else "forward"
        node._rename(name)
        node.target = name


def _clean(traced: fx.GraphModule) -> None:
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    traced.recompile()


def _view_again(traced: fx.GraphModule) -> None:
    """The backward makes its own views of what the forward left, so that what is kept is always an op's result and may
    be kept in another placement than the forward's readers need. Views of parameters and buffers stay: nothing is kept.
    """
    graph = traced.graph
    again: dict[fx.Node, fx.Node] = {}

    def viewed(node: fx.Node) -> bool:
        if node.op != "call_function" or node.meta.get("phase") != "forward" or not is_view(node):
            return False
        root = node
        while root.op == "call_function" and not is_getitem(root) and is_view(root):
            root = root.args[0]  # type: ignore[assignment]
        return not (root.op == "placeholder" and kind_of(root.name) in LASTING)

    def remake(node: fx.Node, before: fx.Node) -> fx.Node:
        if not viewed(node):
            return node
        if node not in again:
            source = remake(node.args[0], before)  # type: ignore[arg-type]
            with graph.inserting_before(before):
                new = graph.call_function(node.target, (source, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
            new.meta = {**node.meta, "phase": "backward"}
            again[node] = new
        return again[node]

    for node in list(graph.nodes):
        if node.op == "call_function" and node.meta.get("phase") == "backward":
            for operand in node.all_input_nodes:
                if viewed(operand):
                    node.replace_input_with(operand, remake(operand, node))
    graph.eliminate_dead_code()
    traced.recompile()


def flatten_outputs(graph: fx.Graph) -> list[Any]:
    return list(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
