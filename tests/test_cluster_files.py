"""Clusters described in TOML files, and this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler import cpu_calibration, discovery
from shardwright.profiler.hardware import parse_hardware
from shardwright.units import GIB

LAB = """
name = "lab"

[[hosts]]
count = 2
devices = "8xA100-SXM-80GB"
network_link = { name = "InfiniBand-HDR", gb_per_s = 21.5, source = "ib_write_bw", date = "2026-03-01" }
host_memory_gib = 1024
memory_gib = 70

[[hosts]]
devices = "4xL40S"
network_link = "Ethernet-25"

[[links]]
hosts = [0, 1]
gb_per_s = 3.0
latency_us = 40.0
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(LAB)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_describes_hosts_and_links(lab: Path) -> None:
    cluster = parse_hardware(str(lab))
    assert (cluster.name, cluster.num_devices, cluster.num_hosts) == ("lab", 20, 3)
    assert cluster.device(0).memory_bytes == 70 * GIB
    assert cluster.device(0).host_memory_bytes == 128 * GIB  # one eighth of the host
    assert cluster.link_between(0, 8).bytes_per_s == 3e9
    assert cluster.link_between(8, 16).name == "Ethernet-25"
    measured = cluster.group_link([0, 16]).link
    assert measured.name == "Ethernet-25" and not measured.measured
    assert cluster.sources_summary()["measured"] == 5
    assert json.loads(json.dumps(cluster.to_dict()))["host_pairs"][0]["hosts"] == [0, 1]


def test_measured_links_are_used_as_they_are(lab: Path) -> None:
    network = parse_hardware(str(lab)).groups[0].network
    assert network.measured and network.bytes_per_s == 21.5e9 and network.latency_s == pytest.approx(10e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "describes no host"),
        ("[[hosts]]\ncount = 2", "no devices"),
        ('[[hosts]]\ndevices = "8xH100"\nnetwork = "x"', "unknown key 'network'"),
        ('[[hosts]]\ndevices = "8xH100"\nnetwork_link = "InfiniBand"', "InfiniBand-"),
        ('[[hosts]]\ndevices = "8xH100"\nmemory_gib = "many"', "memory_gib"),
        ('[[hosts]]\ndevices = "8xH100"\n[[links]]\nhosts = [0, 5]\ngb_per_s = 1', "0 to 0"),
        ("[[hosts", "not TOML"),
        ('[[hosts]]\ndevices = "8xH1000"', "near: H100"),
        ("hosts = [1]", "hosts[0] is 1, not a table"),
        ("[[hosts]]\ndevices = 1", "devices = 1"),
        ('[[hosts]]\ndevices = "8xH100"\ncount = 0', "count = 0"),
        ('[[hosts]]\ndevices = "8xH100"\ncount = "x"', "count = 'x'"),
        ('[[hosts]]\ndevices = "8xH100"\nnvme_gib = nan', "nvme_gib = nan"),
        (f'[[hosts]]\ndevices = "8xH100"\nlocal_link = {{ gb_per_s = {"9" * 400} }}', "gb_per_s = 999"),
        ('[[hosts]]\ndevices = "8xH100"\nlocal_link = { name = 1 }', "name = 1"),
        ('links = { a = 1 }\n[[hosts]]\ndevices = "8xH100"', "a list of tables"),
        ('[[hosts]]\ndevices = "8xH100"\n[[links]]\nhosts = [0, 0]\ngb_per_s = 1', "two different host numbers"),
    ],
)
def test_a_wrong_file_says_what_to_change(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ShardwrightError) as caught:
        parse_hardware(str(path))
    assert says in str(caught.value)
    assert caught.value.change and caught.value.works


def test_a_missing_file_is_a_usage_error() -> None:
    with pytest.raises(ShardwrightError, match="No such file"):
        parse_hardware("./nowhere.toml")


def test_processes_share_the_machine() -> None:
    one, four = parse_hardware("1xCPU").device(0), parse_hardware("4xCPU").device(0)
    assert four.memory_bytes == one.memory_bytes // 4
    assert four.peak_flops_per_s("fp32") == one.peak_flops_per_s("fp32") / 4
    assert four.memory_bytes_per_s == one.memory_bytes_per_s / 4


def test_nominal_figures_are_used_and_said_so_until_measured(empty_cache: Path) -> None:
    cluster = parse_hardware("4xCPU")
    assert cluster.sources_summary()["measured"] == 0
    assert "nominal" in cluster.notes[0]
    assert not cluster.device(0).measured


def test_calibration_measures_once_and_marks_its_figures(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parse_hardware("2xCPU")
    first = cpu_calibration.calibrate_cpu()
    monkeypatch.setattr(cpu_calibration, "_measure_gloo", lambda: pytest.fail("measured twice"))
    assert cpu_calibration.calibrate_cpu() == first
    assert 1e8 < first.flops_per_s["fp32"] < 1e14
    assert 1e8 < first.memory_bytes_per_s < 1e13
    assert 1e-6 < first.loopback_latency_s < 0.1 and 1e6 < first.loopback_bytes_per_s < 1e12
    after = parse_hardware("2xCPU")
    assert after.sources_summary()["measured"] == 7
    assert after.device(0).peak_flops_per_s("fp64") == first.flops_per_s["fp64"] / 2
    assert after.device(0).measured and after.groups[0].local.measured
    assert after.hash == before.hash  # a plan made before calibration stays valid


def test_another_machines_calibration_is_not_used(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_calibration, "MEASURE_S", 0.01)
    cpu_calibration.calibrate_cpu()
    monkeypatch.setattr(cpu_calibration, "machine_name", lambda: "another")
    assert cpu_calibration.read_cpu_calibration() is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 0}', "\x00"])
def test_a_damaged_cache_is_ignored(empty_cache: Path, text: str) -> None:
    empty_cache.mkdir()
    (empty_cache / "cpu.json").write_text(text)
    assert cpu_calibration.read_cpu_calibration() is None


def test_local_is_this_machine_or_this_job(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_calibration, "MEASURE_S", 0.01)
    monkeypatch.setattr(discovery, "_visible_accelerator", lambda: ("", 0, 0))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = parse_hardware("local")
    assert alone.num_devices == 1 and alone.device(0).kind == "cpu" and alone.device(0).measured
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    job = parse_hardware("local")
    assert (job.num_devices, job.num_hosts) == (4, 1)
    assert job.device(0).memory_bytes == alone.device(0).memory_bytes // 4


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100-SXM-80GB"), ("NVIDIA H100 PCIe", 79.2, "H100-PCIE-80GB"),
        ("NVIDIA H100 NVL", 93.1, "H100-NVL-94GB"), ("NVIDIA A100-SXM4-40GB", 39.4, "A100-SXM-40GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-PCIE-40GB"), ("Tesla V100-SXM2-16GB", 15.8, "V100-SXM-16GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090-PCIE-24GB"), ("NVIDIA H200", 139.8, "H200-SXM-141GB"),
        ("NVIDIA B200", 178.4, "B200-SXM-180GB"), ("NVIDIA GB200", 184.0, "GB200-NVL72-186GB"),
        ("NVIDIA L40S", 44.4, "L40S-PCIE-48GB"), ("AMD Instinct MI300X", 191.6, "MI300X-OAM-192GB"),
    ],
)  # fmt: skip
def test_a_drivers_device_name_finds_its_entry(
    name: str, memory_gib: float, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_visible_accelerator", lambda: (name, 4, int(memory_gib * GIB)))
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    cluster = parse_hardware("local")
    assert (cluster.num_devices, cluster.device(0).name) == (4, key)
    assert cluster.device(0).memory_bytes == int(memory_gib * GIB)
    assert cluster.sources_summary()["measured"] == 1


def test_an_unknown_accelerator_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_visible_accelerator", lambda: ("Quadro 9000", 1, 8 * GIB))
    with pytest.raises(ShardwrightError, match=r"Quadro 9000.*8\.0 GiB"):
        parse_hardware("local")
