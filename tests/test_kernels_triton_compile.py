"""The Triton kernels compile for NVIDIA GPUs, down to machine code, on a machine that has none."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton is not installed, or interprets", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwright.kernels import random_triton, rms_norm_triton

HOPPER = GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(kernel, types, constants, aligned=()):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=HOPPER)


@pytest.mark.parametrize(
    "mode,element,aligned", [(0, "fp64", True), (1, "fp32", False), (2, "u8", True), (3, "bf16", True)]
)
def test_random_kernels_compile_and_write_four_elements_at_once_where_aligned(mode, element, aligned):
    wide = tl.float64 if element == "fp64" else tl.float32
    compiled = compile_for(
        random_triton._random_kernel,
        {"out_ptr": "*" + element, "in_ptr": "*" + element, "key_ptr": "*i64", "rng_index": "i32"},
        {"NUM_OUTER": 2, "ALIGNED": aligned, "MODE": mode, "WIDE": wide, "BITS": 24, "UNIT": 2.0**-24}
        | {"THRESHOLD": 3 * 10**9, "KEEP_SCALE": 1 / 0.7, "LANES": 256},
        ["out_ptr", "in_ptr", "key_ptr"],
    )
    assert compiled.asm["cubin"]
    if aligned:
        stores = set(re.findall(r"st\.global\.(\S+)", compiled.asm["ptx"]))
        widths = {"fp64": "v2.b64", "u8": "b32", "bf16": "v2.b32"}
        assert stores == {widths[element]}, "a store of a whole block, 16 bytes at most"


@pytest.mark.parametrize("element,extra", [("bf16", True), ("fp64", False)])
def test_rms_norm_kernels_compile(element, extra):
    wide = tl.float64 if element == "fp64" else tl.float32
    pointers = {name: "*" + element for name in ("y_ptr", "sum_ptr", "x_ptr", "residual_ptr", "weight_ptr", "grad_ptr")}
    pointers |= {name: "*" + element for name in ("grad_y_ptr", "grad_sum_ptr")}
    types = {**pointers, "rstd_ptr": "*fp64" if element == "fp64" else "*fp32", "dim": "i32", "num_rows": "i32"}
    types["partial_ptr"] = types["rstd_ptr"]
    common = {"CAST_FIRST": True, "WIDE": wide, "BLOCK": 1024}
    forward = {**common, "EPS": 1e-5, "HAS_RESIDUAL": extra}
    assert compile_for(rms_norm_triton._forward_kernel, types, forward).asm["cubin"]
    assert compile_for(rms_norm_triton._backward_kernel, types, {**common, "HAS_GRAD_SUM": extra}).asm["cubin"]
