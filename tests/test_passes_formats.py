"""Ops of a rewritten graph read what is in their operands, however these lie in memory.

Shards, results of collectives and results written over operands have strides of their own. Each op of the sharding
tables, and the backward ops that assume a format, run on operands that are transposed, sliced, expanded, channels-last
and any mixture of them, and must give what they give on contiguous ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_op import OneOp, assert_same
from split_modules import assert_equal_when_split
from test_sharding_rules_other import CASES, IMAGE, UNDEFINED, node_of, randn
from torch import fx, nn
from torch.nn import functional as F

from shardwright.ops.strategy import replicated
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.reuse import reuse
from shardwright.passes.shard import ShardContext, shard_segment
from shardwright.passes.values import propagate
from shardwright.plans.placements import AxisSolution

aten = torch.ops.aten
CPU = torch.device("cpu")
MORE: list[tuple[Any, tuple[Any, ...]]] = []
for training in (True, False):
    gamma, mean, var = randn(4), randn(4), randn(4).abs()
    _, kept_mean, kept_rstd = aten.native_batch_norm(
        IMAGE, gamma, gamma, mean.clone(), var.clone(), training, 0.1, 1e-5
    )
    norm = (IMAGE, gamma, mean, var, kept_mean, kept_rstd, training, 1e-5, [True, True, True])
    MORE.append((aten.native_batch_norm_backward.default, (randn(6, 4, 6, 6), *norm)))
SIGNAL = randn(3, 4, 8)
MORE.append((aten.upsample_linear1d_backward.default, (randn(3, 4, 12), [12], [3, 4, 8], False)))
MORE.append((aten.upsample_nearest3d_backward.default, (randn(2, 4, 4, 4, 6), [4, 4, 6], [2, 4, 2, 2, 3])))
MORE.append((aten.upsample_trilinear3d_backward.default, (randn(2, 4, 4, 4, 6), [4, 4, 6], [2, 4, 2, 2, 3], False)))
MORE.append((aten.view_as_complex.default, (randn(6, 4, 2),)))
MORE.append((aten._cdist_backward.default, (randn(3, 5), randn(3, 4), randn(5, 4), 1.0, randn(3, 5).abs())))


def reversed_(x: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Each second element of a longer tensor."""
    if x.dim() == 0:
        return x
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    return wide[..., 1::2].copy_(x)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else reversed_(x)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """As the gradient of a sum lies: one element, seen everywhere."""
    return x.flatten()[0].expand(x.shape) if x.is_floating_point() and x.numel() else x


LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (reversed_, sliced, channels_last)


def mixtures(operands: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    for layout in LAYOUTS:
        yield [layout(x) for x in operands]
        for k in range(len(operands)):
            yield [layout(x) if j == k else x for j, x in enumerate(operands)]


def rewritten(one: OneOp) -> fx.GraphModule:
    solution = AxisSolution({("op", one.node.name): replicated(one.view)})
    return shard_segment(one.segment, ShardContext((MeshAxis("tp", 1, 0, ""),), (solution,), CPU))


def test_every_op_reads_operands_of_any_strides() -> None:
    wrong = []
    for op, args, kwargs in [*CASES, *((op, args, {}) for op, args in MORE)]:
        if op in UNDEFINED:
            continue
        one = OneOp(*node_of(op, args, kwargs))
        graph = rewritten(one)
        for operands in mixtures([x.contiguous() for x in one.operands]):
            try:
                for found, expected in zip(graph(*operands), one.whole, strict=False):
                    assert_same(found, expected)
            except (AssertionError, RuntimeError) as error:
                strides = [tuple(x.stride()) for x in operands]
                wrong.append(f"{one.node.format_node()} {one.view.shapes} {strides}: {str(error)[:200]}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def test_backward_ops_read_a_gradient_that_is_one_element_seen_everywhere() -> None:
    for op, args, kwargs in [*CASES, *((op, args, {}) for op, args in MORE)]:
        if "backward" not in str(op) or not isinstance(op, torch._ops.OpOverload):
            continue
        first = expanded(args[0])
        expected = OneOp(*node_of(op, (first.contiguous(), *args[1:]), kwargs))
        graph = rewritten(expected)
        for found, right in zip(graph(first, *expected.operands[1:]), expected.whole, strict=False):
            assert_same(found, right)


def test_nothing_is_written_over_memory_that_lies_in_another_order() -> None:
    """The result of silu_backward lies as its input does, not as the gradient that it could be written over."""
    graph = fx.Graph()
    x, given = graph.placeholder("x"), graph.placeholder("given")
    gradient = graph.call_function(aten.transpose.int, (graph.call_function(aten.neg.default, (given,)), 0, 1))
    graph.output((graph.call_function(aten.silu_backward.default, (gradient, x)),))
    values = {"x": randn(3, 4), "given": randn(4, 3)}
    propagate(graph, values, CPU)
    before = fx.GraphModule(nn.Module(), graph)(*values.values())[0]
    reuse(graph)
    after = fx.GraphModule(nn.Module(), graph)(*values.values())[0]
    assert torch.equal(before, after) and after.stride() == before.stride()


class Normed(nn.Module):
    """A group norm between layers of tokens, its gradient transposed; the input as the factory lays it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.norm(self.into(x)))
        return self.out(y.flatten(2).transpose(1, 2)).square().sum()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_before_transposed_layers_has_its_gradients(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(Normed(), x=randn(4, 4, 6, 6).contiguous(memory_format=layout))
