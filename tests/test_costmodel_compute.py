"""Ops on a device: the roofline, op classes, and a whole model's sanity."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.cli import main
from shardwright.costmodel.constants import default_constants
from shardwright.costmodel.model import CostModel
from shardwright.costmodel.op_classes import op_class
from shardwright.profiler.accelerators import accelerators
from shardwright.profiler.hardware import parse_hardware

BF16 = torch.bfloat16


def matmul_s(model: CostModel, n: int, dtype: object = BF16, width: int = 2) -> float:
    return model.op_seconds("aten.mm.default", 2 * n**3, 3 * n * n * width, dtype)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("aten.mm.default", "matmul"), ("aten::bmm", "matmul"), ("aten.addmm.default", "matmul"),
        ("aten.view.default", "view"), ("aten._unsafe_view.default", "view"), ("aten.t.default", "view"),
        ("aten.transpose.int", "view"), ("<built-in function getitem>", "view"), ("_operator.getitem", "view"),
        ("shardwright.attention.default", "attention"),
        ("shardwright.attention_backward.default", "attention_backward"),
        ("aten._scaled_dot_product_flash_attention_backward.default", "attention_backward"),
        ("aten._softmax.default", "reduction"), ("aten.sum.dim_IntList", "reduction"), ("aten.mean.dim", "reduction"),
        ("aten.native_layer_norm_backward.default", "normalization"),
        ("shardwright.add_rms_norm.default", "normalization"),
        ("aten.embedding_dense_backward.default", "gather"), ("aten.index_put.default", "gather"),
        ("aten.gelu.default", "pointwise"), ("aten.add.Tensor", "pointwise"), ("aten.pow.Tensor_Scalar", "pointwise"),
        ("aten._to_copy.default", "copy"), ("aten.cat.default", "copy"), ("aten.clone.default", "copy"),
        ("aten.convolution_backward.default", "convolution"), ("aten.max_pool2d_with_indices.default", "reduction"),
    ],
)  # fmt: skip
def test_ops_fall_into_their_class(op: str, kind: str) -> None:
    assert op_class(op) == kind


def test_views_are_free_and_small_ops_cost_a_launch() -> None:
    model = CostModel(parse_hardware("8xH100"))
    assert model.op_seconds("aten.view.default", 0, 1 << 30, BF16) == 0
    launch_s = model.op_seconds("aten.add.Tensor", 10, 60, BF16)
    assert 1e-6 < launch_s < 20e-6
    assert model.op_seconds("aten.mm.default", 2 * 64**3, 3 * 64 * 64 * 2, BF16) == launch_s


@pytest.mark.parametrize("name", [key for key in accelerators() if key != "CPU"])
def test_large_matrix_products_reach_a_plausible_share_of_the_peak(name: str) -> None:
    model = CostModel(parse_hardware(f"1x{name}"))
    share = 2 * 8192**3 / matmul_s(model, 8192) / model.peak_flops_per_s(BF16)
    assert 0.35 < share < 0.9


def test_efficiency_falls_with_size() -> None:
    model = CostModel(parse_hardware("8xH100"))
    rates = [2 * n**3 / matmul_s(model, n) for n in (256, 512, 1024, 2048, 4096, 8192)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] / 10


def test_narrower_types_are_faster() -> None:
    model = CostModel(parse_hardware("8xH100"))
    times = [matmul_s(model, 4096, dtype, width) for dtype, width in
             ((torch.float8_e4m3fn, 1), (BF16, 2), (torch.float32, 4), (torch.float64, 8))]  # fmt: skip
    assert times == sorted(times) and times[0] < times[-1] / 10


def test_pointwise_ops_are_bound_by_memory() -> None:
    model = CostModel(parse_hardware("8xA100-80GB"))
    num_bytes = 3 << 30
    assert num_bytes / 2039e9 < model.op_seconds("aten.add.Tensor", 1 << 29, num_bytes, BF16) < num_bytes / 2039e9 * 1.6


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["mm", "attention", "attention_backward", "add", "sum", "layer_norm", "embedding", "convolution"]),
    st.floats(0, 1e15), st.floats(0, 1e11), st.sampled_from(["8xH100", "8xV100", "4xCPU", "8xMI300X"]),
)  # fmt: skip
def test_more_work_never_takes_less_time(op: str, flops: float, num_bytes: float, spec: str) -> None:
    model = CostModel(parse_hardware(spec))
    base = model.op_seconds(op, flops, num_bytes, BF16)
    assert 0 < base <= model.op_seconds(op, flops * 1.5, num_bytes, BF16)
    assert base <= model.op_seconds(op, flops, num_bytes * 1.5, BF16)


def test_measured_devices_are_taken_at_their_word() -> None:
    from dataclasses import replace

    model = CostModel(parse_hardware("1xCPU"))
    device = replace(model.cluster.device(0), measured=True, peaks=(("fp32", 1e11),), memory_bytes_per_s=1e10)
    assert model.op_seconds("aten.add.Tensor", 0, 1e9, torch.float32, device) == pytest.approx(0.1)


def test_every_constant_is_printable_with_its_source() -> None:
    rows = CostModel(parse_hardware("8xH100")).constants()
    assert len(rows) > 40
    for row in rows:
        assert row["source"] and row["date"] and row["meaning"] and float(row["value"]) >= 0
        assert row["kind"] in {"datasheet", "measured", "fitted", "assumed"}
    assert len({row["name"] for row in rows}) == len(rows)


def test_what_is_assumed_of_memory_and_software_is_printable_too(capsys) -> None:
    names = {row["name"] for row in default_constants().rows()}
    assert {"usable_memory_fraction.default", "communicator_bytes.default", "pinned_memory_factor.default"} <= names
    assert main(["hardware", "--show-assumptions", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["value"] for row in printed}["usable_memory_fraction.default"] == "0.93"
    assert main(["hardware", "8xH100", "--show-assumptions"]) == 2


def test_constants_are_looked_up_nearest_key_first() -> None:
    table = default_constants()
    assert table.get("matmul_efficiency", "H100-fp8", "H100") != table.get("matmul_efficiency", "H100")
    assert table.get("matmul_efficiency", "no such part") == table.get("matmul_efficiency")
    with pytest.raises(KeyError, match="no_such_group"):
        table.get("no_such_group")
    changed = table.replaced({"tree_efficiency.default": 0.5})
    assert changed.get("tree_efficiency") == 0.5 != table.get("tree_efficiency")
