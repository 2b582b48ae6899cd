"""Modules built inside a forward initialize memory that nothing reads: no random op of the model's."""

from __future__ import annotations

import torch
from torch import nn

from shardwright import api


class Rebuilds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nn.Linear(8, 8)  # its initial values are drawn and thrown away
        return self.linear(x).pow(2).mean()


def test_initial_values_that_nothing_reads_are_dropped():
    made = api.load_workload(f"{__file__}:rebuilds", global_batch=4)
    graph = api.capture_for_planning(made)
    assert not any(segment.has_random for segment in graph.segments.values())


def rebuilds() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Rebuilds(), {"x": torch.randn(4, 8)}
