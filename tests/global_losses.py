"""Losses of a batch whose microbatches do not count alike, for tests of profiler/global_loss.py and loss_over.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, WIDTH, SAMPLES, LENGTH = 7, 6, 8, 4
LOSSES: dict[str, Any] = {
    "ignored": lambda y, b: F.cross_entropy(y.flatten(0, 1), b["t"].flatten()),
    "class_weights": lambda y, b: F.cross_entropy(y.flatten(0, 1), b["t"].flatten(), b["c"], label_smoothing=0.1),
    "negative_log": lambda y, b: F.nll_loss(y.log_softmax(-1).transpose(1, 2), b["t"]),
    "masked": lambda y, b: (y.square().mean(-1) * b["m"]).sum() / b["m"].sum(),
    "clamped": lambda y, b: (y.square().mean(-1) * b["m"]).sum() / (b["m"].sum().clamp(min=1.0) + 1e-6),
    "means": lambda y, b: (y.abs().mean(-1) * b["m"]).mean() / b["m"].mean(),
    "reciprocal": lambda y, b: (y.square().sum(-1) * b["m"]).sum() * (0.5 / b["m"].sum()),
    "normalized": lambda y, b: (y.square().sum(-1) * (b["m"] / b["m"].sum())).sum(),
    "counted": lambda y, b: (token_losses(y, b) * (b["t"] != -100)).sum() / (b["t"] != -100).sum(),
    "two": lambda y, b: 0.3 * F.cross_entropy(y.flatten(0, 1), b["t"].flatten()) + F.mse_loss(y[..., 0], b["m"]),
    "sum": lambda y, b: F.cross_entropy(y.flatten(0, 1), b["t"].flatten(), reduction="sum"),
    "sum_over_given": lambda y, b: F.cross_entropy(y.flatten(0, 1), b["t"].flatten(), reduction="sum") / b["n"],
    "sum_over_size": lambda y, b: y.square().sum() / len(y),
    "last": lambda y, b: y[torch.arange(len(y)), b["t"].ne(-100).sum(1) - 1].square().mean(),
    "masked_rows": lambda y, b: torch.where(b["m"] > 0.5, 0.0, y[..., 0]).square().mean(),
    "columns": lambda y, b: y.slice_scatter(2 * y[:, ::2], 1, 0, None, 2).square().mean(),
    "derived": lambda y, b: F.cross_entropy(y.flatten(0, 1), torch.where(b["m"] > 0.3, b["t"], -100).flatten()),
    "synonyms": lambda y, b: (
        torch.multiply(y.square().mean(-1), b["m"]).sum().divide((b["m"] > 0).__and__(b["m"] < 0.9).sum())
    ),
    "samples": lambda y, b: (token_losses(y, b) * b["m"]).sum(1).div(b["m"].sum(1)).mean(),
}
OVER = dict.fromkeys(LOSSES, "mean") | {"sum": "sum", "sum_over_given": "sum"}
EACH: dict[str, Any] = {
    "maximum": lambda y, b: y.max(),
    "squared": lambda y, b: y.mean().square(),
    "in_batch": lambda y, b: F.cross_entropy(y[:, 0] @ y[:, 1].t(), torch.arange(len(y))),
    "standardized": lambda y, b: ((y - y.mean(0)) / y.std(0)).exp().mean(),
    "ranked": lambda y, b: (y[:, 0, 0].sort().values * b["m"][:, 0]).mean(),
    "turned": lambda y, b: (y * y[torch.arange(len(y) - 1, -1, -1)]).mean(),
    "first_two": lambda y, b: y.index_put((torch.tensor([0, 1]),), y.new_zeros(())).square().mean(),
    "first_row": lambda y, b: torch.cat([y, y]).unflatten(0, (2, -1))[0].slice_scatter(y[:1], 0, 0, 1).mean(),
    "gathered": lambda y, b: y.gather(0, b["t"].clamp(0, 1)[..., None].expand_as(y)).mean(),
    "sum_and_mean": lambda y, b: y.sum() + y.mean(),
    "of_a_table": lambda y, b: y.square().mean() / (b["m"].sum(1).sort().values * b["m"][:, 0]).sum(),
}


def token_losses(y: torch.Tensor, b: Any) -> torch.Tensor:
    return F.cross_entropy(y.flatten(0, 1), b["t"].flatten(), reduction="none").view_as(b["t"])


class Small(nn.Module):
    """Two blocks, so that a pipeline can cut it. names: of losses; their weighted sum is the model's."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.names = names
        self.double()

    def forward(self, x: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        y = self.head(x)
        found = [(LOSSES | EACH)[name](y, batch) for name in self.names]
        return sum((k + 1) * loss for k, loss in enumerate(found))  # type: ignore[return-value]


def batch_of(seed: int = 0, empty: bool = False) -> dict[str, torch.Tensor]:
    """Samples keep 4, 3, ... of their labels; empty: the first half none."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (SAMPLES, LENGTH), generator=generator)
    for sample in range(SAMPLES):
        targets[sample, LENGTH - sample // 2 :] = -100
    if empty:
        targets[: SAMPLES // 2] = -100
    kept = (targets != -100).double()
    return {
        "x": torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64, generator=generator),
        "t": targets,
        "m": kept * torch.rand(SAMPLES, LENGTH, dtype=torch.float64, generator=generator) + (0.0 if empty else 0.01),
        "c": torch.rand(CLASSES, dtype=torch.float64, generator=generator) + 0.1,
        "n": torch.tensor(23.0, dtype=torch.float64),
    }
