"""Writes of a forward, through whatever views, and of autograd's own formulas are computed as eager computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from split_modules import assert_equal_when_split, workload_of
from torch import nn
from torch.nn import functional as F

from shardwright.errors import ShardwrightError
from shardwright.profiler.capture import capture

TP = [{"tp": 2}]


class Through(nn.Module):
    """A linear layer, a function of its result, a loss."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x)).square().mean()


def batch() -> torch.Tensor:
    return torch.randn(4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class WritesThroughViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.first(x).clone()
        turned, strided = whole.transpose(1, 2), whole[:, ::2]
        strided.mul_(2)
        turned[:, 1].add_(1)
        whole.view(4, 36)[:, 3:5].zero_()
        left, right = whole[..., :3], whole[..., 3:]
        left.copy_(right * 2)
        whole.diagonal(dim1=1, dim2=2).fill_(0.5)
        rest = self.second(turned.contiguous())
        rest[..., 0] = 0
        rest.relu_()
        return (whole * rest).mean() + strided.square().mean() + left.sum() + right.square().sum()


class Queue(nn.Module):
    """Keys of earlier batches, as in MoCo: a buffer written by slices and read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("keys", torch.ones(8, 6))
        self.register_buffer("counts", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x).mean(1)
        before = (h @ self.keys.clone().t()).square().mean()
        with torch.no_grad():
            self.keys[:4] = h.detach()
            self.counts[1] += 2
            self.counts.view(1, 3).mul_(3)
        return before + (h @ self.keys.t()).square().mean() * self.counts.sum()


class NormCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm, self.instance = nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.instance(torch.relu(self.norm(self.into(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x).square().mean() + self.one(x * 2 + 1).mean()


class CumulativeNorm(nn.Module):
    """momentum=None: the running statistics are the mean over all batches; called twice, and frozen once."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(6, momentum=None)
        self.frozen = nn.BatchNorm1d(6, momentum=None).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.into(x))).square().mean() + self.frozen(self.norm(x * 2 + 1)).cos().mean()


class SharedBuffer(nn.Module):
    """A table that every block holds, outside the state; a block that is not there."""

    class Block(nn.Module):
        def __init__(self, table: nn.Module) -> None:
            super().__init__()
            self.table, self.linear = table, nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x * self.table.cache)

    def __init__(self) -> None:
        super().__init__()
        table = nn.Module()
        table.register_buffer("cache", torch.randn(6, 6), persistent=False)
        self.blocks = nn.ModuleList([self.Block(table), None, self.Block(table)])  # type: ignore[list-item]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if block is not None else x
        return x.square().mean()


MODELS = [WritesThroughViews, Queue, NormCalledTwice, CumulativeNorm, SharedBuffer]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_buffers_and_written_views_are_those_of_eager(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(model(), TP, x=batch())


GRADIENTS_THAT_WRITE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "circular padding": lambda h: F.pad(h, (2, 2), mode="circular"),
    "real Fourier transforms": lambda h: torch.fft.irfft2(torch.fft.rfft2(h)[..., :3] * 2, s=(6, 6)),
    "overlapping as_strided": lambda h: h.as_strided((4, 5, 12), (36, 6, 1)),
    "cumulative products and norms": lambda h: h.cumprod(1) / h.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("name", GRADIENTS_THAT_WRITE)
def test_gradients_that_write_in_place_are_computed(name: str) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(Through(GRADIENTS_THAT_WRITE[name]), TP, x=batch())


def test_as_strided_beside_its_tensor_is_refused() -> None:
    model = Through(lambda h: h[1].as_strided((2, 6), (36, 1), 0))
    with pytest.raises(ShardwrightError, match="memory beside the tensor"):
        capture(workload_of(model, {"x": batch()}))
