"""What a loss is of the batch: a mean over its samples, a sum over them, or neither.

Of a captured graph whose batch has a size that no other dimension is a multiple of. Each node is of a kind,

    "fixed"    the same for every microbatch (parameters, shared entries, sizes)
    "rows"     has a dimension of samples, each depending on its own sample
    "added"    a sum over samples of rows

with a degree: the power of the batch's size that it grows with. A sum over samples of rows of degree 0 is "added" of
degree 1, their mean of degree 0. Everything else (a maximum, a product of two means, what mixes samples) is of no kind.
A loss that is added, of degree 1 or 0, is over microbatches what it is over the batch, as a sum or a mean. Statistics
of batch norm count as fixed: they are those of a microbatch by what batch norm is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .global_loss import SHARE, op_name, reduction_of
from .graph import LossOver
from .nodes import value

Kind = tuple[str, int] | None
_LINEAR = {"neg", "_to_copy", "to", "view", "reshape", "squeeze", "unsqueeze", "select", "slice", "expand", "clone",
           "alias", "permute", "transpose", "t", "contiguous", "stack", "cat", "detach", "sum", "mean", "index_select",
           "flatten", "unbind", "broadcast_tensors", "diagonal", "lift_fresh_copy", "type_as"}  # fmt: skip
_CONTRACTIONS = {"mm", "bmm", "matmul", "addmm", "einsum", "dot", "mv", "linear", "baddbmm", "vdot", "inner"}
_ADDING = {*_CONTRACTIONS, "index_add", "scatter_add", "bincount", "sum", "count_nonzero"}
# dimension argument's position: ops that mix what stands along it
_ALONG = {"softmax": 1, "log_softmax": 1, "cumsum": 1, "cumprod": 1, "sort": 1, "argsort": 1, "topk": 2, "flip": 1,
          "roll": 2, "logcumsumexp": 1, "_softmax": 1, "_log_softmax": 1}  # fmt: skip


def loss_over(graph: fx.Graph, loss: fx.Node, batch_size: int, totals: dict[str, str]) -> LossOver:
    """totals: name of a placeholder -> entry, of those that separate_totals() put in."""
    judge = _Judge(batch_size, totals)
    for node in graph.nodes:
        if node.op != "output":
            judge.kinds[node] = judge.kind(node)
    found = judge.kinds[loss]
    if found is not None and found[1] == 0 and found[0] != "rows":
        return "mean"
    return "sum" if found == ("added", 1) else "each"


class _Judge:
    def __init__(self, batch_size: int, totals: dict[str, str]) -> None:
        self.size, self.totals = batch_size, totals
        self.kinds: dict[fx.Node, Kind] = {}

    def kind(self, node: fx.Node) -> Kind:
        if node.op != "call_function":
            if self.totals.get(node.name) == SHARE:
                return "fixed", 1
            return ("rows" if self._rows(node) else "fixed"), 0
        if node.meta.get("statistics"):
            return "fixed", 0
        if node.target is torch.ops.shardwright.assumed.default:  # its first argument, on a condition
            return self.kinds[node.all_input_nodes[0]]
        operands = [self.kinds[n] for n in node.all_input_nodes]
        if not operands:
            return ("rows", 0) if self._rows(node) else self._made(node)
        if any(kind is None for kind in operands):
            return None
        given: list[tuple[str, int]] = [kind for kind in operands if kind is not None]
        if op_name(node) in ("mul", "div"):
            return self._product(node)
        if self._rows(node):
            return self._of_rows(node, given)
        if any(kind == "rows" for kind, _ in given):
            return self._reduced(node, given)
        return self._of_numbers(node, given)

    def _made(self, node: fx.Node) -> Kind:
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        return "fixed", (self._degree(numbers[0]) if numbers and op_name(node) in ("full", "scalar_tensor") else 0)

    def _rows(self, node: Any) -> int:
        """How many dimensions carry the batch: of a tuple, the most of any."""
        val = value(node)
        tensors = val if isinstance(val, (tuple, list)) else [val]
        return max((sum(map(self._is_batch, t.shape)) for t in tensors if isinstance(t, torch.Tensor)), default=0)

    def _is_batch(self, size: Any) -> bool:
        return isinstance(size, int) and size != 0 and size % self.size == 0

    def _of_rows(self, node: fx.Node, given: list[tuple[str, int]]) -> Kind:
        more = self._rows(node) > max(map(self._rows, node.all_input_nodes)) >= 1
        if more or any(kind == "added" for kind, _ in given) or self._mixes(node):
            return None
        degrees = {degree for _, degree in given}
        if degrees == {0}:
            return "rows", 0
        linear = op_name(node) in (*_LINEAR, "add", "sub") or node.target is operator.getitem
        return ("rows", degrees.pop()) if linear and len(degrees) == 1 else None

    def _mixes(self, node: fx.Node) -> bool:
        position = _ALONG.get(op_name(node))
        if position is None or len(node.args) <= position:
            return False
        dims: Any = node.args[position]
        shape = value(node.args[0]).shape
        return any(self._is_batch(shape[d]) for d in (dims if isinstance(dims, (list, tuple)) else [dims]))

    def _reduced(self, node: fx.Node, given: list[tuple[str, int]]) -> Kind:
        """Rows in, none out."""
        degrees = {degree for kind, degree in given if kind == "rows"}
        if any(kind == "added" for kind, _ in given) or len(degrees) > 1 or (degrees != {0} and len(given) > 1):
            return None
        degree, reduction = degrees.pop(), reduction_of(node)
        if reduction is not None:
            return ("added", degree + (reduction == 2)) if reduction and degree == 0 else None
        if op_name(node) == "mean":
            return "added", degree
        return ("added", degree + 1) if op_name(node) in _ADDING else None

    def _of_numbers(self, node: fx.Node, given: list[tuple[str, int]]) -> Kind:
        name, kinds = op_name(node), set(given)
        if name in ("add", "sub"):
            kinds |= {("fixed", 0) for a in node.args[:2] if not isinstance(a, fx.Node) and a != 0}
        elif node.target is not operator.getitem and name not in _LINEAR:
            return ("fixed", 0) if kinds == {("fixed", 0)} else self._inverse(name, kinds)
        if len(kinds) == 1:
            return kinds.pop()
        return ("added", 0) if kinds == {("added", 0), ("fixed", 0)} else None

    def _inverse(self, name: str, kinds: set[tuple[str, int]]) -> Kind:
        if name == "reciprocal" and len(kinds) == 1 and next(iter(kinds))[0] == "fixed":
            return "fixed", -next(iter(kinds))[1]
        return None

    def _product(self, node: fx.Node) -> Kind:
        factors = [self.kinds[a] if isinstance(a, fx.Node) else ("fixed", self._degree(a)) for a in node.args[:2]]
        (first, degree), (second, other) = factors[0] or ("", 0), factors[1] or ("", 0)
        divides = op_name(node) == "div"
        degree = degree - other if divides else degree + other
        if second == "fixed":
            return first, degree
        if divides:
            return ("rows", 0) if second == "rows" and first in ("rows", "fixed") and degree == other == 0 else None
        if first == "fixed" or (first == second == "rows"):
            return second, degree
        return None

    def _degree(self, number: Any) -> int:
        """Sizes are written into the graph as numbers: a multiple of the batch's, or one over it."""
        if isinstance(number, (int, float)) and number:
            if number % self.size == 0:
                return 1
            inverse = 1 / number / self.size
            if abs(inverse) >= 0.5 and abs(inverse - round(inverse)) < 1e-9:
                return -1
        return 0
