"""Seconds of a collective over a group of devices, of a message between two, and of a copy to host memory.

A ring over n members takes n-1 steps (all-gather, reduce-scatter) or 2(n-1) (all-reduce), each sending 1/n of the tensor.
Its bandwidth is that of its slowest level: a subgroup of k members on a host puts k ports on the network, one ring each, so
the level carries k times one device's rate. Latency is that of the better of ring and tree.
"""

from __future__ import annotations

import math

from ..profiler.device import Device, GroupLink, Link
from .constants import Constants

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def link_rate(constants: Constants, link: Link, bytes_per_s: float) -> float:
    """Bytes/s that large messages reach. A measured link is what it is."""
    return bytes_per_s * (1.0 if link.measured else constants.get("link_efficiency", link.family))


def collective_seconds(constants: Constants, kind: str, bytes_full_tensor: float, group: GroupLink) -> float:
    """Seconds of one collective. bytes_full_tensor: the whole tensor: all-gather's output, reduce-scatter's input,
    what each member holds in an all-reduce, broadcast or all-to-all (it keeps 1/n of it)."""
    if kind not in COLLECTIVES:
        raise ValueError(f"collective {kind!r} is none of {', '.join(COLLECTIVES)}")
    size = group.size
    if size <= 1 or bytes_full_tensor <= 0:
        return 0.0
    levels = group.levels()
    launch_s = constants.get("collective_launch_s", group.link.family)
    if kind == "all_to_all":
        return launch_s + _all_to_all_seconds(constants, bytes_full_tensor, levels)
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}[kind]
    steps_bytes = bytes_full_tensor * (size - 1) / size * passes if kind != "broadcast" else bytes_full_tensor
    busy_s = 0.0
    for level in levels:
        rate = link_rate(constants, level.link, level.bytes_per_s) * level.members_per_subgroup
        if kind == "all_reduce" and level.link.multicast and level.size > 4:
            rate *= constants.get("multicast_gain")
        busy_s = max(busy_s, steps_bytes / rate)
    return launch_s + _latency_seconds(passes, kind, levels) + busy_s


def _latency_seconds(passes: int, kind: str, levels: list[GroupLink]) -> float:
    """Hops of the tree (all-reduce, broadcast) or the ring, level by level."""
    total = 0.0
    for level in levels:
        hops = (
            math.log2(max(2, level.num_subgroups)) if kind in {"all_reduce", "broadcast"} else level.num_subgroups - 1
        )
        total += passes * hops * level.latency_s
    return total


def _all_to_all_seconds(constants: Constants, num_bytes: float, levels: list[GroupLink]) -> float:
    """Every member sends 1/n of its tensor to each other one; at each level what leaves the subgroup crosses its ports."""
    size = levels[-1].size
    efficiency = constants.get("all_to_all_efficiency")
    total = 0.0
    for level in levels:
        leaving = num_bytes * (level.size - level.members_per_subgroup) / size
        rate = link_rate(constants, level.link, level.bytes_per_s) * efficiency
        total = max(total, leaving / rate + level.latency_s * math.log2(max(2, level.num_subgroups)))
    return total


def p2p_seconds(constants: Constants, num_bytes: float, link: Link | GroupLink) -> float:
    """Seconds until a message has arrived at the other end."""
    if isinstance(link, GroupLink):
        latency_s, rate, link = link.latency_s, min(link.bytes_per_s, link.link.pair_bytes_per_s()), link.link
    else:
        latency_s, rate = link.latency_s, link.bytes_per_s
    if num_bytes <= 0:
        return 0.0
    return constants.get("collective_launch_s", link.family) + latency_s + num_bytes / link_rate(constants, link, rate)


def transfer_host_seconds(constants: Constants, num_bytes: float, device: Device, tier: str = "host") -> float:
    """Seconds of a copy between the device and its share of host memory (or 'nvme'), one direction."""
    if num_bytes <= 0:
        return 0.0
    found = next((one for one in device.tiers if one.name == tier), None)
    if found is None or tier == "device":
        raise ValueError(f"{device.name} has no memory tier {tier!r}")
    return found.latency_s + num_bytes / link_rate(constants, device.host_link, found.bytes_per_s)
