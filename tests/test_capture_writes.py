"""Writes in a forward: to memory that nothing reads, and to parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from as_written import largest_difference, workload_of
from torch import nn

from shardwright import api, tasks
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.batches import make_batch
from shardwright.profiler.capture import capture, compute_loss
from shardwright.profiler.initial_values import initial_tensors


class Rebuilds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nn.Linear(8, 8)  # its initial values are drawn and thrown away
        return self.linear(x).pow(2).mean()


def test_initial_values_that_nothing_reads_are_dropped():
    made = api.load_workload(f"{__file__}:rebuilds", global_batch=4)
    graph = api.capture_for_planning(made)
    assert not any(segment.has_random for segment in graph.segments.values())


def rebuilds() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Rebuilds(), {"x": torch.randn(4, 8)}


class Rescales(nn.Module):
    """As RWKV does before inference: a parameter divided in place."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.div_(self.scale)
        return self.linear(x).pow(2).mean()


def rescales_by_one() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Rescales(1), {"x": torch.randn(4, 8)}


def rescales_by_two() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Rescales(2), {"x": torch.randn(4, 8)}


def test_a_write_that_changes_nothing_leaves_the_gradient() -> None:
    made = api.load_workload(f"{__file__}:rescales_by_one", global_batch=4)
    program = api.build(api.plan(made, "1xCPU"), made)
    batch = dict(made.example_batch)
    program.forward_backward(batch)
    assert set(program.gradients()) == {"linear.weight", "linear.bias"}


def test_a_write_to_a_parameter_is_refused_with_its_line() -> None:
    made = api.load_workload(f"{__file__}:rescales_by_two", global_batch=4)
    with pytest.raises(ShardwrightError, match="writes to a parameter") as caught:
        api.plan(made, "1xCPU")
    assert f"{Path(__file__).name}:" in caught.value.what


class Ones(nn.Module):
    """Makes a tensor of torch's default type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (1.0 - torch.ones(x.shape).to(x.dtype)) * torch.finfo(x.dtype).min
        return (self.linear(x) + mask).pow(2).mean()


def ones() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Ones(), {"x": torch.randn(4, 8)}


def test_types_do_not_follow_the_default_at_run_time() -> None:
    workload = tasks.check_workload({"model": f"{__file__}:ones", "kind": "factory", "global_batch": 4})
    program = api.build(api.plan(workload, "1xCPU"), workload)
    assert float(program.forward_backward(dict(make_batch(workload, 4, seed=1)))) < 1e3


class Pooled(nn.Module):
    """Torch's pool to one value restrides its result in place where its operand is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.adaptive_avg_pool1d(self.linear(x).transpose(1, 2), 1)
        return self.head(pooled.flatten(1)).pow(2).mean()


def pooled() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Pooled(), {"x": torch.randn(4, 6, 8)}


class Restrided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(self.linear(x), (4, 3, 4), (8, 2, 1)).pow(2).mean()


def restrided() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Restrided(), {"x": torch.randn(4, 8)}


def _agrees(factory: str) -> None:
    workload = tasks.check_workload({"model": f"{__file__}:{factory}", "kind": "factory", "global_batch": 4})
    program = api.build(api.plan(workload, "1xCPU"), workload)
    batch = dict(make_batch(workload, 4, seed=1))
    program.forward_backward(batch)
    model = copy.deepcopy(workload.model)
    compute_loss(model, workload.loss, batch).backward()
    found = program.gradients()
    for name, parameter in model.named_parameters():
        assert float((found[name] - parameter.grad).abs().max()) <= 1e-12 * float(parameter.grad.abs().max()), name


def test_a_pool_to_one_value_has_the_gradient_of_a_mean() -> None:
    _agrees("pooled")


def test_a_gradient_that_writes_in_place_is_right_or_refused() -> None:
    with contextlib.suppress(ShardwrightError):
        _agrees("restrided")


class Siamese(nn.Module):
    """A batch norm and a counter that one forward writes twice, from two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm, self.g = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        first = self.g(self.norm(self.f(a)).relu())
        self.count += 1
        second = self.g(self.norm(self.f(b)).relu())
        self.count += 1
        return (first - second.detach()).square().mean() + second.square().mean() * self.count


def test_a_buffer_written_twice_holds_what_the_second_write_left() -> None:
    torch.manual_seed(0)
    batch = {"a": torch.randn(6, 5), "b": torch.randn(6, 5)}
    workload = workload_of(Siamese(), batch)
    graph = capture(workload)
    assert largest_difference(workload, graph) < 1e-12
    assert sorted(graph.buffers) == ["count", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    assert workload.model.count == 2 and workload.model.norm.num_batches_tracked == 2


def through_data(h: torch.Tensor) -> torch.Tensor:
    h.data.mul_(2)
    return h


def through_detach_of_a_view(h: torch.Tensor) -> torch.Tensor:
    h[:, 1:].detach().zero_()
    return h


def without_gradients(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h.clamp_(min=0)
    return h


def of_its_own(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = h.abs().mean(1, keepdim=True)
        scale.clamp_(min=0.1)
    values = h.detach().clone()
    values.mul_(0.5)
    return h / scale + values


def smoothed(h: torch.Tensor) -> torch.Tensor:
    target, smooth = torch.zeros_like(h), torch.full_like(h, 0.1).detach()
    with torch.no_grad():
        target.scatter_(1, h.argmax(1, keepdim=True), 1.0)
    smooth[:, 1] = 0.9
    return h.log_softmax(1) * (target + smooth)


def masked(h: torch.Tensor) -> torch.Tensor:
    mask, above, least = h.new_ones(h.shape), (h > 0).to(h.dtype), torch.empty_like(h)
    mask.data[:, 0] = 0
    with torch.no_grad():
        above.mul_(2)
        least.fill_(0.5)
        least[:, 1:].copy_(h[:, 1:])
    return h * mask * above + torch.maximum(h, least)


def filled(h: torch.Tensor) -> torch.Tensor:
    parts = torch.empty_like(h)
    with torch.no_grad():
        parts.zero_()
    parts[:, 0] = h[:, 1]
    parts[:, 1:].add_(h[:, 1:])
    return parts


def filled_and_changed(h: torch.Tensor) -> torch.Tensor:
    parts = torch.zeros_like(h)
    last = parts[:, 1:]
    parts[:, 0] = h[:, 1]
    last.data.add_(1)
    return parts


class Changes(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(5, 4), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.linear(x)).square().mean()


@pytest.mark.parametrize("change", [through_data, through_detach_of_a_view, without_gradients, filled_and_changed])
def test_a_write_beside_autograd_is_refused_with_its_line(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    line = change.__code__.co_firstlineno + {without_gradients: 2, filled_and_changed: 4}.get(change, 1)
    with pytest.raises(ShardwrightError, match=rf"test_capture_writes.py:{line} writes .* beside autograd") as found:
        capture(workload_of(Changes(change), {"x": torch.randn(4, 5)}))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL


@pytest.mark.parametrize("change", [of_its_own, smoothed, masked, filled])
def test_a_write_to_values_that_take_no_gradient_is_captured(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.manual_seed(0)
    assert largest_difference(workload_of(Changes(change), {"x": torch.randn(4, 5)})) < 1e-12


def test_a_random_mask_drawn_without_gradients_is_captured() -> None:
    def dropped(h: torch.Tensor) -> torch.Tensor:
        mask = torch.empty_like(h)
        with torch.no_grad():
            mask.bernoulli_(0.5)
        return h * mask

    capture(workload_of(Changes(dropped), {"x": torch.randn(4, 5)}))


class Seen(nn.Module):
    """Python's operators that write; a list of layers in a list, with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), None, nn.ModuleList([None, nn.Linear(6, 6)])])
        self.register_buffer("seen", torch.zeros(6, dtype=torch.bool))
        self.register_buffer("bits", torch.full((6,), 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.layers[0], self.layers[2][1]):
            x = torch.tanh(layer(x))
        self.seen |= (x.detach() > 0).any(0)
        self.bits &= 4 + self.seen
        self.bits <<= 1
        return (x * self.seen + self.bits).square().mean()


def test_operators_that_write_are_captured_and_gaps_in_nested_lists_passed_over() -> None:
    torch.manual_seed(0)
    workload = workload_of(Seen(), {"x": torch.randn(4, 6)})
    assert largest_difference(workload, capture(workload)) < 1e-12
    assert len(list(initial_tensors(workload.model, seed=0))) == 6
