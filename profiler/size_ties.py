"""Sizes that a model takes for one, though its trace keeps a symbol for each.

Most ops want equal sizes, and a trace with symbols makes one of them. Some take less than they mean: gather lets its
index be shorter than what it reads, CTC does not look at how many lengths it is given, and what a sort of one entry
orders may be another (`hidden[lengths.argsort()]`). The pairs found here are of dimensions that go through such an op
position by position, and of positions among n elements that index n others. Two entries that all samples share may be
tied like that as well (keys, and the values that are looked up by the best key): a tie says that two sizes are one, not
that samples are counted by it. CTC's are: its lengths are of samples, whatever else the model does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

Pair = tuple[str, str]

_ALIGNED = ("gather", "scatter", "scatter_add", "scatter_reduce")  # (x, dim, index, source, ...)
_BY_INDEX = ("index_select", "index_add", "index_copy", "index_fill")  # (x, dim, index, source, ...)
_COUNT_SAMPLES = ("ctc_loss", "_ctc_loss")
_SECOND_IS_POSITIONS = ("sort", "topk", "max", "min", "kthvalue", "median", "mode", "cummax", "cummin")
_ARE_POSITIONS = ("argsort", "argmax", "argmin")
_KEEP_VALUES = {
    "to", "_to_copy", "clone", "contiguous", "detach", "alias", "view", "reshape", "flatten", "unflatten", "slice",
    "select", "unsqueeze", "squeeze", "expand", "repeat", "flip", "roll", "permute", "transpose", "t", "index_select",
    "index", "gather", "lift_fresh_copy",
}  # fmt: skip


def tied_sizes(graph: fx.Graph, of_samples: bool = False) -> list[Pair]:
    """Pairs of symbols, by name; of_samples: those alone whose op takes both for the number of samples."""
    names = _COUNT_SAMPLES if of_samples else None
    return [(a, b) for a, b in _pairs(graph, names) if not a.isdigit() and not b.isdigit()]


def takes_for_one(graph: fx.Graph, size: int, other: int) -> bool:
    """Of a trace without symbols: is anything that is `size` long taken for as long as what is `other` long?"""
    return any({a, b} == {str(size), str(other)} for a, b in _pairs(graph))


def _pairs(graph: fx.Graph, names: Collection[str] | None = None) -> list[Pair]:
    found = _Positions(graph)
    nodes = [n for n in graph.nodes if n.op == "call_function" and (names is None or _name(n) in names)]
    pairs = (pair for node in nodes for pair in _of_one(node, found))
    return [(a, b) for a, b in pairs if a and b and a != b]


def one_of_each(pairs: list[Pair]) -> dict[str, str]:
    """Symbol -> the one that stands for all that are tied to it; those tied to nothing are left out."""
    stands: dict[str, str] = {}

    def root(symbol: str) -> str:
        while stands.get(symbol, symbol) != symbol:
            symbol = stands[symbol]
        return symbol

    for a, b in pairs:
        stands.setdefault(a, a)
        stands.setdefault(b, b)
        stands[root(b)] = root(a)
    return {symbol: root(symbol) for symbol in stands}


def _of_one(node: fx.Node, positions: _Positions) -> Iterator[Pair]:
    name, args = _name(node), node.args
    if name in _ALIGNED and len(args) > 2:
        x, dim, index = _sizes(args[0]), args[1], _sizes(args[2])
        dim = dim % max(len(x), 1) if isinstance(dim, int) else dim
        yield from ((x[d], index[d]) for d in range(min(len(x), len(index))) if d != dim)
        yield from zip(index, _sizes(args[3]) if len(args) > 3 else (), strict=False)
        yield positions.of(args[2]), _at(x, dim)
    elif name in _BY_INDEX and len(args) > 2:
        x, index, source = _sizes(args[0]), _sizes(args[2]), _sizes(args[3]) if len(args) > 3 else []
        yield positions.of(args[2]), _at(x, args[1])
        yield _at(index, 0), _at(source, args[1])
    elif name in ("index", "index_put"):
        x, indices = _sizes(args[0]), args[1]
        yield from ((positions.of(index), _at(x, d)) for d, index in enumerate(indices) if index is not None)  # type: ignore
        if name == "index_put" and len(indices) == 1 and len(_sizes(indices[0])) == 1:  # type: ignore
            yield _at(_sizes(indices[0]), 0), _at(_sizes(args[2]), len(_sizes(args[2])) - len(x))  # type: ignore
    elif name == "embedding":
        yield positions.of(args[1]), _at(_sizes(args[0]), 0)
    elif name in _COUNT_SAMPLES:
        samples, targets = _at(_sizes(args[0]), 1), _sizes(args[1])
        yield from ((samples, _at(_sizes(lengths), 0)) for lengths in args[2:4] if isinstance(lengths, fx.Node))
        yield samples, targets[0] if len(targets) == 2 else ""


class _Positions:
    """Which values are positions among as many elements as a symbol counts."""

    def __init__(self, graph: fx.Graph) -> None:
        self._among: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                self._among[node] = self._made_by(node)

    def of(self, node: Any) -> str:
        return self._among.get(node, "") if isinstance(node, fx.Node) else ""

    def _made_by(self, node: fx.Node) -> str:
        name, args = _name(node), node.args
        first = args[0] if args else None
        if name == "getitem" and isinstance(first, fx.Node):
            return _ordered(first) if args[1] == 1 and _name(first) in _SECOND_IS_POSITIONS else ""
        if name in _ARE_POSITIONS:
            return _ordered(node)
        if name in ("arange", "randperm"):
            starts_at_0 = len(args) == 1 or (len(args) == 2 and args[0] == 0)
            end = args[-1] if starts_at_0 else None
            return _symbol(end.meta.get("val") if isinstance(end, fx.Node) else end)
        if name in ("scatter", "index_copy") and len(args) > 3:  # the inverse of a permutation
            return self.of(args[3])
        if name == "index_put" and len(args) > 2:
            return self.of(args[2])
        return self.of(first) if name in _KEEP_VALUES else ""


def _ordered(node: fx.Node) -> str:
    """How many elements an op puts in order, or looks for the largest of."""
    x = _sizes(node.args[0])
    kwargs_dim = node.kwargs.get("dim")
    numbers = [arg for arg in node.args[1:] if isinstance(arg, int) and not isinstance(arg, bool)]
    skip = 1 if _name(node) in ("topk", "kthvalue") else 0  # k comes first
    dim = kwargs_dim if kwargs_dim is not None else numbers[skip] if len(numbers) > skip else -1
    if _name(node) in ("argmax", "argmin") and kwargs_dim is None and not numbers:
        return x[0] if len(x) == 1 else ""
    return _at(x, dim)


def _name(node: fx.Node) -> str:
    """Of the op, whether it writes in place or not."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(packet.__name__).removesuffix("_")


def _sizes(node: Any) -> list[str]:
    """The symbol or the number of each dimension."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [_symbol(size) for size in found.shape] if isinstance(found, torch.Tensor) else []


def _at(sizes: list[str], dim: Any) -> str:
    return sizes[dim] if isinstance(dim, int) and -len(sizes) <= dim < len(sizes) else ""


def _symbol(size: Any) -> str:
    """The name of a size that is one symbol, a number as it is written; else ""."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return str(expr) if expr.is_symbol or expr.is_Integer else ""
    return str(size) if isinstance(size, int) else ""
