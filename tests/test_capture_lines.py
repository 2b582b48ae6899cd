"""The source lines that a trace notes for its nodes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from as_written import workload_of
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler import capture


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second):
            x = torch.tanh(layer(x)) + \
                x  # fmt: skip
        return x.sum()


def test_nodes_have_the_lines_that_torch_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(Net(), {"x": torch.ones(3, 4)})
    kept = [node.meta.get("stack_trace") for node in capture.export_step(workload).graph.nodes]
    monkeypatch.setattr(capture, "lines_kept", contextlib.nullcontext)
    assert kept == [node.meta.get("stack_trace") for node in capture.export_step(workload).graph.nodes]
    assert any("torch.tanh(layer(x))" in (text or "") for text in kept)


class Cast(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.first(x).sum()  # the line


def test_a_region_of_autocast_is_refused_with_a_line_in_it() -> None:
    code = Cast.forward.__code__
    with pytest.raises(ShardwrightError, match=rf"around .*{__name__}.py:{code.co_firstlineno + 2}"):
        capture.capture(workload_of(Cast(), {"x": torch.ones(3, 4)}))
