"""Cluster: devices, hosts and links, as planning sees them. No device is looked at here.

Ranks are numbered host by host in the order of the specification. Three kinds of link join them, nearest first:

    bridge   a pair (or so) of neighbours: an NVLink bridge, two dies in a package
    local    all devices of a host, or of a rack where a switch spans it (GB200 NVL72): NVLink, PCIe, Infinity Fabric
    network  hosts: InfiniBand, Ethernet, EFA

Bandwidth is bytes/s per device and direction; a port that several devices share counts as each one's share, because in
training all of them send at once. Nothing is enumerated by pairs, so 16,384 devices cost little more than 8.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ShardwrightError
from ..units import GB, GIB
from .device import Device, Figure, GroupLink, Link, MemoryTier, dtype_key, worse_device, worse_link, worst_link

if TYPE_CHECKING:
    import networkx

__all__ = [
    "Cluster", "Device", "Figure", "GroupLink", "HostGroup", "HostPairLink", "Link", "MemoryTier", "dtype_key",
]  # fmt: skip


@dataclass(frozen=True)
class HostGroup:
    """count identical hosts in a row. domain_devices: devices joined by local (a host, or a rack of several hosts)."""

    count: int
    devices_per_host: int
    device: Device
    local: Link
    network: Link
    bridge: Link | None = None
    bridge_devices: int = 1
    domain_devices: int = 0  # 0: one host

    @property
    def num_devices(self) -> int:
        return self.count * self.devices_per_host

    @property
    def devices_per_domain(self) -> int:
        """Whole hosts only."""
        hosts = max(1, (self.domain_devices or self.devices_per_host) // self.devices_per_host)
        return hosts * self.devices_per_host


@dataclass(frozen=True)
class HostPairLink:
    """A pair of hosts whose link differs from the rest (measured, or an uplink)."""

    host_a: int
    host_b: int
    link: Link


def _row_keys(rows: np.ndarray) -> np.ndarray:
    """One number for each row, the same for equal rows (for others with odds of 2**-64): sorts faster than rows."""
    weights = np.random.default_rng(0).integers(1, 1 << 63, size=rows.shape[1], dtype=np.uint64)
    return rows.astype(np.uint64) @ weights


@dataclass(frozen=True)
class _Places:
    """Per rank: index of its host group, host, local domain and bridge."""

    group: np.ndarray
    host: np.ndarray
    domain: np.ndarray
    bridge: np.ndarray


@dataclass(frozen=True)
class Cluster:
    """Build one with parse_hardware. Immutable; every method is a pure function of the fields."""

    name: str
    groups: tuple[HostGroup, ...]
    host_pairs: tuple[HostPairLink, ...] = ()
    memory_limit_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    @property
    def num_hosts(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def is_homogeneous(self) -> bool:
        return len({group.device for group in self.groups}) == 1

    @cached_property
    def _places(self) -> _Places:
        parts: list[tuple[np.ndarray, ...]] = []
        host = domain = bridge = 0
        for index, group in enumerate(self.groups):
            rank = np.arange(group.num_devices)
            host_of = rank // group.devices_per_host
            local = rank % group.devices_per_host
            bridges_per_host = math.ceil(group.devices_per_host / group.bridge_devices)
            bridge_of = host_of * bridges_per_host + local // group.bridge_devices
            domain_of = rank // group.devices_per_domain
            parts.append((np.full_like(rank, index), host + host_of, domain + domain_of, bridge + bridge_of))
            host, domain, bridge = host + group.count, domain + int(domain_of[-1]) + 1, bridge + int(bridge_of[-1]) + 1
        return _Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    @cached_property
    def _axis_cache(self) -> dict[tuple[Any, ...], GroupLink]:
        return {}

    def _check_ranks(self, *ranks: int) -> None:
        number = self.num_devices
        for rank in ranks:
            if not 0 <= rank < number:
                raise IndexError(f"rank {rank} is outside the cluster {self.name} of {self.num_devices} devices")

    def _limited(self, device: Device) -> Device:
        limit = self.memory_limit_bytes
        return device if limit is None or limit >= device.memory_bytes else replace(device, memory_bytes=limit)

    @cached_property
    def _devices(self) -> tuple[Device, ...]:
        return tuple(self._limited(group.device) for group in self.groups)

    def device(self, rank: int) -> Device:
        self._check_ranks(rank)
        return self._devices[int(self._places.group[rank])]

    def host_of(self, rank: int) -> int:
        self._check_ranks(rank)
        return int(self._places.host[rank])

    @property
    def is_accelerated(self) -> bool:
        """Does a step run on accelerators, which hide copies behind kernels and have a host's memory beside theirs?"""
        return self.worst_device().kind != "cpu"

    def worst_device(self, ranks: Iterable[int] | None = None) -> Device:
        """Slowest and smallest of the devices of ranks (all of them by default). Where one is slower and another
        smaller, a device that is both: what a step in lock-step waits for, and what must fit."""
        if ranks is None:
            return self._worst_of_all
        ranks = list(ranks)
        self._check_ranks(*ranks)
        return self._worst_of([self._devices[index] for index in sorted(set(self._places.group[ranks].tolist()))])

    @cached_property
    def _worst_of_all(self) -> Device:
        return self._worst_of(self._devices)

    @staticmethod
    def _worst_of(devices: Iterable[Device]) -> Device:
        first, *others = dict.fromkeys(devices)
        worst = first
        for other in others:
            worst = worse_device(worst, other)
        return worst

    def link_between(self, rank_a: int, rank_b: int) -> Link:
        """The link that a message from rank_a to rank_b takes; its bytes_per_s is what the pair has."""
        self._check_ranks(rank_a, rank_b)
        places = self._places
        group_a, group_b = self.groups[int(places.group[rank_a])], self.groups[int(places.group[rank_b])]
        if places.bridge[rank_a] == places.bridge[rank_b] and group_a.bridge is not None:
            link = group_a.bridge
        elif places.domain[rank_a] == places.domain[rank_b]:
            link = group_a.local
        else:
            link = worse_link(group_a.network, group_b.network)
            pair = {int(places.host[rank_a]), int(places.host[rank_b])}
            for special in self.host_pairs:
                if {special.host_a, special.host_b} == pair:
                    link = special.link
        rate = link.pair_bytes_per_s()
        return link if rate == link.bytes_per_s else replace(link, bytes_per_s=rate, peer_bytes_per_s=0.0)

    def group_link(self, ranks: Sequence[int]) -> GroupLink:
        """What joins these ranks. Levels that hold a single member each are left out."""
        self._check_ranks(*ranks)
        places = self._places
        index = np.asarray(ranks, dtype=int)
        groups = [self.groups[kind] for kind in sorted(set(places.group[index].tolist()))]
        size = len(index)
        in_domain = _mean_count(places.domain[index])
        in_bridge = _mean_count(places.bridge[index]) if all(group.bridge for group in groups) else 1
        inner: GroupLink | None = None
        if in_bridge > 1:
            bridge = worst_link([group.bridge for group in groups if group.bridge is not None])
            inner = _group_link(in_bridge, bridge, None, "bridge")
        spans_network = len(np.unique(places.domain[index])) > 1
        if in_domain > in_bridge or (not spans_network and size > in_bridge):
            local = worst_link([group.local for group in groups])
            inner = _group_link(in_domain if spans_network else size, local, inner)
        if spans_network:
            network = worst_link([group.network for group in groups])
            hosts = set(places.host[index].tolist())
            special = [pair.link for pair in self.host_pairs if {pair.host_a, pair.host_b} <= hosts]
            inner = _group_link(size, worst_link([network, *special]), inner, "network")
        if inner is None:
            return _group_link(1, groups[0].local, None)
        return inner

    def axis_links(self, mesh_shape: Mapping[str, int], axes: str | tuple[str, ...]) -> GroupLink:
        """The bottleneck of the worst group along a mesh axis, or along several as one; ranks are row-major indices
        into mesh_shape.

        mesh_shape: axis name -> size, outermost first; their product is at most num_devices (the first ranks are used).
        """
        names = (axes,) if isinstance(axes, str) else axes
        key = (tuple(mesh_shape.items()), names)
        if key not in self._axis_cache:
            self._axis_cache[key] = self._axis_links(mesh_shape, names)
        return self._axis_cache[key]

    def _axis_links(self, mesh_shape: Mapping[str, int], axes: tuple[str, ...]) -> GroupLink:
        if missing := [axis for axis in axes if axis not in mesh_shape]:
            raise KeyError(f"axis {missing[0]!r} is not in the mesh {mesh_shape}")
        total = math.prod(mesh_shape.values())
        if total > self.num_devices:
            raise ShardwrightError(
                f"a mesh of {total} devices {mesh_shape} does not fit {self.name} with {self.num_devices}",
                change="--force sizes or --hardware",
                works=f"sizes whose product is {self.num_devices}",
            )
        names = list(mesh_shape)
        sizes = [mesh_shape[name] for name in names]
        positions = [names.index(axis) for axis in axes]
        columns_last = np.moveaxis(np.arange(total).reshape(sizes), positions, range(-len(axes), 0))
        ranks = columns_last.reshape(-1, math.prod(mesh_shape[axis] for axis in axes))
        # groups that lie alike (same pattern of hosts, domains and bridges, same kinds of device) have the same links
        places = self._places
        columns = [places.domain[ranks], places.bridge[ranks]]
        pattern = np.concatenate([column - column[:, :1] for column in columns] + [places.group[ranks]], axis=1)
        if self.host_pairs:
            pattern = np.concatenate([pattern, places.host[ranks]], axis=1)
        _, first = np.unique(_row_keys(pattern), return_index=True)
        return max((self.group_link(ranks[index].tolist()) for index in first), key=_slowness)

    def with_memory_limit(self, limit_bytes: int) -> Cluster:
        """A limit per device (per process, for CPU). Never raises what the device has."""
        if limit_bytes <= 0:
            raise ShardwrightError(
                f"a memory limit of {limit_bytes} bytes leaves nothing to plan with",
                change="--memory-limit",
                works="1GiB",
            )
        return replace(self, memory_limit_bytes=int(limit_bytes))

    @cached_property
    def graph(self) -> networkx.Graph:
        """Devices, hosts and the switches between them: ('device', rank), ('host', i), ('domain', i), ('network', 0).

        Edges carry bytes_per_s and latency_s; a star for each switch, so edges grow linearly with devices.
        """
        import networkx

        graph = networkx.Graph(name=self.name)
        graph.add_node(("network", 0), kind="network")
        places = self._places
        for rank in range(self.num_devices):
            group = self.groups[int(places.group[rank])]
            host, domain = int(places.host[rank]), int(places.domain[rank])
            device = self.device(rank)
            node = ("device", rank)
            graph.add_node(node, kind="device", name=device.name, memory_bytes=device.memory_bytes)
            graph.add_node(("host", host), kind="host", memory_bytes=device.host_memory_bytes * group.devices_per_host)
            graph.add_node(("domain", domain), kind="domain")
            for other, link in (
                (("host", host), device.host_link), (("domain", domain), group.local), (("network", 0), group.network),
            ):  # fmt: skip
                graph.add_edge(node, other, link=link.name, bytes_per_s=link.bytes_per_s, latency_s=link.latency_s)
        for pair in self.host_pairs:
            graph.add_edge(
                ("host", pair.host_a), ("host", pair.host_b), link=pair.link.name,
                bytes_per_s=pair.link.bytes_per_s, latency_s=pair.link.latency_s,
            )  # fmt: skip
        return graph

    @cached_property
    def hash(self) -> str:
        """Identity of the hardware: which devices in which hosts over which links, and the memory limit.

        Figures that calibration refreshes are left out, so that a plan stays valid on the machine it was made for.
        """
        identity = {
            "groups": [
                [g.count, g.devices_per_host, g.device.name, g.local.name, g.network.name, g.devices_per_domain]
                for g in self.groups
            ],
            "pairs": [[pair.host_a, pair.host_b, pair.link.name] for pair in self.host_pairs],
            "memory_limit_bytes": self.memory_limit_bytes,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def figures(self) -> list[Figure]:
        """Every figure that planning on this cluster uses, once."""
        seen: dict[Figure, None] = {}
        for group in self.groups:
            links = [group.bridge, group.local, group.network, group.device.host_link]
            for owner in (group.device, *links):
                seen.update(dict.fromkeys(owner.figures if owner is not None else ()))
        for pair in self.host_pairs:
            seen.update(dict.fromkeys(pair.link.figures))
        return list(seen)

    def sources_summary(self) -> dict[str, int]:
        """How many figures are of each kind: {'datasheet': 21, 'measured': 0, 'fitted': 3, 'assumed': 2}."""
        counts = {"datasheet": 0, "measured": 0, "fitted": 0, "assumed": 0}
        for figure in self.figures():
            counts[figure.kind] = counts.get(figure.kind, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """What a plan says of its hardware. JSON-ready."""
        return {
            "name": self.name,
            "num_devices": self.num_devices,
            "num_hosts": self.num_hosts,
            "hash": self.hash,
            "memory_limit_bytes": self.memory_limit_bytes,
            "hosts": [
                {
                    "count": group.count,
                    "devices_per_host": group.devices_per_host,
                    "device": group.device.name,
                    "memory_gib": round(self._devices[index].memory_bytes / GIB, 3),
                    "memory_gb_per_s": group.device.memory_bytes_per_s / GB,
                    "peak_tflops": {dtype: rate / 1e12 for dtype, rate in group.device.peaks},
                    "links": [
                        _link_dict(link) for link in (group.bridge, group.local, group.network) if link is not None
                    ],
                    "host_link": _link_dict(group.device.host_link),
                }
                for index, group in enumerate(self.groups)
            ],
            "host_pairs": [{"hosts": [p.host_a, p.host_b], **_link_dict(p.link)} for p in self.host_pairs],
            "sources": self.sources_summary(),
            "notes": list(self.notes),
        }


def _link_dict(link: Link) -> dict[str, Any]:
    return {
        "name": link.name,
        "gb_per_s": round(link.bytes_per_s / GB, 4),
        "latency_us": round(link.latency_s * 1e6, 3),
        "measured": link.measured,
    }


def _group_link(size: int, link: Link, inner: GroupLink | None, scope: str = "local") -> GroupLink:
    return GroupLink(size, link.latency_s, link.group_bytes_per_s(size), link, inner, scope)


def _mean_count(places: np.ndarray) -> int:
    """Members a subgroup, so that size / members gives the number of subgroups. Uneven groups count as even ones."""
    return max(1, len(places) // len(np.unique(places)))


def _slowness(group: GroupLink) -> tuple[float, float, float]:
    """Groups are compared by the bandwidth that a ring through them reaches, then by hops and their latency."""
    rate = min(level.bytes_per_s * level.members_per_subgroup for level in group.levels())
    return -rate, group.latency_s * group.num_subgroups, group.size
