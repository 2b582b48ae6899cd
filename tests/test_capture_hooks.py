"""A captured graph has the gradients that a model's hooks make, or the hook is refused by name and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import largest_difference, workload_of
from distributed import run_ranks
from torch import nn

from shardwright import api, reference
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.capture import capture
from shardwright.profiler.copies import copy_model
from shardwright.profiler.models import make_reference_dtype

TOLERANCE = 1e-12


class Net(nn.Module):
    """between: what the forward does with its hidden tensor before it is used."""

    def __init__(self, between: Callable[[Net, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25]))
        self.between = between

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        early = h.sum()
        if self.between is not None:
            changed = self.between(self, h)
            h = h if changed is None else changed
        return F.cross_entropy(self.head(torch.tanh(self.b(h)) + h), y) + 0.1 * early


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(6, 5, generator=generator), "y": torch.tensor([0, 1, 2, 0, 1, 2])}


def on_parameter(model: Net) -> None:
    model.head.weight.register_hook(lambda g: g * 0.5)
    model.b.bias.register_hook(lambda g: g.clamp(-0.01, 0.01))


def twice_in_order(model: Net) -> None:
    model.b.weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    model.b.weight.register_hook(lambda g: g * 7 + 0.001)


def reads_a_buffer(model: Net) -> None:
    model.a.bias.register_hook(lambda g: g * model.scale)


def on_module(model: Net) -> None:
    model.b.register_full_backward_hook(lambda module, gi, go: tuple(-g for g in gi))
    model.b.register_full_backward_pre_hook(lambda module, go: (go[0] * 3,))


def forward_hooks(model: Net) -> None:
    model.b.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.b.register_forward_hook(lambda module, args, result: result * 3)


def clears_rows(model: Net) -> None:
    def hook(g: torch.Tensor) -> torch.Tensor:
        g = g.clone()
        g[:3] = 0
        g[:, model.scale > 1.0] = 0.5
        return g

    model.b.weight.register_hook(hook)


@pytest.mark.parametrize("put", [clears_rows, on_parameter, twice_in_order, reads_a_buffer, on_module, forward_hooks])
def test_hooks_on_a_model_are_in_the_graph(put: Callable[[Net], None]) -> None:
    model = Net()
    put(model)
    assert largest_difference(workload_of(model, batch())) < TOLERANCE


def reversal(model: Net, h: torch.Tensor) -> None:
    h.register_hook(lambda g: -g)


def two_on_one(model: Net, h: torch.Tensor) -> None:
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    h.register_hook(lambda g: g * 5)


def then_written(model: Net, h: torch.Tensor) -> torch.Tensor:
    h = h * 2
    h.register_hook(lambda g: g * 5)
    h.mul_(3)
    h[:, ::2] += 1
    h.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return h


def removed(model: Net, h: torch.Tensor) -> None:
    h.register_hook(lambda g: g * 5).remove()


def changes_in_place(model: Net, h: torch.Tensor) -> None:
    h.register_hook(lambda g: g.mul_(3))


@pytest.mark.parametrize("between", [reversal, two_on_one, then_written, removed, changes_in_place])
def test_hooks_in_a_forward_are_in_the_graph(between: Callable[[Net, torch.Tensor], Any]) -> None:
    assert largest_difference(workload_of(Net(between), batch())) < TOLERANCE


def test_a_hook_on_a_tied_parameter_sees_its_whole_gradient() -> None:
    model = Net()
    model.b.weight = model.head.weight = nn.Parameter(torch.randn(8, 8))
    model.head.bias = nn.Parameter(torch.zeros(8))
    model.b.weight.register_hook(lambda g: g.clamp(-0.05, 0.05))
    assert largest_difference(workload_of(model, batch())) < TOLERANCE


def test_hooks_of_every_module_run_for_the_models_own() -> None:
    handles = [
        nn.modules.module.register_module_forward_hook(lambda module, args, result: result * 1.5),
        nn.modules.module.register_module_full_backward_pre_hook(lambda module, go: tuple(g * 2 for g in go)),
    ]
    try:
        assert largest_difference(workload_of(Net(), batch())) < TOLERANCE
    finally:
        for handle in handles:
            handle.remove()


def _gradients(rank: int, zero: int) -> dict[str, float]:
    """Largest differences on two data ranks of a hook that is no sum of parts, with a hook of every module about."""
    model = Net()
    model.b.weight.register_hook(lambda g: g.clamp(-0.002, 0.003) * g.abs().max())
    workload = workload_of(model, batch())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: None)
    every = nn.modules.module.register_module_forward_pre_hook(lambda module, args: tuple(a * 1 for a in args))
    try:
        plan = api.plan(workload, "2xCPU", force={"dp": 2, "zero": zero, "microbatch": 3}, self_test=False)
        program = api.build(plan, workload)
        program.forward_backward(program.shard_batch(batch_wide()))
        found = program.gradients()
        reference.forward_backward(workload, batch_wide(), microbatch_size=6)
    finally:
        handle.remove()
        every.remove()
    return {name: float((found[name] - p.grad).abs().max()) for name, p in model.named_parameters()}


def batch_wide() -> dict[str, torch.Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in batch().items()}


def test_a_hook_that_is_no_sum_of_parts_sees_the_gradient_of_all_ranks() -> None:
    for errors in run_ranks(2, _gradients, 1):
        assert max(errors.values()) < TOLERANCE, errors


def test_copies_keep_the_hooks_of_parameters() -> None:
    model = Net()
    on_parameter(model)
    assert copy_model(model).head.weight._backward_hooks
    assert largest_difference(make_reference_dtype(workload_of(model, batch()))) < TOLERANCE


def after_accumulation(model: Net) -> None:
    model.head.weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))


def observer(model: Net) -> None:
    model.head.weight.register_hook(lambda g: print(g.shape))


def reads_the_data(model: Net) -> None:
    model.head.weight.register_hook(lambda g: g if g.norm().item() < 1 else g / 2)


def draws(model: Net) -> None:
    model.head.weight.register_hook(lambda g: g + torch.rand_like(g))


def reads_grad_output(model: Net) -> None:
    model.b.register_full_backward_hook(lambda module, gi, go: (gi[0] * go[0].mean(),))


def old_kind(model: Net) -> None:
    model.b.register_backward_hook(lambda module, gi, go: None)


def saves_otherwise(model: Net) -> None:
    def between(model: Net, h: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            return h.exp()

    model.between = between


def counts_its_runs(model: Net) -> None:
    runs = [0.0]

    def hook(g: torch.Tensor) -> torch.Tensor:
        runs[0] += 1
        return g * runs[0]

    model.head.weight.register_hook(hook)


def keeps_a_statistic(model: Net) -> None:
    def hook(g: torch.Tensor) -> torch.Tensor:
        model.scale.add_(g.norm())
        return g * 2

    model.head.weight.register_hook(hook)


def on_a_node(model: Net) -> None:
    model.between = lambda model, h: h.grad_fn.register_hook(lambda gi, go: (gi[0] * 2,)) and None


def after_accumulation_in_the_forward(model: Net) -> None:
    model.between = lambda model, h: model.b.weight.register_post_accumulate_grad_hook(lambda p: None) and None


REFUSED = {
    counts_its_runs: "computes another gradient each time",
    keeps_a_statistic: "writes to a tensor that it is not given",
    on_a_node: "a hook is put on a grad_fn",
    after_accumulation_in_the_forward: "put behind an accumulated gradient",
    after_accumulation: "parameter head.weight runs after its gradient is accumulated",
    observer: "parameter head.weight returns nothing",
    reads_the_data: "cannot be traced",
    draws: "draws random numbers",
    reads_grad_output: "module b reads grad_output",
    old_kind: "register_backward_hook",
    saves_otherwise: "opens saved_tensors_hooks",
}


@pytest.mark.parametrize("put", REFUSED)
def test_a_hook_that_no_graph_can_carry_is_refused_by_name_and_line(put: Callable[[Net], None]) -> None:
    model = Net()
    put(model)
    with pytest.raises(ShardwrightError, match=REFUSED[put]) as found:
        capture(workload_of(model, batch()))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL
    assert f"{__file__}:" in found.value.what


@pytest.fixture(autouse=True)
def _no_hooks_left() -> Iterator[None]:
    """What capture patches is whole again, also where it failed."""
    before = torch.Tensor.register_hook, nn.modules.module.BackwardHook, torch.autograd.Function.__dict__["apply"]
    yield
    assert before == (
        torch.Tensor.register_hook,
        nn.modules.module.BackwardHook,
        torch.autograd.Function.__dict__["apply"],
    )
