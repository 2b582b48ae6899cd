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
