"""Collectives: closed forms on measured links, published points, and order between kinds and layouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.costmodel.communication import COLLECTIVES
from shardwright.costmodel.constants import default_constants
from shardwright.costmodel.model import CostModel
from shardwright.profiler.accelerators import find_link
from shardwright.profiler.cluster import Cluster, Link
from shardwright.profiler.hardware import parse_hardware

GIB = 1 << 30


def whole(spec: str, network: str = "") -> tuple[CostModel, object]:
    cluster = parse_hardware(spec)
    if network:
        cluster = Cluster(spec, tuple(replace(group, network=find_link(network)) for group in cluster.groups))
    return CostModel(cluster), cluster.axis_links({"dp": cluster.num_devices}, "dp")


def on_measured_link(size: int, bytes_per_s: float, latency_s: float) -> tuple[CostModel, object]:
    """One host of size devices on a link whose figures are exact, and constants without launch or chunks."""
    link = Link("wire", "wire", bytes_per_s, latency_s, measured=True)
    cluster = parse_hardware(f"{size}xCPU")
    cluster = Cluster("exact", (replace(cluster.groups[0], local=link),))
    table = default_constants().replaced({"collective_launch_s.wire": 0.0, "chunk_bytes.wire": 1e-9})
    return CostModel(cluster, table), cluster.axis_links({"dp": size}, "dp")


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 16), st.floats(1e6, 1e12), st.floats(1e8, 1e12), st.floats(1e-7, 1e-4))
def test_a_ring_on_an_exact_link_is_alpha_beta(size: int, num_bytes: float, rate: float, latency_s: float) -> None:
    model, group = on_measured_link(size, rate, latency_s)
    expected = (size - 1) * latency_s + num_bytes * (size - 1) / size / rate
    for kind in ("all_gather", "reduce_scatter"):
        assert model.collective_seconds(kind, num_bytes, group) == pytest.approx(expected)
    assert model.collective_seconds("all_reduce", num_bytes, group) <= 2 * expected * (1 + 1e-9)


@pytest.mark.parametrize(
    ("spec", "network", "num_bytes", "measured_s"),
    [
        # nccl-tests all-reduce, published by NVIDIA/dgxc-benchmarking, oci-hpc, AML_NCCL_Test and stas00/ml-engineering
        ("8xH100", "", 8 * GIB, 31.3e-3),
        ("8xH100", "", 1 << 27, 0.586e-3),
        ("8xH100", "", 1 << 21, 42e-6),
        ("8xA100-80GB", "", 8 * GIB, 64.2e-3),
        ("2x8xA100-80GB", "InfiniBand-HDR", 8 * GIB, 85.8e-3),
        ("2x8xA100-80GB", "InfiniBand-HDR", 1 << 27, 1.68e-3),
        ("2x8xH100", "RoCE-400", 8 * GIB, 34.3e-3),
        ("4xH200", "", 8 * GIB, 35.5e-3),
        ("8xB200", "", 8 * GIB, 17.9e-3),
        ("18x4xGB200", "", 8 * GIB, 20.3e-3),
    ],
)
def test_published_all_reduces_are_within_a_sixth(spec: str, network: str, num_bytes: int, measured_s: float) -> None:
    model, group = whole(spec, network)
    assert model.collective_seconds("all_reduce", num_bytes, group) == pytest.approx(measured_s, rel=1 / 6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["2xH100", "8xH100", "4x8xH100", "8xA100-PCIE", "3x8xV100", "2x8xMI250X", "40x4xGB200", "4xCPU"]),
    st.sampled_from(COLLECTIVES), st.floats(1.0, 1e11),
)  # fmt: skip
def test_time_grows_with_bytes_and_is_never_free(spec: str, kind: str, num_bytes: float) -> None:
    model, group = whole(spec)
    less, more = (model.collective_seconds(kind, size, group) for size in (num_bytes, 2 * num_bytes))
    assert 0 < less <= more <= 2 * less * (1 + 1e-9)
    assert math.isfinite(more)


@given(st.sampled_from(["8xA100-80GB", "4x8xH100", "4xCPU"]), st.floats(1e3, 1e11))
@settings(max_examples=40, deadline=None)
def test_an_all_reduce_costs_no_more_than_its_two_halves(spec: str, num_bytes: float) -> None:
    model, group = whole(spec)
    halves = sum(model.collective_seconds(kind, num_bytes, group) for kind in ("reduce_scatter", "all_gather"))
    assert model.collective_seconds("all_reduce", num_bytes, group) <= halves


def test_members_on_a_host_share_the_way_out() -> None:
    cluster = parse_hardware("2x8xH100")
    model = CostModel(cluster)
    across = cluster.axis_links({"dp": 2, "tp": 8}, "dp")  # one member a host: one port each
    both = cluster.axis_links({"dp": 16}, "dp")  # eight members a host: eight ports a ring
    one, eight = (model.collective_seconds("all_gather", GIB, group) for group in (across, both))
    assert one > 3 * eight


def test_nearer_links_are_faster() -> None:
    cluster = parse_hardware("2x8xH100")
    model = CostModel(cluster)
    near = model.collective_seconds("all_reduce", GIB, cluster.axis_links({"dp": 2, "tp": 8}, "tp"))
    far = model.collective_seconds("all_reduce", GIB, cluster.axis_links({"tp": 8, "dp": 2}, "tp"))
    assert far > 2 * near
    assert model.p2p_seconds(1 << 24, cluster.link_between(0, 1)) < model.p2p_seconds(
        1 << 24, cluster.link_between(0, 8)
    )


def test_no_other_member_no_time() -> None:
    cluster = parse_hardware("8xH100")
    model = CostModel(cluster)
    for kind in COLLECTIVES:
        assert model.collective_seconds(kind, GIB, cluster.axis_links({"dp": 8, "tp": 1}, "tp")) == 0
        assert model.collective_seconds(kind, 0, cluster.axis_links({"dp": 8}, "dp")) == 0
    with pytest.raises(ValueError, match="all_the_things"):
        model.collective_seconds("all_the_things", 1, cluster.axis_links({"dp": 8}, "dp"))


def test_a_message_along_the_pipeline_takes_its_slowest_link() -> None:
    cluster = parse_hardware("2x8xH100")
    model = CostModel(cluster)
    group = cluster.axis_links({"pp": 2, "dp": 1, "tp": 8}, "pp")
    assert model.p2p_seconds(1 << 26, group) == model.p2p_seconds(1 << 26, cluster.link_between(0, 8))
    assert model.p2p_seconds(0, group) == 0


def test_copies_to_host_memory_and_disk() -> None:
    model = CostModel(parse_hardware("8xA100-80GB"))
    assert model.transfer_host_seconds(GIB) == pytest.approx(GIB / 31.5e9 / 0.75, rel=0.3)
    assert model.transfer_host_seconds(GIB, tier="nvme") > model.transfer_host_seconds(GIB)
    with pytest.raises(ValueError, match="no memory tier 'tape'"):
        model.transfer_host_seconds(1, tier="tape")
