"""Small models that are called in every way that Python has, for tests of profiler/calling.py and batch_dims.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WORDS, WIDTH, LENGTH, SAMPLES = 17, 8, 5, 8


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
            hidden = hidden if mask is None else hidden * mask.unsqueeze(-1)
        return self.head(hidden.cumsum(1))

    def loss(self, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.cross_entropy(self.logits(ids, mask).flatten(0, 1), labels.flatten())


class ByKeywords(Core):
    """`mask` reaches what uses it through **kwargs alone."""

    def forward(self, ids: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
        return self.loss(ids, labels, kwargs.get("mask"))


class AnyKeywords(Core):
    def forward(self, **kwargs: Any) -> torch.Tensor:
        return self.loss(**kwargs)


class ByPosition(Core):
    def forward(self, ids: Any, labels: Any, mask: Any, /) -> torch.Tensor:
        return self.loss(ids, labels, mask)


class AnyPositions(Core):
    def forward(self, *entries: Any) -> torch.Tensor:
        return self.loss(*entries)


class OneMapping(Core):
    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss(batch["ids"], batch["labels"], batch["mask"])


@dataclass
class Extras:
    mask: torch.Tensor | None
    scale: float
    kind: str


class Nested(Core):
    def forward(self, ids: Any, more: Any, extras: Extras) -> torch.Tensor:
        labels, nothing = more["labels"]
        assert nothing is None and extras.kind == "scaled"
        return extras.scale * self.loss(ids, labels, extras.mask)


class Wrapped(nn.Module):
    """Hands on whatever it is given, as adapters and compilers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ByKeywords()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner(*args, **kwargs)


class Logits(Core):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(ids)


def entries(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator),
        "labels": torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator),
        "mask": (torch.rand(SAMPLES, LENGTH, generator=generator) > 0.4).double(),
    }


def nested(seed: int = 1) -> dict[str, Any]:
    e = entries(seed)
    return {"ids": e["ids"], "more": {"labels": (e["labels"], None)}, "extras": Extras(e["mask"], 1.5, "scaled")}


def position_loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())


# name -> (model class, batch by seed, its call, loss)
Way = tuple[type[nn.Module], Callable[[int], Any], Callable[[nn.Module, Any], torch.Tensor], Any]
WAYS: dict[str, Way] = {
    "keywords": (ByKeywords, entries, lambda model, batch: model(**batch), None),
    "any_keywords": (AnyKeywords, entries, lambda model, batch: model(**batch), None),
    "wrapped": (Wrapped, entries, lambda model, batch: model(**batch), None),
    "by_position": (ByPosition, entries, lambda model, batch: model(*batch.values()), None),
    "any_positions": (AnyPositions, entries, lambda model, batch: model(*batch.values()), None),
    "tuple": (AnyPositions, lambda seed: tuple(entries(seed).values()), lambda model, batch: model(*batch), None),
    "one_mapping": (OneMapping, entries, lambda model, batch: model(batch), None),
    "nested": (Nested, nested, lambda model, batch: model(**batch), None),
    "tuple_and_loss": (
        Logits,
        lambda seed: tuple(entries(seed).values())[:2],
        lambda model, batch: position_loss(model(batch[0]), batch),
        position_loss,
    ),
}


class Shared(nn.Module):
    """Entries that are as long as the batch and hold no samples; SAMPLES classes and a sequence of SAMPLES."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.head = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, SAMPLES),
        )

    def forward(self, bias: Any, ids: Any, positions: Any, weight: Any, labels: Any, scales: Any) -> torch.Tensor:
        hidden = self.embed(ids) * (positions.sum(0).unsqueeze(-1) * 0.1).cos()
        scores = torch.softmax(self.query(hidden) @ hidden.transpose(1, 2) + bias, -1)
        out = self.head((scores @ hidden).mean(1))
        return F.mse_loss(out * weight, labels[:, None] * scales.sum() + 0 * out)


def shared_entries(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def real(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return {
        "bias": real(SAMPLES, SAMPLES),  # [sequence, sequence]
        "ids": torch.randint(WORDS, (SAMPLES, SAMPLES), generator=generator),
        "positions": real(3, SAMPLES, SAMPLES),  # samples along dimension 1
        "weight": real(SAMPLES),  # [classes]
        "labels": real(SAMPLES),
        "scales": real(SAMPLES),  # read as a whole: tied to nothing
    }
