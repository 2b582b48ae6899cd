"""Each rewrite of a rank's graph computes what the graph before it computed, and writes over nothing but its own.

Graphs are random: views of views, values returned twice, operands used twice, products whose sums are read again.
"""

from __future__ import annotations

import copy
import operator
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import PRESETS, recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import cells
from torch import fx

from shardwright.passes.gradients import write_gradients
from shardwright.passes.loss import cross_entropy_backward, early_count, fuse_cross_entropy_backward
from shardwright.passes.reuse import reuse
from shardwright.passes.tidy import tidy
from shardwright.passes.values import memory_roots, propagate

aten = torch.ops.aten
CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**32 - 1)


class RandomGraph:
    """Some inputs, some ops on matrices of few different shapes, and results of which some are the same."""

    def __init__(self, seed: int, num_ops: int = 18) -> None:
        self.random = random.Random(seed)
        self.graph = fx.Graph()
        self.inputs: dict[str, torch.Tensor] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        sizes = self.random.sample((2, 3, 4, 6), 2)
        for k in range(4):
            shape = (self.random.choice(sizes), self.random.choice(sizes))
            node = self.graph.placeholder(f"input_{k}")
            self.inputs[node.name] = torch.randn(shape, dtype=torch.float64)
            self.shapes[node] = shape
        while len(self.shapes) < num_ops + 4:
            self._op()
        made = list(self.shapes)
        self.graph.output(tuple(self.random.choice(made[-8:]) for _ in range(4)))
        propagate(self.graph, self.inputs, CPU)

    def _op(self) -> None:
        x = self.random.choice(list(self.shapes)[-8:])
        shape = self.shapes[x]
        kind = self.random.choice(
            ("unary", "binary", "binary", "product", "product", "view", "view", "twice", "slices")
        )
        like = [n for n, s in self.shapes.items() if s == shape]
        if kind == "unary":
            op = self.random.choice((aten.neg, aten.tanh, aten.relu, aten.sigmoid))
            self._add(op.default, (x,), shape)
        elif kind == "binary":
            op = self.random.choice((aten.add, aten.sub, aten.mul))
            self._add(op.Tensor, (x, self.random.choice(like)), shape)
        elif kind == "twice":
            op = self.random.choice((aten.tanh_backward, aten.sigmoid_backward))
            self._add(op.default, (x, self.random.choice(like)), shape)
        elif kind == "product" and len(shape) == 2:
            self._product(x, shape)
        elif kind == "view":
            self._view(x, shape)
        elif kind == "slices" and len(shape) == 2:
            self._slices(x, shape)

    def _add(self, op: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.call_function(op, args)
        self.shapes[node] = shape
        return node

    def _product(self, x: fx.Node, shape: tuple[int, ...]) -> None:
        matrices = [(n, s) for n, s in self.shapes.items() if len(s) == 2 and s[0] == shape[1]]
        if not matrices:
            return
        other, columns = self.random.choice(matrices)
        made = self._add(aten.mm.default, (x, other), (shape[0], columns[1]))
        like = [n for n, s in self.shapes.items() if s == self.shapes[made] and n is not made]
        if like and self.random.random() < 0.7:
            pair = (made, self.random.choice(like))
            self._add(aten.add.Tensor, pair[:: self.random.choice((1, -1))], self.shapes[made])
        elif self.random.random() < 0.5:
            self._add(aten.t.default, (made,), self.shapes[made][::-1])

    def _view(self, x: fx.Node, shape: tuple[int, ...]) -> None:
        kind = self.random.choice(("t", "transpose", "flat", "part", "expand", "same"))
        rows, columns = (*shape, 1)[:2]
        if kind == "t":
            self._add(aten.t.default, (x,), shape[::-1])
        elif kind == "transpose" and len(shape) == 2:
            self._add(aten.transpose.int, (x, 0, -1), shape[::-1])
        elif kind == "flat":
            flat = self._add(aten.reshape.default, (x, [rows * columns]), (rows * columns,))
            if self.random.random() < 0.7:
                self._add(aten.reshape.default, (flat, [columns, rows]), (columns, rows))
        elif kind == "part" and rows > 1:
            self._add(aten.slice.Tensor, (x, 0, 1, rows), (rows - 1, *shape[1:]))
        elif kind == "expand" and len(shape) == 2:
            row = self._add(aten.slice.Tensor, (x, 0, 0, 1), (1, columns))
            self._add(aten.expand.default, (row, [rows, columns]), shape)
        elif kind == "same":
            self._add(aten.reshape.default, (x, list(shape)), shape)

    def _slices(self, x: fx.Node, shape: tuple[int, ...]) -> None:
        dim = self.random.choice((0, 1))
        size, middle = 2 * shape[dim], shape[dim]
        whole = list(shape)
        whole[dim] = size
        bounds = [(0, middle), (middle, self.random.choice((size, 2**63 - 1)))]
        self.random.shuffle(bounds)
        like = [n for n, s in self.shapes.items() if s == shape]
        parts = [
            self._add(aten.slice_backward.default, (n, whole, dim, *bound, 1), tuple(whole))
            for n, bound in zip((x, self.random.choice(like)), bounds, strict=True)
        ]
        self._add(aten.add.Tensor, tuple(parts), tuple(whole))

    def owned(self) -> set[str]:
        return {name for name in self.inputs if self.random.random() < 0.5}


def run(graph: fx.Graph, inputs: dict[str, torch.Tensor], *more: Any) -> list[Any]:
    graph.lint()
    return list(fx.GraphModule(torch.nn.Module(), graph)(*inputs.values(), *more))


def assert_computes_the_same(
    built: RandomGraph, rewrite: Callable[[fx.Graph, set[str]], object], owned: set[str]
) -> None:
    expected = run(built.graph, built.inputs)
    changed = copy.deepcopy(built.graph)
    rewrite(changed, owned)
    given = {name: tensor.clone() for name, tensor in built.inputs.items()}
    for found, wanted in zip(run(changed, given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for name in set(given) - owned:
        assert torch.equal(given[name], built.inputs[name]), f"{name} was written over"


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_tidied_graphs_compute_the_same(seed: int) -> None:
    assert_computes_the_same(RandomGraph(seed), lambda graph, _: tidy(graph), set())


@settings(max_examples=300, deadline=None)
@given(seed=SEEDS)
def test_memory_is_reused_only_when_nothing_reads_it_any_more(seed: int) -> None:
    built = RandomGraph(seed)
    assert_computes_the_same(built, reuse, built.owned())


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_all_rewrites_together_compute_the_same(seed: int) -> None:
    def rewrite(graph: fx.Graph, owned: set[str]) -> None:
        tidy(graph)
        reuse(graph, owned)

    built = RandomGraph(seed)
    assert_computes_the_same(built, rewrite, built.owned())


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_gradients_are_written_or_added_where_asked(seed: int) -> None:
    built = RandomGraph(seed)
    expected = run(built.graph, built.inputs)
    changed = copy.deepcopy(built.graph)
    slots = write_gradients(changed, num_params=3)
    reuse(changed)
    for given_memory in (False, True):
        held = {slot: torch.randn_like(expected[slot]) for slot in slots}
        into = [(held[slot].clone(), built.random.random() < 0.5) if given_memory else None for slot in slots]
        found = run(changed, built.inputs, *into)
        for slot, memory in zip(slots, into, strict=True):
            if memory is not None:
                assert found[slot] is memory[0]
                found[slot] = found[slot] - held[slot] if memory[1] else found[slot]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize("add", [None, False, True])
def test_the_gradient_of_an_embedding_is_written_or_added_where_asked(add: bool | None, padding: int) -> None:
    graph = fx.Graph()
    grad, index = (graph.placeholder(name) for name in ("grad", "index"))
    graph.output((graph.call_function(aten.embedding_dense_backward.default, (grad, index, 5, padding, False)),))
    inputs = {"grad": torch.randn(2, 4, 3, dtype=torch.float64), "index": torch.randint(0, 5, (2, 4))}
    propagate(graph, inputs, CPU)
    (expected,) = run(graph, inputs)
    assert write_gradients(graph, num_params=1) == (0,)
    held = torch.randn(5, 3, dtype=torch.float64)
    (found,) = run(graph, inputs, None if add is None else (held.clone(), add))
    torch.testing.assert_close(found, expected + held if add else expected)


def test_a_sum_is_added_into_its_product_and_written_over_its_other_term() -> None:
    graph = fx.Graph()
    x, a, b = (graph.placeholder(name) for name in ("x", "a", "b"))
    doubled = graph.call_function(aten.add.Tensor, (x, x))
    product = graph.call_function(aten.reshape.default, (graph.call_function(aten.mm.default, (a, b)), [2, 2, 3]))
    graph.output((graph.call_function(aten.add.Tensor, (doubled, product)),))
    shapes = {"x": (2, 2, 3), "a": (4, 5), "b": (5, 3)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    propagate(graph, inputs, CPU)
    expected = run(graph, inputs)
    tidy(graph)
    reuse(graph)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [aten.add.Tensor, aten.reshape.default, aten.addmm_.default, aten.reshape.default]
    torch.testing.assert_close(run(graph, inputs), expected)


@pytest.mark.parametrize("returned", [False, True])
def test_a_value_that_is_returned_keeps_its_memory(returned: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.tanh.default, (x,))
    view = graph.call_function(aten.t.default, (made,))
    graph.output((graph.call_function(aten.neg.default, (made,)), view if returned else x))
    propagate(graph, {"x": torch.randn(3, 3)}, CPU)
    reuse(graph)
    in_place = aten.neg_.default in [node.target for node in graph.nodes]
    assert in_place is not returned


def test_windows_over_one_row_are_not_written_to() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.tanh.default, (x,))
    windows = graph.call_function(aten.unfold.default, (made, 0, 3, 1))
    graph.output((graph.call_function(aten.neg.default, (windows,)),))
    inputs = {"x": torch.randn(8, dtype=torch.float64)}
    propagate(graph, inputs, CPU)
    reuse(graph)
    torch.testing.assert_close(run(graph, inputs), [-inputs["x"].tanh().unfold(0, 3, 1)])


def _cross_entropy_graph(target: torch.Tensor, ignore: int, reduction: int, shape: tuple[int, int]) -> fx.Graph:
    """(logits, target, tangent) -> (loss, gradient of logits), as autograd writes it."""
    graph = fx.Graph()
    logits, labels, tangent = (graph.placeholder(name) for name in ("logits", "target", "tangent"))
    logs = graph.call_function(aten._log_softmax.default, (logits, 1, False))
    both = graph.call_function(aten.nll_loss_forward.default, (logs, labels, None, reduction, ignore))
    loss, total = (graph.call_function(operator.getitem, (both, k)) for k in (0, 1))
    inner = graph.call_function(aten.nll_loss_backward.default, (tangent, logs, labels, None, reduction, ignore, total))
    outer = graph.call_function(aten._log_softmax_backward_data.default, (inner, logs, 1, torch.float64))
    graph.output((loss, total, outer))
    scalar = torch.empty((), dtype=torch.float64)
    propagate(graph, {"logits": scalar.new_empty(shape), "target": target, "tangent": scalar}, CPU)
    return graph


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (33, 70_000)])
def test_fused_cross_entropy_is_the_same_to_the_bit(shape: tuple[int, int], reduction: int) -> None:
    torch.manual_seed(shape[0])
    target = torch.randint(0, shape[1], shape[:1])
    target[::3] = -7  # ignored
    logits, tangent = torch.randn(shape, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    graph = _cross_entropy_graph(target, -7, reduction, shape)
    inputs = {"logits": logits, "target": target, "tangent": tangent}
    expected = run(graph, inputs)
    early_count(graph)
    fuse_cross_entropy_backward(graph)
    reuse(graph)
    fused = [node for node in graph.nodes if node.target is cross_entropy_backward]
    assert len(fused) == 1
    assert fused[0].args[-1] is True, "the log-probabilities are not needed any more"
    for found, wanted in zip(run(graph, inputs), expected, strict=True):
        assert torch.equal(found, wanted) or (found.isnan().all() and wanted.isnan().all())


@pytest.mark.parametrize("preset", cells(PRESETS, ["tiny-gpt2", "tiny-llama", "mlp", "tiny-unet", "tiny-mixtral"]))
def test_values_that_share_memory_have_a_root_in_common(preset: str) -> None:
    for one in recorded(preset):
        roots = memory_roots(one.segment.joint.graph)
        sharing: dict[int, list[fx.Node]] = defaultdict(list)
        for node, value in one.values.items():
            if isinstance(value, torch.Tensor) and value.numel() and node.op == "call_function":
                sharing[value.untyped_storage().data_ptr()].append(node)
        for nodes in sharing.values():
            for node in nodes[1:]:
                assert roots[node] & roots[nodes[0]], f"{nodes[0]} and {node}"
