"""What a user changes on a decorated model's module is followed, or refused by its name; never passed over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright.doors import Parallel
from shardwright.errors import ShardwrightError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def make() -> nn.Module:
    torch.manual_seed(3)
    return Net().double()


def batch(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, width, generator=generator).double() for name, width in (("x", 6), ("y", 4))}


def loss_of(output: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output, given["y"])


def parallel(size: int = 1) -> Parallel:
    decorate = shardwright.parallelize(
        hardware=f"{size}xCPU", loss=loss_of, optimizer="SGD", optimizer_options={"lr": 0.1}, self_test=False
    )
    return decorate(make)()


def test_alone_the_module_has_the_buffers_that_train_and_they_may_be_written() -> None:
    model, plain = parallel(), make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        if step == 2:
            for module in (model.module, plain):
                module.norm.reset_running_stats()
        loss = loss_of(plain.train()(batch(step)["x"]), batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert model.step(batch(step)).item() == pytest.approx(loss.item(), rel=1e-9)
        evaluated = loss_of(plain.eval()(batch(step)["x"]), batch(step))
        assert model.evaluate(batch(step)).item() == pytest.approx(evaluated.item(), rel=1e-9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def _set_rate(module: nn.Module) -> None:
    module.drop.p = 0.5


def _hook(module: nn.Module) -> None:
    module.a.register_full_backward_hook(lambda *_: None)


def _new_buffer(module: nn.Module) -> None:
    module.norm.running_mean = torch.zeros(8).double()


CHANGES: list[tuple[Callable[[nn.Module], object], str]] = [
    (lambda module: module.eval(), "training"), (_set_rate, "drop.p"), (_new_buffer, "norm.running_mean"),
    (_hook, "a._is_full_backward_hook"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_a_change_that_the_program_would_not_follow_is_refused(change: Callable[[nn.Module], object], named: str):
    model = parallel()
    model.step(batch(0))
    change(model.module)
    with pytest.raises(ShardwrightError, match=f"{named} of the module was"):
        model.step(batch(1))


def test_a_module_put_into_evaluation_and_back_trains_on_with_any_batch_size() -> None:
    model = parallel()
    model.step(batch(0))
    model.module.eval()
    model.evaluate(batch(0))
    model.module.train()
    model.step(batch(1))
    model.step(batch(2, size=5))  # captured once more
    model.step(batch(3))


def test_a_nan_on_the_module_is_as_it_was() -> None:
    model = parallel()
    model.module.best, model.module.bounds = float("nan"), (float("nan"), 1.0)
    model.step(batch(0))
    model.step(batch(1))
    model.module.best = float("nan")  # another object
    model.step(batch(2))
    model.module.bounds = (float("nan"), 2.0)
    with pytest.raises(ShardwrightError, match="bounds of the module was"):
        model.step(batch(3))


def _on_two_ranks(rank: int) -> list[str]:
    model = parallel(2)
    model.step(batch(0))
    model.evaluate(batch(0))
    model.step(batch(1))
    found = []
    for change in (model.module.state_dict, model.module.b.weight.zero_):
        try:
            with torch.no_grad():
                change()
            model.step(batch(2))
        except ShardwrightError as error:
            found.append(error.what)
    return found


def test_a_module_whose_values_are_on_the_ranks_is_neither_saved_nor_written() -> None:
    for saved, written in run_ranks(2, _on_two_ranks):
        assert "has no values" in saved and written.startswith("b.weight of the module was written to")


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict", "train", "eval", "to", "cuda", "zero_grad"])
def test_what_a_module_has_and_a_decorated_model_lacks_says_what_there_is(name: str) -> None:
    model = parallel()
    assert not hasattr(model, name)
    with pytest.raises(ShardwrightError) as caught:
        getattr(model, name)
    assert "model." in caught.value.works or "parallelize" in caught.value.works
    with pytest.raises(ShardwrightError, match="is not called"):
        model(batch(0)["x"])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018
