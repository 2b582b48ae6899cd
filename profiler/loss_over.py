"""What a loss is of the batch: a mean over its samples, a sum over them, or neither.

Of a captured graph whose batch has a size that no other dimension is a multiple of. Each node is of a kind,

    "fixed"    the same for every microbatch (parameters, shared entries, sizes)
    "rows"     has a dimension of samples, each depending on its own sample
    "added"    a sum over samples of rows

with a degree: the power of the batch's size that it grows with. A sum over samples of rows of degree 0 is "added" of
degree 1, their mean of degree 0. Everything else (a maximum, a product of two means, what mixes samples) is of no kind.
A loss that is added, of degree 1 or 0, is over microbatches what it is over the batch, as a sum or a mean. Statistics
of batch norm count as fixed: they are those of a microbatch by what batch norm is.

The gradients of all that torch differentiates are then added too, but what a user's own backward makes of them need not
be (a gradient divided by its norm, or by the batch's size). So the backward of a recorded call, a Function's or a
hook's, is judged likewise: given gradients of the kinds that belong to its results, it must give those that belong to
its arguments. Where it does not, the loss is that of each microbatch, as its gradient is.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from .autograd_functions import OP, replayed_of
from .global_loss import SHARE, op_name, reduction_of
from .graph import LossOver
from .nodes import named_arguments, value
from .replay import Graphs, Replayed

Kind = tuple[str, int] | None


class _Judged(NamedTuple):
    kind: Kind
    val: Any


_ABSENT = ("absent", 0)  # of a gradient that a backward does not give
_LINEAR = {"neg", "_to_copy", "to", "view", "reshape", "squeeze", "unsqueeze", "select", "slice", "expand", "clone",
           "alias", "permute", "transpose", "t", "contiguous", "stack", "cat", "detach", "sum", "mean", "index_select",
           "flatten", "unbind", "slice_copy", "select_copy", "broadcast_tensors", "diagonal", "lift_fresh_copy",
           "type_as"}  # fmt: skip
_CONTRACTIONS = {"mm", "bmm", "matmul", "addmm", "einsum", "dot", "mv", "linear", "baddbmm", "vdot", "inner"}
_ADDING = {*_CONTRACTIONS, "index_add", "scatter_add", "bincount", "sum", "count_nonzero"}
# ops that mix, or place by number, what stands along their dimension
_ALONG = {"softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp",
          "sort", "argsort", "msort", "topk", "kthvalue", "flip", "roll", "gather", "take_along_dim", "scatter",
          "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_select", "index_reduce",
          "slice_scatter", "select_scatter", "renorm"}  # fmt: skip
_INDEXED = {"index", "index_put", "_unsafe_index", "_unsafe_index_put", "_index_put_impl"}
# backwards whose results without samples are gradients of parameters, summed over samples
_OF_PARAMETERS = {"native_layer_norm_backward", "native_group_norm_backward", "convolution_backward",
                  "embedding_dense_backward", "_fused_rms_norm_backward"}  # fmt: skip
# of values and of where they come from or go to: linear in the values, with zeros in the other places
_PLACING = {*_LINEAR, "slice_scatter", "select_scatter", "index_put", "_unsafe_index_put", "index", "_unsafe_index",
            "masked_fill", "where", "index_fill", "index_copy", "index_add", "scatter", "scatter_add", "gather", "tril",
            "triu", "flip", "roll", "cumsum", "constant_pad_nd", "copy", "fill"}  # fmt: skip
_ZEROS = {"zeros", "zeros_like", "new_zeros", "zero"}
_PASSED_ON = {"view", "reshape", "unsqueeze", "expand", "expand_as", "_to_copy", "to", "clone", "alias", "flatten"}


def loss_over(graph: fx.Graph, loss: fx.Node, batch_size: int, totals: dict[str, str]) -> LossOver:
    """totals: name of a placeholder -> entry, of those that separate_totals() put in."""
    judge = _Judge(batch_size, totals)
    for node in graph.nodes:
        if node.op != "output":
            judge.kinds[node] = judge.kind(node)
    found = judge.kinds[loss]
    if judge.is_of_each:
        return "each"
    if found is not None and found[1] == 0 and found[0] != "rows":
        return "mean"
    return "sum" if found == ("added", 1) else "each"


class _Judge:
    def __init__(self, batch_size: int, totals: dict[str, str]) -> None:
        self.size, self.totals = batch_size, totals
        self.kinds: dict[fx.Node, Kind] = {}
        self.results: dict[fx.Node, list[Kind]] = {}  # of recorded calls
        self.is_of_each = False

    def kind(self, node: fx.Node) -> Kind:
        if node.op != "call_function":
            if self.totals.get(node.name) == SHARE:
                return "fixed", 1
            return ("rows" if self._rows(node) else "fixed"), 0
        if node.meta.get("statistics"):
            return "fixed", 0
        if node.target is torch.ops.shardwright.assumed.default:  # its first argument, on a condition
            return self.kinds[node.all_input_nodes[0]]
        if node.target is OP:
            return self._call(node, replayed_of(node))
        if node.target is operator.getitem and node.args[0] in self.results:
            return self.results[node.args[0]][node.args[1]]  # type: ignore[index, union-attr]
        if op_name(node) == "embedding" and len(node.args) > 3 and node.args[3]:
            self.is_of_each = True  # its gradient is divided by how often the batch has a word
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

    def _call(self, node: fx.Node, replayed: Replayed) -> Kind:
        """The kinds of its results; is_of_each is set where its backward gives a microbatch's own gradients."""
        tensors: Any = node.args[0]
        given = [_Judged(self.kinds[tensor], value(tensor)) for tensor in tensors]
        results = self._run(replayed.graphs.forward, given)[: replayed.num_results + len(replayed.written)]
        self.results[node] = [result.kind for result in results]
        for pattern, graphs in ((None, replayed.graphs), *replayed.partial.items()):
            if not self._gives_added(replayed, graphs, pattern, given):
                self.is_of_each = True
        return next(iter(self.results[node]), None)

    def _gives_added(
        self, replayed: Replayed, graphs: Graphs, pattern: tuple[bool, ...] | None, given: list[_Judged]
    ) -> bool:
        if graphs.backward is None:
            return True
        results = self._run(graphs.forward, given)
        taken = [result for result, takes in zip(results, replayed.differentiable, strict=False) if takes]
        if pattern is not None:
            taken = [result for result, is_given in zip(taken, pattern, strict=True) if is_given]
        saved = results[replayed.num_results + len(replayed.written) :]
        gradients = [_Judged(_gradient_kind(result.kind), result.val) for result in taken]
        found = self._run(graphs.backward, [*saved, *gradients])
        wanted = [tensor for tensor, takes in zip(given, replayed.wanted, strict=True) if takes]
        return all(
            gradient.kind == _ABSENT or (gradient.kind is not None and gradient.kind == _gradient_kind(tensor.kind))
            for gradient, tensor in zip(found, wanted, strict=True)
        )

    def _run(self, module: fx.GraphModule, given: list[_Judged]) -> list[_Judged]:
        """Of what a graph returns. Its nodes have the values of this call, as one graph may serve several."""
        inner, arguments = _Judge(self.size, {}), iter(given)
        with next(judged.val for judged in given).fake_mode:
            for node in module.graph.nodes:
                if node.op == "output":
                    return [_Judged(inner.kinds.get(r, _ABSENT), value(r)) for r in node.args[0]]
                if node.op == "placeholder":
                    inner.kinds[node], node.meta["val"] = next(arguments)
                    continue
                operands, keywords = fx.node.map_arg((node.args, node.kwargs), value)
                node.meta["val"] = node.target(*operands, **keywords)
                inner.kinds[node] = inner.kind(node)
        raise AssertionError("a graph without an output")

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
        made_by = node.args[0] if node.target is operator.getitem else node
        if isinstance(made_by, fx.Node) and op_name(made_by) in _OF_PARAMETERS:
            return "added", degree + 1
        return ("added", degree + 1) if op_name(node) in _ADDING else None

    def _of_numbers(self, node: fx.Node, given: list[tuple[str, int]]) -> Kind:
        name, kinds = op_name(node), set(given)
        if name in ("add", "sub"):
            kinds |= {("fixed", 0) for a in node.args[:2] if not isinstance(a, fx.Node) and a != 0}
        elif kinds == {("fixed", 0)}:
            return "fixed", 0
        elif name in _CONTRACTIONS:
            return self._contracted(node)
        elif name in _PLACING:
            return self._placed(node)
        elif node.target is not operator.getitem:
            return self._inverse(name, kinds)
        if len(kinds) == 1:
            return kinds.pop()
        return ("added", 0) if kinds == {("added", 0), ("fixed", 0)} else None

    def _contracted(self, node: fx.Node) -> Kind:
        """Of a sum over samples and what is fixed: linear in the sum."""
        kinds = [self.kinds[n] for n in node.all_input_nodes]
        added = [kind for kind in kinds if kind != ("fixed", 0)]
        is_product = len(kinds) == 2 and len(added) == 1
        return added[0] if is_product and added[0] is not None and added[0][0] == "added" else None

    def _placed(self, node: fx.Node) -> Kind:
        """Values beside zeros, by fixed places."""
        values: list[fx.Node] = []
        places: list[fx.Node] = []
        for operand in node.all_input_nodes:
            dtype = value(operand).dtype
            (values if dtype.is_floating_point or dtype.is_complex else places).append(operand)
        kinds = {self.kinds[operand] for operand in values if not _is_zero(operand)}
        filled = [named_arguments(node).get(name) for name in ("value", "fill_value", "self", "other")]
        is_fixed = all(self.kinds[operand] == ("fixed", 0) for operand in places)
        beside_zeros = not any(isinstance(number, (int, float)) and number for number in filled)
        return kinds.pop() if len(kinds) == 1 and is_fixed and beside_zeros else None

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


def _gradient_kind(of: Kind) -> Kind:
    """Of the gradient of a loss of the batch, by a value of a kind: what is the same in it for each microbatch."""
    if of is None:
        return None
    kind, degree = of
    return {"rows": ("rows", -degree), "fixed": ("added", 1 - degree), "added": ("fixed", 1 - degree)}[kind]


def _is_zero(node: fx.Node) -> bool:
    while op_name(node) in _PASSED_ON and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if op_name(node) not in ("full", "full_like", "new_full", "fill", "scalar_tensor"):
        return op_name(node) in _ZEROS
    filled = node.args[0 if op_name(node) == "scalar_tensor" else 1]
    return _is_zero(filled) if isinstance(filled, fx.Node) else bool(filled == 0)


def _is_whole(given: dict[str, Any], shape: torch.Size) -> bool:
    start, end, step = given.get("start") or 0, given.get("end"), given.get("step", 1)
    return start == 0 and step == 1 and (end is None or end >= shape[given.get("dim", 0)])


def _is_each_its_own(index: Any, size: int) -> bool:
    """Is it 0, 1, ... size - 1?"""
    while index.op == "call_function" and op_name(index) in _PASSED_ON:
        index = index.args[0]
    given = named_arguments(index) if index.op == "call_function" and op_name(index) == "arange" else {"start": None}
    return given.get("start", 0) == 0 and given.get("step", 1) == 1 and given.get("end") == size
