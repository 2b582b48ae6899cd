"""The self-test finds what a captured graph has lost of its model, and is run where a model is the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import shardwright
from shardwright import api, rounding, self_test
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler import as_written, copies, gradient_hooks, initial_values, models
from shardwright.profiler.capture import capture
from shardwright.profiler.workload import Precision, Workload

NARROW = Precision(torch.float32, torch.float32, torch.float32)


class Reverse(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return -g


class Net(nn.Module):
    def __init__(self, between: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.drop, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.between = between

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.norm(self.a(x)))
        h = h if self.between is None else self.between(self, h)
        return F.cross_entropy(self.head(h), y)


def workload_of(model: nn.Module, **changes: Any) -> Workload:
    batch = {"x": torch.randn(6, 5), "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    return dataclasses.replace(Workload(model, batch, 6, precision=NARROW, batch_size=6, name="Net"), **changes)


def test_a_model_passes_with_its_dropout_its_statistics_and_a_step() -> None:
    workload = workload_of(Net())
    before = {name: tensor.clone() for name, tensor in workload.model.state_dict().items()}
    torch.manual_seed(7)
    found = self_test.self_test(workload, capture(workload))
    assert (found.status, found.dtype, found.samples) == ("passed", "float64", 6)
    assert found.largest_difference < 1e-8
    after = workload.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in workload.model.parameters())
    assert torch.initial_seed() == 7


def off(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: contextlib.nullcontext())


def hooks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, as_written, "recorded_hooks")
    monkeypatch.setattr(gradient_hooks.GradientHooks, "record_parameters", lambda self: None)


def refusals_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_written, "refuse_hooks", lambda model: None)


def functions_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, as_written, "recorded_functions")


def checkpoints_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, as_written, "captured_through")


def engine_off(monkeypatch: pytest.MonkeyPatch) -> None:
    off(monkeypatch, as_written, "guarded_engine")


def carrying_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (copies, initial_values, models):
        monkeypatch.setattr(module, "carry_hooks", lambda source, target: None)


def on_parameter() -> Net:
    model = Net()
    model.head.weight.register_hook(lambda g: g * 0.5)
    return model


def halve(parameter: torch.Tensor) -> None:
    parameter.grad.mul_(0.5)


def on_accumulation() -> Net:
    model = Net()
    model.head.weight.register_post_accumulate_grad_hook(halve)
    return model


def on_module() -> Net:
    model = Net()
    model.norm.register_full_backward_hook(lambda module, gi, go: tuple(-g for g in gi))
    return model


def on_activation() -> Net:
    def between(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        h.register_hook(lambda g: -g)
        return h

    return Net(between)


SWITCHED_OFF = {
    "hooks of parameters": (hooks_off, on_parameter, "gradient of head.weight"),
    "hooks of modules": (hooks_off, on_module, "gradient of a.weight"),
    "hooks of tensors": (hooks_off, on_activation, "gradient of a.weight"),
    "refusals": (refusals_off, on_accumulation, "gradient of head.weight"),
    "copies with hooks": (carrying_off, on_parameter, "gradient of head.weight"),
    "Functions": (functions_off, lambda: Net(lambda net, h: Reverse.apply(h)), "gradient of a.weight"),
    "checkpoints": (
        checkpoints_off,
        lambda: Net(lambda net, h: checkpoint(torch.tanh, h, use_reentrant=True)),
        "gradient of a|no gradient comes through the loss",  # capture may see it first
    ),
}


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_with_a_remedy_switched_off_the_difference_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switch, make, named = SWITCHED_OFF[name]
    switch(monkeypatch)
    workload = workload_of(make())
    with pytest.raises(ShardwrightError, match=named) as found:
        self_test.self_test(workload, capture(workload))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


def test_what_a_copy_of_the_model_loses_is_found() -> None:
    model = Net()
    node = model.head.weight.expand_as(model.head.weight).grad_fn.next_functions[0][0]  # its AccumulateGrad
    node.register_prehook(lambda gradients: (gradients[0] * 0.5,))
    workload = workload_of(model)
    with pytest.raises(ShardwrightError, match=r"gradient of head\.weight"):
        self_test.self_test(workload, capture(workload))


def test_a_graph_that_keeps_what_a_step_changes_is_found() -> None:
    workload = workload_of(Net())
    graph = capture(workload)
    stale = next(segment for segment in graph.segments.values() if "linear" in str(segment.forward.code))
    for node in stale.joint.graph.nodes:
        if node.op == "call_function" and "addmm" in str(node.target) and node.meta["phase"] == "forward":
            node.args = (torch.zeros(6), *node.args[1:])
            break
    with pytest.raises(ShardwrightError, match="differs from the model as written"):
        self_test.self_test(workload, graph)


def test_a_model_that_fails_in_pytorch_is_refused() -> None:
    workload = workload_of(Net(lambda net, h: h.exp().add_(1)))
    with pytest.raises(ShardwrightError, match=r"fails in plain PyTorch.*in-?place"):
        self_test.self_test(workload, capture(workload))


def test_what_is_too_big_or_has_no_values_is_skipped_and_says_so() -> None:
    workload = workload_of(Net())
    graph = capture(workload)
    skipped = self_test.self_test(workload, graph, budget_s=0.0)
    assert skipped.status == "skipped" and "budget is 0 s" in skipped.reason
    with torch.device("meta"):
        bare = workload_of(Net())
    assert self_test.self_test(bare, graph).status == "not applicable"


def test_the_result_is_in_the_plan_and_can_be_left_out() -> None:
    workload = workload_of(Net())
    assert api.plan(workload, "1xCPU").self_test.status == "passed"
    assert api.plan(workload, "1xCPU", self_test=False).self_test.status == "off"


def test_the_decorator_refuses_a_model_that_was_not_captured_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks_off(monkeypatch)
    batch = {"x": torch.randn(6, 5), "y": torch.tensor([0, 1, 2, 0, 1, 2])}
    with pytest.raises(ShardwrightError, match=r"gradient of head\.weight"):
        shardwright.parallelize(on_parameter, hardware="1xCPU")().prepare(batch)


class Fails(Net):
    """Runs while it is traced, and no more."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            raise KeyError("table")
        return super().forward(x, y)


def test_whatever_the_models_own_code_raises_is_said_in_four_parts() -> None:
    workload = workload_of(Fails())
    with pytest.raises(ShardwrightError, match="fails in plain PyTorch: KeyError: 'table'"):
        self_test.self_test(workload, capture(workload))


def in_half(model: nn.Module) -> Workload:
    workload = workload_of(model.to(torch.bfloat16))
    batch = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in workload.example_batch.items()}
    return dataclasses.replace(workload, example_batch=batch, precision=Precision(*[torch.bfloat16] * 3))


def test_a_small_difference_is_found_of_a_model_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks_off(monkeypatch)
    model = Net()
    model.head.weight.register_hook(lambda g: g * 0.99)
    workload = in_half(model)
    with pytest.raises(ShardwrightError, match=r"gradient of head\.weight.*"):
        self_test.self_test(workload, capture(workload))


def test_an_epsilon_that_goes_by_the_dtype_is_no_difference_in_half_precision() -> None:
    model = Net()
    model.norm = nn.RMSNorm(6)
    workload = in_half(model)
    assert self_test.self_test(workload, capture(workload)).status == "passed"


def test_a_model_that_gives_nan_is_not_called_equal() -> None:
    workload = workload_of(Net(lambda net, h: h * float("nan")))
    found = self_test.self_test(workload, capture(workload))
    assert found.status == "skipped" and "gives NaN, as the graph does: loss, " in found.reason


def test_a_graph_whose_shapes_do_not_fit_fails_the_test() -> None:
    workload = workload_of(Net())
    graph = capture(workload)
    for segment in graph.segments.values():
        for node in segment.joint.graph.nodes:
            if node.op == "call_function" and "addmm" in str(node.target) and node.meta["phase"] == "forward":
                node.args = (torch.zeros(7), *node.args[1:])
    with pytest.raises(ShardwrightError, match="cannot be run") as found:
        self_test.self_test(workload, graph)
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


class Overwritten(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x).sigmoid()
        h.mul_(2)  # what the gradient of sigmoid reads
        return h.square().mean() + super().forward(x, y)


def test_a_line_whose_values_are_written_over_before_their_gradient_is_named() -> None:
    workload = workload_of(Overwritten())
    with pytest.raises(ShardwrightError, match="fails in plain PyTorch") as found:
        self_test.self_test(workload, capture(workload))
    assert found.value.means.startswith("what ") and f"{__file__}:" in found.value.means


class OfOneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x).reshape(4, -1, 12).logsumexp(-1).mean()


def test_a_model_that_takes_one_size_of_batch_alone_is_refused_by_that_reason() -> None:
    workload = Workload(OfOneSize(), {"x": torch.randn(6, 6)}, 6, precision=NARROW, batch_size=6, name="OfOneSize")
    with pytest.raises(ShardwrightError, match="takes batches of 6 samples alone") as found:
        api.capture_for_planning(workload)
    assert f"{__file__}:" in found.value.means and found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


class BeforeNorm(Net):
    """A bias that a norm takes away again: its gradient is the rounding of what cancels, here of large terms."""

    def __init__(self, scale: float = 1e-3) -> None:
        super().__init__()
        self.norm.eps, self.scale = 1e-12, scale
        nn.init.zeros_(self.a.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale, y)


def before_norm(dtype: torch.dtype) -> Workload:
    return in_half(BeforeNorm(0.03)) if dtype == torch.bfloat16 else workload_of(BeforeNorm())


NO_DIGITS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", NO_DIGITS, ids=str)
def test_gradients_that_are_rounding_alone_are_no_difference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = before_norm(dtype)
    graph = capture(workload)
    assert self_test.self_test(workload, graph).status == "passed"
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "moved_by_rounding", lambda model, again: dict.fromkeys(graph.params, 0.0))
        with pytest.raises(ShardwrightError, match="differs"):
            self_test.self_test(workload, graph)


class OnAKink(nn.Module):
    """Rounding moves relu(a - b) to either side: its gradient is all or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(5)) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a - self.b).sum() + (x * self.c).square().mean() + 0 * y.sum()


def damaged(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, step: int, damage: Callable[[dict], None]) -> None:
    """Runs of the graph in dtype give other gradients in one of the two steps."""
    run = self_test.run_graph
    steps = iter(range(10**6))

    def with_damage(graph: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        ran = run(graph, values, *args, **kwargs)
        if next(iter(ran.gradients.values())).dtype == dtype and next(steps) % 2 == step:
            damage(ran.gradients)
        return ran

    monkeypatch.setattr(self_test, "run_graph", with_damage)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("parameter", ["a", "b"])
def test_a_gradient_on_a_kink_is_not_passed_over_as_rounding(
    parameter: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = workload_of(OnAKink())
    graph = capture(workload)
    assert self_test.self_test(workload, graph).status == "passed"

    def other_side(gradients: dict[str, torch.Tensor]) -> None:
        gradients[parameter] = gradients[parameter] + 1

    damaged(monkeypatch, torch.float64, step, other_side)
    damaged(monkeypatch, torch.float32, step, other_side)
    with pytest.raises(ShardwrightError, match=f"gradient of {parameter} by"):
        self_test.self_test(workload, graph)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.01), (torch.bfloat16, 0.4)], ids=str)
def test_a_fault_that_is_there_in_the_models_own_dtype_alone_is_found(
    dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = before_norm(dtype)
    graph = capture(workload)

    def smaller(gradients: dict[str, torch.Tensor]) -> None:
        gradients["a.weight"] = gradients["a.weight"] * (1 - share)

    damaged(monkeypatch, dtype, 0, smaller)
    with pytest.raises(ShardwrightError, match=r"gradient of a\.weight by"):
        self_test.self_test(workload, graph)


def test_what_is_excused_in_one_step_leaves_the_difference_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(BeforeNorm())
    graph = capture(workload)
    monkeypatch.setattr(self_test, "roundings", lambda workload, run: {"a.bias": 1.0})
    kept = {0: 40.0, 1: 0.5}  # of which the second is excused
    numbers = iter(range(10**6))

    def shifted(gradients: dict[str, torch.Tensor]) -> None:
        gradients["a.bias"] = gradients["a.bias"] + kept[next(numbers) % 2]

    run = self_test.run_graph
    monkeypatch.setattr(
        self_test, "run_graph", lambda *args, **kwargs: (ran := run(*args, **kwargs), shifted(ran.gradients))[0]
    )
    with pytest.raises(ShardwrightError, match=r"gradient of a\.bias by"):
        self_test.self_test(workload, graph)
