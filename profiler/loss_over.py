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
from .nodes import named_arguments, value

Kind = tuple[str, int] | None
_LINEAR = {"neg", "_to_copy", "to", "view", "reshape", "squeeze", "unsqueeze", "select", "slice", "expand", "clone",
           "alias", "permute", "transpose", "t", "contiguous", "stack", "cat", "detach", "sum", "mean", "index_select",
           "flatten", "unbind", "broadcast_tensors", "diagonal", "lift_fresh_copy", "type_as"}  # fmt: skip
_CONTRACTIONS = {"mm", "bmm", "matmul", "addmm", "einsum", "dot", "mv", "linear", "baddbmm", "vdot", "inner"}
_ADDING = {*_CONTRACTIONS, "index_add", "scatter_add", "bincount", "sum", "count_nonzero"}
# ops that mix, or place by number, what stands along their dimension
_ALONG = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
          "sort", "argsort", "msort", "topk", "kthvalue", "flip", "roll", "gather", "take_along_dim", "scatter",
          "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_select", "index_reduce",
          "slice_scatter", "select_scatter", "renorm"}  # fmt: skip
_INDEXED = {"index", "index_put", "_unsafe_index", "_unsafe_index_put", "_index_put_impl"}
_PASSED_ON = {"view", "reshape", "unsqueeze", "expand", "expand_as", "_to_copy", "to", "clone", "alias", "flatten"}


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
        name = op_name(node)
        if name in _INDEXED:
            return self._mixes_by_index(node)
        if name not in _ALONG:
            return False
        given, shape = named_arguments(node), value(node.all_input_nodes[0]).shape
        if name == "slice_scatter" and _is_whole(given, shape):
            return False
        dims = given.get("dim", given.get("dims", 0))
        if dims in (None, [], ()):
            return True  # of all elements in a row
        return any(self._is_batch(shape[d]) for d in (dims if isinstance(dims, (list, tuple)) else [dims]))

    def _mixes_by_index(self, node: fx.Node) -> bool:
        """Samples picked or written by number; not each its own (x[arange(n), last]) or by a mask of samples."""
        tensor, indices = node.args[:2]
        dim, shape = 0, value(tensor).shape
        for index in indices:  # type: ignore[union-attr]
            covered = value(index).dim() if isinstance(index, fx.Node) and value(index).dtype == torch.bool else 1
            by_number = isinstance(index, fx.Node) and value(index).dtype != torch.bool
            if by_number and self._is_batch(shape[dim]) and not _is_each_its_own(index, shape[dim]):
                return True
            dim += covered
        return False

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


def _is_whole(given: dict[str, Any], shape: torch.Size) -> bool:
    start, end, step = given.get("start") or 0, given.get("end"), given.get("step", 1)
    return start == 0 and step == 1 and (end is None or end >= shape[given.get("dim", 0)])


def _is_each_its_own(index: Any, size: int) -> bool:
    """Is it 0, 1, ... size - 1?"""
    while index.op == "call_function" and op_name(index) in _PASSED_ON:
        index = index.args[0]
    given = named_arguments(index) if index.op == "call_function" and op_name(index) == "arange" else {"start": None}
    return given.get("start", 0) == 0 and given.get("step", 1) == 1 and given.get("end") == size
