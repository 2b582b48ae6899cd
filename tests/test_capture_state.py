"""What a model, its loss and its hooks hold beside parameters is read as PyTorch reads it, or refused by line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import WIDE, largest_difference, workload_of
from torch import nn

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.attributes import Attributes
from shardwright.profiler.capture import capture
from shardwright.profiler.models import make_reference_dtype
from shardwright.profiler.workload import Workload
from shardwright.self_test import self_test

TOLERANCE = 1e-12


class Net(nn.Module):
    """change: what the forward does with the model and its hidden tensor."""

    def __init__(self, change: Callable[[Net, torch.Tensor], torch.Tensor] = lambda net, h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head, self.change = nn.Linear(5, 8), nn.Linear(8, 3), change
        self.register_buffer("ema", torch.zeros(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.head(self.change(self, torch.tanh(self.a(x))))
        return logits if y is None else F.cross_entropy(logits, y)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(6, 5, generator=generator), "y": torch.tensor([0, 1, 2, 0, 1, 2])}


def with_loss(make: Callable[[Net], Any]) -> Workload:
    model = Net().double()
    entries = {"x": batch()["x"].double(), "y": batch()["y"]}
    return Workload(model, entries, 6, loss=make(model), model_inputs=("x",), precision=WIDE, batch_size=6)


def penalty(model: nn.Module) -> torch.Tensor:
    return 0.1 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def closure(model: Net) -> Any:
    return lambda output, batch: F.cross_entropy(output, batch["y"]) + penalty(model)


def part_of_it(model: Net) -> Any:
    head = model.head
    return lambda output, batch, *, weight=head.weight: F.cross_entropy(output, batch["y"]) + penalty(head)


def partial(model: Net) -> Any:
    return functools.partial(lambda m, output, batch: F.cross_entropy(output, batch["y"]) + penalty(m), model)


class Trainer:
    def __init__(self, model: Net) -> None:
        self.model, self.weight = model, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def loss(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(output, batch["y"], weight=self.weight) + penalty(self.model)


def of_a_trainer(model: Net) -> Any:
    return Trainer(model).loss


AT_MODULE_LEVEL: dict[str, Any] = {}
SCALE = torch.tensor(0.3, dtype=torch.float64)


def helper() -> torch.Tensor:
    return penalty(AT_MODULE_LEVEL["model"]) * SCALE


def of_its_module(model: Net) -> Any:
    AT_MODULE_LEVEL["model"] = model
    return lambda output, batch: F.cross_entropy(output, batch["y"]) + helper()


def of_a_teacher(model: Net) -> Any:
    teacher = nn.Linear(5, 3).double()

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(batch["x"]).softmax(-1)
        return F.cross_entropy(output, target)

    return loss


class Weighted(nn.Module):
    """A loss that is a module; its tensors are no parameters to train."""

    def __init__(self) -> None:
        super().__init__()
        self.entropy = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def forward(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        return self.entropy(output, batch["y"])


LOSSES = [closure, part_of_it, partial, of_a_trainer, of_its_module, of_a_teacher, lambda model: Weighted()]


@pytest.mark.parametrize("make", LOSSES)
def test_a_loss_reads_the_model_and_what_else_it_holds(make: Callable[[Net], Any]) -> None:
    workload = with_loss(make)
    assert largest_difference(workload) < TOLERANCE
    copied = make_reference_dtype(workload)
    assert copied.model is not workload.model
    assert largest_difference(copied) < TOLERANCE, "of a copy, the loss reads the copy"


def temperature(model: Net) -> Any:
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    return lambda output, batch: F.cross_entropy(output / scale, batch["y"])


class Uncertain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(output, batch["y"]) * torch.exp(-self.log_variance) + self.log_variance


def centred(model: Net) -> Any:
    centre = torch.zeros(3, dtype=torch.float64)

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            centre.mul_(0.9).add_(output.mean(0), alpha=0.1)
        return F.cross_entropy(output - centre, batch["y"])

    return loss


def each_sample(model: Net) -> Any:
    return lambda output, batch: torch.vmap(F.cross_entropy)(output, batch["y"]).mean()


REFUSED_LOSSES = {
    temperature: "takes a gradient and is no parameter of the model",
    (lambda model: Uncertain()): "takes a gradient and is no parameter of the model",
    centred: "writes to a tensor .* that is no buffer",
    each_sample: r"test_capture_state.py:\d+ calls a transform of torch.func",
}


@pytest.mark.parametrize("make", REFUSED_LOSSES)
def test_a_loss_with_state_of_its_own_is_refused(make: Callable[[Net], Any]) -> None:
    with pytest.raises(ShardwrightError, match=REFUSED_LOSSES[make]) as found:
        capture(with_loss(make))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


def binds_a_buffer(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.ema = 0.9 * net.ema + 0.1 * h.detach().mean(0)
    return h - net.ema


def keeps_what_it_saw(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.attention, net.seen = h, [h]
    return h


def reads_data(net: Net, h: torch.Tensor) -> torch.Tensor:
    return h + 0.1 * h.data + net.a.weight.data.sum()


def writes_data_of_a_buffer(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.ema.data.mul_(0.9).add_(h.mean(0).data, alpha=0.1)
    return h - net.ema.data


@pytest.mark.parametrize("change", [binds_a_buffer, keeps_what_it_saw, reads_data, writes_data_of_a_buffer])
def test_what_a_forward_sets_is_as_in_pytorch_and_no_tensor_of_a_trace_stays(change: Callable[..., Any]) -> None:
    workload = workload_of(Net(change), batch())
    before = set(vars(workload.model))
    graph = capture(workload)
    assert set(vars(workload.model)) == before
    assert largest_difference(workload, graph) < TOLERANCE


def test_a_hook_that_closes_over_the_model_reads_the_copy() -> None:
    model = Net()
    kept: list[torch.Tensor] = []
    model.kept = kept
    model.a.register_forward_hook(lambda module, args, result: model.kept.append(result))
    model.change = lambda net, h: h + net.kept.pop()
    assert largest_difference(make_reference_dtype(workload_of(model, batch()))) < TOLERANCE


def counts(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return h * net.calls


def remembers(net: Net, h: torch.Tensor) -> torch.Tensor:
    last, net.last = getattr(net, "last", None), h.detach()
    return h if last is None else h + last


@pytest.mark.parametrize("change", [counts, remembers])
def test_what_python_carries_from_step_to_step_is_found_by_name(change: Callable[..., Any]) -> None:
    workload = workload_of(Net(change), batch())
    with pytest.raises(ShardwrightError, match="differs from the model as written") as found:
        self_test(workload, capture(workload))
    assert ("calls" if change is counts else "last") in found.value.change


def reads_a_list(net: Net, h: torch.Tensor) -> torch.Tensor:
    return torch.tanh(net.hidden[0](h))


def writes_a_plain_tensor(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.plain.add_(1)
    return h * net.plain


def of_another_shape(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.ema = h.detach()
    return h


def numbers_of_the_default_type(net: Net, h: torch.Tensor) -> torch.Tensor:
    index = torch.arange(8)
    turned = torch.exp(1j * torch.pi * index / 7).real + torch.fft.fft(index).abs() + torch.logsumexp(index, 0)
    return h * turned + torch.where(h > 0, 0.1, 0.7) + torch.where(index > 3, index, 0.3)


def test_numbers_made_of_integers_are_of_the_models_precision() -> None:
    assert largest_difference(workload_of(Net(numbers_of_the_default_type), batch())) < TOLERANCE


def each_row(net: Net, h: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row / row.norm())(h)


def sets_data(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.a.weight.data = 0.5 * net.a.weight.data
    return h


def writes_data_of_a_parameter(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.a.weight.data.clamp_(-1, 1)
    return h


def without_a_derivative(net: Net, h: torch.Tensor) -> torch.Tensor:
    return torch.igamma(h.abs() + 1, h.abs())


def overwritten_before_its_gradient(net: Net, h: torch.Tensor) -> torch.Tensor:
    return h + torch.vander(h[0], 8)[1]


def freezes_for_a_while(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.head.requires_grad_(False)
    scored = net.head(h)
    net.head.requires_grad_(True)
    return h + scored.sum()


def freezes_by_its_flag(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.a.weight.requires_grad = False
    return h


def strided_as_it_is(net: Net, h: torch.Tensor) -> torch.Tensor:
    return h + h.as_strided(h.shape, h.stride())


REFUSED = {
    strided_as_it_is: "cannot be traced with its gradient: View operation",
    freezes_for_a_while: "sets requires_grad of a parameter",
    freezes_by_its_flag: "sets requires_grad of a parameter",
    sets_data: "sets .data of a tensor",
    writes_data_of_a_parameter: "writes to a parameter",
    without_a_derivative: r"has no gradient \(aten.igamma.default\)",
    overwritten_before_its_gradient: r"has no gradient \(aten.vander.default\)",
    reads_a_list: "takes a gradient and is no parameter of the model",
    writes_a_plain_tensor: "writes to a tensor",
    of_another_shape: "the forward sets ema",
    each_row: "calls a transform of torch.func",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_no_module_holds_is_refused_by_line(change: Callable[..., Any]) -> None:
    model = Net(change)
    model.hidden, model.plain = [nn.Linear(8, 8).double()], torch.ones((), dtype=torch.float64)
    with pytest.raises(ShardwrightError, match=REFUSED[change]) as found:
        capture(workload_of(model, batch()))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL
    first, last = change.__code__.co_firstlineno, max(line for *_, line in change.__code__.co_lines() if line)
    lines = [f"{__file__}:{line}" for line in range(first, last + 1)]
    assert change is of_another_shape or any(line in found.value.what for line in lines)


def caches(net: Net, h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] not in net.cache:
        net.cache[h.shape[1]] = torch.ones(h.shape[1]).cumsum(0)
    return h * net.cache[h.shape[1]].to(h.dtype)


def test_what_a_forward_caches_does_not_stay_behind_the_self_test() -> None:
    model = Net(caches)
    model.cache = {}
    workload = workload_of(model, batch())
    graph = capture(workload)
    assert self_test(workload, graph).status == "passed"
    assert model.cache == {} and capture(workload).structure_hash == graph.structure_hash


class Noisy(nn.Module):
    """Its deviation has a gradient of zeros, so it decays."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.deviation, self.weight = nn.Parameter(torch.ones(5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.normal(x, self.deviation.expand_as(x)) + torch.bernoulli(self.deviation.sigmoid().expand_as(x))
        return (noise * self.weight).square().sum()


def test_what_is_drawn_by_a_parameter_gives_it_zeros() -> None:
    workload = workload_of(Noisy(), {"x": batch()["x"]})
    found = self_test(workload, capture(workload))
    assert found.status == "passed" and found.largest_difference < 1e-7


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(5, 6), nn.GroupNorm(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x[:, None] * x[:, :, None])
        return (self.norm(h.transpose(1, 2)).transpose(1, 2) * x[:, :, None]).square().sum()


def test_the_self_test_brings_operands_to_the_formats_of_their_kernels() -> None:
    workload = workload_of(Turned(), {"x": batch()["x"]})
    assert self_test(workload, capture(workload)).largest_difference < TOLERANCE


def test_a_scripted_module_is_refused_by_name() -> None:
    model = Net()
    model.a = torch.jit.script(model.a)
    with pytest.raises(ShardwrightError, match="a is a TorchScript module"):
        make_reference_dtype(Workload(model, batch(), 6))
    with pytest.raises(ShardwrightError, match="a is a TorchScript module"):
        capture(Workload(model, batch(), 6, batch_size=6))


class Table(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, **options)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.table(y), y)


def test_a_sparse_gradient_has_the_values_of_a_dense_one() -> None:
    workload = workload_of(Table(sparse=True), {"y": batch()["y"]})
    assert self_test(workload, capture(workload)).largest_difference < TOLERANCE
    dense = workload_of(Table(), {"y": batch()["y"]})
    assert capture(workload).structure_hash == capture(dense).structure_hash


def test_gradients_divided_by_how_often_a_batch_has_a_word_are_of_each_microbatch() -> None:
    assert capture(workload_of(Table(scale_grad_by_freq=True), {"y": batch()["y"]})).loss_over == "each"
    assert capture(workload_of(Table(), {"y": batch()["y"]})).loss_over == "mean"


@pytest.mark.parametrize("pair", [([1, 2], [3, 4]), ([1, 2], 5), ({"a": 1}, None), [1, 2]])
def test_attributes_that_are_tuples_are_put_back(pair: Any) -> None:
    model = Net()
    model.pair, model.other = pair, pair
    attributes = Attributes(model)
    with attributes.put_back():
        model.other = ([0], 7)
        attributes.note_changes()
    assert attributes.changed == ["other"]
    assert model.pair is pair and model.other is pair
