"""Checks of the data in a forward end as they do for the example batch: assumed, and verified as the program runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import run_ranks
from split_modules import assert_equal_when_split, workload_of
from torch import nn
from torch.nn import functional as F

import shardwright
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.capture import capture
from shardwright.profiler.selected_targets import Selected

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


def test_answers_of_the_batch_alone_are_known_before_the_forward() -> None:
    graph = capture(workload_of(Checked(), batch()))
    prologue = {out for i in graph.instances if graph.segments[i.segment].is_prologue for out in i.outputs}
    assert len(graph.conditions) == 3 and set(graph.conditions) <= prologue
    assert len(graph.later_conditions) == 1


class Normed(Checked):
    """With a buffer that the forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, labels, lengths)
        return loss + self.norm(self.linear(x).mean(1)).square().mean()


def even_batch() -> dict[str, torch.Tensor]:
    """Any microbatch of it answers alike."""
    return {**batch(), "lengths": torch.full((4,), 6)}


def _bad(kind: str) -> dict[str, torch.Tensor]:
    found = even_batch()
    if kind == "label":
        found["labels"][3] = 7  # that cross entropy itself fails for, on the rank that has it
    elif kind == "ignored":
        found["labels"][0] = -100
    else:
        found["x"][2, 0, 0] = torch.inf
    return found


def _stopped(rank: int, force: dict[str, int]) -> list[tuple[str, int, bool, int]]:
    """Of a bad batch of each kind: the reason, its code, whether all is as it was. Then the next step goes on."""
    torch.manual_seed(0)
    workload = workload_of(Normed(), even_batch())
    plan = shardwright.plan(workload, "2xCPU", force={"global_microbatch": 2, **force}, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    program.step(program.shard_batch(even_batch()))
    found = []
    for kind in ("label", "ignored", "infinite"):
        before = {name: value.clone() for name, value in program.state_dict().items()}
        try:
            program.step(program.shard_batch(_bad(kind)))
        except ShardwrightError as error:
            after = program.state_dict()
            same = all(torch.equal(after[name], before[name]) for name in before)
            found.append((error.what, int(error.exit_code), same, program.step_index))
    if "dp" in force:
        with pytest.raises(ShardwrightError, match=r"test_assumptions\.py:"):
            program.evaluate(program.shard_batch(_bad("label")))
    program.step(program.shard_batch(even_batch()))
    return found


@pytest.mark.parametrize("force", [{"dp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_a_batch_that_answers_otherwise_on_one_rank_stops_all_and_changes_nothing(force: dict[str, int]) -> None:
    first, second = run_ranks(2, _stopped, force)
    assert first == second and len(first) == 3
    for what, code, same, step in first:
        assert "test_assumptions.py:" in what and code == ExitCode.PLAN_MISMATCH
        assert same and step == 1
    assert len({what for what, *_ in first}) == 3  # the line of each


def test_no_microbatch_waits_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tensor is asked in Python makes the host wait for the device: once a step of each kind of question."""
    torch.manual_seed(0)
    workload = workload_of(Checked(), even_batch())
    plan = shardwright.plan(workload, "1xCPU", force={"microbatch": 1}, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    asked = []
    for name in ("__bool__", "item", "tolist", "__int__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, own=own, name=name: (asked.append(name), own(t))[1])
    program.step(even_batch())
    assert asked == ["tolist", "tolist"]


def test_a_short_last_batch_is_asked_the_questions_of_the_example_batch() -> None:
    torch.manual_seed(0)
    model = Checked().double()
    program = _built_for(model)
    short = {name: tensor[:3] for name, tensor in batch().items()}
    assert program.forward_backward(short).item() == pytest.approx(model(**short).item(), rel=1e-9)


def _built_for(model: nn.Module) -> shardwright.Program:
    workload = workload_of(model, batch())
    plan = shardwright.plan(workload, "1xCPU", self_test=False)
    return shardwright.build(plan, workload, self_test=False)


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


class ChecksNumbers(AsksOfNumbers):
    """Checks of computed numbers that do nothing but raise, torch's own among them."""

    bound = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x).exp()
        if (h <= self.bound).any():
            raise ValueError("not positive")
        if self.training and (h < -1).any():
            raise ValueError("below -1")
        assert (h >= 0).all() and h.sum() > 0, "negative"
        return 1e-9 * F.gaussian_nll_loss(h[:, :3].cos(), h[:, 3:6], h[:, 4:7] * 1e-6)


def test_what_a_check_asks_that_only_raises_is_assumed() -> None:
    torch.manual_seed(0)
    graph = assert_equal_when_split(ChecksNumbers(), TP, x=batch()["x"])
    assert len(graph.later_conditions) == 4  # lines, one of which asks twice
    model = ChecksNumbers()
    workload = workload_of(model, {"x": batch()["x"]})
    plan = shardwright.plan(workload, "1xCPU")
    program = shardwright.build(plan, workload)
    good = dict(workload.example_batch)
    program.step(program.shard_batch(good))
    with pytest.raises(ShardwrightError, match=r"the question at .*test_assumptions.py:\d+"):
        program.step(program.shard_batch({"x": torch.full_like(good["x"], -1e6) * good["x"].abs()}))


class Skips(nn.Module):
    """Layer drop: a layer that is left out by chance."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear, self.probability = nn.Linear(6, 5), probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return (h if torch.rand([]) < self.probability else h.tanh()).square().mean()


def test_a_path_by_chance_is_refused_by_line_unless_it_is_always_the_same() -> None:
    capture(workload_of(Skips(0.0), {"x": batch()["x"]}))
    with pytest.raises(ShardwrightError, match=r"test_assumptions.py:\d+ decides by a random number") as found:
        capture(workload_of(Skips(0.1), {"x": batch()["x"]}))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


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


class AlignedByMask(nn.Module):
    """Targets in one row, as transformers gives them: those that are neither ignored nor blank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        frames = self.linear(x).log_softmax(-1).transpose(0, 1)
        counts = (labels != -100) & (labels != 0)
        frames_of = torch.full_like(labels[:, 0], x.shape[1])
        return F.ctc_loss(frames, labels.masked_select(counts), frames_of, counts.sum(-1), reduction="sum")


def test_targets_that_a_mask_selects_are_those_of_padded_rows() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, -100], [-100, 3, 1], [4, -100, 4], [2, 0, -100]])
    graph = assert_equal_when_split(AlignedByMask(), TP, x=batch()["x"], labels=labels)
    assert len(conditions(graph)) == 1  # that each row has as many targets as it is said to have


class SelectsElsewhere(nn.Module):
    def __init__(self, read: Callable[[torch.Tensor], Any] = lambda selected: selected.sum()) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(6, 5), read

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean() * self.read(labels.masked_select(labels > 1))


def test_a_selection_that_anything_else_reads_is_refused_by_line() -> None:
    labels = torch.tensor([[1, 2, 3], [0, 3, 1], [4, 1, 4], [2, 0, 2]])
    with pytest.raises(ShardwrightError, match=r"size follows from data|cannot be captured"):
        capture(workload_of(SelectsElsewhere(), {"x": batch()["x"], "labels": labels}))


READERS = [
    lambda selected: (selected + 1).sum(),
    lambda selected: (2 - selected).sum(),
    lambda selected: (-selected).sum(),
    lambda selected: (selected == 1).sum(),
    lambda selected: selected[0],
    lambda selected: len(selected),
    lambda selected: 2.0 if selected else 1.0,
]


@pytest.mark.parametrize("read", READERS)
def test_operators_on_a_selection_are_those_of_its_tensor(read: Callable[[torch.Tensor], Any]) -> None:
    selected = Selected(torch.tensor([[1, 2], [3, 1]]), torch.tensor([[False, False], [True, False]]))
    assert read(selected) == read(torch.tensor([3]))


def test_an_operator_on_a_selection_is_refused_by_line() -> None:
    labels = torch.tensor([[1, 2, 3], [0, 3, 1], [4, 1, 4], [2, 0, 2]])
    model = SelectsElsewhere(lambda selected: (selected == 1).sum())
    with pytest.raises(ShardwrightError, match=r"test_assumptions.py.* makes a tensor whose size follows from data"):
        capture(workload_of(model, {"x": batch()["x"], "labels": labels}))


class Windows(nn.Module):
    """Lengths of windows, as vision models cut sequences: sizes that follow from constants, and a list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([0, 3, 3, 5, 7]).unique_consecutive()
        kept = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 0, 1]))
        kept = kept[kept != 2]
        parts = self.linear(x).split((ends[1:] - ends[:-1]).tolist(), dim=1)
        longest = torch.tensor([lengths.max(), 7])
        return sum(part.square().mean() for part in parts) * len(kept) + longest.sum() * parts[0].mean()


def test_sizes_that_follow_from_constants_are_those_of_every_step() -> None:
    torch.manual_seed(0)
    entries = {name: tensor for name, tensor in batch().items() if name != "labels"}
    assert conditions(assert_equal_when_split(Windows(), TP, **entries)) == []


class UniqueOfData(Windows):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean() * lengths.unique().sum()


def test_sizes_that_follow_from_the_batch_are_refused_by_line() -> None:
    with pytest.raises(ShardwrightError, match=r"test_assumptions.py:\d+ makes a tensor whose size follows from data"):
        capture(workload_of(UniqueOfData(), {name: t for name, t in batch().items() if name != "labels"}))


class WithMadeMask(AlignedByMask):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        made = torch.arange(x.shape[1], device=self.linear.weight.device)
        return super().forward(x, labels) + self.linear(x)[:, made != 0].mean()


def test_what_a_model_on_meta_makes_beside_its_parameters_answers_nothing() -> None:
    """Nor does it stop the trace: the line is refused, as its size is known only where values are."""
    entries = {"x": batch()["x"].to("meta"), "labels": torch.zeros(4, 3, dtype=torch.int64, device="meta")}
    with pytest.raises(ShardwrightError, match="size follows from data"):
        capture(workload_of(WithMadeMask().double().to("meta"), entries))
