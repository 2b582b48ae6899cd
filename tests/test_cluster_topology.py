"""Ranks, links and groups, against enumeration of every group."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.accelerators import find_link
from shardwright.profiler.cluster import Cluster, GroupLink, HostPairLink
from shardwright.profiler.hardware import parse_hardware

AXES = ("pp", "dp", "tp")


def ranks_along(mesh: dict[str, int], axis: str) -> list[list[int]]:
    """Every group along axis, ranks being row-major indices."""
    names = list(mesh)
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*(range(mesh[name]) for name in names))):
        rest = tuple(value for name, value in zip(names, place, strict=True) if name != axis)
        groups.setdefault(rest, []).append(rank)
    return list(groups.values())


def ring_rate(group: GroupLink) -> float:
    return min(level.bytes_per_s * level.members_per_subgroup for level in group.levels())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["2x8xH100", "4x4xA100-PCIE", "3x8xA100-40GB", "20x4xGB200", "2x8xH100+1x8xA100", "2x8xMI250X"]),
    st.integers(1, 4), st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(AXES),
)  # fmt: skip
def test_axis_links_is_the_slowest_of_all_groups(spec: str, pp: int, dp: int, tp: int, axis: str) -> None:
    cluster = parse_hardware(spec)
    mesh = {"pp": pp, "dp": dp, "tp": tp}
    if math.prod(mesh.values()) > cluster.num_devices:
        with pytest.raises(ShardwrightError, match="does not fit"):
            cluster.axis_links(mesh, axis)
        return
    found = cluster.axis_links(mesh, axis)
    every = [cluster.group_link(ranks) for ranks in ranks_along(mesh, axis)]
    assert found.size == mesh[axis]
    assert ring_rate(found) == min(ring_rate(group) for group in every)
    assert found in every


def test_tensor_parallelism_stays_on_the_host_and_data_parallelism_crosses() -> None:
    cluster = parse_hardware("2x8xH100")
    mesh = {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "tp": 8}
    tp, dp = cluster.axis_links(mesh, "tp"), cluster.axis_links(mesh, "dp")
    assert (tp.link.name, tp.size, tp.inner) == ("NVLink4", 8, None)
    assert (dp.link.name, dp.size, dp.inner) == ("InfiniBand-NDR", 2, None)
    both = cluster.axis_links({"dp": 16}, "dp")
    assert (both.size, both.num_subgroups, both.members_per_subgroup) == (16, 2, 8)
    assert [level.link.name for level in both.levels()] == ["NVLink4", "InfiniBand-NDR"]


def test_a_rack_joined_by_one_switch_is_one_domain() -> None:
    cluster = parse_hardware("36x4xGB200")
    assert cluster.link_between(0, 71).name == "NVLink5"
    assert cluster.link_between(71, 72).name == "InfiniBand-NDR"
    assert cluster.axis_links({"dp": 144}, "dp").members_per_subgroup == 72


def test_bridged_pairs_and_meshes_have_nearer_and_narrower_links() -> None:
    pcie = parse_hardware("8xA100-PCIE-80GB")
    assert (pcie.link_between(0, 1).name, pcie.link_between(1, 2).name) == ("NVLink-Bridge", "PCIe4")
    mesh = parse_hardware("8xMI300X")
    assert mesh.link_between(0, 5).bytes_per_s == 64e9
    assert mesh.axis_links({"dp": 4, "tp": 2}, "tp").bytes_per_s == 64e9
    assert mesh.axis_links({"tp": 8}, "tp").bytes_per_s == 448e9


def test_a_mixed_cluster_waits_for_its_slowest_and_smallest() -> None:
    cluster = parse_hardware("1x8xH100-80GB+1x8xA100-40GB")
    assert cluster.worst_device().name == "A100-SXM-40GB"
    assert cluster.worst_device(range(8)).name == "H100-SXM-80GB"
    assert not cluster.is_homogeneous
    composite = parse_hardware("8xH100-PCIE-80GB+8xV100-32GB+8xL40S").worst_device()
    assert composite.memory_bytes_per_s == 864e9 and composite.peak_flops_per_s("bf16") == 15.7e12
    assert cluster.link_between(0, 8).bytes_per_s == 25e9  # HDR at the A100's end


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["2x8xH100", "8xA100-PCIE", "20x4xGB200", "1x8xH100+1x4xA100"]), st.data())
def test_links_are_the_same_both_ways(spec: str, data: st.DataObject) -> None:
    cluster = parse_hardware(spec)
    a = data.draw(st.integers(0, cluster.num_devices - 1))
    b = data.draw(st.integers(0, cluster.num_devices - 1))
    assert cluster.link_between(a, b) == cluster.link_between(b, a)


def test_a_slow_pair_of_hosts_slows_the_groups_across_it() -> None:
    plain = parse_hardware("4x8xH100")
    slow = Cluster("uneven", plain.groups, host_pairs=(HostPairLink(2, 3, find_link("Ethernet-10")),))
    assert slow.link_between(16, 24).name == "Ethernet-10"
    assert slow.link_between(0, 24).name == "InfiniBand-NDR"
    mesh = {"pp": 2, "dp": 2, "tp": 8}
    assert slow.axis_links(mesh, "dp").link.name == "Ethernet-10"
    assert slow.axis_links(mesh, "pp").link.name == "InfiniBand-NDR"
    assert slow.hash != plain.hash


def test_sixteen_thousand_devices_are_instant() -> None:
    start = time.perf_counter()
    cluster = parse_hardware("2048x8xH100-80GB")
    for mesh in ({"pp": 16, "dp": 128, "tp": 8}, {"pp": 1, "dp": 16384, "tp": 1}, {"pp": 8, "dp": 256, "tp": 8}):
        assert all(cluster.axis_links(mesh, axis).size == size for axis, size in mesh.items())
    assert cluster.worst_device().name == "H100-SXM-80GB"
    assert time.perf_counter() - start < 3
    smaller = parse_hardware("64x8xH100").graph
    assert smaller.number_of_edges() == 3 * 512  # grows with devices, not with pairs


def test_the_graph_joins_devices_hosts_and_switches() -> None:
    import networkx

    graph = parse_hardware("2x8xH100").graph
    assert networkx.is_connected(graph)
    kinds = networkx.get_node_attributes(graph, "kind")
    counts = {kind: list(kinds.values()).count(kind) for kind in set(kinds.values())}
    assert counts == {"device": 16, "host": 2, "domain": 2, "network": 1}
    assert graph.edges[("device", 0), ("domain", 0)]["bytes_per_s"] == 450e9


def test_memory_tiers_are_ordered_from_the_device_outwards() -> None:
    tiers = parse_hardware("8xH100").device(0).tiers
    assert [tier.name for tier in tiers] == ["device", "host", "nvme"]
    assert tiers[0].bytes_per_s > tiers[1].bytes_per_s >= tiers[2].bytes_per_s


def test_ranks_outside_the_cluster_are_refused() -> None:
    cluster = parse_hardware("8xH100")
    with pytest.raises(IndexError, match="rank 8"):
        cluster.device(8)
    with pytest.raises(KeyError, match="axis 'ep'"):
        cluster.axis_links({"dp": 8}, "ep")
