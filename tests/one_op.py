"""One op of a captured graph as a segment of its own, rewritten for each rank by the sharding pass and run on all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from simulated_ranks import cut, join, mesh, run
from torch import fx

from shardwright.ops.catalog import fits, strategies
from shardwright.ops.strategy import Strategy
from shardwright.passes.shard import ShardContext, shard_segment
from shardwright.plans.placements import AxisSolution
from shardwright.profiler._torch import lazy_recompile
from shardwright.profiler.graph import Segment, ValueInfo
from shardwright.profiler.op_view import OpView, view_of

CPU = torch.device("cpu")


class OneOp:
    """node: of a joint graph, with meta['val']. operands: values of view_of(node).operands."""

    def __init__(self, node: fx.Node, operands: Sequence[torch.Tensor]) -> None:
        self.original, self.operands = node, list(operands)
        graph = fx.Graph()
        given = []

        def placeholder(source: fx.Node) -> fx.Node:
            new = graph.placeholder(f"input_{len(given)}")
            new.meta = {"val": source.meta["val"], "phase": "forward"}
            given.append(new)
            return new

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), placeholder)
        self.node = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        self.node.meta = {"val": node.meta["val"], "phase": "forward"}
        val = node.meta["val"]
        if isinstance(val, (tuple, list)):
            results = [
                graph.call_function(operator.getitem, (self.node, k)) for k, v in enumerate(val) if v is not None
            ]
            for result in results:
                result.meta = {"val": val[result.args[1]], "phase": "forward"}
        else:
            results = [self.node]
        graph.output(tuple(results))
        self.kept = [r.args[1] if r is not self.node else 0 for r in results]
        module = fx.GraphModule(torch.nn.Module(), graph)
        infos = tuple(ValueInfo(n.name, tuple(n.meta["val"].shape), n.meta["val"].dtype, False) for n in results)
        inputs = tuple(ValueInfo(n.name, tuple(n.meta["val"].shape), n.meta["val"].dtype, False) for n in given)
        self.given = given
        self.segment = Segment(
            name="op", joint=module, forward=module, param_shapes=(), param_dtypes=(), param_requires_grad=(),
            num_buffers=0, mutated_buffers=(), inputs=inputs, outputs=infos, has_random=False, structure_hash="",
        )  # fmt: skip
        out = node.target(*self._call(args), **self._call(kwargs))
        self.whole = [out[k] for k in self.kept] if isinstance(out, (tuple, list)) else [out]

    def _call(self, arguments: Any) -> Any:
        values = dict(zip(self.given, self.operands, strict=True))
        return fx.node.map_arg(arguments, lambda n: values[n])

    @property
    def view(self) -> OpView:
        return view_of(self.node)

    def strategies(self, parts: int) -> list[Strategy]:
        """Of an axis that cuts neither sequences nor experts; those send between ranks that are not simulated."""
        found = [s for s in strategies(self.node)[0] if not (s.of_sequence or s.of_experts)]
        return [s for s in found if fits(s, self.view, parts, lambda tensor, dim: True)]

    def sharded(
        self, chosen: Sequence[Strategy], sizes: dict[str, int], check_copies: bool = True
    ) -> list[torch.Tensor]:
        """Results put together again as the strategies (one for each axis) say."""
        solutions = []
        for strategy in chosen:
            places = {("op", n.name): place for n, place in zip(self.given, strategy.inputs, strict=True)}
            solutions.append(AxisSolution({("op", self.node.name): strategy}, places))
        ranks = mesh(sizes)
        with lazy_recompile():
            graphs = [shard_segment(self.segment, ShardContext(axes, tuple(solutions), CPU)) for axes in ranks]
        inputs = [
            [
                cut(value, [s.inputs[i] for s in chosen], axes)
                for i, value in enumerate(self.operands)
            ]
            for axes in ranks
        ]  # fmt: skip
        results = run(graphs, inputs, ranks)
        return [
            join([r[i] for r in results], [s.outputs[k] for s in chosen], ranks, check_copies)
            for i, k in enumerate(self.kept)
        ]


def one_op(op: object, *operands: object) -> OneOp:
    """A call of op. operands: tensors and its other arguments, in order."""
    graph = fx.Graph()
    args, tensors = [], []
    for operand in operands:
        if isinstance(operand, torch.Tensor):
            args.append(graph.placeholder(f"x{len(tensors)}"))
            args[-1].meta["val"] = operand
            tensors.append(operand)
        else:
            args.append(operand)
    node = graph.call_function(op, tuple(args))
    node.meta["val"] = op(*operands)
    return OneOp(node, tensors)


def assert_same(found: torch.Tensor, expected: torch.Tensor, compare: Callable[..., None] | None = None) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, expected.shape, found.dtype)
    if expected.is_floating_point() or expected.is_complex():
        scale = expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * max(scale, 1.0), equal_nan=True)
    else:
        assert torch.equal(found, expected)
