"""shardwright::attention against autograd of the formula, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.kernels import attention_math
from shardwright.kernels.generator import keep_mask, keep_scale
from shardwright.kernels.ops import attention, make_key

CPU = torch.device("cpu")
B, H, S, T, D, E, W = 2, 4, 5, 7, 8, 6, 10


def oracle(query, key, value, mask=None, scale=0.3, causal=False, window=0, keep=None):
    """Whole S x T matrices and autograd; nothing shared with the code under test."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    for i, j in itertools.product(range(seen.shape[0]), range(seen.shape[1])):
        if causal:
            seen[i, j] &= j <= i
        if window:
            seen[i, j] &= i - j < window and (causal or j - i < window)
    scores = scores.masked_fill(~seen, -torch.inf)
    p = torch.nan_to_num(scores.softmax(-1), nan=0.0)
    if keep is not None:
        p = p * keep
    return p @ value, scores.logsumexp(-1)


def qkv(dtype=torch.float64, heads=H, kv_heads=2, queries=S, keys=T, value_dim=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, heads, queries, D), (B, kv_heads, keys, D), (B, kv_heads, keys, value_dim)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes]


def call(
    query,
    key,
    value,
    mask=None,
    rng_key=None,
    scale=0.3,
    causal=False,
    window=0,
    p=0.0,
    index=0,
    shape=None,
    offset=None,
):
    return attention(query, key, value, mask, rng_key, scale, causal, window, p, index, shape, offset)


def assert_agrees(inputs, actual, expected, tolerance=1e-12):
    out, lse = actual
    expected_out, expected_lse = expected
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    sees = expected_lse > -torch.inf
    torch.testing.assert_close(lse[sees], expected_lse[sees].detach(), rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad(out, inputs, grad)
    want = torch.autograd.grad(expected_out, inputs, grad)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def masks():
    generator = torch.Generator().manual_seed(3)
    hides = torch.rand(B, 1, S, T, generator=generator) > 0.3
    hides[0, :, 2] = False  # one query that sees nothing
    return {
        "none": None,
        "bool": hides,
        "bool_2d": hides[1, 0],
        "padding": hides[:, :, :1],
        "float": torch.randn(1, H, S, T, dtype=torch.float64, generator=generator),
        "float_per_key": torch.randn(B, 1, 1, T, dtype=torch.float64, generator=generator),
        "expanded": torch.randn(B, 1, S, 1, dtype=torch.float64, generator=generator).expand(B, H, S, T),
    }


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 3), (False, 3)])
@pytest.mark.parametrize("value_dim", [D, E, W])  # W takes the formula, D and, made wider, E the fused kernel
def test_output_and_gradients_agree_with_autograd_of_the_formula(mask, causal, window, value_dim):
    inputs = qkv(value_dim=value_dim)
    mask = masks()[mask]
    assert_agrees(
        inputs, call(*inputs, mask, causal=causal, window=window), oracle(*inputs, mask, causal=causal, window=window)
    )


@pytest.mark.parametrize("name", ["float", "float_per_key", "expanded"])
@pytest.mark.parametrize("causal", [False, True])
def test_an_additive_mask_gets_a_gradient_of_its_own_shape(name, causal):
    mask = masks()[name].clone().requires_grad_()
    inputs = [*qkv(), mask]
    assert_agrees(inputs, call(*inputs, causal=causal), oracle(*inputs, causal=causal))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries,keys", [(5, 5), (9, 4), (1, 6)])
def test_grouped_heads_and_unequal_lengths_are_causal_from_the_top_left(kv_heads, queries, keys):
    inputs = qkv(kv_heads=kv_heads, queries=queries, keys=keys)
    assert_agrees(inputs, call(*inputs, causal=True), oracle(*inputs, causal=True))
    if queries == keys:
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(call(*inputs, causal=True)[0], sdpa, rtol=1e-12, atol=1e-12)


def test_inputs_and_gradients_of_any_layout():
    inputs = [t.detach().mT.contiguous().mT.requires_grad_() for t in qkv()]
    assert all(t.stride(-1) != 1 for t in inputs)
    for grad in (
        torch.randn(B, H, D, S, dtype=torch.float64).mT,
        torch.ones((), dtype=torch.float64).expand(B, H, S, D),
    ):
        got = torch.autograd.grad(call(*inputs, causal=True)[0], inputs, grad)
        want = torch.autograd.grad(oracle(*inputs, causal=True)[0], inputs, grad)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal,window", [(False, 0), (True, 3)])
def test_dropout_keeps_what_the_counter_says(causal, window):
    inputs, rng_key = qkv(), make_key(seed=5, step=2, microbatch=1, random_base=3)
    mask = masks()["float"].clone().requires_grad_()
    keep = keep_mask(
        rng_key, (B, H, S, T), (B, H, S, T), (0, 0, 0, 0), 4, 0.4, torch.device("cpu")
    ).double() * keep_scale(0.4)
    assert 0.4 < (keep > 0).double().mean() < 0.8
    actual = call(*inputs, mask, rng_key, causal=causal, window=window, p=0.4, index=4)
    assert_agrees([*inputs, mask], actual, oracle(*inputs, mask, causal=causal, window=window, keep=keep))


def test_dropout_of_a_shard_is_the_slice_of_the_whole():
    query, key, value = qkv(kv_heads=4)
    rng_key, shape = make_key(1), (B, H, S, T)
    whole, _ = call(query, key, value, rng_key=rng_key, p=0.5)
    for b, h in itertools.product(range(2), (0, 2)):
        part = [t[b : b + 1, h : h + 2] for t in (query, key, value)]
        out, _ = call(*part, rng_key=rng_key, p=0.5, shape=shape, offset=(b, h, 0, 0))
        torch.testing.assert_close(out, whole[b : b + 1, h : h + 2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 4), (False, 4)])
@pytest.mark.parametrize("limit", [1, 40, 300])
def test_blocks_of_rows_give_what_one_block_gives(monkeypatch, causal, window, limit):
    monkeypatch.setitem(attention_math._MAX_SCORES, "cpu", limit)
    mask = masks()["float"].clone().requires_grad_()
    inputs, rng_key = [*qkv(value_dim=W), mask], make_key(2)
    keep = keep_mask(
        rng_key, (B, H, S, T), (B, H, S, T), (0, 0, 0, 0), 0, 0.3, torch.device("cpu")
    ).double() * keep_scale(0.3)
    actual = call(*inputs, rng_key, causal=causal, window=window, p=0.3)
    assert_agrees(inputs, actual, oracle(*inputs, causal=causal, window=window, keep=keep))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("value_dim", [D, E, W])
def test_fake_tensors_promise_the_dtypes_and_layouts_that_come(dtype, tolerance, value_dim):
    inputs = qkv(dtype, value_dim=value_dim)
    mask = torch.zeros(1, H, S, T).transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()

    def run(*tensors):
        out, lse = call(*tensors)
        return [out, lse, *torch.autograd.grad(out.float().sum(), tensors)]

    real = run(*inputs, mask)
    torch.testing.assert_close(
        real[0].double(), oracle(*(t.double() for t in inputs))[0], rtol=tolerance, atol=tolerance
    )
    mode = FakeTensorMode()
    fake = run(*(mode.from_tensor(t) for t in (*inputs, mask)))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("mask_needs_grad", [False, True])
def test_a_traced_step_has_one_node_forward_and_one_backward(mask_needs_grad):
    inputs = [*qkv(), masks()["float"].clone().requires_grad_(mask_needs_grad)]

    def step(*tensors):
        out, _ = call(*tensors)
        return torch.autograd.grad((out * out).sum(), [t for t in tensors if t.requires_grad])

    graph = make_fx(step, tracing_mode="fake")(*inputs)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("shardwright.attention.default") == 1
    assert names.count("shardwright.attention_backward.default") == 1
    assert not any("softmax" in name or "bmm" in name for name in names)
    for got, want in zip(graph(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


class _Attend(torch.nn.Module):
    def forward(self, query, key, value, rng_key):
        return (call(query, key, value, rng_key=rng_key, causal=True, p=0.25)[0].sum(),)


def test_exported_forward_and_joint_graphs_keep_the_operators_whole():
    inputs = (*qkv(), make_key(0))
    exported = torch.export.export(_Attend(), inputs, strict=False)
    joint, _ = aot_export_module(exported.module(), inputs, trace_joint=True, output_loss_index=0)
    for graph, wanted in ((exported.graph, 1), (exported.run_decompositions({}).graph, 1), (joint.graph, 2)):
        ours = [node for node in graph.nodes if str(node.target).startswith("shardwright.attention")]
        assert len(ours) == wanted


def test_torch_compile_gives_the_same_gradients():
    inputs = [*qkv(), masks()["float"].clone().requires_grad_()]

    def loss(*tensors):
        return (call(*tensors, causal=True)[0] ** 2).sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for g, w in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-13)


def test_a_second_derivative_is_refused_by_name():
    inputs = qkv()
    grads = torch.autograd.grad(call(*inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward"):
        grads[0].sum().backward()


def test_sizes_that_do_not_go_together_are_refused():
    query, key, value = qkv()
    with pytest.raises(RuntimeError, match="do not go together"):
        call(query[:, :3], key, value)
    with pytest.raises(RuntimeError, match="needs rng_key"):
        call(query, key, value, p=0.1)
