"""What attention hands to CUDA's kernels, recorded on fake tensors of cuda:1, against the checks in their sources.

flash       aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp and attention_backward.cu
efficient   check_supported() in aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_{forward,backward}.h,
            which are installed with torch, and the checks before their launch in attention.cu, attention_backward.cu
No call goes to cuDNN's attention: `Recorder.only` fails on any kernel but the one expected.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.kernels import attention as attention_module
from shardwright.kernels import attention_fused

aten = torch.ops.aten
DEVICE = torch.device("cuda", 1)
ALIGN_BYTES = 16  # of a vector load: kAlignmentQ and kMinimumAlignment are at most this
ALIGN_LSE = 32  # kAlignLSE in kernel_forward.h


class Recorder(TorchDispatchMode):
    """Every call, its arguments by name. What the kernels' meta functions cannot take gets a result of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        called = defaults | dict(zip(names, args, strict=False)) | (kwargs or {})
        self.calls.append((func, called))
        for value in called.values():
            if isinstance(value, torch.Tensor):
                assert value.device == DEVICE, f"{func}: a tensor on {value.device}"
        if func is aten._efficient_attention_backward.default:  # its meta function has no window_size
            return *(torch.empty_like(called[name]) for name in ("query", "key", "value")), torch.empty(())
        return func(*args, **(kwargs or {}))

    def only(self, *ops):
        """The arguments of the one call of any attention kernel, which is one of ops."""
        found = [(func, called) for func, called in self.calls if "attention" in func.name()]
        assert len(found) == 1 and found[0][0] in ops, [func for func, _ in found]
        return found[0][1]


@pytest.fixture
def gpu(monkeypatch):
    """Fake tensors of cuda:1, an H100 as PyTorch sees it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        yield


def tensors(dtype=torch.bfloat16, heads=4, kv_heads=4, queries=70, keys=70, dim=64):
    def empty(count, length):  # as a linear layer's output leaves them: [B, S, H, D] in memory
        return torch.empty(2, length, count, dim, dtype=dtype, device=DEVICE).transpose(1, 2)

    return empty(heads, queries), empty(kv_heads, keys), empty(kv_heads, keys)


def attend(query, key, value, mask=None, causal=False, window=0):
    """(recorded forward, recorded backward) of our operator's kernels."""
    options = (0.125, causal, window, 0.0, 0, None, None)
    forward, backward = Recorder(), Recorder()
    with forward:
        out, lse = attention_module._forward(query, key, value, mask, None, *options)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    with backward:
        grads = attention_module._backward(
            torch.empty_like(out), query, key, value, mask, None, out, lse, *options, False
        )
    assert [grad.shape for grad in grads[:3]] == [tensor.shape for tensor in (query, key, value)]
    return forward, backward


def assert_rows_aligned(tensor, *, allow_equal_rows=False):
    """stride(-1) == 1 (CHECK_NOSPARSE_LASTCONTIGUOUS_CUDA), and the strides of the others and the beginning as vector
    loads want them (check_supported: strideB, strideH, strideM, CHECK_ALIGNED_PTR)."""
    assert tensor.stride(-1) == 1
    for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True):
        assert size == 1 or stride * tensor.element_size() % ALIGN_BYTES == 0
    assert tensor.storage_offset() * tensor.element_size() % ALIGN_BYTES == 0


@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 16), (False, 16)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_gets_no_lengths_of_packed_sequences(gpu, causal, window, kv_heads):
    query, key, value = tensors(kv_heads=kv_heads)
    forward, backward = attend(query, key, value, causal=causal, window=window)
    sent = forward.only(aten._flash_attention_forward.default)
    got = backward.only(aten._flash_attention_backward.default)
    for call in (sent, got):
        # attention_backward.cu: `if (cumulative_sequence_length_q.defined())` takes the call for variable length, whose
        # mha_varlen_bwd wants 3-D tensors and batch + 1 lengths; attention.cu: the same on has_value()
        assert call["cum_seq_q"] is None and call["cum_seq_k"] is None
        assert (call["max_q"], call["max_k"]) == (70, 70)
        # mha_fwd, mha_bwd: [B, S, H, D], last dimension contiguous, D a multiple of 8 and at most 256, H % Hkv == 0
        for name in ("query", "key", "value"):
            assert call[name].shape[1] == 70 and call[name].shape[3] == 64
            assert_rows_aligned(call[name])
        assert call["query"].shape[2] % call["key"].shape[2] == 0
        # the window's flags: left is how many keys before the diagonal are seen; -1 (None here) is all of them
        assert call["window_size_left"] == (window - 1 if window else None)
        assert call["window_size_right"] == (None if not window else 0 if causal else window - 1)
        assert call["dropout_p"] == 0.0 and call["is_causal"] == causal
    # mha_bwd: dout and out are [B, S, H, D]; softmax_lse is read as contiguous [B, H, S] in float32
    assert got["grad_out"].shape == got["out"].shape == got["query"].shape
    assert got["logsumexp"].shape == (2, 4, 70) and got["logsumexp"].is_contiguous()
    assert got["logsumexp"].dtype == torch.float32


@pytest.mark.parametrize("dim,capability,kernel", [(216, (9, 0), "flash"), (216, (8, 6), "efficient")])
@pytest.mark.parametrize("batch,lowering", [(2, None), (70000, "math")])
def test_flash_is_asked_only_for_what_its_backward_takes(gpu, monkeypatch, dim, capability, kernel, batch, lowering):
    # mha_bwd: "backward for head dim > 192 requires A100/A800 or H100/H800" up to 224; grid.y and grid.z end at 65535
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    query = torch.empty(batch, 1, 4, dim, dtype=torch.bfloat16, device=DEVICE)
    spec = attention_module.Spec(0.1, True, 0)
    assert attention_fused.lowering(query, query, query, None, spec) == (lowering or kernel)


def masks(queries, keys):
    yield "padding", torch.ones(2, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    yield "expanded padding", torch.ones(2, 1, 1, keys, dtype=torch.bool, device=DEVICE).expand(2, 4, queries, keys)
    yield "whole", torch.ones(1, 4, queries, keys, dtype=torch.bool, device=DEVICE)
    yield "additive", torch.zeros(queries, keys, dtype=torch.float32, device=DEVICE)
    yield "odd offset", torch.zeros(2, 1, queries, keys + 1, device=DEVICE, dtype=torch.bfloat16).narrow(3, 1, keys)


@pytest.mark.parametrize("dtype,queries", [(torch.bfloat16, 70), (torch.float32, 33)])
@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 16), (False, 16)])
@pytest.mark.parametrize("kind", range(5))
def test_the_efficient_kernel_gets_aligned_masks_and_one_key_head_a_query_head(
    gpu, dtype, causal, window, queries, kind
):
    keys = 70
    query, key, value = tensors(dtype, kv_heads=2, queries=queries, keys=keys)
    name, mask = list(masks(queries, keys))[kind]
    forward, backward = attend(query, key, value, mask, causal, window)
    in_kernel = causal and window > 0
    if in_kernel:
        sent = forward.only(aten._efficient_attention_forward.default)
        got = backward.only(aten._efficient_attention_backward.default)
        for call in (sent, got):
            # check_supported: "LocalAttention only supported in causal mode"; both kernels hide keys <= query - window
            assert call["custom_mask_type"] == 1 and call["window_size"] == window
            assert call["query"].shape == (2, queries, 4, 64) and call["key"].shape == (2, keys, 4, 64)
        assert (got["max_seqlen_q"], got["max_seqlen_k"]) == (queries, keys)
        bias = "bias"
    else:
        sent = forward.only(aten._scaled_dot_product_efficient_attention.default)
        got = backward.only(aten._scaled_dot_product_efficient_attention_backward.default)
        assert sent["is_causal"] == got["is_causal"] == causal
        assert sent["query"].shape == (2, 4, queries, 64) and sent["key"].shape == (2, 4, keys, 64)
        bias = "attn_bias"
    assert sent["compute_log_sumexp"]
    for call in (sent, got):
        for tensor in ("query", "key", "value"):
            assert_rows_aligned(call[tensor])
        # attention.cu: "invalid dtype for bias - should match query's dtype"; its shape is [B, H, S, T]
        assert call[bias].dtype == dtype and call[bias].shape == (2, 4, queries, keys)
        assert_rows_aligned(call[bias])
    # kernel_backward.h: "LSE is not correctly aligned"; attention.cu pads it to kAlignLSE
    lse = got["logsumexp"]
    assert lse.shape == (2, 4, -(-queries // ALIGN_LSE) * ALIGN_LSE) and lse.is_contiguous()
    assert_rows_aligned(got["grad_out_"])
    assert_rows_aligned(got["out"])
    # a mask of equal rows is not made S times larger: the kernel gets a stride of 0
    if name.endswith("padding") and (in_kernel or not window):
        assert sent[bias].stride(2) == 0 and sent[bias].untyped_storage().nbytes() <= 2 * 80 * dtype.itemsize


def test_layers_share_the_bias_of_one_mask(gpu):
    query, key, value = tensors()
    _, mask = list(masks(70, 70))[2]
    calls = [attend(query, key, value, mask, causal=True) for _ in range(2)]
    biases = {recorder.only(*efficient())["attn_bias"].untyped_storage()._cdata for both in calls for recorder in both}
    assert len(biases) == 1


def efficient():
    return (
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
    )


def test_a_mask_written_to_or_freed_is_converted_anew():
    query = torch.randn(1, 1, 2, 8)
    mask = torch.tensor([[True, False]])
    options = (1.0, False, 0, 0.0, 0, None, None)
    first, _ = attention_module._forward(query, query, query, mask, None, *options)
    mask.logical_not_()
    second, _ = attention_module._forward(query, query, query, mask, None, *options)
    torch.testing.assert_close(first, query[:, :, :1].expand_as(query))
    torch.testing.assert_close(second, query[:, :, 1:].expand_as(query))
    del mask
    assert attention_fused._last_bias._bias is None


def test_rows_that_begin_off_the_vector_loads_are_copied(gpu):
    fused = torch.empty(2, 70, 4 * 64 + 3, dtype=torch.bfloat16, device=DEVICE)
    query = fused.narrow(2, 3, 4 * 64).unflatten(2, (4, 64)).transpose(1, 2)
    for recorder in attend(query, query, query, causal=True):
        call = recorder.only(aten._flash_attention_forward.default, aten._flash_attention_backward.default)
        assert_rows_aligned(call["query"])
