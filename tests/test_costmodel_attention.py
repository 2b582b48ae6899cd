"""Attention is priced as what runs, and what it holds beside its results is counted."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.costmodel import attention as priced
from shardwright.costmodel.attention import AttentionCall
from shardwright.costmodel.model import CostModel
from shardwright.kernels import attention_fused, attention_math
from shardwright.kernels.attention_math import Spec
from shardwright.kernels.ops import attention, make_key
from shardwright.planner.sharding.sharder import Sharder
from shardwright.plans.axes import MeshShape
from shardwright.profiler.capture import capture
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.marker_ops import visible
from shardwright.profiler.models import load_workload
from shardwright.profiler.work import attention_pairs, op_work
from shardwright.units import GIB

pytestmark = pytest.mark.usefixtures("shared_captures")


def call_of(query, key=None, mask=None, dtype=torch.bfloat16, causal=False, window=0, dropout_p=0.0, **changes):
    key = key or query
    made = None if mask is None else (tuple(mask[0]), mask[1])
    call = AttentionCall(query, key, key, (dtype,) * 3, made, None, causal, window, dropout_p, False, False)
    return dataclasses.replace(call, **changes)


def cases():
    for dtype, dim, keys, flags, masked, p in itertools.product(
        (torch.bfloat16, torch.float32, torch.float64),
        (4, 64, 200, 264),
        (8, 16),
        ((False, 0), (True, 0), (True, 4), (False, 4)),
        (False, True),
        (0.0, 0.1),
    ):
        mask = ((2, 1, 1, keys), torch.bool) if masked else None
        yield call_of((2, 4, 16, dim), (2, 2, keys, dim), mask, dtype, *flags, p)


CAPABILITIES = {
    "1xCPU": None,
    "1xV100": (7, 0),
    "1xA100": (8, 0),
    "1xRTX4090": (8, 9),
    "1xH100": (9, 0),
    "1xB200": (10, 0),
}


@pytest.mark.parametrize("hardware,capability", CAPABILITIES.items())
def test_the_kernel_that_is_priced_is_the_one_that_runs(hardware, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = parse_hardware(hardware).device(0)
    with FakeTensorMode():
        place = "cpu" if capability is None else "cuda:1"
        for call in cases():
            query, key = (torch.empty(s, dtype=call.dtypes[0], device=place) for s in (call.query, call.key))
            mask = None if call.mask is None else torch.empty(call.mask[0], dtype=call.mask[1], device=place)
            spec = Spec(1.0, call.causal, call.window, call.dropout_p)
            for wide in (0, -2, 2):  # values as wide as keys, narrower and wider
                sizes = (*call.key[:3], call.key[3] + wide)
                value = torch.empty(sizes, dtype=call.dtypes[0], device=place)
                other = dataclasses.replace(call, value=sizes)
                assert other.kernel(device) == attention_fused.lowering(query, key, value, mask, spec), other
    assert call_of((2, 4, 16, 64), mask_needs_grad=True).kernel(device) == "math"
    assert call_of((2, 4, 16, 64)).kernel(parse_hardware("1xMI300X").device(0)) == "math"


@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 5), (False, 5)])
@pytest.mark.parametrize("limit", [40, 300, 1 << 20])
def test_the_formulas_scores_are_those_of_its_blocks(monkeypatch, causal, window, limit):
    for table, kind in ((attention_math._MAX_SCORES, "cpu"), (priced.MAX_SCORES, "cpu")):
        monkeypatch.setitem(table, kind, limit)
    blocks = attention_math._blocks(2, 4, 13, 17, Spec(1.0, causal, window), torch.device("cpu"))
    expected = sum(4 * (b.batch.stop - b.batch.start) * (b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start)
                   for b in blocks)  # fmt: skip
    call = call_of((2, 4, 13, 8), (2, 4, 17, 8), causal=causal, window=window)
    assert call.formula_scores("cpu") == expected


@pytest.mark.parametrize("causal,window", [(False, 0), (True, 0), (True, 16), (True, 63), (False, 16), (False, 90)])
def test_flops_count_the_pairs_that_see_each_other(causal, window):
    """Up to the diagonal, of which causal attention counts half everywhere."""
    pairs = attention_pairs(64, 64, causal, window)
    assert pairs == pytest.approx(visible(64, 64, causal, window, torch.device("cpu")).sum().item(), abs=64)


def test_a_window_makes_attention_cheaper_where_the_kernel_skips():
    """32 heads at 32,768 tokens with a window of 4,096: a quarter less an eighth of a quarter's square, of the half."""
    expected = (4096 * 32768 - 4096**2 / 2) / (32768**2 / 2)
    call = call_of((1, 32, 32768, 128), causal=True, window=4096)
    for hardware, computed in (("1xH100-SXM-80GB", 1.0), ("1xCPU", 1 / expected)):
        assert call.computed_pairs(parse_hardware(hardware).device(0)) == pytest.approx(computed)
    with FakeTensorMode():
        query = torch.empty(1, 32, 32768, 128, dtype=torch.bfloat16, device="meta")
        flops = {}

        def windowed(window, q):
            return attention(q, q, q, None, None, 1.0, True, window, 0.0, 0, None, None)[0]

        for window in (0, 4096):
            traced = make_fx(partial(windowed, window))(query)
            node = next(n for n in traced.graph.nodes if "attention" in str(n.target))
            flops[window] = op_work(node).flops
    assert flops[0] == 2 * 2 * 32 * 128 * 32768**2 / 2
    assert flops[4096] / flops[0] == pytest.approx(expected)


def test_values_narrower_than_keys_are_priced_as_wide_and_their_copies_beside():
    """Multi-head latent attention of DeepSeek-V3: 128 heads with keys of 192 numbers and values of 128."""
    cost_model = CostModel(parse_hardware("1xH100-SXM-80GB"))
    device = cost_model.cluster.device(0)
    call = call_of((1, 128, 4096, 192), causal=True, value=(1, 128, 4096, 128))
    backward = dataclasses.replace(call, is_backward=True)
    assert call.kernel(device) == backward.kernel(device) == "flash"
    assert call.widened_work(device) == pytest.approx(2 * 192 / (192 + 128))
    assert backward.widened_work(device) == pytest.approx(5 * 192 / (3 * 192 + 2 * 128))
    one = 128 * 4096 * 192 * 2
    assert (call.widened_bytes(device, 1.0), backward.widened_bytes(device, 0.5)) == (2 * one, 2 * one)
    assert cost_model.attention_seconds(call, 1.0) is None
    assert cost_model.attention_copies_seconds(call, 1.0) == cost_model.op_seconds(
        "copy_", 0.0, 4 * one, torch.bfloat16
    )
    assert call_of((1, 128, 4096, 192), value=(1, 128, 4096, 256)).kernel(device) == "math"


def test_limits_of_a_block_are_those_of_the_kernels():
    assert priced.MAX_SCORES == {"cpu": attention_math._MAX_SCORES["cpu"], "gpu": attention_math._MAX_SCORES["cuda"]}


def test_a_traced_call_is_read_with_its_flags():
    def step(query, key, mask, rng_key):
        out, _ = attention(query, key, key, mask, rng_key, 0.3, True, 5, 0.25, 0, None, None)
        return torch.autograd.grad(out.sum(), [query, mask])

    inputs = [torch.randn(2, 4, 6, 8), torch.randn(2, 2, 7, 8), torch.randn(1, 4, 6, 7)]
    graph = make_fx(step, tracing_mode="fake")(*(t.requires_grad_() for t in inputs), make_key(0))
    forward, backward = (call for node in graph.graph.nodes if (call := AttentionCall.read(node)) is not None)
    assert (forward.query, forward.key, forward.mask) == ((2, 4, 6, 8), (2, 2, 7, 8), ((1, 4, 6, 7), torch.float32))
    assert (forward.causal, forward.window, forward.dropout_p, forward.is_backward) == (True, 5, 0.25, False)
    assert (
        dataclasses.replace(backward, is_backward=False, mask_needs_grad=False, mask_node=forward.mask_node) == forward
    )
    assert backward.mask_needs_grad


@pytest.mark.parametrize(
    "hardware,dtype,slower", [("1xCPU", torch.float32, (5, 20)), ("1xH100", torch.bfloat16, (20, 120))]
)
def test_dropout_costs_what_the_formula_costs(hardware, dtype, slower):
    """On a core of a CPU about 7 times a fused kernel was measured; this one skips half of a causal mask's scores."""
    model, size = CostModel(parse_hardware(hardware)), (8, 16, 1024, 64)
    fused_s = model.op_seconds("attention", 2 * 2 * 8 * 16 * 1024 * 1024 * 64 * 0.5, 4 * 8 * 16 * 1024 * 64 * 2, dtype)
    call = call_of(size, dtype=dtype, causal=True, dropout_p=0.1)
    seconds = model.attention_seconds(call, 1.0)
    assert slower[0] < seconds / fused_s < slower[1]
    assert model.attention_seconds(call, 0.5) == pytest.approx(seconds / 2)
    assert model.attention_seconds(dataclasses.replace(call, dropout_p=0.0), 1.0) is None


def test_the_planner_prices_dropout_in_attention():
    seconds = []
    for overrides in ({"attn_pdrop": 0.0}, {"attn_pdrop": 0.1}):
        workload = load_workload("preset:tiny-gpt2", global_batch=4, batch_size=4, overrides=overrides)
        solved = Sharder(capture(workload), CostModel(parse_hardware("1xH100"))).solve(MeshShape.of(), 4)
        seconds.append(solved.objective_s)
    assert seconds[1] > 1.2 * seconds[0]


def test_what_a_kernel_holds_beside_its_results_is_counted():
    gpu, cpu = parse_hardware("1xH100").device(0), parse_hardware("1xCPU").device(0)
    size, padding = (2, 32, 32768, 128), ((2, 1, 1, 32768), torch.bool)
    # padding beside a causal mask: its own elements in bf16, no S x T matrix
    assert call_of(size, mask=padding, causal=True).scratch_bytes(gpu, 1.0, 2 * 32768) == (0.0, 2 * 2 * 32768)
    # a window that is not causal is in no kernel beside a mask: 2 x S x T elements
    around = call_of(size, mask=padding, window=128).scratch_bytes(gpu, 1.0, 2 * 32768)
    assert around == (0.0, 2 * 2 * 32768**2) and around[1] == 4 * GIB
    # a boolean mask of all pairs is converted, for as many heads as it has
    whole = call_of(size, mask=((2, 1, 32768, 32768), torch.bool)).scratch_bytes(gpu, 1.0, 2.0 * 32768**2)
    assert whole == (0.0, 4 * GIB)
    assert call_of(size, mask=((32768, 32768), torch.bfloat16)).scratch_bytes(gpu, 1.0, 2 * GIB) == (0.0, 0.0)
    # key heads are repeated for the kernel that takes masks: keys and values of 32 heads
    grouped = call_of(size, (2, 8, 32768, 128), mask=padding, causal=True).scratch_bytes(gpu, 0.5, 32768)
    assert grouped == (0.5 * 2 * 2 * 32 * 32768 * 128 * 2, 2 * 32768)
    # the formula: three tensors of a block of scores in float32, five in the backward; on CPUs two of random words
    dropped = call_of(size, causal=True, dropout_p=0.1)
    assert dropped.scratch_bytes(gpu, 1.0, 0.0) == (3 * 4 * (1 << 26), 0.0)
    assert dataclasses.replace(dropped, is_backward=True).scratch_bytes(cpu, 1.0, 0.0) == (7 * 4 * (1 << 20), 0.0)
    assert call_of(size, causal=True).scratch_bytes(gpu, 1.0, 0.0) == (0.0, 0.0)
