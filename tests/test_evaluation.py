"""evaluate() and outputs() are what model.eval() gives under PyTorch; training goes on as if they had not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload

DOUBLE = Precision(torch.float64, torch.float64, torch.float64)
SAMPLES, WIDTH, CLASSES = 8, 6, 5


class Result(NamedTuple):
    logits: torch.Tensor
    parts: dict[str, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(torch.tanh(self.norm(self.linear(x))), 0.5, self.training)


class Net(nn.Module):
    """Batch statistics, dropout, a branch on the mode, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, x: torch.Tensor) -> Result:
        hidden = x
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden) * (1.0 if self.training else 1.5)
        return Result(logits, {"hidden": [hidden, None], "mean": logits.mean(), "name": "net"})


def loss_of(output: Result, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output.logits, batch["labels"])


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    labels[5] = -100
    return {"x": torch.randn(SAMPLES, WIDTH, dtype=torch.float64, generator=generator), "labels": labels}


def _train(rank: int, force: dict[str, Any], evaluates: bool) -> Any:
    spec = OptimizerSpec("SGD", torch.optim.SGD, {"lr": 0.1}, 0)
    workload = Workload(
        model=Net(), example_batch=batch_of(0), global_batch=SAMPLES, loss=loss_of, precision=DOUBLE, optimizer=spec
    )
    program = shardwright.build(shardwright.plan(workload, f"{2 if force else 1}xCPU", force=force), workload)
    losses, evaluated, outputs = [], None, []
    for step in range(2):
        losses.append(program.step(program.shard_batch(batch_of(step))).item())
        if evaluates:
            part = program.shard_batch(batch_of(9))
            evaluated, outputs = program.evaluate(part).item(), program.outputs(part)
    state = {name: tensor for name, tensor in program.state_dict().items() if not name.startswith("optimizer")}
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return losses, evaluated, outputs, whole


def _eager(states: list[dict[str, torch.Tensor]]) -> nn.Module:
    """The model as PyTorch has it after the same steps, in evaluation mode."""
    values = {name.split(".", 1)[1]: tensor for state in states for name, tensor in state.items()}
    model = Net()
    missing = model.load_state_dict(values, strict=False).missing_keys
    assert not missing
    return model.eval()


@torch.no_grad()
def _check(found: list[Any], last: list[int], data_ranks: int) -> None:
    model = _eager([rank[3] for rank in found])
    expected = model(batch_of(9)["x"])
    loss = loss_of(expected, batch_of(9)).item()
    assert all(rank[1] == pytest.approx(loss, rel=1e-9) for rank in found)
    for number in range(len(found)):
        assert (number in last) == bool(found[number][2])
    micro = [[output.logits for output in found[rank][2]] for rank in last]
    logits = torch.cat([piece for pieces in zip(*micro, strict=True) for piece in pieces])
    torch.testing.assert_close(logits, expected.logits, rtol=1e-9, atol=1e-12)
    first = found[last[0]][2][0]
    assert isinstance(first, Result) and first.parts["name"] == "net" and first.parts["hidden"][1] is None
    assert first.parts["hidden"][0].shape == (SAMPLES // len(found[last[0]][2]) // data_ranks, WIDTH)


def test_evaluation_is_the_models_own_and_leaves_training_alone() -> None:
    found, plain = _train(0, {}, True), _train(0, {}, False)
    _check([found], [0], 1)
    assert found[0] == plain[0]
    assert all(torch.equal(tensor, plain[3][name]) for name, tensor in found[3].items())


@pytest.mark.parametrize(
    ("force", "last", "data_ranks"),
    [({"dp": 2, "zero": 3, "microbatch": 2}, [0, 1], 2), ({"pp": 2, "microbatch": 4}, [1], 1)],
)
def test_evaluation_runs_where_training_does(force: dict[str, Any], last: list[int], data_ranks: int) -> None:
    _check(run_ranks(2, _train, force, True), last, data_ranks)


class Scaled(nn.Module):
    """A buffer and a constant that evaluation alone reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.rand(CLASSES))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.head(x)
        return self.head(x) * self.scale + torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], dtype=x.dtype)


def test_what_evaluation_alone_reads_is_no_state_of_the_program(tmp_path: Path) -> None:
    loss = lambda output, batch: F.cross_entropy(output, batch["labels"])  # noqa: E731
    workload = Workload(
        model=Scaled(), example_batch=batch_of(0), global_batch=SAMPLES, loss=loss, precision=DOUBLE,
        batch_dims={"x": 0, "labels": 0},
    )  # fmt: skip
    program = shardwright.build(shardwright.plan(workload, "1xCPU"), workload)
    before = set(program.state_dict())
    program.save(tmp_path / "saved")
    expected = loss(Scaled().eval()(batch_of(9)["x"]), batch_of(9)).item()
    for _ in range(2):
        assert program.evaluate(batch_of(9)).item() == pytest.approx(expected, rel=1e-9)
        assert set(program.state_dict()) == before
        program.load(tmp_path / "saved")


class Odd(nn.Module):
    """Of few samples it has other ops, which are placed anew."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head, self.dropout = nn.Linear(WIDTH, 2 * CLASSES), dropout
        self.double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x
        for block in self.blocks:
            h = F.dropout(block(h), self.dropout, self.training).tanh()
        h = self.head(h)
        h = h if len(x) % 4 == 0 else h.mul(3.0).sub(h).div(2.0)
        return F.cross_entropy(h, labels.clamp(min=0)), h


def _odd(count: int) -> dict[str, torch.Tensor]:
    return {"x": batch_of(3)["x"][:count], "labels": batch_of(3)["labels"][:count]}


def _outputs_of_another_size(rank: int, force: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Of 8 samples in microbatches of 4, of 6 (one of 4, one of 2), then of 8 again."""
    workload = Workload(model=Odd(), example_batch=_odd(8), global_batch=8, precision=DOUBLE)
    plan = shardwright.plan(workload, "2xCPU", force={"global_microbatch": 4, **force}, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    return [[out[1] for out in program.outputs(program.shard_batch(_odd(n)))] for n in (8, 6, 8)]


@pytest.mark.parametrize("force", [{"tp": 2, "head.weight": "S(0)"}, {"dp": 2}, {"pp": 2}], ids=["tp", "dp", "pp"])
@torch.no_grad()
def test_outputs_of_a_short_batch_are_whole(force: dict[str, Any]) -> None:
    found = run_ranks(2, _outputs_of_another_size, force)
    for index, count in enumerate((8, 6, 8)):
        sizes, expected = (4, count - 4), Odd().eval()(**_odd(count))[1]
        for k, (size, start) in enumerate(zip(sizes, (0, 4), strict=True)):
            of_ranks = [rank[index][k] for rank in found if rank[index]]
            together = torch.cat(of_ranks) if "dp" in force else of_ranks[0]
            want = Odd().eval()(**{n: t[start : start + size] for n, t in _odd(count).items()})[1]
            torch.testing.assert_close(together, want, rtol=1e-9, atol=1e-12)
            assert expected.shape[1] == together.shape[1]


def _frozen_then_short(rank: int) -> tuple[list[float], list[float]]:
    """A block of the user's model is frozen and the model is put into evaluation mode, then a short batch comes."""
    model, plain = Odd(), Odd()
    workload = Workload(model=model, example_batch=_odd(8), global_batch=8, precision=DOUBLE)
    program = shardwright.build(shardwright.plan(workload, "1xCPU", self_test=False), workload, self_test=False)
    mine = [program.forward_backward(_odd(8)).item()]
    for net in (model, plain):
        net.blocks[0].requires_grad_(False)
        net.eval()
    mine += [program.forward_backward(_odd(n)).item() for n in (5, 8)]
    assert set(program.gradients()) == {n for n, p in plain.named_parameters() if p.requires_grad}
    outputs = [program.outputs(_odd(5))[0][1], program.outputs(_odd(8))[0][1]]
    for out, n in zip(outputs, (5, 8), strict=True):
        torch.testing.assert_close(out, plain(**_odd(n))[1], rtol=1e-9, atol=1e-12)
    return mine, [plain(**_odd(n))[0].item() for n in (8, 5, 8)]


def test_a_layer_frozen_since_does_not_change_what_is_built_for_a_short_batch() -> None:
    mine, theirs = _frozen_then_short(0)
    assert mine == pytest.approx(theirs, rel=1e-9)
