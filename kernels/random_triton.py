"""The random operators in Triton: the same definition as generator.py, block for block.

A lane makes one Philox block: four consecutive elements of the whole tensor, of which those in the shard are written.
Imported only where triton is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .generator import accumulate_dtype, keep_scale, keep_threshold, uniform_bits
from .shards import runs_of

_LANES = 256  # blocks for each program
_MAX_OUTER = 4  # outer dimensions of a shard that the kernel takes apart itself

_UNIFORM, _NORMAL, _KEEP, _DROPOUT = 0, 1, 2, 3


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    # [lanes, 4]: the last dimension counts consecutive elements
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(words, (c0.shape[0], 4))


@triton.jit
def _words(block, key_ptr, rng_index, STREAM: tl.constexpr):
    seed, step, base = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 3)
    operator = ((base + rng_index) & 0x7FFFFFFF) + STREAM * 0x80000000
    zero = tl.zeros_like(block)
    return _philox(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        (zero + operator).to(tl.uint32),
        (zero + step).to(tl.uint32),
        (zero + seed).to(tl.uint32),
        (zero + (seed >> 32)).to(tl.uint32),
    )


@triton.jit
def _fraction(block, words, key_ptr, rng_index, WIDE: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr):
    """[lanes, 4] uniform in [0, 1)."""
    if WIDE == tl.float64:
        tail = _words(block, key_ptr, rng_index, 1)
        digits = (words.to(tl.int64) << 21) | (tail >> 11).to(tl.int64)
    else:
        digits = (words >> (32 - BITS)).to(tl.int32)
    return digits.to(WIDE) * tl.full((1, 1), SCALE, WIDE)


@triton.jit(do_not_specialize=["rng_index"])
def _random_kernel(
    out_ptr,
    in_ptr,
    key_ptr,
    rng_index,
    num_runs,
    run,
    per_run,
    start,
    global_numel,
    size1,
    size2,
    size3,
    stride0,
    stride1,
    stride2,
    stride3,
    NUM_OUTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    begin = tl.zeros_like(lane) + start + tl.load(key_ptr + 2) * global_numel
    row = tl.zeros_like(lane)
    column = lane
    if NUM_OUTER > 0:
        row = lane // per_run
        column = lane % per_run
        rest = row
        if NUM_OUTER > 3:
            begin += rest % size3 * stride3
            rest = rest // size3
        if NUM_OUTER > 2:
            begin += rest % size2 * stride2
            rest = rest // size2
        if NUM_OUTER > 1:
            begin += rest % size1 * stride1
            rest = rest // size1
        begin += rest * stride0
    block = (begin >> 2) + column
    four = tl.arange(0, 4)[None, :]
    if ALIGNED:  # the place follows from the lane alone, so that the compiler can write four elements at once
        place = lane[:, None] * 4 + four
        inside = lane[:, None] < num_runs * per_run
    else:
        element = column[:, None] * 4 + four - (begin & 3)[:, None]
        place = row[:, None] * run + element
        inside = (row[:, None] < num_runs) & (column[:, None] < per_run) & (element >= 0) & (element < run)
    words = _words(block, key_ptr, rng_index, 0)
    if MODE == 0:
        value = _fraction(block, words, key_ptr, rng_index, WIDE, BITS, UNIT)
    elif MODE == 1:
        fraction = _fraction(block, words, key_ptr, rng_index, WIDE, BITS, UNIT)
        u, v = tl.split(tl.reshape(fraction, (LANES, 2, 2)))
        radius = tl.sqrt(-2 * tl.log(1 - u))
        angle = v * tl.full((1, 1), 6.283185307179586, WIDE)
        value = tl.reshape(tl.join(radius * tl.cos(angle), radius * tl.sin(angle)), (LANES, 4))
    elif MODE == 2:
        value = words.to(tl.int64) >= THRESHOLD
    else:
        keep = words.to(tl.int64) >= THRESHOLD
        value = tl.load(in_ptr + place, mask=inside, other=0).to(WIDE)
        value = value * keep.to(WIDE) * tl.full((1, 1), KEEP_SCALE, WIDE)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    mode: int,
    out: torch.Tensor,
    input: torch.Tensor,
    key: torch.Tensor,
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    wide: torch.dtype,
    bits: int = 0,
    p: float = 0.0,
) -> torch.Tensor:
    runs = runs_of(out.shape, global_shape, offset)
    if out.numel() == 0:
        return out
    if len(runs.outer) > _MAX_OUTER:  # more cuts than a mesh has axes: one launch for each slice of the first dimension
        for i in range(out.shape[0]):
            begin = [offset[0] + i, *offset[1:]]
            _launch(mode, out[i : i + 1], input[i : i + 1], key, global_shape, begin, rng_index, wide, bits, p)
        return out
    numel = runs.global_numel
    aligned = runs.run % 4 == 0 and numel % 4 == 0 and runs.shift() == 0
    per_run = runs.run // 4 if aligned else (runs.run + 6) // 4
    sizes = (*runs.outer, *(1,) * (_MAX_OUTER - len(runs.outer)))
    strides = (*runs.strides, *(0,) * (_MAX_OUTER - len(runs.outer)))
    grid = (triton.cdiv(runs.num_runs * per_run, _LANES),)
    with on_device(out.device):
        _random_kernel[grid](
            out, input, key.to(out.device), rng_index, runs.num_runs, runs.run, per_run, runs.start, numel,
            *sizes[1:], *strides,
            NUM_OUTER=len(runs.outer), ALIGNED=aligned, MODE=mode,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32, BITS=bits, UNIT=2.0**-bits,
            THRESHOLD=keep_threshold(p), KEEP_SCALE=keep_scale(p), LANES=_LANES,
        )  # fmt: skip
    return out


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device; under its interpreter there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def uniform(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    out = torch.empty(tuple(local_shape), dtype=dtype, device=device)
    wide = accumulate_dtype(dtype)
    return _launch(_UNIFORM, out, out, key, global_shape, offset, rng_index, wide, bits=uniform_bits(dtype))


def normal(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    out = torch.empty(tuple(local_shape), dtype=dtype, device=device)
    uniform_bits(dtype)
    wide = accumulate_dtype(dtype)
    return _launch(_NORMAL, out, out, key, global_shape, offset, rng_index, wide, bits=uniform_bits(wide))


def keep_mask(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    p: float,
    device: torch.device,
) -> torch.Tensor:
    out = torch.empty(tuple(local_shape), dtype=torch.uint8, device=device)
    return _launch(_KEEP, out, out, key, global_shape, offset, rng_index, torch.float32, p=p).view(torch.bool)


def dropout(
    input: torch.Tensor, key: torch.Tensor, p: float, rng_index: int, global_shape: Sequence[int], offset: Sequence[int]
) -> torch.Tensor:
    input = input.contiguous()
    out = torch.empty_like(input)
    return _launch(_DROPOUT, out, input, key, global_shape, offset, rng_index, accumulate_dtype(input.dtype), p=p)
