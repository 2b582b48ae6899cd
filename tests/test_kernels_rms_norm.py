"""RMSNorm with and without the residual addition, against autograd of Hugging Face's formulation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.kernels.ops import add_rms_norm, rms_norm

EPS = 1e-5


def llama(hidden, weight, eps=EPS):
    """As transformers' LlamaRMSNorm has it, float64 taking the place of float32 where the input is float64."""
    dtype = hidden.dtype
    hidden = hidden.to(torch.promote_types(dtype, torch.float32))
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return weight * (hidden * torch.rsqrt(variance + eps)).to(dtype)


def torchs(hidden, weight, eps=EPS):
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def tensors(dtype=torch.float64, shape=(2, 5, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, shape[-1:]))
    return [t.to(dtype).requires_grad_() for t in (x, residual, weight)]


@pytest.mark.parametrize("shape", [(2, 5, 12), (3, 1), (16,), (0, 4)], ids=str)
@pytest.mark.parametrize("formula,cast_first", [(llama, True), (torchs, False)])
@pytest.mark.parametrize("sum_used", [True, False])
def test_output_and_gradients_agree_with_the_formula_in_float64(formula, cast_first, sum_used, shape):
    x, residual, weight = inputs = tensors(shape=shape)

    def outputs(y, sum):
        return (y.square() * 3).sum() + ((sum.sin() * y.detach()).sum() if sum_used else 0)

    y, sum, rstd = add_rms_norm(x, residual, weight, EPS, cast_first)
    assert rstd.shape == (*shape[:-1], 1) and not rstd.requires_grad
    want_y = formula(x + residual, weight)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum, x + residual, rtol=0, atol=0)
    got = torch.autograd.grad(outputs(y, sum), inputs)
    want = torch.autograd.grad(outputs(want_y, x + residual), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    y, _ = rms_norm(x, weight, EPS, cast_first)
    got = torch.autograd.grad(outputs(y, x), (x, weight))
    want = torch.autograd.grad(outputs(formula(x, weight), x), (x, weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_sum_alone_passes_through():
    x, residual, weight = tensors()
    _, sum, _ = add_rms_norm(x, residual, weight, EPS, True)
    assert all(torch.equal(g, torch.ones_like(x)) for g in torch.autograd.grad(sum.sum(), (x, residual)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_rounds_where_the_formula_rounds(dtype):
    x, residual, weight = tensors(dtype)
    for formula, cast_first in ((llama, True), (torchs, False)):
        y, _, rstd = add_rms_norm(x, residual, weight, EPS, cast_first)
        assert rstd.dtype == torch.float32 and y.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 0 if formula is llama else 1e-2
        torch.testing.assert_close(y, formula(x + residual, weight), rtol=tolerance, atol=tolerance)
    y, _ = rms_norm(x, weight.float(), EPS, True)
    assert y.dtype == torch.float32  # a float32 weight over a bfloat16 input widens the product


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cast_first", [True, False])
def test_fake_tensors_promise_what_comes(dtype, cast_first):
    x, residual, weight = tensors(dtype)
    x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # another layout

    def run(x, residual, weight):
        y, sum, rstd = add_rms_norm(x, residual, weight, EPS, cast_first)
        alone = rms_norm(x, weight, EPS, cast_first)
        grads = torch.autograd.grad((y.float() * sum.float()).sum() + alone[0].float().sum(), (x, residual, weight))
        return [y, sum, rstd, *alone, *grads]

    mode = FakeTensorMode()
    for real, fake in zip(
        run(x, residual, weight), run(*(mode.from_tensor(t) for t in (x, residual, weight))), strict=True
    ):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_a_traced_step_has_one_node_each_way_and_compiles():
    inputs = tensors()

    def loss(x, residual, weight):
        y, sum, _ = add_rms_norm(x, residual, weight, EPS, True)
        return (y * sum).sum()

    def step(*inputs):
        return torch.autograd.grad(loss(*inputs), inputs)

    graph = make_fx(step, tracing_mode="fake")(*inputs)
    names = [str(node.target) for node in graph.graph.nodes]
    assert (
        names.count("shardwright.add_rms_norm.default") == names.count("shardwright.add_rms_norm_backward.default") == 1
    )
    assert not any("rsqrt" in name for name in names)
    want = step(*inputs)
    assert all(torch.equal(g, w) for g, w in zip(graph(*inputs), want, strict=True))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    x, residual, weight = tensors()
    with pytest.raises(RuntimeError, match="does not fit"):
        add_rms_norm(x, residual, weight[:-1], EPS, True)
    with pytest.raises(RuntimeError, match="residual"):
        add_rms_norm(x, residual[:1], weight, EPS, True)
