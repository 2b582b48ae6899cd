"""Checks of the data in a forward end as they do for the example batch: assumed, and verified as the program runs."""

from __future__ import annotations

import pytest
import torch
from split_modules import assert_equal_when_split, workload_of
from torch import nn
from torch.nn import functional as F

from shardwright.errors import ShardwrightError
from shardwright.profiler.capture import capture

TP = [{"tp": 2}]


class Checked(nn.Module):
    """Labels in range, as transformers' speech models ask; a path by whether any label is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if labels.max() >= 5:
            raise ValueError("a label is out of range")
        h = self.linear(x[:, : lengths.max().item()])
        if (labels < 0).any():
            h = h * 2
        if not torch.isfinite(h).all():
            h = h.clamp(-1, 1)
        return F.cross_entropy(h.mean(1), labels)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(4, 7, 6, dtype=torch.float64, generator=generator),
        "labels": torch.tensor([0, 4, 1, 2]),
        "lengths": torch.tensor([3, 6, 2, 4]),
    }


def conditions(graph: object) -> list[str]:
    return [n.args[2] for s in graph.segments.values() for n in s.joint.graph.nodes if "assumed" in str(n.target)]  # type: ignore[attr-defined]


def test_what_holds_for_the_example_batch_is_assumed() -> None:
    torch.manual_seed(0)
    graph = assert_equal_when_split(Checked(), TP, **batch())
    assert len(conditions(graph)) == 4 and all("test_assumptions.py:" in line for line in conditions(graph))


def test_a_batch_that_answers_otherwise_is_refused_by_line_as_it_runs() -> None:
    with pytest.raises(ShardwrightError, match=r"the question at .*test_assumptions.py:\d+"):
        torch.ops.shardwright.assumed(torch.ones(()), torch.tensor(False), "test_assumptions.py:26")


class AsksOfNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return h.square().mean() if h.sum() > 0 else h.mean()


def test_questions_about_what_parameters_make_are_refused() -> None:
    with pytest.raises(ShardwrightError, match="data"):
        capture(workload_of(AsksOfNumbers(), {"x": batch()["x"]}))


class Masked(nn.Module):
    """torch's own transformer looks whether its mask is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Transformer(8, 2, 1, 1, 8, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.stack(x, x * 2, tgt_mask=mask).square().mean()


def test_a_question_about_constants_needs_no_condition() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert conditions(assert_equal_when_split(Masked(), (), x=x)) == []


class Aligned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        frames = self.linear(x).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(frames, labels, torch.full_like(lengths, x.shape[1]), lengths, zero_infinity=True)


def test_connectionist_temporal_classification_equals_eager() -> None:
    torch.manual_seed(0)
    labels, lengths = torch.tensor([[1, 2], [3, 1], [4, 4], [2, 0]]), torch.tensor([2, 2, 2, 1])
    assert_equal_when_split(Aligned(), TP, x=batch()["x"], labels=labels, lengths=lengths)
