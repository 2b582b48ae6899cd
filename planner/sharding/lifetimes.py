"""How long each result of a segment's ops is held, and the most that a forward or backward holds at once.

The forward is the ops that its results and what it keeps need; the backward those of the gradients, behind what of the
forward it makes again. Both run in the order of the joint graph, and a result goes after the last op that reads it,
or a view of it. What the passes rewrite is looked at as they leave it: an op writes over an operand that nothing reads
any more (passes/reuse.py), a product is added into what it is added to, slices of a gradient are joined
(passes/tidy.py), the gradient of a loss takes the memory of its probabilities on CPUs (passes/loss.py).

What is kept stays until the backward is done, and so do the gradients that come in: whoever calls it holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ops.in_place import LOSS_CHUNK_BYTES, may_write_over
from ...profiler.graph import Segment
from ...profiler.op_view import is_op, origin, storage_root
from ...profiler.signature import results
from ...profiler.slots import PARAM_GRAD, kind_of
from ...profiler.work import is_free, is_view

aten = torch.ops.aten
Result = tuple[fx.Node, int]  # an op or placeholder, and which of its results


@dataclass(frozen=True)
class Lifetimes:
    """Of one run of ops. made_at, gone_after: of each result, the place among the ops; len(nodes): it stays.
    is_written: of each, may the gradient of a parameter be written where it is added up? loss_rows: places at which a
    loss's gradient works on some rows of such a result at a time."""

    nodes: tuple[fx.Node, ...]
    results: tuple[Result, ...]
    made_at: np.ndarray
    gone_after: np.ndarray
    is_written: np.ndarray
    loss_rows: tuple[tuple[int, Result], ...] = ()

    def peak(
        self, bytes_of: Callable[[Result], float], scratch: Callable[[fx.Node], float], *, writes_gradients: bool
    ) -> float:
        """The most bytes that are held at once. scratch: of an op, while it runs."""
        if not self.nodes:
            return 0.0
        sizes = np.array([bytes_of(result) for result in self.results])
        if writes_gradients:
            sizes = np.where(self.is_written, 0.0, sizes)
        held = np.array([scratch(node) for node in self.nodes])
        for place, result in self.loss_rows:
            held[place] += _loss_bytes(result, bytes_of(result))
        if len(sizes):
            count = len(self.nodes)
            change = np.bincount(self.made_at, sizes, count + 2) - np.bincount(self.gone_after + 1, sizes, count + 2)
            held += np.cumsum(change)[:count]
        return float(held.max())

    def at_end(self, bytes_of: Callable[[Result], float]) -> float:
        """Bytes of what is returned."""
        stays = self.gone_after >= len(self.nodes)
        return sum(bytes_of(result) for result, is_left in zip(self.results, stays, strict=True) if is_left)


@dataclass
class _Run:
    """The ops of a run and what it returns. ours: results of before whose memory it may use up."""

    nodes: list[fx.Node]
    finals: list[Result]
    gradients: Collection[Result]
    ours: Collection[Result]
    on_cpu: bool
    place: dict[fx.Node, int] = field(init=False)
    last: dict[Result, int] = field(init=False)
    within: dict[Result, Result] = field(default_factory=dict)  # results in another's memory
    merged: dict[fx.Node, fx.Node] = field(default_factory=dict)  # ops that are done as part of a later one
    loss_rows: list[tuple[int, Result]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place = {node: k for k, node in enumerate(self.nodes)}
        for node in self.nodes:
            self._merge(node)
        self.last = {}
        for node in self.nodes:
            at = self.place[self._done_in(node)]
            for operand in node.all_input_nodes:
                root = storage_root(operand)
                self.last[root] = max(self.last.get(root, 0), at)
        for root in self.finals:
            self.last[root] = len(self.nodes)

    def _done_in(self, node: fx.Node) -> fx.Node:
        while node in self.merged:
            node = self.merged[node]
        return node

    # ------------------------------------------------------------------ what the passes merge

    def _merge(self, node: fx.Node) -> None:
        if node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
            pair = [term for term in node.args if isinstance(term, fx.Node)]
            slices = [term for term in pair if term.target is aten.slice_backward.default and self._is_only(term, node)]
            if len(slices) == 2:
                self.merged.update(dict.fromkeys(slices, node))
                return
            for term in reversed(pair):
                if len(pair) == 2 and (product := self._product(term, node)) is not None:
                    self.merged[product] = node
                    return
        if self.on_cpu and node.target is aten._log_softmax_backward_data.default:
            inner: Any = node.args[0]
            if inner.target is aten.nll_loss_backward.default and self._is_only(inner, node):
                self.merged[inner] = node
                self.loss_rows.append((self.place[node], (inner, 0)))

    def _is_only(self, node: fx.Node, reader: fx.Node) -> bool:
        """Does nothing else in this run read it?"""
        return node in self.place and [user for user in node.users if user in self.place] == [reader]

    def _product(self, term: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The matrix product that a term of a sum is, where nothing else reads it."""
        while self._is_only(term, reader) and (term, 0) not in self.finals:
            if term.target is aten.mm.default:
                return term
            if not is_view(term) or term.target not in (aten.reshape.default, aten.view.default):
                return None
            reader, term = term, term.args[0]  # type: ignore[assignment]
        return None

    # ------------------------------------------------------------------ what is written over

    def memory_of(self, operand: fx.Node) -> Result:
        root = storage_root(operand)
        return self.within.get(root, root)

    def write_over(self, node: fx.Node) -> bool:
        """Does its result take the memory of an operand?"""
        for operand in self._candidates(node):
            memory = self.memory_of(operand)
            if not (memory[0] in self.place or memory in self.ours) or self.last.get(memory) != self.place[node]:
                continue
            others = [n for n in node.all_input_nodes if n is not operand]
            if any(self.memory_of(n) == memory for n in others) or list(node.args).count(operand) > 1:
                continue
            if not _alike(operand, node):
                continue
            self.within[node, 0] = memory
            self.last[memory] = max(self.last[memory], self.last.get((node, 0), 0))
            return True
        return False

    def _candidates(self, node: fx.Node) -> Iterator[fx.Node]:
        parts = [other for other, into in self.merged.items() if into is node]
        if parts and node.target is aten._log_softmax_backward_data.default:
            yield node.args[1]  # type: ignore[misc]
            return
        for position in () if self._joins(parts) else may_write_over(node.target, bool(node.kwargs)):
            operand = node.args[position]
            if isinstance(operand, fx.Node) and storage_root(operand)[0] not in parts:
                yield operand

    def _joins(self, parts: list[fx.Node]) -> bool:
        return any(part.target is aten.slice_backward.default for part in parts)

    def lifetimes(self) -> Lifetimes:
        found: list[Result] = []
        for node in self.nodes:
            if not is_op(node) or is_view(node) or node in self.merged or self.write_over(node):
                continue
            val = node.meta.get("val")
            many = val if isinstance(val, (tuple, list)) else (val,)
            found += [(node, k) for k, out in enumerate(many) if isinstance(out, torch.Tensor)]
        made_at = [self.place[node] for node, _ in found]
        gone = [max(self.last.get(result, 0), at) for result, at in zip(found, made_at, strict=True)]
        return Lifetimes(
            tuple(self.nodes),
            tuple(found),
            np.array(made_at, dtype=int),
            np.array(gone, dtype=int),
            np.array([result in self.gradients for result in found], dtype=bool),
            tuple(self.loss_rows),
        )


def _loss_bytes(result: Result, num_bytes: float) -> float:
    """What passes/loss.py holds beside probabilities of so many bytes: some rows, and of each row its gradient, its
    target and whether that counts."""
    gradient = result[0].meta["val"]
    row_bytes = gradient.shape[-1] * gradient.element_size()
    return min(num_bytes, max(row_bytes, LOSS_CHUNK_BYTES)) + num_bytes / row_bytes * (gradient.element_size() + 8 + 1)


def _alike(operand: fx.Node, node: fx.Node) -> bool:
    before, after = operand.meta["val"], node.meta["val"]
    if not isinstance(after, torch.Tensor) or before.dtype != after.dtype or before.shape != after.shape:
        return False
    wide = [k for k, size in enumerate(after.shape) if size > 1]
    return all(before.stride(k) == after.stride(k) for k in wide)


@dataclass(frozen=True, eq=False)
class RunLifetimes:
    """Of a segment's forward and backward under any choice of what is kept."""

    segment: Segment
    _known: dict[tuple[frozenset[Result], bool, bool], Lifetimes] = field(default_factory=dict)

    def forward(self, kept: frozenset[Result], on_cpu: bool) -> Lifetimes:
        return self._once(kept, on_cpu, False)

    def backward(self, kept: frozenset[Result], on_cpu: bool) -> Lifetimes:
        return self._once(kept, on_cpu, True)

    def _once(self, kept: frozenset[Result], on_cpu: bool, is_backward: bool) -> Lifetimes:
        key = kept, on_cpu, is_backward
        if key not in self._known:
            self._known[key] = (
                self._backward(kept, on_cpu) if is_backward else self._forward(kept, on_cpu)
            ).lifetimes()
        return self._known[key]

    @cached_property
    def _rows(self) -> list[tuple[str, Result, str]]:
        return results(self.segment)

    @cached_property
    def _calls(self) -> list[fx.Node]:
        return [node for node in self.segment.joint.graph.nodes if node.op == "call_function"]

    @cached_property
    def _forward_results(self) -> list[Result]:
        return [storage_root(n) for n in self._returned if n.meta.get("phase") != "backward"]

    @cached_property
    def _returned(self) -> list[fx.Node]:
        output = next(node for node in reversed(self.segment.joint.graph.nodes) if node.op == "output")
        return [node for node in output.args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]

    def _reaching(self, wanted: Collection[fx.Node], stops: Callable[[fx.Node], bool]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node in found or node.op != "call_function" or stops(node):
                continue
            found.add(node)
            stack.extend(node.all_input_nodes)
        return found

    def _forward(self, kept: frozenset[Result], on_cpu: bool) -> _Run:
        wanted = [node for node, _ in [*kept, *self._forward_results]]
        needed = self._reaching(wanted, lambda node: False)
        nodes = [node for node in self._calls if node in needed or (not is_op(node) and node.args[0] in needed)]
        nodes = [node for node in nodes if node.meta.get("phase") != "backward"]
        return _Run(nodes, [*self._forward_results, *kept], (), (), on_cpu)

    def _backward(self, kept: frozenset[Result], on_cpu: bool) -> _Run:
        def is_kept(node: fx.Node) -> bool:
            return node.meta.get("phase") != "backward" and not is_free(node) and storage_root(node) in kept

        rows = self._rows
        wanted = [source for key, (source, _), phase in rows if phase == "backward"]
        needed = self._reaching(wanted, is_kept)
        nodes = [node for node in self._calls if node in needed]
        finals = [storage_root(node) for node in self._returned if origin(node)[0] in needed]
        outputs = set(self._forward_results)
        ours = {result for result in kept if result[0].op != "placeholder" and result not in outputs}
        return _Run(nodes, finals, self._written(nodes, finals, on_cpu), ours, on_cpu)

    def _written(self, nodes: Collection[fx.Node], finals: list[Result], on_cpu: bool) -> set[Result]:
        """Gradients of parameters that the backward may write where they are added up (passes/gradients.py)."""
        inside, found = set(nodes), set()
        for key, (node, output), _ in self._rows:
            if kind_of(key) != PARAM_GRAD or finals.count(storage_root(node)) > 1:
                continue
            while node in inside and node.target is aten.t.default:
                node = node.args[0]  # type: ignore[assignment]
            if node.target is aten.mm.default or (
                on_cpu and node.target is aten.embedding_dense_backward.default and not node.args[4]
            ):
                if all(user.target is aten.t.default or user.op == "output" for user in node.users):
                    found.add((origin(node)[0], output))
        return found
