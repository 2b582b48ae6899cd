"""Residual addition and RMSNorm as one operator, in a captured forward graph.

    sum = x + residual
    y   = weight * (sum * rsqrt(mean(sum^2) + eps))

become (y, sum, rstd) = shardwright::add_rms_norm(x, residual, weight, eps, cast_first), or shardwright::rms_norm where
nothing is added before. The formula is found however it is spelled: with or without casts to float32 and back, the
weight before or after the cast back (Gemma and OLMo 2, Llama and T5), aten.rms_norm, aliases and copies in between. A
norm whose numbers the operator would not keep is left: one that works in less than float32, or in float32 on float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..kernels.generator import accumulate_dtype
from ..kernels.ops import add_rms_norm, rms_norm
from ..profiler.nodes import needed_for

aten = torch.ops.aten

# (floating-point operations, bytes of memory traffic saved) of one norm -> does the fused kernel win?
Wins = Callable[[int, int], bool]

_BOOKKEEPING = {aten._assert_tensor_metadata.default}
_COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
}
_ADDS = {aten.add.Tensor, aten.add.Scalar}
_OPERATIONS_PER_ELEMENT = 4  # square, sum, times rstd, times weight; the residual adds one


@dataclass(frozen=True)
class Norm:
    """One RMSNorm found: y = norm(x) * weight. inner: the nodes that serve nothing else, in graph order, y last."""

    x: fx.Node
    weight: fx.Node
    eps: float
    cast_first: bool
    inner: tuple[fx.Node, ...]

    @property
    def y(self) -> fx.Node:
        return self.inner[-1]


def fuse_add_rms_norm(graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, wins: Wins) -> fx.GraphModule:
    """A copy of the forward graph with every norm fused for which wins(flops, bytes_saved) says so.

    flops: what the fused forward does. bytes_saved: memory traffic, forward only, as if each node read its operands and
    wrote its result once. Nodes without meta["val"] get it by running the graph on fakes of example_inputs.
    """
    fused = fx.GraphModule(graph_module, _copy(graph_module.graph))
    graph = fused.graph
    if any(node.op == "call_function" and "val" not in node.meta for node in graph.nodes):
        FakeTensorProp(fused).propagate(*example_inputs)
    for root in _roots(graph):
        norm = _match(root)
        if norm is not None:
            _fuse(norm, wins)
    graph.eliminate_dead_code()
    graph.lint()
    fused.recompile()
    return fused


def find_norms(graph: fx.Graph) -> list[Norm]:
    """Every RMSNorm of a graph whose nodes carry meta["val"], in graph order."""
    return [norm for norm in map(_match, _roots(graph)) if norm is not None]


def _roots(graph: fx.Graph) -> list[fx.Node]:
    targets = {aten.rms_norm.default, aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.reciprocal.default}
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


# --------------------------------------------------------------------------- what a node is


def _copy(graph: fx.Graph) -> fx.Graph:
    """With its output and each node's own meta."""
    new = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    new.graph_copy(graph, environment)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    new.output(fx.node.map_arg(output.args[0], lambda node: environment[node])).meta = dict(output.meta)
    new._codegen = graph._codegen
    return new


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _is_copy(node: fx.Node) -> bool:
    """Gives its input's numbers in its input's shape and dtype."""
    if node.target not in _COPIES | _CASTS:
        return False
    before, after = _value(node.args[0]), _value(node)
    return before is not None and after is not None and (before.shape, before.dtype) == (after.shape, after.dtype)


def _is_cast(node: fx.Node) -> bool:
    before, after = (_value(node.args[0]), _value(node)) if node.target in _CASTS else (None, None)
    return before is not None and after is not None and before.shape == after.shape and before.is_floating_point()


def _source(node: fx.Node) -> fx.Node:
    """Where a value comes from, copies aside."""
    while _is_copy(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _unwidened(node: fx.Node) -> fx.Node:
    """The same value before it was cast to the accumulating dtype."""
    node = _source(node)
    if _is_cast(node):
        before = _source(node.args[0])  # type: ignore[arg-type]
        dtype = before.meta["val"].dtype
        if node.meta["val"].dtype == accumulate_dtype(dtype):
            return before
    return node


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in _BOOKKEEPING]


# --------------------------------------------------------------------------- matching


def _match(root: fx.Node) -> Norm | None:
    return _match_single(root) if root.target is aten.rms_norm.default else _match_formula(root)


def _match_single(node: fx.Node) -> Norm | None:
    """aten.rms_norm over the last dimension, with a weight and a stated eps."""
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if eps is None or len(shape) != 1 or _value(x) is None or _value(weight) is None:  # type: ignore[arg-type]
        return None
    if _value(weight).dtype != _value(x).dtype:  # type: ignore[union-attr]
        return None
    return Norm(x, weight, float(eps), False, (node,))  # type: ignore[arg-type]


def _match_formula(inverse_root: fx.Node) -> Norm | None:
    """Backward from 1 / sqrt(variance + eps) to x, then forward to the product with the weight."""
    statistics = _match_variance(_under_inverse_root(inverse_root))
    if statistics is None:
        return None
    x, eps = statistics
    value = x.meta["val"]
    wide = accumulate_dtype(value.dtype)
    if inverse_root.meta["val"].dtype != wide or inverse_root.meta["val"].shape != (*value.shape[:-1], 1):
        return None
    normed = _past_copies(inverse_root)
    if normed is None or normed.target is not aten.mul.Tensor or normed.meta["val"].dtype != wide:
        return None
    factors = [_source(factor) for factor in normed.args if isinstance(factor, fx.Node)]
    if inverse_root not in factors or x not in map(_unwidened, factors):
        return None
    tail = _match_weight(normed, value)
    if tail is None:
        return None
    weight, cast_first, y = tail
    inner = _between(x, weight, y)
    inside = set(inner)
    if any(user not in inside for node in inner[:-1] for user in _users(node)):
        return None
    return Norm(x, weight, eps, cast_first, inner)


def _between(x: fx.Node, weight: fx.Node, y: fx.Node) -> tuple[fx.Node, ...]:
    """What y is computed with, without copies and casts of x, which others may read."""
    return tuple(sorted(needed_for([y], lambda node: node is weight or _unwidened(node) is x)))


def _only_user(node: fx.Node) -> fx.Node | None:
    users = _users(node)
    return users[0] if len(users) == 1 else None


def _past_copies(node: fx.Node) -> fx.Node | None:
    """The one user of node that is not a copy."""
    user = _only_user(node)
    while user is not None and _is_copy(user):
        user = _only_user(user)
    return user


def _under_inverse_root(node: fx.Node) -> fx.Node | None:
    """v, where node is v ** -0.5."""
    base = node.args[0]
    if node.target is aten.pow.Tensor_Scalar and node.args[1] != -0.5:
        return None
    if node.target is aten.reciprocal.default:
        if not isinstance(base, fx.Node) or _source(base).target is not aten.sqrt.default:
            return None
        base = _source(base).args[0]
    return _source(base) if isinstance(base, fx.Node) else None


def _match_variance(node: fx.Node | None) -> tuple[fx.Node, float] | None:
    """(x, eps), where node is mean(x^2, last dimension) + eps."""
    if node is None or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None
    mean, eps = node.args
    if isinstance(mean, (int, float)):
        mean, eps = eps, mean
    if not isinstance(mean, fx.Node) or not isinstance(eps, (int, float)):
        return None
    mean = _source(mean)
    if mean.target is not aten.mean.dim or len(mean.args) != 3 or not mean.args[2] or mean.kwargs:
        return None
    base = _squared(_source(mean.args[0]))  # type: ignore[arg-type]
    if base is None or list(mean.args[1]) not in ([-1], [base.meta["val"].dim() - 1]):  # type: ignore[arg-type]
        return None
    return _unwidened(base), float(eps)


def _squared(node: fx.Node) -> fx.Node | None:
    """a, where node is a^2."""
    base = node.args[0] if node.args else None
    squares = (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)
        or (node.target is aten.mul.Tensor and node.args[0] is node.args[1])
    )
    return base if squares and isinstance(base, fx.Node) and _value(base) is not None else None


def _match_weight(normed: fx.Node, x: torch.Tensor) -> tuple[fx.Node, bool, fx.Node] | None:
    """(weight, cast_first, y), from the normalized value on."""
    node, weight = normed, None
    cast_first = normed.meta["val"].dtype == x.dtype
    while True:
        user = _only_user(node)
        value = _value(user)
        if user is None or value is None or value.shape != x.shape:
            return None
        if user.target is aten.mul.Tensor and weight is None:
            weight = next((factor for factor in user.args if factor is not node), None)
            scale = _value(weight)
            if scale is None or scale.shape != x.shape[-1:]:
                return None
            if cast_first:
                same = value.dtype == torch.promote_types(x.dtype, scale.dtype)
                return (weight, True, user) if same else None  # type: ignore[return-value]
        elif _is_cast(user) and not _is_copy(user) and value.dtype == x.dtype:
            if weight is not None:
                return weight, False, user  # type: ignore[return-value]
            cast_first = True
        elif not _is_copy(user):
            return None
        node = user


# --------------------------------------------------------------------------- rewriting


def _fuse(norm: Norm, wins: Wins) -> None:
    addition = _addition(norm)
    x = norm.x.meta["val"]
    flops = x.numel() * (_OPERATIONS_PER_ELEMENT + (addition is not None))
    before = sum(_traffic(node) for node in norm.inner) + (_traffic(addition) if addition is not None else 0)
    streams = 3 if addition is not None else 1  # x, residual and sum, or x alone
    rstd_bytes = x.numel() // x.shape[-1] * accumulate_dtype(x.dtype).itemsize
    after = streams * _num_bytes(norm.x) + _num_bytes(norm.weight) + _num_bytes(norm.y) + rstd_bytes
    if not wins(int(flops), int(before - after)):
        return
    options = (norm.weight, norm.eps, norm.cast_first)
    if addition is None:
        results = _emit(norm.y, rms_norm, (norm.x, *options), norm.y)
    else:
        for node in _made_after(norm.weight, addition):
            addition.prepend(node)
        results = _emit(addition, add_rms_norm, (*addition.args, *options), addition)
    norm.y.replace_all_uses_with(results[0])
    for node in reversed(norm.inner):
        _erase_idle_users(node)
        node.graph.erase_node(node)
    if addition is not None:
        _erase_idle_users(addition)
        addition.replace_all_uses_with(results[1])
        addition.graph.erase_node(addition)


def _erase_idle_users(node: fx.Node) -> None:
    """Bookkeeping, and copies and casts that nobody reads any more."""
    for user in list(node.users):
        if _is_copy(user) or _is_cast(user):
            _erase_idle_users(user)
        if not user.users and (user.target in _BOOKKEEPING or _is_copy(user) or _is_cast(user)):
            node.graph.erase_node(user)


def _addition(norm: Norm) -> fx.Node | None:
    """The residual addition that gives x, if the weight can be had before it."""
    node = _source(norm.x)
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    total, *terms = (_value(n) for n in (node, *node.args))
    if any(term is None or (term.shape, term.dtype) != (total.shape, total.dtype) for term in terms):  # type: ignore[union-attr]
        return None
    return node if node not in _made_after(norm.weight, node) else None


def _made_after(weight: fx.Node, addition: fx.Node) -> list[fx.Node]:
    """What must move before the addition for the weight to stand there, in order; the addition itself if it cannot."""
    return sorted(needed_for([weight], lambda node: not addition <= node))


def _emit(place: fx.Node, op: torch._ops.OpOverload, args: tuple[Any, ...], like: fx.Node) -> list[fx.Node]:
    """The call and its results, after place, with the source and module of `like`."""
    graph = place.graph
    with graph.inserting_after(place):
        call = graph.call_function(op, args)
    call.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    call.meta["val"] = op(*fx.node.map_arg(args, lambda node: node.meta["val"]))
    results: list[fx.Node] = []
    for i, value in enumerate(call.meta["val"]):
        with graph.inserting_after(results[-1] if results else call):
            results.append(graph.call_function(operator.getitem, (call, i)))
        results[-1].meta = {**call.meta, "val": value}
    return results


def _num_bytes(node: fx.Node) -> int:
    value = _value(node)
    return 0 if value is None else value.numel() * value.element_size()


def _traffic(node: fx.Node) -> int:
    """Bytes read and written by a node on its own; copies that are views cost nothing."""
    if _is_copy(node) and node.target is not aten.clone.default:
        return 0
    return _num_bytes(node) + sum(_num_bytes(operand) for operand in node.all_input_nodes)
