"""@parallelize over a class and a factory: alone and under torchrun, it trains as the model as written does."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright.errors import ShardwrightError

OPTIONS = {"lr": 0.05, "momentum": 0.9}


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def squared_error(output: torch.Tensor, batch) -> torch.Tensor:
    return (output - batch["y"]).square().mean()


def make_net(width: int = 16) -> nn.Module:
    return Net(width).double()


def batches(count: int = 3, size: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [{"x": draw(size, 8), "y": draw(size, 3)} for _ in range(count)]


def expected_losses() -> list[float]:
    torch.manual_seed(11)
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), **OPTIONS)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = squared_error(model(batch["x"]), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parallel(made_by, **settings):
    chosen = {"hardware": "1xCPU", "loss": squared_error, "optimizer": "SGD", "optimizer_options": OPTIONS} | settings
    return shardwright.parallelize(**chosen)(made_by)


def test_alone_a_factory_trains_as_the_model_as_written():
    torch.manual_seed(11)
    model = parallel(make_net)()
    losses = [model.step(batch).item() for batch in batches()]
    assert losses == pytest.approx(expected_losses(), rel=1e-9)
    assert model.plan.mesh.num_devices == 1
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in Net().named_parameters()}
    # alone, the model's own tensors are the ones that train
    assert torch.equal(dict(model.module.named_parameters())["layers.0.weight"], next(model.parameters()))


def test_a_class_keeps_its_name_and_arguments():
    decorated = parallel(Net, hardware="1xCPU")
    assert decorated.__name__ == "Net" and decorated.__wrapped__ is Net
    model = decorated(width=24)
    batch = {name: tensor.float() for name, tensor in batches(1)[0].items()}
    model.prepare(batch)
    assert next(model.parameters()).shape[0] == 24
    assert "not planned" not in repr(model)


def test_asking_for_the_plan_too_early_says_what_to_do():
    with pytest.raises(ShardwrightError, match="prepare"):
        parallel(make_net)().plan  # noqa: B018


def _train(rank: int, force: dict[str, int]) -> tuple[list[float], dict[str, int], list[str]]:
    torch.manual_seed(11 + rank)  # ranks that are seeded differently still start from rank 0's values
    model = parallel(make_net, hardware="2xCPU", force=force)()
    first, *rest = batches()
    losses = [model.step(first).item()]
    losses += [model.step(model.shard_batch(batch)).item() for batch in rest]
    devices = sorted({parameter.device.type for parameter in model.module.parameters()})
    return losses, model.plan.mesh.model_dump(), devices


@pytest.mark.parametrize("force", [{"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}], ids=str)
def test_on_two_ranks_it_trains_as_the_model_as_written(force):
    expected = expected_losses()
    for losses, mesh, devices in run_ranks(2, _train, force):
        assert losses == pytest.approx(expected, rel=1e-9)
        assert mesh[next(iter(force))] == 2
        assert devices == ["meta"]  # the whole model is let go


def _too_many(rank: int) -> str:
    model = parallel(make_net, hardware="4xCPU")()
    try:
        model.prepare(batches(1)[0])
    except ShardwrightError as error:
        return error.works
    return ""


def test_a_plan_for_more_processes_than_there_are_names_the_torchrun_command():
    assert run_ranks(2, _too_many)[1] == "torchrun --nproc-per-node 4 SCRIPT"
