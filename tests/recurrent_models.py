"""Small recurrent models, for factories that worker processes import."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

VOCABULARY, WIDTH, HIDDEN = 17, 6, 5


class Recurrent(nn.Module):
    """Embedding, a recurrent module over samples first, and a head."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.time_first = not options.pop("batch_first", True)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = getattr(nn, kind)(WIDTH, HIDDEN, batch_first=not self.time_first, **options)
        self.head = nn.LazyLinear(VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x, state = self.rnn(x.transpose(0, 1) if self.time_first else x)
        x = x.transpose(0, 1) if self.time_first else x
        last = state[0] if isinstance(state, tuple) else state
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten()) + last.square().mean()


class Cells(Recurrent):
    """The steps written out by the user."""

    def __init__(self) -> None:
        super().__init__("LSTM")
        self.rnn, self.second = nn.LSTMCell(WIDTH, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        hidden = cell = second = x.new_zeros(x.shape[0], HIDDEN)
        outs = []
        for step in range(x.shape[1]):
            hidden, cell = self.rnn(x[:, step], (hidden, cell))
            second = self.second(hidden, second)
            outs.append(second)
        return F.cross_entropy(self.head(torch.stack(outs, 1)).flatten(0, 1), ids.flatten())


class Packed(Recurrent):
    """use: what the model does with the packed result."""

    def __init__(self, use: str, **options: Any) -> None:
        super().__init__("GRU", bidirectional=True, **options)
        self.use = use

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        if self.use == "maps":
            packed = PackedSequence(packed.data * 2, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        packed, last = self.rnn(packed)
        if self.use == "reads":
            return self.head(packed.data).square().mean()
        length = None if self.use == "longest" else ids.shape[1]
        x, _ = pad_packed_sequence(packed, batch_first=True, total_length=length)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten()) + last.square().mean()


MODELS: dict[str, Any] = {
    "lstm_dropout": lambda: Recurrent("LSTM", num_layers=3, dropout=0.3),
    "long": lambda: Recurrent("LSTM", num_layers=3, dropout=0.3),
    "lstm_both_ways": lambda: Recurrent("LSTM", bidirectional=True, proj_size=3, batch_first=False),
    "gru": lambda: Recurrent("GRU", num_layers=2, dropout=0.2, bias=False),
    "rnn": lambda: Recurrent("RNN", nonlinearity="relu", bidirectional=True),
    "cells": Cells,
    "packed": lambda: Packed("pads"),
    "packed_longest": lambda: Packed("longest"),
    "packed_reads": lambda: Packed("reads"),
    "packed_maps": lambda: Packed("maps"),
    "packed_dropout": lambda: Packed("pads", num_layers=2, dropout=0.3),
}


def _factory(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, batch = MODELS[name](), {"ids": torch.randint(VOCABULARY, (4, 512 if name == "long" else 5))}
    if name.startswith("packed"):
        batch["lengths"] = torch.tensor([5, 2, 4, 1])
        model.use, use = "pads", model.use
    model(**batch)  # the head sees how wide the result is
    if name.startswith("packed"):
        model.use = use
    return model, batch


def __getattr__(name: str) -> Any:
    if name.startswith("make_"):
        return lambda: _factory(name.removeprefix("make_"))
    raise AttributeError(name)
