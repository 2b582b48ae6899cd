"""The Triton kernels against their references: on an NVIDIA GPU, else under Triton's interpreter.

The interpreter must be chosen before triton is imported: without a GPU this file runs itself in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from shardwright.kernels import generator
from shardwright.kernels.ops import make_key
from shardwright.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = HAS_TRITON and (INTERPRETED or torch.cuda.is_available())
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

here = pytest.mark.skipif(not RUNS_HERE, reason="run by test_kernels_under_tritons_interpreter, or no triton")

if RUNS_HERE:
    from shardwright.kernels import random_triton, rms_norm_triton

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# whole shape, shard, offset: whole, cut by rows, by columns, unaligned, one element wide, cut on every dimension
BOXES = [
    ((8, 12), (8, 12), (0, 0)),
    ((8, 12), (3, 12), (2, 0)),
    ((8, 12), (8, 4), (0, 8)),
    ((5, 7), (5, 7), (0, 0)),
    ((5, 7), (4, 3), (1, 2)),
    ((6, 3, 5), (6, 3, 1), (0, 0, 3)),
    ((40, 30, 8), (20, 30, 4), (20, 0, 4)),
    ((3, 4, 3, 4, 3), (2, 3, 2, 2, 2), (1, 1, 0, 2, 1)),
    ((2, 3, 2, 3, 2, 4), (1, 2, 2, 2, 1, 2), (1, 1, 0, 1, 1, 1)),
]
KEYS = [(1, 0, 0, 0), (-5, 2**31 + 3, 3, 70), (2**63 - 1, 9, 2**30, 0)]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_kernels_under_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@here
@pytest.mark.parametrize("number", range(len(BOXES)))
def test_random_kernels_give_the_references_bits(number):
    whole, local, offset = BOXES[number]
    key = make_key(*KEYS[number % len(KEYS)], device=DEVICE)
    for dtype in FLOATS:
        got = random_triton.uniform(key, local, whole, offset, 3, dtype, DEVICE)
        assert torch.equal(got, generator.uniform(key, local, whole, offset, 3, dtype, DEVICE))
        x = torch.linspace(-2, 2, got.numel(), dtype=torch.float64).view(local).to(DEVICE, dtype)
        # Triton 3's interpreter cuts float32 to bfloat16 short where hardware rounds: a scale of 2 needs no rounding
        p = 0.5 if INTERPRETED and dtype == torch.bfloat16 else 0.3
        got = random_triton.dropout(x, key, p, 3, whole, offset)
        assert torch.equal(got, generator.dropout(x, key, p, 3, whole, offset))
    for p in (0.0, 0.1, 1.0):
        got = random_triton.keep_mask(key, local, whole, offset, 3, p, DEVICE)
        assert torch.equal(got, generator.keep_mask(key, local, whole, offset, 3, p, DEVICE))


@here
@pytest.mark.parametrize("whole,local,offset", BOXES[:5], ids=str)
def test_normal_kernel_agrees_to_rounding(whole, local, offset):
    key = make_key(7, 1, 1, device=DEVICE)
    for dtype, tolerance in (
        (torch.float64, 1e-14),
        (torch.float32, 2e-6),
        (torch.float16, 2e-3),
        (torch.bfloat16, 2e-2),
    ):
        got = random_triton.normal(key, local, whole, offset, 0, dtype, DEVICE)
        want = generator.normal(key, local, whole, offset, 0, dtype, DEVICE)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@here
@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize(
    "dtype,tolerance,shape",
    [
        *((torch.float64, 1e-13, shape) for shape in ((7, 32), (2, 3, 48), (4, 1), (1, 300))),
        (torch.float32, 3e-6, (5, 48)),
        (torch.bfloat16, 3e-2, (5, 48)),
    ],
    ids=str,
)
def test_rms_norm_kernels_agree_with_the_reference(dtype, tolerance, cast_first, shape):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad_y, grad_sum = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(4))
    weight = torch.randn(shape[-1:], generator=generator).to(DEVICE, dtype)

    def close(got, want):
        for g, w in zip(got, want, strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * max(1.0, w.abs().max().item()))

    for addend in (residual, None):
        y, sum, rstd = rms_norm_triton.forward(x, addend, weight, 1e-5, cast_first)
        if addend is not None:
            close([sum], [x + residual])
        close([y, rstd], rms_norm_reference(sum, weight, 1e-5, cast_first))
        for further in (grad_sum, None):
            got = rms_norm_triton.backward(grad_y, further, sum, rstd, weight, cast_first)
            close(got, rms_norm_backward_reference(grad_y, further, sum, rstd, weight, cast_first))
