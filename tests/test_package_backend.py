"""torch.compile(model, backend="shardwright"): same numbers as the model as written, alone and on two ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from distributed import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from shardwright import backend, backend_test
from shardwright.errors import ShardwrightError


class TiedNet(nn.Module):
    """Tied weights, BatchNorm buffers, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.second = nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.head = nn.Linear(12, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.norm(self.first(x)))
        return self.head(torch.nn.functional.gelu(self.second(hidden)) + hidden)


class PlainNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))


class BrokenNet(PlainNet):
    """Dynamo must break its graph in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self[1](self[0](x))
        torch._dynamo.graph_break()
        return self[4](self[3](self[2](hidden)))


def build(net: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return net().double()


def batch(steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(steps, 8, 12, generator=generator, dtype=torch.float64),
        torch.randn(steps, 8, 3, generator=generator, dtype=torch.float64),
    )


def train(model: nn.Module, run, part: slice = slice(None)) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final parameters. Gradients of the last step under 'grad:'."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for x, y in zip(*batch(), strict=True):
        optimizer.zero_grad()
        loss = (run(x[part]) - y[part]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state |= {f"grad:{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, state


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("options", [None, {"activation_limit": "4KiB"}], ids=["plain", "activation_limit"])
@pytest.mark.parametrize("net", [TiedNet, BrokenNet])
def test_trains_as_the_eager_model_does(net, options):
    torch._dynamo.reset()
    reference = build(net)
    expected = train(reference, reference)
    model = build(net)
    losses, state = train(model, torch.compile(model, backend="shardwright", options=options))
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert_same(state, expected[1])


def test_dropout_recomputed_under_a_limit_keeps_its_mask():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5), nn.GELU(), nn.Linear(12, 1)).double()
    x = batch()[0][0]
    compiled = torch.compile(model, backend="shardwright", options={"activation_limit": "3KiB"})
    torch.manual_seed(3)
    compiled(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    model(x).sum().backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_activation_limit_is_kept_or_refused():
    from shardwright.backend import shardwright as backend
    from shardwright.passes import activation_limit

    kept: list[int] = []
    split = activation_limit.partition_within

    def recording(joint, inputs, **options):
        forward, backward = split(joint, inputs, **options)
        kept.append(activation_limit.saved_bytes(forward, options["num_fwd_outputs"]))
        return forward, backward

    model = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(6))).double()
    for limit in (None, 6000, 3000):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shardwright.backend.partition_within", recording)
            torch.compile(model, backend=backend, options={"activation_limit": limit})(batch()[0][0]).sum().backward()
        assert limit is None or kept[-1] <= limit
    assert kept[0] > 6000
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_limit, "saved_bytes", lambda forward, num_outputs: 5000)
        with pytest.raises(Exception, match=r"at least 4.88 KiB.*activation_limit is 2.93 KiB"):
            torch.compile(model, backend="shardwright", options={"activation_limit": 3000})(batch()[0][0])


class NormNet(nn.Module):
    """A residual stream with RMSNorm, once by the module and once spelled out, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.norm = nn.RMSNorm(12, eps=1e-6)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.nn.functional.gelu(self.first(self.norm(x)))
        x = x + self.dropout(self.second(x))
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.head(self.weight * normed)


def test_fused_norms_give_the_same_numbers():
    from shardwright import backend

    torch._dynamo.reset()
    reference, model = build(NormNet), build(NormNet)
    torch.manual_seed(4)
    expected = train(reference, reference)
    fused_ops = []
    fuse = backend.fuse_add_rms_norm

    def recording(*arguments, **options):
        fused = fuse(*arguments, **options)
        fused_ops.extend(str(node.target) for node in fused.graph.nodes if "rms_norm" in str(node.target))
        return fused

    torch.manual_seed(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "fuse_add_rms_norm", recording)
        losses, state = train(model, torch.compile(model, backend="shardwright", options={"fuse": True}))
    assert "shardwright.add_rms_norm.default" in fused_ops
    assert losses == pytest.approx(expected[0], rel=1e-9)
    assert_same(state, expected[1])


class Reentrant(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.head = first, nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=True))


def test_a_checkpoint_that_freezes_its_block_in_eager_alone_is_refused():
    x = torch.rand(4, 12)
    with pytest.raises(Exception, match="reentrant checkpoint has no argument that takes a gradient"):
        torch.compile(Reentrant(nn.Identity()), backend="shardwright")(x)
    torch._dynamo.reset()
    model = Reentrant(nn.Linear(12, 12))
    torch.compile(model, backend="shardwright")(x).sum().backward()
    assert model.block.weight.grad is not None


class Closing(nn.Module):
    """A reentrant checkpoint, whose function takes or finds a weight, or what is computed of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.rand(12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        derived = 2 * self.weight
        if self.kind == "explicit":
            return checkpoint(lambda w, x: (x @ w).relu() @ w, self.weight, x, use_reentrant=True)
        if self.kind == "explicit, with a closure before it":
            return checkpoint(lambda x, w: x @ derived @ w, x, self.weight, use_reentrant=True)
        if self.kind == "derived":
            return checkpoint(lambda x: (x @ derived).relu(), x, use_reentrant=True) + self.weight.sum()
        if self.kind == "nested":
            inner = lambda x: checkpoint(lambda x: x @ derived, x.detach(), use_reentrant=True) + x  # noqa: E731
            return checkpoint(inner, derived[0] * x, use_reentrant=True)
        return checkpoint(lambda x: x @ self.weight, x, use_reentrant=True) + self.weight.sum()


@pytest.mark.parametrize("kind", ["explicit", "explicit, with a closure before it"])
def test_a_checkpoint_that_is_given_a_parameter_trains_it_as_in_eager(kind):
    torch._dynamo.reset()
    model, x = Closing(kind), torch.rand(4, 12)
    compiled = torch.compile(model, backend="shardwright")(x)
    compiled.sum().backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(compiled, model(x))


@pytest.mark.parametrize("kind", ["derived", "nested", "plain"])
def test_a_checkpoint_without_a_trained_argument_is_refused_whatever_it_finds(kind):
    torch._dynamo.reset()
    model, x = Closing(kind), torch.rand(4, 12)
    with pytest.raises(Exception, match="reentrant checkpoint has no argument that takes a gradient"):
        torch.compile(model, backend="shardwright")(x)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="shardwright")(x), model(x))


def test_unknown_option_names_the_near_match():
    from shardwright.backend import BackendOptions

    with pytest.raises(ShardwrightError, match="data_parallel"):
        BackendOptions.parse({"data_paralel": False})
    with pytest.raises(ShardwrightError, match="600MiB"):
        BackendOptions.parse({"activation_limit": "lots"})


def test_found_without_importing_shardwright():
    code = (
        "import sys, torch; assert 'shardwright' in torch._dynamo.list_backends()\n"
        "assert 'shardwright' not in sys.modules\n"
        "f = torch.compile(lambda x: (x * 2).sum(), backend='shardwright')\n"
        "x = torch.ones(3, requires_grad=True); f(x).backward(); assert x.grad.tolist() == [2, 2, 2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _train_part(rank: int, net: type[nn.Module], wrapping: str, options) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch._dynamo.reset()
    model = build(
        net, seed=rank if wrapping == "shardwright" else 0
    )  # ranks differ until rank 0's values are broadcast
    if wrapping == "ddp":
        run = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    else:
        run = torch.compile(model, backend="shardwright", options=options)
    return train(model, run, slice(rank * 4, rank * 4 + 4))


@pytest.mark.parametrize("bucket_mib", [25, 0.001, 0])
@pytest.mark.parametrize("net", [PlainNet, BrokenNet])
def test_two_ranks_train_as_one_process_on_the_whole_batch(net, bucket_mib):
    reference = build(net)
    losses, state = train(reference, reference)
    ranks = run_ranks(2, _train_part, net, "shardwright", {"bucket_mib": bucket_mib})
    mean = [sum(pair) / 2 for pair in zip(*(losses for losses, _ in ranks), strict=True)]
    assert mean == pytest.approx(losses, rel=1e-9)
    for _, found in ranks:
        assert_same(found, state)


def test_two_ranks_train_as_distributed_data_parallel():
    expected = run_ranks(2, _train_part, TiedNet, "ddp", None)
    found = run_ranks(2, _train_part, TiedNet, "shardwright", {"activation_limit": "3KiB"})
    for (losses, state), (expected_losses, expected_state) in zip(found, expected, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        # DistributedDataParallel gives the unused parameter no gradient either
        assert_same(state, expected_state)


def _gradients(rank: int, options) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model = build(PlainNet)
    torch.compile(model, backend="shardwright", options=options)(
        batch()[0][0, rank * 4 : rank * 4 + 4]
    ).sum().backward()
    return [p.grad for p in model.parameters()]


def test_averaging_can_be_turned_off():
    model = build(PlainNet)
    model(batch()[0][0, :4]).sum().backward()
    apart = run_ranks(2, _gradients, {"data_parallel": False})
    for found, expected in zip(apart[0], model.parameters(), strict=True):
        torch.testing.assert_close(found, expected.grad)
    assert not torch.allclose(apart[0][0], apart[1][0])


def _order_of_collectives(rank: int) -> list[str]:
    """Kinds of node in the rewritten backward, in order: g(radient matmul), r(educe), w(ait)."""
    import shardwright.backend as backend

    torch._dynamo.reset()
    seen: list[str] = []
    original = backend.average_gradients

    def recording(graph_module, *arguments, **options):
        count = original(graph_module, *arguments, **options)
        for node in graph_module.graph.nodes:
            kind = {"aten.mm": "g", "_c10d_functional.all_reduce": "r", "_c10d_functional.wait_tensor": "w"}
            seen.extend(kind.get(str(node.target).removesuffix(".default"), ""))
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "average_gradients", recording)
        _gradients(rank, {"bucket_mib": 0.001})
    return seen


def test_all_reduces_start_before_the_backward_ends_and_are_waited_for_last():
    order = "".join(run_ranks(2, _order_of_collectives)[0])
    assert order.index("r") < order.rindex("g"), order
    assert order.count("r") == order.count("w") > 1
    assert order.index("w") > order.rindex("g")


@pytest.mark.timeout(300)
def test_inductor_gives_the_same_numbers():
    torch._dynamo.reset()
    reference = build(PlainNet)
    expected = train(reference, reference)
    model = build(PlainNet)
    losses, state = train(model, torch.compile(model, backend="shardwright", options={"inductor": True}))
    assert losses == pytest.approx(expected[0], rel=1e-9)
    assert_same(state, expected[1])


def _broken_fuse(graph_module, example_inputs, settings):
    """A pass that puts another op in the place of one."""
    changed = backend._torch.trace_to_aten(graph_module)
    node = next(n for n in changed.graph.nodes if n.target is torch.ops.aten.gelu.default)
    node.target = torch.ops.aten.relu.default
    changed.recompile()
    return changed


def test_a_pass_that_changes_the_numbers_is_found_at_the_first_call(monkeypatch):
    monkeypatch.setattr(backend, "_fuse", _broken_fuse)
    x = batch()[0][0]
    torch._dynamo.reset()
    with pytest.raises(ShardwrightError, match="output 0 by") as found:
        torch.compile(build(PlainNet), backend="shardwright")(x)
    assert "'self_test': False" in found.value.works
    torch._dynamo.reset()
    torch.compile(build(PlainNet), backend="shardwright", options={"self_test": False})(x)


def test_a_backward_that_changes_the_numbers_is_found(monkeypatch):
    own = backend._compile_backward

    def twice(graph_module, example_inputs, **options):
        run = own(graph_module, example_inputs, **options)
        doubled = lambda arguments: [None if g is None else 2 * g for g in run(arguments)]  # noqa: E731
        doubled._boxed_call = True
        return doubled

    monkeypatch.setattr(backend, "_compile_backward", twice)
    torch._dynamo.reset()
    with pytest.raises(ShardwrightError, match="gradient of input"):
        torch.compile(build(PlainNet), backend="shardwright")(batch()[0][0])


def test_the_self_test_leaves_buffers_gradients_and_random_numbers_alone():
    class Drops(TiedNet):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)

    for net in (TiedNet, Drops):
        found = []
        for tests in (True, False):
            torch._dynamo.reset()
            model = build(net)
            torch.manual_seed(3)
            out = torch.compile(model, backend="shardwright", options={"self_test": tests})(batch()[0][0])
            assert all(parameter.grad is None for parameter in model.parameters())
            found.append((out.detach(), model.norm.running_mean.clone(), int(model.norm.num_batches_tracked)))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert found[0][2] == found[1][2] == 1


class WritesInPlace(nn.Module):
    """The second graph writes to what the first one computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        torch._dynamo.graph_break()
        return self.second(self.activation(hidden)) + hidden.sum()


def test_a_graph_that_writes_to_an_earlier_graphs_output_is_tested_and_trains(caplog):
    torch._dynamo.reset()
    reference, model = build(WritesInPlace), build(WritesInPlace)
    expected = train(reference, reference)
    losses, state = train(model, torch.compile(model, backend="shardwright"))
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert_same(state, expected[1])
    assert "not tested" not in caplog.text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("in_backward", "options"),
    [(False, None), (False, {"data_parallel": False}), (True, {"data_parallel": False})],
    ids=["forward-averaging", "forward", "backward"],
)
def test_a_graph_with_collectives_is_not_run_again_for_a_test(in_backward, options):
    for calls, _ in run_ranks(2, _calls_of_the_test, in_backward, options):
        assert calls == 0


class _SumOfGradients(torch.autograd.Function):
    """As where tensor-parallel ranks take a copy of the same activations."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return functional_collectives.all_reduce(gradient, "sum", dist.group.WORLD)


class Talks(PlainNet):
    in_backward = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self[1](self[0](x))
        if self.in_backward:
            return self[4](_SumOfGradients.apply(hidden))
        return self[4](functional_collectives.all_reduce(hidden.detach(), "sum", dist.group.WORLD) + hidden)


def _calls_of_the_test(rank: int, in_backward: bool, options) -> tuple[int, list[torch.Tensor]]:
    torch._dynamo.reset()
    model = build(Talks)
    model.in_backward = in_backward
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        # one rank has no room: were a collective tested, the other would wait for it in vain
        patch.setattr(backend_test, "free_bytes", lambda device: 0 if rank else 1 << 40)
        patch.setattr(backend_test, "_compare", lambda *arguments: calls.append(1))
        torch.compile(model, backend="shardwright", options=options)(batch()[0][0]).sum().backward()
    return len(calls), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["_copies", "_gradients", "free_bytes"])
def test_a_fault_of_the_test_itself_is_logged_and_stops_nothing(name, monkeypatch, caplog):
    def fails(*arguments):
        torch.rand(3)
        raise KeyError("a fault of the test")

    monkeypatch.setattr(backend_test, name, fails)
    torch._dynamo.reset()
    reference, model = build(PlainNet), build(PlainNet)
    expected = train(reference, reference)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    losses, state = train(model, torch.compile(model, backend="shardwright"))
    assert losses == pytest.approx(expected[0], rel=1e-12)
    assert_same(state, expected[1])
    assert "a compiled graph is not tested: KeyError: 'a fault of the test'" in caplog.text
    assert name == "free_bytes" or torch.equal(before, torch.get_rng_state())


def test_an_output_of_another_shape_or_dtype_is_a_difference():
    ones = torch.ones(2, 3)
    for other in (ones.double(), ones[:1], 1.0):
        assert backend_test._first_difference("output", [other], [ones]) is not None
    assert backend_test._first_difference("output", [ones.clone()], [ones]) is None


class PartlyEager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.compiled, self.eager = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left_out(torch.tanh(self.compiled(x)))

    @torch._dynamo.disable
    def left_out(self, x: torch.Tensor) -> torch.Tensor:
        return self.eager(x)


def _first_step(rank: int, same_batch: bool) -> str:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = PartlyEager()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0 if same_batch else rank))
    torch.compile(model, backend="shardwright")(x).square().mean().backward()
    try:
        optimizer.step()
    except ShardwrightError as error:
        return error.what
    return ""


def test_gradients_that_dynamo_leaves_to_eager_are_not_stepped_by_unaveraged():
    for found in run_ranks(2, _first_step, False):
        assert "the gradient of eager.weight of shape (4, 4) and 1 more differs between ranks" in found
    assert run_ranks(2, _first_step, True) == ["", ""]
