"""A decoder-only transformer's training step, written out as ops and collectives and timed by the cost model.

It exists to test the cost model on published runs of other frameworks: planning itself never uses it (the planner times
the captured graph in the event simulator). Each op goes through CostModel.op_seconds, each collective through
collective_seconds; what is left here is which ops a framework runs and what it overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardwright.costmodel.model import CostModel
from shardwright.profiler.device import GroupLink

Op = tuple[str, float, float, str]  # name, flops, bytes, dtype


@dataclass(frozen=True)
class Transformer:
    """ffn: width of the MLP; gated: three matrices instead of two."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    gated: bool
    tied: bool = False

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_params(self) -> int:
        h = self.hidden
        return 2 * h * h + 2 * h * self.kv_width + (3 if self.gated else 2) * h * self.ffn

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + (1 if self.tied else 2) * self.vocab * self.hidden

    def flops_per_token(self) -> float:
        """Forward and backward, causal attention at half, no recomputation, embedding look-up free."""
        return (
            6 * (self.layers * self.layer_params + self.vocab * self.hidden)
            + self.layers * 6 * self.seq_len * self.hidden
        )


@dataclass(frozen=True)
class Layout:
    """micro_batch: sequences of one data-parallel rank in one microbatch. zero as in ZeRO; 3 is FSDP."""

    dp: int
    tp: int
    pp: int
    cp: int
    micro_batch: int
    global_batch: int
    zero: int = 0
    virtual_stages: int = 1
    schedule: str = "1f1b"  # 1f1b | zb-1p | zb-2p
    recompute: str = "none"  # none | attention | half (every second block) | full
    sequence_parallel: bool = False

    @property
    def num_microbatches(self) -> int:
        return max(1, self.global_batch // (self.dp * self.micro_batch))


@dataclass(frozen=True)
class Software:
    """What the framework runs. attention: flash | unfused (scores stored, no causal saving)."""

    dtype: str = "bf16"
    linear_dtype: str = "bf16"  # fp8 where the linear layers are
    attention: str = "flash"
    attention_slowdown: float = 1.0  # against FlashAttention-2
    compiled: bool = False
    fused_softmax: bool = True  # scale, mask and softmax in one kernel, where attention is unfused
    fused_norm: bool = True
    fused_rotary: bool = True
    rotary: bool = True
    dropout: bool = False
    grad_bytes: int = 4  # of a gradient as it is accumulated and reduced
    overlap_dp: bool = False
    overlap_tp: bool = False
    fused_accumulation: bool = False  # the weight gradient's product adds into the running sum itself
    blocking_p2p: bool = True
    scattered_p2p: bool = False  # tensor-parallel ranks each send a slice (Megatron's scatter-gather)
    dispatch_s: float = 10e-6  # host time that the framework takes to dispatch one op
    tp_overlap: float = 0.4  # share of tensor-parallel communication hidden, where overlap_tp
    dp_overlap: float = 0.8  # share of data-parallel communication that can hide, where overlap_dp
    step_overhead: float = 0.03  # share of a step outside compute and communication: data, logging, stragglers


@dataclass(frozen=True)
class Half:
    """One pass through a piece of the model on one rank: device seconds, kernels, tensor-parallel seconds."""

    device_s: float
    kernels: int
    tp_s: float


def _time(model: CostModel, ops: list[Op]) -> float:
    return sum(model.op_seconds(*op) for op in ops)


def _matmul(m: float, k: float, n: float, dtype: str, batch: float = 1) -> Op:
    width = 1 if dtype == "fp8" else 2
    return ("mm", 2 * batch * m * k * n, batch * (width * (m * k + k * n) + 2 * m * n), dtype)


def _linear(m: float, k: float, n: float, software: Software, backward: bool) -> list[Op]:
    """Forward, or the two products of the backward. fp8 operands are cast, and transposed for the backward."""
    dtype = software.linear_dtype
    if backward:
        ops = [_matmul(m, n, k, dtype), _matmul(k, m, n, dtype)]
        # the weight gradient joins the running sum, which is read and written; unless fused, so is the fresh one
        ops.append(
            ("add", k * n, k * n * (2 * software.grad_bytes + (0 if software.fused_accumulation else 2)), "fp32")
        )
        if dtype == "fp8":
            ops.append(("copy_", 0, m * n * 4, "bf16"))
        return ops
    ops = [_matmul(m, k, n, dtype)]
    if dtype == "fp8":
        ops.append(("copy_", 0, m * k * 4, "bf16"))
    return ops


def _norm(elements: float, software: Software, backward: bool) -> list[Op]:
    if software.fused_norm or software.compiled:
        return [("layer_norm", 0, elements * (8 if backward else 4), "bf16")]
    # eager, in fp32: cast, square, mean, scale, cast, multiply
    return [
        ("mul", 0, elements * size, "fp32") for size in ((6, 8, 4, 8, 6, 4) if not backward else (6, 12, 12, 12, 8, 6))
    ]


def _pointwise(bytes_moved: float, count: int = 1) -> list[Op]:
    return [("mul", 0, bytes_moved / count, "bf16")] * count


def attention_ops(t: Transformer, layout: Layout, software: Software, backward: bool) -> list[Op]:
    tokens = layout.micro_batch * t.seq_len / layout.cp
    heads = t.heads / layout.tp
    width = t.hidden / layout.tp
    if software.attention == "flash":
        flops = 4 * tokens * t.seq_len * width / 2 * (2.5 if backward else 1)
        name = "attention_backward" if backward else "attention"
        return [
            (name, flops * software.attention_slowdown, tokens * width * 2 * (8 if backward else 4), software.dtype)
        ]
    head_dim = t.hidden / t.heads
    scores = layout.micro_batch * heads * t.seq_len * t.seq_len / layout.cp
    batch = layout.micro_batch * heads
    rows = t.seq_len / layout.cp
    products = [
        _matmul(rows, head_dim, t.seq_len, software.dtype, batch),
        _matmul(rows, t.seq_len, head_dim, software.dtype, batch),
    ]
    softmax: list[Op] = [("softmax", 0, scores * (6 if backward else 4), "bf16")]
    if software.dropout:
        softmax += _pointwise(scores * 5)
    if not software.fused_softmax:  # scale, mask, cast, cast back
        softmax += _pointwise(scores * 24, 4)
    return products * (2 if backward else 1) + softmax


def layer(model: CostModel, t: Transformer, layout: Layout, software: Software, tp: GroupLink, backward: bool) -> Half:
    """One transformer block for one microbatch."""
    tokens = layout.micro_batch * t.seq_len / layout.cp
    h, f = t.hidden, t.ffn / layout.tp
    outside = tokens / (layout.tp if layout.sequence_parallel else 1)
    qkv = (h + 2 * t.kv_width) / layout.tp
    passes = 2 if backward else 1
    ops = _norm(outside * h, software, backward) + _norm(outside * h, software, backward)
    ops += _linear(tokens, h, qkv, software, backward)
    if software.rotary:
        count = 1 if software.fused_rotary or software.compiled else 6
        ops += _pointwise(tokens * (h + t.kv_width) / layout.tp * 4 * (1 if count == 1 else 4), count)
    ops += attention_ops(t, layout, software, backward)
    ops += _linear(tokens, h / layout.tp, h, software, backward)
    ops += _linear(tokens, h, f * (2 if t.gated else 1), software, backward)
    activation = tokens * f * 2 * (3 if t.gated else 2) * (1.67 if backward else 1)
    ops += _pointwise(activation, 1 if software.compiled or not t.gated else 2)
    ops += _linear(tokens, f, h, software, backward)
    residual = outside * h * 6
    ops += _pointwise(residual * (1 if not software.dropout else 1.3), 1) * 2
    kernels = len(ops) + (4 if software.compiled else 14) * passes
    comm_s = 0.0
    if layout.tp > 1:
        size = tokens * h * 2
        if layout.sequence_parallel:
            one = model.collective_seconds("all_gather", size, tp) + model.collective_seconds(
                "reduce_scatter", size, tp
            )
        else:
            one = model.collective_seconds("all_reduce", size, tp)
        comm_s = 2 * one
        if layout.sequence_parallel and backward:  # the input is gathered again for the weight gradient
            comm_s += 2 * model.collective_seconds("all_gather", size, tp)
        kernels += 4
    return Half(_time(model, ops), kernels, comm_s)


def head(model: CostModel, t: Transformer, layout: Layout, software: Software, tp: GroupLink, backward: bool) -> Half:
    """Last norm, projection onto the vocabulary, cross-entropy in fp32."""
    tokens = layout.micro_batch * t.seq_len / layout.cp
    vocab = t.vocab / layout.tp
    plain = Software(**{**software.__dict__, "linear_dtype": software.dtype})
    ops = _linear(tokens, t.hidden, vocab, plain, backward)
    logits_bytes = (10 if software.compiled else 24) if not backward else (6 if software.compiled else 14)
    ops += [("softmax", 0, tokens * vocab * logits_bytes / 4, "fp32")] * 4
    comm_s = model.collective_seconds("all_reduce", tokens * t.hidden * 2, tp) if layout.tp > 1 else 0.0
    return Half(_time(model, ops), len(ops) + 10, comm_s)


def embedding(model: CostModel, t: Transformer, layout: Layout, tp: GroupLink, backward: bool) -> Half:
    tokens = layout.micro_batch * t.seq_len / layout.cp
    size = tokens * t.hidden * 2
    ops: list[Op] = [("embedding", 0, size * (3 if backward else 2), "bf16")]
    if backward:
        ops.append(("add", 0, t.vocab / layout.tp * t.hidden * 10, "fp32"))
    comm_s = model.collective_seconds("all_reduce", size, tp) if layout.tp > 1 and not backward else 0.0
    return Half(_time(model, ops), 4, comm_s)


def _busy(model: CostModel, halves: list[tuple[float, Half]], software: Software) -> float:
    """Seconds of a stage's pass: the device, or the host that dispatches eager ops one by one, whichever is slower.

    Overlapped tensor parallelism hides tp_overlap of itself."""
    device_s = sum(count * half.device_s for count, half in halves)
    tp_s = sum(count * half.tp_s for count, half in halves)
    if software.overlap_tp:
        tp_s -= min(tp_s, device_s) * software.tp_overlap
    kernels = sum(count * half.kernels for count, half in halves)
    return max(device_s + tp_s, kernels * software.dispatch_s)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and of what it is made of (parts overlap, so they need not add up)."""

    step_s: float
    compute_s: float
    bubble_s: float
    tp_s: float
    dp_s: float
    optimizer_s: float


def step_time(model: CostModel, t: Transformer, layout: Layout, software: Software) -> StepTime:
    mesh = {"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp}
    tp = model.cluster.axis_links(mesh, "tp")
    fwd = layer(model, t, layout, software, tp, backward=False)
    bwd = layer(model, t, layout, software, tp, backward=True)
    per_stage = t.layers / layout.pp
    full_stage = math.ceil(per_stage) if layout.virtual_stages == 1 else per_stage

    again: list[tuple[float, Half]] = []
    if layout.recompute == "full":
        again = [(full_stage, fwd)]
    elif layout.recompute == "half":
        again = [(full_stage / 2, fwd)]
    elif layout.recompute == "attention":
        ops = attention_ops(t, layout, software, backward=False)
        again = [(full_stage, Half(_time(model, ops), len(ops), 0.0))]
    head_f, head_b = (head(model, t, layout, software, tp, back) for back in (False, True))
    emb_f, emb_b = (embedding(model, t, layout, tp, back) for back in (False, True))

    middle_f = _busy(model, [(full_stage, fwd)], software)
    middle_b = _busy(model, [(full_stage, bwd), *again], software)
    last_f, last_b = _busy(model, [(1, head_f)], software), _busy(model, [(1, head_b)], software)
    first_f, first_b = _busy(model, [(1, emb_f)], software), _busy(model, [(1, emb_b)], software)
    comm_s = _context_seconds(model, t, layout, mesh) * full_stage
    middle_f, middle_b = middle_f + comm_s, middle_b + 2 * comm_s

    m, p, v = layout.num_microbatches, layout.pp, layout.virtual_stages
    one = middle_f + middle_b
    if p == 1:
        ends = first_f + first_b + last_f + last_b
        run_s, bubble_s = m * (one + ends), 0.0
        window_s = middle_b + first_b + last_b
    else:
        p2p_s = _p2p_seconds(model, t, layout, software)
        # the last stage carries the head; some give it and the first one layer less
        layer_s = one / full_stage
        lighter = (t.layers + 2) % p == 0 and t.layers % p != 0
        last_s = one + last_f + last_b - (layer_s if lighter else 0.0)
        slowest = max(one, last_s)
        bubble = (p - 1) * (one / v + 2 * p2p_s)
        if layout.schedule == "zb-1p":
            bubble *= 0.5
        elif layout.schedule == "zb-2p":
            bubble *= 0.1
        exposed = 2 * p2p_s * v if software.blocking_p2p else 0.0
        run_s, bubble_s = m * (slowest + exposed) + bubble, bubble
        window_s = middle_b
    dp_s, exposed_dp_s = _data_parallel_seconds(model, t, layout, software, mesh, run_s, window_s)
    optimizer_s = _optimizer_seconds(model, t, layout)
    step_s = (run_s + exposed_dp_s + optimizer_s) * (1 + software.step_overhead)
    tp_s = m * full_stage * (fwd.tp_s + bwd.tp_s)
    return StepTime(step_s, m * one, bubble_s, tp_s, dp_s, optimizer_s)


def _p2p_seconds(model: CostModel, t: Transformer, layout: Layout, software: Software) -> float:
    sliced = layout.sequence_parallel or software.scattered_p2p
    size = layout.micro_batch * t.seq_len / layout.cp * t.hidden * 2 / (layout.tp if sliced else 1)
    stride = layout.dp * layout.cp * layout.tp
    links = [
        model.cluster.link_between(0, stride),
        model.cluster.link_between(stride * (layout.pp - 2), stride * (layout.pp - 1)),
    ]
    return max(model.p2p_seconds(size, link) for link in links)


def _context_seconds(model: CostModel, t: Transformer, layout: Layout, mesh: dict[str, int]) -> float:
    """Keys and values gathered around the context group, for one layer's forward."""
    if layout.cp == 1:
        return 0.0
    size = 2 * layout.micro_batch * t.seq_len * t.kv_width / layout.tp * 2
    return model.collective_seconds("all_gather", size, model.cluster.axis_links(mesh, "cp")) * 0.5


def _data_parallel_seconds(
    model: CostModel,
    t: Transformer,
    layout: Layout,
    software: Software,
    mesh: dict[str, int],
    run_s: float,
    window_s: float,
) -> tuple[float, float]:
    """(all of it, exposed). FSDP gathers twice and reduces once a microbatch; others reduce once a step."""
    shards = layout.dp * layout.cp
    if shards == 1:
        return 0.0, 0.0
    params = (t.layers * t.layer_params / layout.pp + t.vocab * t.hidden * (2 if layout.pp == 1 else 1)) / layout.tp
    # context ranks hold the same parameters, so they reduce with the data-parallel ones
    group = model.cluster.axis_links({"pp": layout.pp, "dp": shards, "tp": layout.tp}, "dp")
    blocks = max(1, t.layers / layout.pp)
    hidden_part = software.dp_overlap

    def buckets(kind: str, size: float, count: float) -> float:
        return count * model.collective_seconds(kind, size / count, group)

    if layout.zero == 3:
        gather_s = buckets("all_gather", params * 2, blocks)
        reduce_s = buckets("reduce_scatter", params * software.grad_bytes, blocks)
        regather = 1 if layout.pp > 1 else layout.num_microbatches
        total = regather * (2 * gather_s + reduce_s)
        exposed = max(total * (1 - hidden_part), total - run_s * hidden_part)
        return total, max(exposed, gather_s / blocks)
    count = max(1.0, params * software.grad_bytes / 200e6)
    if layout.zero >= 1:
        reduce_s = buckets("reduce_scatter", params * software.grad_bytes, count)
        gather_s = buckets("all_gather", params * 2, count)
    else:
        reduce_s, gather_s = buckets("all_reduce", params * software.grad_bytes, count), 0.0
    if not software.overlap_dp:
        return reduce_s + gather_s, reduce_s + gather_s
    exposed = max(reduce_s * (1 - hidden_part), reduce_s - window_s * hidden_part)
    return reduce_s + gather_s, exposed + gather_s


def _optimizer_seconds(model: CostModel, t: Transformer, layout: Layout) -> float:
    params = (t.layers * t.layer_params / layout.pp + t.vocab * t.hidden) / layout.tp
    if layout.zero >= 1:
        params /= layout.dp
    # Adam: gradient, master, moments read; master, moments, the 16-bit copy written; the norm reads gradients again
    return model.op_seconds("mul", 0, params * (16 + 14 + 4), "fp32")
