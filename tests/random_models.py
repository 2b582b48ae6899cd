"""Small models that draw random numbers, for factories that worker processes import."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from random import gauss
from typing import Any

import numpy as np
import random_helper
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, VOCABULARY = 8, 11


class Drawing(nn.Module):
    """Embedding, a linear layer, what draws, and a head."""

    def __init__(self, draws: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.draws = nn.Linear(WIDTH, VOCABULARY), draws

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.head(self.draws(torch.tanh(self.linear(self.embed(ids)))))
        return F.cross_entropy(x.flatten(0, 1), ids.flatten())


def dropouts(x: torch.Tensor) -> torch.Tensor:
    """All kinds, in place too, where another view reads what was written; probabilities at which nothing is drawn."""
    x = F.dropout(x, 0.0) + F.dropout(x, 1.0) + F.dropout(x, 0.5, training=False)
    x = x + F.dropout1d(x, 0.2) + F.alpha_dropout(x, 0.1, True) + F.feature_alpha_dropout(x, 0.2, True)
    x = x + F.dropout2d(x.unflatten(-1, (2, 4)), 0.2).flatten(-2) + F.dropout3d(x[..., None, None], 0.2)[..., 0, 0]
    y = x * 1.0
    dropped = F.dropout(y, 0.3, True, inplace=True)
    F.dropout2d(y.unflatten(-1, (4, 2)), 0.3, True, inplace=True)
    keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.7).div_(0.7)  # drop path
    return y + dropped + F.rrelu(x * keep, training=True) + F.rrelu(x.clone(), training=True, inplace=True)


def distributions(x: torch.Tensor) -> torch.Tensor:
    torch.rand(3)  # nothing reads it, and it counts
    with torch.no_grad():
        noise = torch.rand_like(x) + torch.empty_like(x).uniform_(-1, 2) + torch.randn(x.shape[1:], dtype=x.dtype)
    x = x * noise + torch.normal(x, 0.5) + torch.normal(x, x.abs()) + torch.normal(1.0, x.abs())
    x = x + torch.normal(0.0, 2.0, x.shape, dtype=x.dtype) + torch.empty_like(x).normal_(1.0, 2.0)
    y = torch.empty_like(x)
    y.log_normal_(0.0, 0.3)
    parts = torch.zeros_like(x)
    parts[..., ::2].normal_()
    parts[:, 1:].uniform_(-0.1, 0.1)
    parts.transpose(1, 2)[:, 3].exponential_(2.0)
    x = x * y + parts * x + torch.empty_like(x).exponential_(2.0) + torch.empty_like(x).geometric_(0.4)
    return x * torch.empty_like(x).cauchy_().atan() + F.gumbel_softmax(x)


def discrete(x: torch.Tensor) -> torch.Tensor:
    x = x + torch.randint(5, x.shape) + torch.randint_like(x, 1, 3) + torch.empty_like(x).random_(2, 5)
    x = x + torch.bernoulli(x.sigmoid()) + torch.bernoulli(x.detach(), 0.3) + x.clone().bernoulli_(x.sigmoid())
    x = x + 0.5 * x[torch.randperm(x.shape[0])] + x[..., torch.multinomial(x.detach().softmax(-1)[0, 0], WIDTH)]
    chosen = torch.multinomial(x.detach().softmax(-1)[0, 0], WIDTH, replacement=True)
    category = torch.distributions.Categorical(logits=x).sample()
    return x[..., chosen] + torch.distributions.Normal(x, 1.0).rsample() + category[..., None]


def attention(x: torch.Tensor) -> torch.Tensor:
    """Scaled dot products of two to five dimensions, masks and broadcast operands among them."""
    length = x.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    attend = F.scaled_dot_product_attention
    y = attend(x, x, x, dropout_p=0.3) + attend(x, x, x, seen, dropout_p=0.3)
    y = y + attend(x, x, x, seen.expand(x.shape[0], -1, -1), dropout_p=0.3) + attend(x, x, x, dropout_p=1.0)
    y = y + attend(x[0], x[0], x[0], dropout_p=0.3)
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    y = y + attend(q, q[:1], q[:1, :1], dropout_p=0.3).transpose(1, 2).flatten(2)
    q = x.unflatten(-1, (1, 2, 4)).transpose(1, 3)
    return y + attend(q, q, q[:1], dropout_p=0.3, is_causal=True).transpose(1, 3).flatten(2)


class Attends(nn.Module):
    """torch's own layers, whose attention draws inside one function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.3, batch_first=True)
        self.weighed = nn.MultiheadAttention(WIDTH, 2, dropout=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        y = x.transpose(0, 1)
        mixed, weights = self.weighed(y, y, y, need_weights=True)
        return x + mixed.transpose(0, 1) + weights.sum(-1, keepdim=True)


def poisson(x: torch.Tensor) -> torch.Tensor:
    return torch.poisson(x.abs())


_GENERATOR = torch.Generator()


def own_generator(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(x.shape, generator=_GENERATOR)


def of_python(x: torch.Tensor) -> torch.Tensor:
    return x * random.random()


def of_numpy(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.random.rand())


_OF_NUMPY = np.random.default_rng(0)


def of_a_generator_of_numpy(x: torch.Tensor) -> torch.Tensor:
    return x * float(_OF_NUMPY.random())


def by_another_name(x: torch.Tensor) -> torch.Tensor:
    return x * gauss(0, 1)


def seeded(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return x * torch.rand_like(x)


class _Hidden(torch.autograd.Function):
    """Draws where only its own forward sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.poisson(torch.ones_like(x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def hidden(x: torch.Tensor) -> torch.Tensor:
    return _Hidden.apply(x)


COUNTER_BASED: dict[str, Callable[[], Any]] = {
    "dropouts": lambda: dropouts,
    "distributions": lambda: distributions,
    "discrete": lambda: discrete,
    "attention": lambda: attention,
    "attends": Attends,
}
REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "poisson": poisson, "own_generator": own_generator, "of_python": of_python, "of_numpy": of_numpy,
    "of_a_generator_of_numpy": of_a_generator_of_numpy, "by_another_name": by_another_name,
    "seeded": seeded, "hidden": hidden, "by_a_helper": lambda x: x * random_helper.tossed(),
    "by_a_helper_of_numpy": lambda x: x * random_helper.spread(),
    "a_generator_made_there": lambda x: x * random.Random().random(),
    "a_generator_of_numpy_made_there": lambda x: x * np.random.RandomState(0).rand(),
    "of_the_system": lambda x: x * (os.urandom(1)[0] / 256),
    "by_a_helpers_own": lambda x: x * random_helper.of_its_own(),
}  # fmt: skip


def _factory(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    draws = COUNTER_BASED[name]() if name in COUNTER_BASED else REFUSED[name]
    return Drawing(draws), {"ids": torch.randint(VOCABULARY, (4, 4))}


def __getattr__(name: str) -> Any:
    if name.startswith("make_"):
        return lambda: _factory(name.removeprefix("make_"))
    raise AttributeError(name)
