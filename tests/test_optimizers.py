"""Optimizers of all kinds, saved and resumed, train as they do without Shardwright; or are refused by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from own_optimizers import (
    AddsNoise,
    CountsForAll,
    CountsInPython,
    DividesByTheNormOfAll,
    HasAnArgumentOfItsOwn,
    KeepsAList,
    KeepsMoreLater,
    ScalesByTheNormOfMatrices,
    TakesMatrices,
)
from torch import nn

import shardwright
from shardwright.doors import Parallel
from shardwright.errors import ShardwrightError
from shardwright.runtime.coupling import refuse_coupled

LAYOUTS: list[dict[str, int]] = [{"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}]
RATE = {"lr": 1e-2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
        self.mid = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.mid(torch.tanh(self.a(x))))


def make() -> nn.Module:
    torch.manual_seed(3)
    return Net().double()


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(8, 6, generator=generator).double(), "y": torch.randn(8, 4, generator=generator).double()}


def loss_of(output: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output, given["y"])


def parallel(size: int, force: dict[str, int], optimizer: Any = torch.optim.SGD, options: Any = None) -> Parallel:
    decorate = shardwright.parallelize(
        hardware=f"{size}xCPU", loss=loss_of, optimizer=optimizer, optimizer_options=options or {}, force=force,
        self_test=False,
    )  # fmt: skip
    return decorate(make)()


def expected(optimizer: Any, options: dict[str, Any], steps: int = 5) -> list[float]:
    model = make()
    stepper = optimizer(model.parameters(), **options)
    losses = []
    for step in range(steps):
        stepper.zero_grad()
        loss = loss_of(model(batch(step)["x"]), batch(step))
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return losses


def _resumed(rank: int, size: int, force: dict[str, int], optimizer: Any, options: Any, folder: str) -> list[float]:
    """Saved after two steps and gone on with in another program."""
    model = parallel(size, force, optimizer, options)
    losses = [model.step(batch(step)).item() for step in range(3)]
    model.program.save(Path(folder) / "saved")
    again = parallel(size, force, optimizer, options)
    again.prepare(batch(0)).load(Path(folder) / "saved")
    return losses + [again.step(batch(step)).item() for step in range(3, 5)]


OWN = [(CountsInPython, {}), (KeepsMoreLater, {}), (CountsForAll, {}), (torch.optim.Adam, {"lr": torch.tensor(1e-2)})]


@pytest.mark.parametrize(("optimizer", "options"), OWN, ids=lambda given: getattr(given, "__name__", ""))
@pytest.mark.parametrize("force", [{}, *LAYOUTS], ids=str)
def test_a_resumed_run_has_all_that_its_optimizer_keeps(
    force: dict[str, int], optimizer: Any, options: Any, tmp_path: Path
) -> None:
    if force:
        found = run_ranks(2, _resumed, 2, force, optimizer, options, str(tmp_path))
    else:
        found = [_resumed(0, 1, {}, optimizer, options, str(tmp_path))]
    for losses in found:
        assert losses == pytest.approx(expected(optimizer, options), rel=1e-9)


def test_state_of_options_that_only_the_checkpoint_has_is_made(tmp_path: Path) -> None:
    model = parallel(1, {}, torch.optim.Adam, {**RATE, "amsgrad": True})
    losses = [model.step(batch(step)).item() for step in range(3)]
    model.program.save(tmp_path / "saved")
    again = parallel(1, {}, torch.optim.Adam, RATE)
    again.prepare(batch(0)).load(tmp_path / "saved")
    losses += [again.step(batch(step)).item() for step in range(3, 5)]
    assert losses == pytest.approx(expected(torch.optim.Adam, {**RATE, "amsgrad": True}), rel=1e-9)


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = parallel(1, {}, KeepsAList)
    model.step(batch(0))
    with pytest.raises(ShardwrightError, match=r"history, a list,"):
        model.program.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def _refusal(rank: int, force: dict[str, int], optimizer: Any) -> str:
    try:
        parallel(2, force, optimizer).step(batch(0))
    except ShardwrightError as error:
        return error.works
    return ""


def test_a_step_that_looks_at_all_parameters_is_refused_on_stages_alone() -> None:
    assert "pp=1" in run_ranks(2, _refusal, {"pp": 2}, DividesByTheNormOfAll)[0]
    assert run_ranks(2, _refusal, {"tp": 2}, DividesByTheNormOfAll) == ["", ""]


def _own_scaled(rank: int) -> list[str]:
    """What is refused, of an optimizer that is given by its class and options, and of one that is assigned."""
    model = parallel(2, {"pp": 2}, HasAnArgumentOfItsOwn, {"scale": 0.5})
    model.step(batch(0))
    try:
        model.program.optimizer = HasAnArgumentOfItsOwn(model.parameters(), 2.0)
    except ShardwrightError as error:
        assert model.optimizer.scale == 0.5  # it stays
        return [error.what, error.works]
    return []


def test_an_optimizer_that_cannot_be_tried_is_refused_on_stages_by_name() -> None:
    for what, works in run_ranks(2, _own_scaled):
        assert what.startswith("HasAnArgumentOfItsOwn could not be tried") and "scale" in what and "pp=1" in works


def test_optimizers_of_matrices_alone_and_of_noise_are_tried_as_they_are() -> None:
    for kind in (AddsNoise, TakesMatrices):
        refuse_coupled("", kind, {}, 2)
    with pytest.raises(ShardwrightError, match="steps a parameter by what the other parameters"):
        refuse_coupled("", ScalesByTheNormOfMatrices, {}, 2)


def test_what_an_optimizer_raises_is_said_by_its_name() -> None:
    with pytest.raises(ShardwrightError, match=r"LBFGS\.step\(\) failed: .*closure"):
        parallel(1, {}, torch.optim.LBFGS).step(batch(0))
    assert "pp=N" in run_ranks(2, _refusal, {"tp": 2}, torch.optim.Adafactor)[0]


# gradients by hand


def _two_calls(model: Parallel, between: Callable[[Parallel], None] = lambda model: None) -> None:
    model.forward_backward(batch(0))
    between(model)
    model.forward_backward(batch(1))
    model.optimizer_step()


def test_gradients_that_are_not_added_up_are_not_stepped_by() -> None:
    model = parallel(1, {}, options=RATE)
    with pytest.raises(ShardwrightError, match="called 2 times since the last step"):
        _two_calls(model)
    for dropped in (lambda m: m.program.zero_grad(), lambda m: m.optimizer_step(), lambda m: m.optimizer.step()):
        model.program.zero_grad()
        _two_calls(model, dropped)
    model.forward_backward(batch(0))
    model.optimizer.step()
    with pytest.raises(ShardwrightError, match="called 2 times since the last step"):
        _two_calls(model)
    with pytest.raises(ShardwrightError, match="called 2 times since the last step"):
        model.optimizer.step()


def _steps_itself(rank: int, size: int, force: dict[str, int]) -> tuple[list[float], int]:
    """The user steps the optimizer, on the ranks that have one."""
    model = parallel(size, force, torch.optim.AdamW, RATE)
    losses = []
    for step in range(3):
        losses.append(model.forward_backward(batch(step)).item())
        for parameter in model.parameters():
            parameter.grad = parameter.grad * 1.0  # another tensor
        if model.optimizer is not None:
            model.optimizer.step()
            model.optimizer.zero_grad()
    model.evaluate(batch(0))
    return losses, model.program.step_index


@pytest.mark.parametrize("force", LAYOUTS, ids=str)
def test_a_step_of_the_optimizer_itself_counts_as_a_step(force: dict[str, int]) -> None:
    for losses, steps in run_ranks(2, _steps_itself, 2, force):
        assert losses == pytest.approx(expected(torch.optim.AdamW, RATE, 3), rel=1e-9)
        assert steps == 3  # which random numbers depend on


def test_a_step_of_the_optimizer_itself_is_refused_where_it_leaves_out_clipping() -> None:
    model = shardwright.parallelize(hardware="1xCPU", loss=loss_of, max_grad_norm=0.1, self_test=False)(make)()
    model.forward_backward(batch(0))
    with pytest.raises(ShardwrightError, match="ask for clipping"):
        model.optimizer.step()


def _clips(rank: int, force: dict[str, int]) -> str:
    model = parallel(2, force, options=RATE)
    model.forward_backward(batch(0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    try:
        model.optimizer_step()
    except ShardwrightError as error:
        return error.change
    return ""


def test_clipping_each_stage_by_a_norm_of_its_own_is_refused() -> None:
    assert run_ranks(2, _clips, {"pp": 2}) == ["max_grad_norm"] * 2
    assert run_ranks(2, _clips, {"tp": 2}) == ["", ""]


def _halves(rank: int) -> None:
    model = parallel(2, {"pp": 2}, options=RATE)
    model.forward_backward(batch(0))
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)
    model.optimizer_step()


def test_gradients_halved_on_every_stage_are_stepped_by() -> None:
    run_ranks(2, _halves)


def _clips_and_steps_itself(rank: int, after: str) -> str:
    model = parallel(2, {"pp": 2}, options=RATE)
    model.forward_backward(batch(0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    model.optimizer.step()
    try:
        model.program.save("unused") if after == "save" else model.forward_backward(batch(1))
    except ShardwrightError as error:
        return error.change
    return ""


@pytest.mark.parametrize("after", ["save", "forward_backward"])
def test_a_step_of_the_optimizer_itself_by_unlike_factors_is_refused_at_the_next_call(after: str) -> None:
    assert run_ranks(2, _clips_and_steps_itself, after) == ["max_grad_norm"] * 2


def _saves_after_its_step(rank: int, folder: str) -> list[int]:
    model = parallel(2, {"pp": 2}, options=RATE)
    for step in range(3):
        model.forward_backward(batch(step))
        model.optimizer.step()
    model.program.save(folder)
    model.forward_backward(batch(3))
    model.optimizer.step()
    model.program.load(folder)
    model.evaluate(batch(0))
    return [json.loads((Path(folder) / "program.json").read_text())["step"], model.program.step_index]


def test_a_step_of_the_optimizer_itself_is_counted_before_a_save_and_not_after_a_load(tmp_path: Path) -> None:
    assert run_ranks(2, _saves_after_its_step, str(tmp_path / "saved")) == [[3, 3]] * 2


def _gradients_alive(rank: int) -> int:
    model = parallel(2, {"pp": 2}, options=RATE)
    model.forward_backward(batch(0))
    held = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    model.optimizer_step()
    return sum(ref() is not None for ref in held)


def test_gradients_are_let_go_with_the_step() -> None:
    assert run_ranks(2, _gradients_alive) == [0, 0]


# values by hand


def _sets_data(rank: int) -> str:
    model = parallel(2, {"tp": 2}, options=RATE)
    model.step(batch(0))
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    try:
        model.step(batch(1))
    except ShardwrightError as error:
        return error.change
    return ""


def test_values_given_as_data_are_followed_or_refused() -> None:
    model, plain = parallel(1, {}, options=RATE), make()
    model.prepare(batch(0))
    for parameter in (*model.parameters(), *plain.parameters()):
        parameter.data = parameter.data * 0.5
    assert model.step(batch(0)).item() == pytest.approx(loss_of(plain(batch(0)["x"]), batch(0)).item(), rel=1e-12)
    assert run_ranks(2, _sets_data) == ["parameter.data = tensor"] * 2


def _sets_another_shape(rank: int) -> str:
    model = parallel(2, {"pp": 2}, options=RATE)
    model.step(batch(0))
    if "b.bias" in (own := dict(model.named_parameters())):
        own["b.bias"].data = torch.zeros(1).double()
    try:
        model.step(batch(1))
    except ShardwrightError as error:
        return error.what
    return ""


def test_data_of_another_shape_on_one_rank_is_refused_on_all() -> None:
    said = "b.bias.data was given a tensor of shape (1,); the parameter has (4,)"
    assert sorted(run_ranks(2, _sets_another_shape)) == ["another rank refused: " + said, said]


def test_another_view_given_as_data_is_followed() -> None:
    model, plain = parallel(1, {}, options=RATE), make()
    program = model.prepare(batch(0))
    for named in (dict(program.named_parameters()), dict(plain.named_parameters())):
        weight = named["mid.0.0.weight"]
        weight.data = weight.data.t()
    assert model.step(batch(0)).item() == pytest.approx(loss_of(plain(batch(0)["x"]), batch(0)).item(), rel=1e-12)


def test_a_state_dictionary_of_the_model_itself_loads_and_one_of_another_does_not() -> None:
    torch.manual_seed(50)
    other = Net().double()
    model = parallel(1, {}, options=RATE)
    program = model.prepare(batch(0))
    program.load_state_dict(other.state_dict())
    assert model.evaluate(batch(0)).item() == pytest.approx(loss_of(other(batch(0)["x"]), batch(0)).item(), rel=1e-12)
    with pytest.raises(ShardwrightError, match=r"the model has no 'c\.weight'"):
        program.load_state_dict({"c.weight": torch.zeros(3)})
    for key in ("module.b.bias", "model.c.bias", "optimizer.c.bias.exp_avg"):
        with pytest.raises(ShardwrightError, match=f"the model has no '{key}'"):
            program.load_state_dict({key: torch.zeros(4)}, strict=False)
    part = {"b.bias": torch.zeros(4)}
    with pytest.raises(ShardwrightError, match=r"has no a\.bias and 10 more"):
        program.load_state_dict(part)
    program.load_state_dict(part, strict=False)
    assert not dict(program.named_parameters())["b.bias"].any()
