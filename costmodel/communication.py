"""Seconds of a collective over a group of devices, of a message between two, and of a copy to host memory.

Three terms, as NCCL's rings and trees behave in its own benchmark:

    launch    fixed
    hops      each step of the ring (or tree) costs a latency and the time to fill the pipeline with one chunk
    traffic   bytes through the slowest level; a subgroup of k members on a host puts k ports on the network, one ring
              through each, so that level carries k times one device's rate (k up to max_rails)

    ring      n-1 steps for all-gather and reduce-scatter, 2(n-1) for all-reduce, each sending 1/n of the tensor
    tree      all-reduce and broadcast: log2(hosts) levels of the network, then the members of a host in a chain; two
              hosts exchange the tensor once instead of twice
    switch    all-reduce of five devices and more where the switch reduces in flight (NVLink SHARP): each sends it once

All-reduce and broadcast take the fastest that applies, as NCCL's tuner does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

from ..profiler.device import Device, GroupLink, Link
from .constants import Constants, assumed

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def bucket_bytes(total_bytes: float) -> int:
    """Of one collective, where gradients of so many bytes are summed."""
    share = int(total_bytes) // round(assumed("num_buckets"))
    return min(most_bucket_bytes(), max(round(assumed("least_bucket_bytes")), share))


def most_bucket_bytes() -> int:
    return round(assumed("most_bucket_bytes"))


def link_rate(constants: Constants, link: Link, bytes_per_s: float) -> float:
    """Bytes/s that large messages reach. A measured link is what it is."""
    return bytes_per_s * (1.0 if link.measured else constants.get("link_efficiency", link.name, link.family))


def level_rate(constants: Constants, level: GroupLink) -> float:
    """Bytes/s that one subgroup puts on this level, less what contention takes as subgroups (hosts) are added."""
    rails = min(level.members_per_subgroup, constants.get("max_rails"))
    rate = link_rate(constants, level.link, level.bytes_per_s) * rails
    if level.link.measured:
        return rate
    doublings = max(0.0, math.log2(level.num_subgroups) - 1)
    return rate / (1 + constants.get("contention_per_doubling", level.link.name, level.link.family) * doublings)


@dataclass(frozen=True)
class _Algorithm:
    """seconds = traffic_s_per_byte * bytes + latency_s + hops_s_per_byte * chunk."""

    traffic_s_per_byte: float
    latency_s: float
    hops_s_per_byte: float


@lru_cache(maxsize=4096)
def _algorithms(constants: Constants, kind: str, group: GroupLink) -> tuple[_Algorithm, ...]:
    """The algorithms that kind may use over group."""
    levels = group.levels()
    if kind == "all_to_all":
        return (_all_to_all(constants, levels),)
    ring = _ring(constants, kind, levels)
    return (ring,) if kind in {"all_gather", "reduce_scatter"} else (ring, _tree(constants, kind, levels))


def collective_seconds(constants: Constants, kind: str, bytes_full_tensor: float, group: GroupLink) -> float:
    """Seconds of one collective. bytes_full_tensor: the whole tensor: all-gather's output, reduce-scatter's input, what
    each member holds in an all-reduce, broadcast or all-to-all (of which it keeps 1/n)."""
    if kind not in COLLECTIVES:
        raise ValueError(f"collective {kind!r} is none of {', '.join(COLLECTIVES)}")
    if group.size <= 1 or bytes_full_tensor <= 0:
        return 0.0
    chunk_limit = constants.get("chunk_bytes", group.link.family)
    slice_bytes = bytes_full_tensor / group.size
    chunk = chunk_limit * slice_bytes / (slice_bytes + chunk_limit / 2)  # min(slice, limit), smoothly
    fastest_s = min(
        way.traffic_s_per_byte * bytes_full_tensor + way.latency_s + way.hops_s_per_byte * chunk
        for way in _algorithms(constants, kind, group)
    )
    return constants.get("collective_launch_s", group.link.family) + fastest_s


def _hops_by_level(levels: list[GroupLink]) -> list[int]:
    """Links of each level in a chain through all members: 15 hops over 2 hosts of 8 are 14 inside and 1 between."""
    crossings = [math.ceil(levels[-1].size / level.members_per_subgroup) for level in levels] + [1]
    return [here - above for here, above in itertools.pairwise(crossings)]


def _ring(constants: Constants, kind: str, levels: list[GroupLink]) -> _Algorithm:
    size = levels[-1].size
    passes = 2 if kind == "all_reduce" else 1
    share = 1.0 if kind == "broadcast" else passes * (size - 1) / size
    rate = min(level_rate(constants, level) for level in levels)
    return _algorithm(share / rate, [passes * count for count in _hops_by_level(levels)], levels, rate)


def _tree(constants: Constants, kind: str, levels: list[GroupLink]) -> _Algorithm:
    """Double binary tree over hosts; inside a host a chain, or the switch."""
    passes = 2 if kind == "all_reduce" else 1
    traffic, hops = 0.0, []
    for level in levels:
        rate = level_rate(constants, level)
        if level.scope == "network":
            traffic = max(traffic, (1 if level.num_subgroups == 2 else passes) / rate)
            hops.append(passes * math.ceil(math.log2(level.num_subgroups)))
            continue
        if kind == "all_reduce" and level.link.multicast and level.size >= constants.get("multicast_least_devices"):
            switched = constants.get("multicast_efficiency", level.link.name, level.link.family)
            traffic = max(traffic, 1 / (level.bytes_per_s * switched))
        else:
            traffic = max(traffic, passes / (rate * constants.get("tree_efficiency")))
        hops.append(passes * (level.num_subgroups - 1))
    return _algorithm(traffic, hops, levels, min(level_rate(constants, level) for level in levels))


def _all_to_all(constants: Constants, levels: list[GroupLink]) -> _Algorithm:
    """Every member sends 1/n of its tensor to each other one; what leaves a subgroup crosses that level's ports."""
    size = levels[-1].size
    traffic = latency_s = 0.0
    for level in levels:
        rate = level_rate(constants, level) / level.members_per_subgroup * constants.get("all_to_all_efficiency")
        traffic = max(traffic, (level.size - level.members_per_subgroup) / size / rate)
        latency_s += level.latency_s * math.log2(max(2, level.num_subgroups))
    return _Algorithm(traffic, latency_s, 0.0)


def _algorithm(traffic: float, hops: list[int], levels: list[GroupLink], rate: float) -> _Algorithm:
    latency_s = sum(count * level.latency_s for count, level in zip(hops, levels, strict=True))
    return _Algorithm(traffic, latency_s, sum(hops) / rate)


def p2p_seconds(constants: Constants, num_bytes: float, link: Link | GroupLink) -> float:
    """Seconds until a message has arrived at the other end. A GroupLink counts as its slowest level's link."""
    if num_bytes <= 0:
        return 0.0
    if isinstance(link, GroupLink):
        latency_s, rate, link = link.latency_s, min(link.bytes_per_s, link.link.pair_bytes_per_s()), link.link
    else:
        latency_s, rate = link.latency_s, link.bytes_per_s
    return constants.get("collective_launch_s", link.family) + latency_s + num_bytes / link_rate(constants, link, rate)


def transfer_host_seconds(constants: Constants, num_bytes: float, device: Device, tier: str = "host") -> float:
    """Seconds of a copy between the device and its share of host memory (or 'nvme'), one direction.

    Raises ValueError where the device has no such tier.
    """
    if num_bytes <= 0:
        return 0.0
    found = next((one for one in device.tiers if one.name == tier), None)
    if found is None or tier == "device":
        raise ValueError(f"{device.name} has no memory tier {tier!r}")
    latency_s = constants.get("disk_latency_s", tier) if tier == "nvme" else found.latency_s
    return latency_s + num_bytes / link_rate(constants, device.host_link, found.bytes_per_s)
