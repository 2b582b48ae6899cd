"""Hardware names: what each means, and what a wrong one says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.accelerators import accelerators, links
from shardwright.profiler.cluster import _row_keys, dtype_key
from shardwright.profiler.hardware import describe, known_hardware, parse_hardware
from shardwright.profiler.host_groups import find_accelerator
from shardwright.units import GIB


@pytest.mark.parametrize(
    ("spec", "num_devices", "num_hosts", "devices"),
    [
        ("8xA100-40GB", 8, 1, {"A100-SXM-40GB"}),
        ("2x8xH100-80GB", 16, 2, {"H100-SXM-80GB"}),
        ("2x8xH100-SXM-80GB+1x4xA100", 20, 3, {"H100-SXM-80GB", "A100-SXM-80GB"}),
        ("1x1xRTX4090", 1, 1, {"RTX4090-PCIE-24GB"}),
        ("1x2xrtx-4090", 2, 1, {"RTX4090-PCIE-24GB"}),
        ("4xCPU", 4, 1, {"CPU"}),
        ("128x8xH100-80GB", 1024, 128, {"H100-SXM-80GB"}),
        ("4xh100-pcie", 4, 1, {"H100-PCIE-80GB"}),
        ("4xH100-94GB", 4, 1, {"H100-NVL-94GB"}),
        ("8xV100-16GB", 8, 1, {"V100-SXM-16GB"}),
        ("18x4xGB200", 72, 18, {"GB200-NVL72-186GB"}),
        ("8xMI250X", 8, 1, {"MI250X-OAM-64GB"}),
        (" 1 x 8 x H200 ", 8, 1, {"H200-SXM-141GB"}),
    ],
)
def test_a_name_gives_its_devices_and_hosts(spec: str, num_devices: int, num_hosts: int, devices: set[str]) -> None:
    cluster = parse_hardware(spec)
    assert (cluster.num_devices, cluster.num_hosts) == (num_devices, num_hosts)
    assert {cluster.device(rank).name for rank in range(num_devices)} == devices


def test_every_catalog_key_is_a_name() -> None:
    for key in accelerators():
        assert parse_hardware(f"2x2x{key}").device(3).name == key


def test_more_devices_than_a_host_holds_fill_whole_hosts() -> None:
    assert parse_hardware("16xH100").num_hosts == 2
    assert parse_hardware("72xGB200-NVL72").num_hosts == 18
    with pytest.raises(ShardwrightError, match="holds 8"):
        parse_hardware("9xH100")


@pytest.mark.parametrize(
    ("spec", "near"),
    [("8xH10", "H100-SXM-80GB"), ("8xB2000", "B200-SXM-180GB"), ("8xA10O", "A100-SXM-80GB"), ("H100", "H100-SXM-80GB"),
     ("8xMI300", "MI300X-OAM-192GB"), ("8xH100-60GB", "H100-SXM-80GB"), ("2x8xRTX409", "RTX4090-PCIE-24GB")],
)  # fmt: skip
def test_an_unknown_name_shows_what_is_near_and_works(spec: str, near: str) -> None:
    with pytest.raises(ShardwrightError) as caught:
        parse_hardware(spec)
    assert near in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE
    assert parse_hardware(caught.value.works).num_devices > 0


@settings(deadline=None)
@given(st.text(alphabet="0123456789xXhHaAbB-+ GB.", max_size=16))
def test_any_text_is_a_cluster_or_a_usage_error(text: str) -> None:
    try:
        cluster = parse_hardware(text)
    except ShardwrightError as error:
        assert error.change and error.works
    else:
        assert cluster.num_devices >= 1


def test_every_figure_names_its_unit_source_kind_and_date() -> None:
    figures = [figure for entry in accelerators().values() for figure in entry.device.figures]
    figures += [figure for link in links().values() for figure in link.figures]
    assert len(figures) > 250
    for figure in figures:
        assert figure.name.endswith(("_gib", "gb_per_s", "_us", "_tflops")), figure.name
        assert figure.value > 0 and figure.source and figure.date, figure.name
        assert figure.kind in {"datasheet", "measured", "fitted", "assumed"}


def test_rows_for_printing_hold_every_figure_with_its_kind() -> None:
    cluster = parse_hardware("2x8xH100-80GB")
    rows = describe(cluster)
    assert sum(bool(row["source"]) for row in rows) == sum(cluster.sources_summary().values()) > 10
    assert {row["kind"] for row in rows if row["source"]} <= {"datasheet", "measured", "fitted", "assumed"}
    assert {row["name"] for row in known_hardware()} == set(accelerators())


def test_memory_is_what_the_driver_leaves_of_the_size_in_the_name() -> None:
    device = parse_hardware("8xH100-80GB").device(0)
    assert device.nominal_memory_bytes == 80 * GIB
    assert 79 * GIB < device.memory_bytes < 80 * GIB


def test_a_memory_limit_lowers_and_never_raises() -> None:
    cluster = parse_hardware("8xH100-80GB")
    assert cluster.with_memory_limit(10 * GIB).device(3).memory_bytes == 10 * GIB
    assert cluster.with_memory_limit(1000 * GIB).device(3).memory_bytes == cluster.device(3).memory_bytes
    assert parse_hardware("4xCPU", memory_limit_bytes=GIB).worst_device().memory_bytes == GIB
    with pytest.raises(ShardwrightError):
        cluster.with_memory_limit(0)


def test_the_hash_tells_hardware_apart() -> None:
    names = ["8xH100-80GB", "2x8xH100-80GB", "8xH200", "8xA100-40GB", "8xA100-80GB", "4xCPU", "4x2xH100", "2x4xH100"]
    assert len({parse_hardware(name).hash for name in names}) == len(names)
    assert parse_hardware("8xH100").hash == parse_hardware("1x8xH100-SXM-80GB").hash
    assert parse_hardware("8xH100").hash != parse_hardware("8xH100").with_memory_limit(GIB).hash


@pytest.mark.parametrize(
    ("dtype", "key"),
    [(torch.bfloat16, "bf16"), ("float32", "fp32"), (torch.float8_e4m3fn, "fp8"), (torch.int64, "fp32"),
     (torch.float64, "fp64"), ("torch.float16", "fp16"), (torch.complex64, "fp32"), ("bf16", "bf16")],
)  # fmt: skip
def test_types_map_to_peak_rates(dtype: object, key: str) -> None:
    assert dtype_key(dtype) == key


def test_a_type_that_a_part_lacks_runs_at_the_next_wider_rate() -> None:
    v100, a100 = find_accelerator("V100").device, find_accelerator("A100").device
    assert v100.peak_flops_per_s("bf16") == v100.peak_flops_per_s("fp32") == 15.7e12
    assert a100.peak_flops_per_s("fp8") == a100.peak_flops_per_s("bf16") == 312e12


@pytest.mark.parametrize(
    "name", ["99999999999999999999xCPU", "9" * 6000 + "xCPU", "262144x8xH100", "8xH100+262144xH100"]
)
def test_more_devices_than_are_planned_for_are_refused_at_once(name: str) -> None:
    with pytest.raises(ShardwrightError, match="devices") as caught:
        parse_hardware(name)
    assert caught.value.exit_code == ExitCode.USAGE
    assert parse_hardware(caught.value.works).num_devices == 16384


def test_groups_that_lie_alike_have_one_key() -> None:
    rows = np.array([[0, 1, 2], [0, 2, 1], [0, 1, 2], [0, 1, 3]])
    keys = _row_keys(rows)
    assert keys[0] == keys[2] and len(set(keys.tolist())) == 3


def test_naming_hardware_imports_no_torch_and_looks_at_no_device() -> None:
    code = (
        "import sys; from shardwright.profiler.hardware import parse_hardware as p; p('4xCPU'); p('2x8xH100');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
