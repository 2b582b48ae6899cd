"""A model's own autograd.Functions and checkpoints are captured with the gradients that PyTorch gives, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import largest_difference, workload_of
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.capture import capture

TOLERANCE = 1e-12


class Net(nn.Module):
    """layer(self, i, block, h): what each of two blocks does."""

    def __init__(self, layer: Callable[[Net, int, nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()) for _ in range(2))
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.register_buffer("seen", torch.zeros(8))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        for i, block in enumerate(self.blocks):
            h = self.layer(self, i, block, h)
        return F.cross_entropy(self.head(h) * self.scale, y)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(6, 5, generator=generator), "y": torch.tensor([0, 1, 2, 0, 1, 2])}


def scaling(factor: float) -> type[Function]:
    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * factor

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * factor * 3

    return Scale


class Settings:
    def __init__(self) -> None:
        self.factor = 1.0

    def __repr__(self) -> str:
        return "Settings()"


class Several(Function):
    """Two results of which one is an integer, beside a number; a result is saved; gradients may be absent."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, settings: Settings, shift: torch.Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.factor = settings.factor
        settings.factor += 0.5  # by the time of a later trace it is another
        wide = x.exp() if shift is None else x.exp() + shift
        rank = x.argsort(-1)
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(wide)
        return wide, x * 2, rank, 3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor | None, h: torch.Tensor | None, *_: Any) -> Any:
        (wide,) = ctx.saved_tensors
        first = torch.zeros_like(wide) - 0.25 if g is None else g * wide * ctx.factor
        shift = g.sum(0) if g is not None and ctx.needs_input_grad[2] else None
        return first if h is None else first + h * 5, None, shift


class Written(Function):
    """Writes its argument, marked, and a buffer, not marked; knows which gradients are wanted."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        seen.mul_(0.5).add_(x.detach().mean(0))
        ctx.save_for_backward(weight)
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return g * 2, weight * 0.1 if ctx.needs_input_grad[1] else None, None


class Context(Function):
    @staticmethod
    def forward(x: torch.Tensor, levels: int) -> torch.Tensor:
        return torch.round(x * levels) / levels

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 0.5), None


class Reads(Function):
    """Reads a parameter that is none of its arguments."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, net: Net) -> torch.Tensor:
        ctx.net = net
        return x * net.scale

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        return g * ctx.net.scale * 2, None


MADE = [scaling(0.5), scaling(2.0)]
SETTINGS = Settings()


def made_in_a_factory(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return block(MADE[i].apply(h))


def several_results(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    wide, double, rank, number = Several.apply(h.tanh(), SETTINGS, net.seen if i else None)
    return block(double) + (0.01 * rank * number if i else wide)


def written_in_place(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return block(Written.apply(h * 1, block[0].weight, net.seen))


def with_setup_context(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return Context.apply(block(h), 4 + i)


def reads_a_parameter(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return block(Reads.apply(h, net))


def beside_a_write_to_a_view(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    h = MADE[i].apply(h) * 1
    h[:, ::2] = h[:, ::2] * 2
    return block(h)


class Cleared(Function):
    """PyTorch's own tutorial: a gradient is copied and written where what was saved says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        y = x.clone()
        y[:, ::2].mul_(slope)
        return y.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        g = g.clone()
        g[x < 0] = 0
        part = g[:, :4]
        part.mul_(x[:, 4:])
        return g, None


def written_in_the_backward(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return block(Cleared.apply(h, torch.tensor(3.0, dtype=h.dtype)))


FUNCTIONS = [
    written_in_the_backward,
    made_in_a_factory,
    several_results,
    written_in_place,
    with_setup_context,
    reads_a_parameter,
    beside_a_write_to_a_view,
]


@pytest.mark.parametrize("layer", FUNCTIONS)
def test_functions_keep_the_backward_that_was_written(layer: Callable[..., torch.Tensor]) -> None:
    workload = workload_of(Net(layer), batch())
    SETTINGS.factor = 1.0
    graph = capture(workload)
    SETTINGS.factor = 1.0
    assert largest_difference(workload, graph) < TOLERANCE


def test_functions_of_equal_settings_are_the_same_op() -> None:
    def keys(made: list[type[Function]]) -> set[str]:
        graph = capture(workload_of(Net(lambda net, i, block, h: block(made[i].apply(h))), batch()))
        nodes = [node for segment in graph.segments.values() for node in segment.forward.graph.nodes]
        return {node.args[1] for node in nodes if "autograd_function" in str(node.target)}

    assert len(keys([scaling(0.5), scaling(0.5)])) == 1
    assert len(keys(MADE)) == 2


def reentrant(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, h, use_reentrant=True)


def not_reentrant(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda *, input: block(input), input=h, use_reentrant=False)


def reentrant_without_gradient(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, h.detach(), use_reentrant=True) + h


def in_sequence(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(block, 2, h, use_reentrant=bool(i))


def selective(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    contexts = lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])  # noqa: E731
    return checkpoint(block, h, use_reentrant=False, context_fn=contexts)


def nested(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: checkpoint(block, x, use_reentrant=False) + x, h, use_reentrant=False)


CHECKPOINTS = [reentrant, not_reentrant, reentrant_without_gradient, in_sequence, selective, nested]


@pytest.mark.parametrize("layer", CHECKPOINTS)
def test_checkpoints_of_the_model_are_captured_through(layer: Callable[..., torch.Tensor]) -> None:
    assert largest_difference(workload_of(Net(layer), batch())) < TOLERANCE


class Normed(nn.Module):
    """Batch norms in checkpointed parts, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norms = nn.Linear(5, 8), nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def part(self, i: int, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norms[i](self.a.weight[:, 0] * h))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h = checkpoint(self.part, 0, h, use_reentrant=False) + checkpoint(self.part, 0, 2 * h, use_reentrant=True)
        h = checkpoint(self.part, 1, h, use_reentrant=False)
        return F.cross_entropy(self.head(h), y)


def test_norms_in_checkpoints_update_their_statistics_as_often_as_pytorch_does() -> None:
    workload = workload_of(Normed(), batch())
    assert largest_difference(workload) < TOLERANCE
    assert [norm.num_batches_tracked.item() for norm in workload.model.norms] == [4, 2]


def test_a_checkpoint_that_draws_after_its_norm_updates_it_twice() -> None:
    layer = lambda net, i, block, h: checkpoint(lambda h: block(net.norm(h)), h, use_reentrant=bool(i))  # noqa: E731
    workload = workload_of(Net(layer), batch())
    assert largest_difference(workload) < TOLERANCE
    assert workload.model.norm.num_batches_tracked.item() == 4


def within_another(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    def counted(h: torch.Tensor) -> torch.Tensor:
        net.seen.add_(1)
        return block(h)

    return checkpoint(lambda h: checkpoint(counted, h, use_reentrant=False), h, use_reentrant=False)


def without_its_numbers(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(block, h, use_reentrant=bool(i), preserve_rng_state=False)


def draws_before_a_norm(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda h: net.norm(block(h)), h, use_reentrant=bool(i))


class Draws(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class OwnCheckpoint(Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), g)
        return None, x.grad


class Decides(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


def takes_a_gradient(net: Net, i: int, block: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return block(h + torch.autograd.grad(h.square().sum(), h, create_graph=True)[0])


REFUSED = {
    "nested": (within_another, "lies within another, and writes to buffers"),
    "numbers": (without_its_numbers, "draws random numbers, with preserve_rng_state=False"),
    "a draw and a norm": (draws_before_a_norm, "test_capture_functions.py.* draws random numbers before it writes"),
    "Draws": (lambda net, i, block, h: block(Draws.apply(h)), "draws random numbers"),
    "own checkpoint": (lambda net, i, block, h: OwnCheckpoint.apply(block[0], h), r"calls backward\(\) inside"),
    "Decides": (lambda net, i, block, h: block(Decides.apply(h)), "cannot be traced"),
    "grad": (takes_a_gradient, "takes gradients inside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_function_that_no_graph_can_carry_is_refused_by_line(name: str) -> None:
    layer, message = REFUSED[name]
    with pytest.raises(ShardwrightError, match=message) as found:
        capture(workload_of(Net(layer), batch()))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL
    assert f"{__file__}:" in found.value.what


def frozen(net: Net) -> None:
    net.requires_grad_(False)


def detached(net: Net) -> None:
    net.head.register_forward_hook(lambda module, args, result: result.detach())
    net.scale.requires_grad_(False)


def without_gradients(net: Net) -> None:
    net.head.requires_grad_(False)
    net.scale.requires_grad_(False)
    net.layer = lambda net, i, block, h: torch.no_grad()(block)(h)


@pytest.mark.parametrize("change", [frozen, detached, without_gradients])
def test_a_loss_through_which_no_gradient_comes_is_refused(change: Callable[[Net], None]) -> None:
    net = Net(lambda net, i, block, h: block(h))
    change(net)
    with pytest.raises(ShardwrightError, match="no gradient comes through the loss of Net") as found:
        capture(workload_of(net, batch()))
    assert found.value.exit_code == ExitCode.UNSUPPORTED_MODEL
