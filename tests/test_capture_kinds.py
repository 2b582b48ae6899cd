"""Kinds of models that traces often get wrong: each one's graph beside the model as written, in float64.

One process; tests of sharding run others of the same kinds over ranks (test_design_cases.py, test_ops_split.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from as_written import largest_difference, workload_of
from torch import nn

WIDTH = 8
Step = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """step: what is done with the hidden tensor [samples, WIDTH]. The part that it needs is `part`."""

    def __init__(self, step: Step, part: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.mid, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.step, self.part = step, part
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.factor = nn.Parameter(torch.ones(WIDTH // 2 + 1, dtype=torch.cfloat) * (0.5 + 0.2j))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.mid(torch.tanh(self.a(x)))
        return F.cross_entropy(self.head(torch.tanh(self.step(self, h))), y)


def joined_elsewhere(net: Net, h: torch.Tensor) -> torch.Tensor:
    h = h.unflatten(1, (2, 4)).transpose(1, 2).reshape(-1, 2, 4).roll(1, 2).flip(1)
    return F.pixel_shuffle(h.reshape(-1, 4, 1, 2), 2).flatten(1)


def windows(net: Net, h: torch.Tensor) -> torch.Tensor:
    parts = h.split([1, 3, 4], 1)
    strided = torch.as_strided(h.contiguous(), (len(h), 4), (WIDTH, 2)).repeat(1, 2)
    return torch.cat([parts[1], parts[0], parts[2]], 1) + strided + h.unfold(1, 4, 4).sum(2).repeat(1, 4)


def written_in_place(net: Net, h: torch.Tensor) -> torch.Tensor:
    h = h * 1
    h[:, :4].add_(1.0)
    h.t()[0].zero_()
    h[:, [1, 2]] = h[:, [2, 1]]
    h.masked_fill_(h > 0.5, 0.5).clamp_(-1)
    rest = torch.zeros_like(h)
    rest.copy_(h)
    rest.index_add_(1, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), h)
    return F.relu_(rest * 1) + rest


def scanned(net: Net, h: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    for i in range(1, 4):
        h[:, i] = 0.5 * h[:, i - 1].detach() + h[:, i].clone()
    return h


def spectral(net: Net, h: torch.Tensor) -> torch.Tensor:
    z = torch.fft.rfft(h, dim=1) * net.factor
    return torch.fft.irfft(z, n=WIDTH, dim=1) + torch.view_as_real(z[:, :4]).flatten(1) * z.abs().sum(1, keepdim=True)


def without_elements(net: Net, h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h, h[:, :0]], 1) + net.none.sum() + h.new_zeros(0).sum()


def twice(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.part(h) + net.part(2 * h)


KINDS: dict[str, tuple[Step, Callable[[], nn.Module | None]]] = {
    **{step.__name__: (step, lambda: None) for step in (joined_elsewhere, windows, written_in_place, scanned)},
    **{step.__name__: (step, lambda: None) for step in (spectral, without_elements)},
    "norm_twice": (twice, lambda: nn.BatchNorm1d(WIDTH)),
    "spectral_norm": (twice, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
    "weight_norm": (twice, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_its_graph_is_the_model_as_written(kind: str) -> None:
    torch.manual_seed(0)
    step, part = KINDS[kind]
    model = Net(step, part()).double()
    model.factor.data = model.factor.data.to(torch.cdouble)
    batch = {"x": torch.randn(6, 5), "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    assert largest_difference(workload_of(model, batch)) < 1e-12


def test_tied_weights_that_are_tied_after_the_model_is_made_are_one_parameter() -> None:
    torch.manual_seed(0)
    model = Net(lambda net, h: F.linear(net.part(h), net.mid.weight.t()), nn.Linear(WIDTH, WIDTH))
    model.part.weight = model.mid.weight
    model.a.requires_grad_(False)
    batch = {"x": torch.randn(6, 5), "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    assert largest_difference(workload_of(model, batch)) < 1e-12
