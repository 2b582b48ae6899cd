"""The pass that puts the fused norm into a captured forward graph: it finds every spelling, and keeps the numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from shardwright.kernels.ops import add_rms_norm, rms_norm
from shardwright.passes.fuse_norm import find_norms, fuse_add_rms_norm

aten = torch.ops.aten
D = 8


def always(flops, bytes_saved):
    return True


def llama(x, weight, wide=torch.float32):
    dtype = x.dtype
    h = x.to(wide)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * h.to(dtype)


def llama_without_casts(x, weight, wide=None):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def t5(x, weight, wide=torch.float32):
    variance = x.to(wide).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-5)).to(x.dtype)


def gemma(x, weight, wide=torch.float32):
    h = x.to(wide)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.to(wide))).type_as(x)


def olmo2(x, weight, wide=torch.float32):
    h = x.to(wide)
    return (weight * (h * torch.rsqrt(1e-5 + h.square().mean(-1, keepdim=True)))).to(x.dtype)


def by_power(x, weight, wide=torch.float32):
    h = x.to(wide)
    return ((h * (h * h).mean([x.dim() - 1], True).add(1e-5).pow(-0.5)) * weight).to(x.dtype)


def by_root(x, weight, wide=torch.float32):
    h = x.to(wide).clone()
    root = torch.ops.aten.alias(torch.reciprocal(torch.sqrt(h.pow(2).clone().mean(-1, keepdim=True) + 1e-5)))
    return weight * torch.ops.aten.alias(root * h).to(x.dtype).contiguous()


def torchs(x, weight, wide=None):
    return nn.functional.rms_norm(x, (D,), weight, 1e-5)


SPELLINGS = [llama, t5, gemma, olmo2, by_power, by_root, torchs]


class Block(nn.Module):
    """Two residual branches, as in a transformer: a plain norm, a fused one whose sum goes on, and a last fused one."""

    def __init__(self, norm, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))  # noqa: E731
        self.norm = norm
        self.weights = nn.ParameterList([make(D) for _ in range(3)])
        self.mix = nn.ParameterList([make(D, D) for _ in range(2)])

    def forward(self, x):
        x = x + self.norm(x, self.weights[0]) @ self.mix[0]
        x = x + self.norm(x, self.weights[1]) @ self.mix[1]
        return self.norm(x, self.weights[2])


def export(module, *inputs):
    exported = torch.export.export(module, inputs, strict=False)
    graph_module = exported.graph_module
    signature = exported.graph_signature
    state = [exported.state_dict[name] for name in (*signature.parameters, *signature.buffers)]
    return graph_module, [*state, *inputs]


def run_with_gradients(graph_module, inputs, seed=1):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = torch.fx.Interpreter(graph_module).run(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]


def count(graph_module, op):
    return sum(node.target is op for node in graph_module.graph.nodes)


def assert_same_numbers(before, after, inputs, tolerance):
    for got, want in zip(run_with_gradients(after, inputs), run_with_gradients(before, inputs), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm", [*SPELLINGS, llama_without_casts], ids=lambda f: f.__name__)
def test_every_spelling_is_fused_and_keeps_its_numbers_in_float64(norm):
    norm = functools.partial(norm, wide=torch.float64)
    before, inputs = export(Block(norm, torch.float64), torch.randn(2, 3, D, dtype=torch.float64))
    after = fuse_add_rms_norm(before, inputs, wins=always)
    assert count(after, rms_norm) == 1 and count(after, add_rms_norm) == 2
    assert not any(count(after, op) for op in (aten.rsqrt.default, aten.mean.dim, aten.rms_norm.default))
    assert_same_numbers(before, after, inputs, 1e-12)


@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=str)
def test_every_spelling_is_fused_in_low_precision(norm, dtype, tolerance):
    before, inputs = export(Block(norm, dtype), torch.randn(2, 3, D).to(dtype))
    after = fuse_add_rms_norm(before, inputs, wins=always)
    assert count(after, rms_norm) == 1 and count(after, add_rms_norm) == 2
    outputs = [torch.fx.Interpreter(g).run(*inputs)[0] for g in (before, after)]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert_same_numbers(before, after, inputs, 1e-3)


def test_float32_weights_over_bfloat16_activations_keep_the_wider_result():
    class Widening(nn.Module):
        def forward(self, x, residual, weight):
            return llama(x + residual, weight)

    inputs = (torch.randn(4, D).bfloat16(), torch.randn(4, D).bfloat16(), torch.randn(D))
    before, inputs = export(Widening(), *inputs)
    after = fuse_add_rms_norm(before, inputs, wins=always)
    (y,), (want,) = (torch.fx.Interpreter(g).run(*inputs) for g in (after, before))
    assert count(after, add_rms_norm) == 1 and y.dtype == want.dtype == torch.float32
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "norm",
    [llama, t5, lambda x, w: llama_without_casts(x.bfloat16(), w.bfloat16())],
    ids=["float32_inside", "float32_variance", "bfloat16_throughout"],
)
def test_a_norm_in_lower_precision_than_the_kernels_is_left(norm):
    before, inputs = export(Block(lambda x, w: norm(x, w).to(x.dtype), torch.float64), torch.randn(2, D).double())
    assert find_norms(before.graph) == []
    after = fuse_add_rms_norm(before, inputs, wins=always)
    assert count(after, rms_norm) == count(after, add_rms_norm) == 0


class _Fixed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def _fuse(function, *shapes):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    before, inputs = export(_Fixed(function), *inputs)
    after = fuse_add_rms_norm(before, inputs, wins=always)
    assert_same_numbers(before, after, inputs, 1e-12)
    return count(after, add_rms_norm), count(after, rms_norm)


def plain(x, weight):
    return llama(x, weight, wide=torch.float64)


def test_two_norms_of_one_sum_share_it():
    assert _fuse(lambda x, r, w, v: plain(x + r, w) + plain(x + r, v), (3, D), (3, D), (D,), (D,)) == (2, 0)

    def parallel(x, r, w, v):
        s = x + r
        return plain(s, w), plain(s, v), s

    assert _fuse(parallel, (3, D), (3, D), (D,), (D,)) == (1, 1)


def test_the_sum_may_be_read_before_and_after_through_aliases():
    def uses(x, r, w):
        s = x + r
        early = s.sin()
        again = torch.ops.aten.alias(s)
        return plain(again, w) + early, again.clone() * 2, s

    assert _fuse(uses, (3, D), (3, D), (D,)) == (1, 0)


def test_a_weight_made_from_the_sum_gives_the_norm_alone_and_one_made_late_is_made_early():
    def late(x, r, w):
        s = x + r
        return plain(s, s.sin().mean(0) + w)

    assert _fuse(late, (3, D), (3, D), (D,)) == (0, 1)

    def doubled(x, r, w):
        s = x + r
        return s.sin() + plain(s, w * 2)

    assert _fuse(doubled, (3, D), (3, D), (D,)) == (1, 0)


def test_what_is_not_a_residual_addition_stays_an_addition():
    assert _fuse(lambda x, r, w: plain(x + r, w), (3, D), (1, D), (D,)) == (0, 1)  # broadcast
    assert _fuse(lambda x, r, w: plain(torch.add(x, r, alpha=2), w), (3, D), (3, D), (D,)) == (0, 1)
    assert _fuse(lambda x, w: plain(x + 1, w), (3, D), (D,)) == (0, 1)
    assert _fuse(lambda x, w: plain(x + x, w), (3, D), (D,)) == (1, 0)


def test_what_is_not_an_rms_norm_is_left():
    rsqrt = torch.rsqrt
    mean = functools.partial(torch.mean, dim=-1, keepdim=True)
    for other in (
        lambda x, w: w * (x * rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)),  # over another dimension
        lambda x, w: w * (x * rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5)),
        lambda x, w: w * (x.sin() * rsqrt(mean(x.pow(2)) + 1e-5)),  # of another value
        lambda x, w: (x * rsqrt(mean(x.pow(2)) + 1e-5)).exp() * w,
        lambda x, w: x * rsqrt(mean(x.pow(2)) + 1e-5),  # no weight
        lambda x, w: w * (x * rsqrt(mean((x - mean(x)).pow(2)) + 1e-5)),  # LayerNorm's variance
    ):
        assert _fuse(other, (3, D), (D,)) == (0, 0)

    def shows_its_inside(x, w):
        rstd = rsqrt(mean(x.pow(2)) + 1e-5)
        return w * (x * rstd), rstd

    assert _fuse(shows_its_inside, (3, D), (D,)) == (0, 0)


def test_the_cost_model_decides_from_operations_and_bytes():
    before, inputs = export(Block(llama, torch.bfloat16), torch.randn(4, D).bfloat16())
    asked = []

    def wins(flops, bytes_saved):
        asked.append((flops, bytes_saved))
        return flops == 4 * D * 5  # only those with a residual

    after = fuse_add_rms_norm(before, inputs, wins=wins)
    assert count(after, add_rms_norm) == 2 and count(after, rms_norm) == 0
    assert [flops for flops, _ in asked] == [4 * D * 4, 4 * D * 5, 4 * D * 5]
    plain_bytes, *with_residual = [saved for _, saved in asked]
    one_read = 4 * D * 2  # the addition's own three streams stay; what the fused kernel spares is reading the sum again
    assert with_residual == [plain_bytes + one_read] * 2 and plain_bytes > 4 * one_read
    assert count(fuse_add_rms_norm(before, inputs, wins=lambda *_: False), aten.rsqrt.default) == 3
    assert count(before, add_rms_norm) == 0, "the graph that was given stays as it was"


def test_new_nodes_keep_value_module_and_source():
    before, inputs = export(Block(torchs, torch.float32), torch.randn(4, D))
    for node in before.graph.nodes:
        node.meta.setdefault("stack_trace", "")
    after = fuse_add_rms_norm(before, inputs, wins=always)
    for node in after.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta and "stack_trace" in node.meta and "nn_module_stack" in node.meta


def test_values_are_inferred_where_the_graph_has_none():
    graph = torch.fx.Graph()
    x, r, w = (graph.placeholder(name) for name in "xrw")
    s = graph.call_function(aten.add.Tensor, (x, r))
    graph.output((graph.call_function(aten.rms_norm.default, (s, [D], w, 1e-5)),))
    graph_module = torch.fx.GraphModule(nn.Module(), graph)
    inputs = [torch.randn(3, D), torch.randn(3, D), torch.randn(D)]
    after = fuse_add_rms_norm(graph_module, inputs, wins=always)
    assert count(after, add_rms_norm) == 1
    torch.testing.assert_close(after(*inputs), graph_module(*inputs))
