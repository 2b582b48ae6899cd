"""Models with ops of the user's own, by name: imported once by each process, since an op is registered once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@torch.library.custom_op("shardwright_tests::twice_plus", mutates_args=())
def twice_plus(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    return 2 * x + factor * y


@twice_plus.register_fake
def _(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


twice_plus.register_autograd(
    lambda ctx, grad: (2 * grad, ctx.factor * grad, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[2]),
)


@torch.library.custom_op("shardwright_tests::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """It has the name of an op of the kernels, and other arguments."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


rms_norm.register_fake(lambda x, w: torch.empty_like(x))
rms_norm.register_autograd(
    lambda ctx, grad: (torch.ops.shardwright_tests.rms_norm(grad, grad[0]), grad.sum(0)),
    setup_context=lambda ctx, inputs, output: None,
)


@torch.library.custom_op("shardwright_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("shardwright_tests::cube_backward", mutates_args=())
def cube_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * grad


cube.register_fake(lambda x: torch.empty_like(x))
cube_backward.register_fake(lambda grad, x: torch.empty_like(x))
cube.register_autograd(
    lambda ctx, grad: cube_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Swish(torch.autograd.Function):
    """Its backward is deliberately not the derivative: what the user wrote is what must run."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = context.saved_tensors
        return 0.5 * grad * torch.sigmoid(x)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "library":
            return twice_plus(x, x.sin(), 0.5)
        if self.kind == "backward is an op":
            return cube(x)
        if self.kind == "autograd.Function":
            return Swish.apply(x)
        if self.kind == "checkpoint":
            return checkpoint(lambda y: torch.tanh(y) * y, x, use_reentrant=False)
        if self.kind == "no_grad":
            with torch.no_grad():
                scale = x.abs().amax(-1, keepdim=True)
            return x / scale
        if self.kind == "complex":
            z = torch.view_as_complex(x.unflatten(-1, (16, 2))) * torch.polar(x[:, :16].exp(), x[:, 16:])
            return torch.view_as_real(z - z.sum(-1, keepdim=True) / 16).flatten(-2)
        return torch.cond(x.shape[0] > 2, lambda y: y.sin(), lambda y: y.cos(), (x,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.middle(self.first(x))).square().mean()


KINDS = ("library", "backward is an op", "autograd.Function", "checkpoint", "no_grad", "cond", "complex")


def net(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(kind), {"x": torch.randn(8, 16)}


def __getattr__(name: str) -> Any:  # factories by name: net_0, net_1, ...
    if name.startswith("net_"):
        return lambda: net(KINDS[int(name.removeprefix("net_"))])
    raise AttributeError(name)
