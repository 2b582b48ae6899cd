"""An op with all its facts: nothing else in the tests, and nothing in the package, names it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shardwright.ops.facts import OpFacts, add_op
from shardwright.ops.lowering import AllReduce, Lowering
from shardwright.ops.rules import same_everywhere, wrap
from shardwright.ops.strategy import Strategy
from shardwright.profiler.op_view import OpView


@torch.library.custom_op("shardwright_tests::shares", mutates_args=())
def shares(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Each value as a part of the sum along a dimension."""
    return x / x.sum(dim, keepdim=True)


@shares.register_fake
def _(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.dim = inputs[1]
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, out = ctx.saved_tensors
    return (grad - (grad * out).sum(ctx.dim, keepdim=True)) / x.sum(ctx.dim, keepdim=True), None


shares.register_autograd(_backward, setup_context=_keep)


def _rule(view: OpView) -> Iterator[Strategy]:
    (x,) = view.inputs
    summed = wrap(view.args[1], x.dim())
    yield from same_everywhere(view, (d for d in range(x.dim()) if d != summed))
    yield Strategy((summed,), (summed,), lowering="shares_cols")


def _shares_cols(emit: Any, node: torch.fx.Node, args: list[Any], axis: Any) -> torch.fx.Node:
    """The sum over all ranks' parts."""
    own = emit.call(torch.ops.aten.sum.dim_IntList, args[0], [args[1]], True)
    return emit.call(torch.ops.aten.div.Tensor, args[0], emit.all_reduce(own, axis))


def _flops(x: Any, dim: int, *, out_shape: Any, **_: Any) -> int:
    """A sum and a division of each value."""
    return 2 * torch.Size(out_shape).numel()


add_op(
    torch.ops.shardwright_tests.shares,
    OpFacts(
        rule=_rule,
        lowerings=(Lowering("shares_cols", (AllReduce(per_row=True, dim_at=1),), emit=_shares_cols),),
        flops=_flops,
        kind="reduction",
    ),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 1024), nn.Linear(1024, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.shardwright_tests.shares(self.first(x).square() + 1, -1)
        return self.last(y).square().mean()


def net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(8, 32, 16)}
