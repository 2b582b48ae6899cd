"""Local rewrites that leave fewer and cheaper ops and the same numbers.

rule                  from                                             to
merge views           t(t(x)), reshape(reshape(x)), reshape to x's own  x, reshape(x), x
                      shape, the same view of a value twice
turn product          t(mm(a, b))                                       mm(t(b), t(a))
add into product      x + reshape(mm(a, b))                             reshape(addmm(x, a, b))
join slices           slice_backward(a) + slice_backward(b), side by    cat(a, b)
                      side and together the whole
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_VIEWS = (aten.t.default, aten.reshape.default, aten.transpose.int, aten.unsqueeze.default, aten.slice.Tensor,
          aten.expand.default, aten.permute.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int)  # fmt: skip
_END = 2**62  # slices to the end are written with a number as large


def tidy(graph: fx.Graph) -> None:
    """Rewrite in place; nodes have their local values in meta["val"]."""
    _merge_views(graph)
    for rule in (_turn_product, _join_slices, _add_into_product):
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                rule(graph, node)
        _merge_views(graph)
    graph.eliminate_dead_code()


def _merge_views(graph: fx.Graph) -> None:
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _VIEWS:
            continue
        source: Any = node.args[0]
        if node.target is aten.t.default and source.target is aten.t.default:
            replace(node, source.args[0])
            continue
        if node.target is aten.transpose.int and source.target is aten.transpose.int and _undoes(node, source):
            replace(node, source.args[0])
            continue
        while node.target is aten.reshape.default and source.target is aten.reshape.default:
            source = source.args[0]
            node.replace_input_with(node.args[0], source)  # type: ignore[arg-type]
        if node.target is aten.reshape.default and node.meta["val"].shape == source.meta["val"].shape:
            replace(node, source)
            continue
        key = (node.target, source, _frozen(node.args[1:]), _frozen(tuple(sorted(node.kwargs.items()))))
        if key in known:
            replace(node, known[key])
        else:
            known[key] = node
    graph.eliminate_dead_code()


def _undoes(outer: fx.Node, inner: fx.Node) -> bool:
    rank = outer.meta["val"].dim()
    dims = [{dim % rank for dim in node.args[1:3]} for node in (outer, inner)]  # type: ignore[operator]
    return dims[0] == dims[1]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _turn_product(graph: fx.Graph, node: fx.Node) -> None:
    product: Any = node.args[0] if node.target is aten.t.default else None
    if product is None or product.target is not aten.mm.default or len(product.users) > 1:
        return
    with graph.inserting_before(product):
        left, right = (call(graph, aten.t.default, n) for n in (product.args[1], product.args[0]))
        replace(node, call(graph, aten.mm.default, left, right))


def _add_into_product(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return
    pair: list[Any] = list(node.args)
    for x, term in (pair, pair[::-1]):
        product = _product_of(term)
        if product is None or not isinstance(x, fx.Node) or not _alike(node, x, term):
            continue
        with graph.inserting_before(node):
            flat = call(graph, aten.reshape.default, x, list(product.meta["val"].shape))
            total = call(graph, aten.addmm.default, flat, *product.args)
            replace(node, call(graph, aten.reshape.default, total, list(node.meta["val"].shape)))
        return


def _product_of(term: Any) -> fx.Node | None:
    """The matrix product that this value is, where nothing else reads it."""
    while isinstance(term, fx.Node) and len(term.users) == 1:
        if term.target is aten.mm.default:
            return term
        if term.target is not aten.reshape.default:
            return None
        term = term.args[0]
    return None


def _alike(node: fx.Node, *operands: fx.Node) -> bool:
    val = node.meta["val"]
    return all(n.meta["val"].shape == val.shape and n.meta["val"].dtype == val.dtype for n in operands)


def _join_slices(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return
    parts: list[tuple[int, int, Any]] = []
    for part in node.args:
        if not isinstance(part, fx.Node) or part.target is not aten.slice_backward.default or len(part.users) > 1:
            return
        grad, sizes, dim, start, end, step = part.args
        if step != 1 or dim != node.args[0].args[2] or start < 0 or end < 0:  # type: ignore[union-attr,operator]
            return
        parts.append((start, min(end, sizes[dim]), grad))  # type: ignore[index,type-var,arg-type]
    (first, middle, a), (start, last, b) = sorted(parts, key=lambda part: part[0])
    if first == 0 and middle == start and last == node.meta["val"].shape[dim]:
        with graph.inserting_before(node):
            replace(node, call(graph, aten.cat.default, [a, b], dim))


def call(graph: fx.Graph, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A node with its value, computed on the fake ones of its operands."""
    node = graph.call_function(op, args, kwargs)
    values, options = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with node.all_input_nodes[0].meta["val"].fake_mode:
        node.meta["val"] = op(*values, **options)
    return node


def replace(node: fx.Node, by: fx.Node) -> None:
    by.meta.setdefault("phase", node.meta.get("phase", "forward"))
    node.replace_all_uses_with(by)
