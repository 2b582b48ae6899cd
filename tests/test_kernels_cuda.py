"""Attention's CUDA lowerings against the formula, and the dispatch to Triton. Needs an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

from shardwright.kernels import attention_fused, generator
from shardwright.kernels.attention_math import Spec, attention_backward_math, attention_math
from shardwright.kernels.ops import add_rms_norm, attention, dropout, make_key, rand_uniform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU")

B, H, D = 2, 4, 64


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.bfloat16, 4e-2), (torch.float32, 5e-3), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("queries,keys", [(70, 70), (33, 70)])
@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 16), (False, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_lowerings_agree_with_the_formula(dtype, tolerance, kv_heads, queries, keys, causal, window, masked):
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    query, key, value = randn(B, H, queries, D), randn(B, kv_heads, keys, D), randn(B, kv_heads, keys, D)
    mask, grad = randn(1, H, queries, keys) if masked else None, randn(B, H, queries, D)
    spec = Spec(0.125, causal, window)
    expected = {torch.bfloat16: ("flash", "efficient"), torch.float32: ("efficient",), torch.float64: ("math",)}[dtype]
    assert attention_fused.lowering(query, key, value, mask, spec) in expected
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = attention(*leaves, mask, None, 0.125, causal, window, 0.0, 0, None, None)
    got = [out, lse, *torch.autograd.grad(out, leaves, grad)]
    wide = [None if t is None else t.double() for t in (query, key, value, mask)]
    want_out, want_lse = attention_math(*wide, None, spec)
    grads = attention_backward_math(grad.double(), *wide, None, want_out, want_lse, spec, False)[:3]
    for g, w in zip(got, [want_out, want_lse, *grads], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * max(1.0, w.abs().max().item()))


def test_random_operators_give_the_cpus_bits():
    key, shape = make_key(3, 2, 1, 5), (33, 17)
    on_cpu = rand_uniform(key, shape, shape, (0, 0), 1, torch.float32, torch.device("cpu"))
    on_gpu = rand_uniform(key.cuda(), shape, shape, (0, 0), 1, torch.float32, torch.device("cuda"))
    reference = generator.uniform(key.cuda(), shape, shape, (0, 0), 1, torch.float32, torch.device("cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu()) and torch.equal(on_gpu, reference)
    x = torch.randn(shape)
    assert torch.equal(
        dropout(x, key, 0.3, 0, shape, (0, 0)), dropout(x.cuda(), key.cuda(), 0.3, 0, shape, (0, 0)).cpu()
    )


def test_fused_norm_agrees_with_the_cpu():
    x, residual, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 96), (5, 96), (96,)))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, residual, weight)]
        y, total, _ = add_rms_norm(*leaves, 1e-5, True)
        results.append([y, total, *torch.autograd.grad((y * total).sum(), leaves)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-12, atol=1e-12)
