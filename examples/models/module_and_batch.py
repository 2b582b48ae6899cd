"""The shortest factory: a module that computes its own loss, and a batch by the names of its forward's arguments.

shardwright check examples/models/module_and_batch.py:regression --hardware 4xCPU --force dp=2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.layers(features).squeeze(-1)
        return {"loss": F.mse_loss(predicted, target), "predicted": predicted}


def regression() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    features = torch.randn(16, 8)
    return Regression(), {"features": features, "target": features.sum(1).sin()}
