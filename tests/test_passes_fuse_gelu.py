"""The pass that puts GELU's tanh form into a captured forward graph: it finds every spelling, and keeps the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from captured import graph_of
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.passes.fuse import fuse_model
from shardwright.passes.fuse_gelu import GELU, fuse_gelu

Function = Callable[[torch.Tensor], torch.Tensor]
ROOT = math.sqrt(2 / math.pi)


def gpt2(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))


def fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def halved_last(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.tanh((x + x.square() * x * 0.044715) * ROOT) + 1) / 2


def of_a_sum(x: torch.Tensor) -> torch.Tensor:
    return gpt2(x * x + 1.0) * 3.0


def other_constant(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.0447 * torch.pow(x, 3.0))))


def of_two_tensors(x: torch.Tensor) -> torch.Tensor:
    other = torch.sigmoid(x)
    return 0.5 * other * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))


def traced(function: Function, dtype: torch.dtype) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(torch.randn(4, 5, dtype=dtype))


@pytest.mark.parametrize("function", [gpt2, fast, halved_last, of_a_sum])
def test_every_spelling_becomes_one_op_with_the_same_numbers(function: Function) -> None:
    module = traced(function, torch.float64)
    assert fuse_gelu(module.graph) == 1
    module.recompile()
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert GELU in targets and torch.ops.aten.tanh.default not in targets
    x = torch.randn(4, 5, dtype=torch.float64) * 3
    torch.testing.assert_close(module(x), function(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(other_constant, torch.float64), (of_two_tensors, torch.float64), (torch.tanh, torch.float64),
     (gpt2, torch.bfloat16)],
)  # fmt: skip
def test_what_has_other_numbers_is_left(function: Function, dtype: torch.dtype) -> None:
    assert fuse_gelu(traced(function, dtype).graph) == 0


def test_a_fused_model_keeps_one_tensor_for_the_backward_of_gelu() -> None:
    graph, done = fuse_model(graph_of("tiny-gpt2"), lambda dtype: lambda flops, saved: False)
    assert [text.partition(": ")[2] for text in done] == ["gelu x1"]
    name = done[0].partition(":")[0]
    targets = [node.target for node in graph.segments[name].joint.graph.nodes]
    assert torch.ops.aten.gelu_backward.default in targets
    assert torch.ops.aten.tanh.default not in targets
    again, _ = fuse_model(graph_of("tiny-gpt2"), lambda dtype: lambda flops, saved: True, only=[name])
    assert [n.name for n in again.segments[name].joint.graph.nodes] == [
        n.name for n in graph.segments[name].joint.graph.nodes
    ]
