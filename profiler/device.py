"""Devices, links and the figures that describe them: the parts a Cluster is made of. Units are in the names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import ShardwrightError
from .measured_rates import MeasuredRates

DTYPE_NAMES = {
    "float64": "fp64", "double": "fp64", "complex128": "fp64", "float32": "fp32", "float": "fp32", "complex64": "fp32",
    "tfloat32": "tf32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "uint8": "int8", "qint8": "int8",
}  # fmt: skip
# The rate that stands in where a part has no unit for a type: emulation, or the next wider type.
DTYPE_FALLBACK = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "bf16": "fp32", "fp16": "fp32", "tf32": "fp32"}


def dtype_key(dtype: object) -> str:
    """torch.bfloat16, 'torch.bfloat16', 'bfloat16' and 'bf16' all give 'bf16'. Other integers count as fp32."""
    name = str(dtype).removeprefix("torch.").lower()
    if name.startswith("float8"):
        return "fp8"
    if name.startswith("float4"):
        return "fp4"
    name = DTYPE_NAMES.get(name, name)
    return name if name in {"fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"} else "fp32"


@dataclass(frozen=True)
class Figure:
    """One number and where it is from. kind: datasheet | measured | fitted | assumed. The unit ends the name."""

    name: str
    value: float
    kind: str
    source: str
    date: str


@dataclass(frozen=True)
class Link:
    """bytes_per_s: per device and direction. latency_s: one hop. peer_bytes_per_s: what one pair has on a mesh without
    a switch (0: the whole of bytes_per_s). multicast: the switch reduces in flight (NVLink SHARP).
    measured: the bandwidth is what collectives reach, so no efficiency is taken off it."""

    name: str
    family: str
    bytes_per_s: float
    latency_s: float
    peer_bytes_per_s: float = 0.0
    multicast: bool = False
    measured: bool = False
    figures: tuple[Figure, ...] = field(default=(), compare=False)

    def pair_bytes_per_s(self) -> float:
        return self.peer_bytes_per_s or self.bytes_per_s

    def group_bytes_per_s(self, num_members: int) -> float:
        """On a mesh a device has one link to each other member, so small groups reach less."""
        if not self.peer_bytes_per_s:
            return self.bytes_per_s
        return min(self.bytes_per_s, self.peer_bytes_per_s * max(1, num_members - 1))


@dataclass(frozen=True)
class MemoryTier:
    """name: device | host | nvme. bytes: this device's share. bytes_per_s: between it and the device, one direction."""

    name: str
    bytes: int
    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """memory_bytes: what a program may use, after the driver and any limit set by the user."""

    name: str
    kind: str  # gpu | cpu
    memory_bytes: int
    nominal_memory_bytes: int
    memory_bytes_per_s: float
    peaks: tuple[tuple[str, float], ...]  # dtype key -> dense FLOP/s
    host_link: Link
    host_memory_bytes: int = 0  # share of one device; 0: not known
    host_memory_bytes_per_s: float = 0.0  # likewise, reached in an optimizer step; 0: as constants.toml has it
    nvme_bytes: int = 0
    nvme_bytes_per_s: float = 0.0
    measured: bool = False  # peaks and bandwidth are what ops reach: no efficiency is taken off them
    rates: MeasuredRates | None = None  # what ops of each size take on this very device
    figures: tuple[Figure, ...] = field(default=(), compare=False)

    def peak_flops_per_s(self, dtype: object) -> float:
        """Dense FLOP/s of matrix products. A type the part lacks runs as DTYPE_FALLBACK says; fp64 at 1/64 of fp32."""
        rates = dict(self.peaks)
        key: str | None = dtype_key(dtype)
        while key is not None:
            if key in rates:
                return rates[key]
            if key == "fp64":
                return rates["fp32"] / 64
            key = DTYPE_FALLBACK.get(key)
        raise ShardwrightError(
            f"{self.name} has no peak rate for {dtype}", change="the catalog entry", works="fp32_tflops"
        )

    @property
    def tiers(self) -> tuple[MemoryTier, ...]:
        tiers = [MemoryTier("device", self.memory_bytes, self.memory_bytes_per_s)]
        if self.host_memory_bytes:
            link = self.host_link
            tiers.append(MemoryTier("host", self.host_memory_bytes, link.bytes_per_s, link.latency_s))
        if self.nvme_bytes:
            rate = min(self.nvme_bytes_per_s, self.host_link.bytes_per_s)
            tiers.append(MemoryTier("nvme", self.nvme_bytes, rate))
        return tuple(tiers)


@dataclass(frozen=True)
class GroupLink:
    """What joins the worst group along a mesh axis. bytes_per_s: per device and direction, at this level.

    inner: the subgroup of each member that a nearer link joins (None: all size members are at this level). A group of
    16 over 2 hosts of 8: size=16 on the network, inner.size=8 on NVLink.
    """

    size: int
    latency_s: float
    bytes_per_s: float
    link: Link
    inner: GroupLink | None = None
    scope: str = "local"  # bridge | local | network

    @property
    def num_subgroups(self) -> int:
        """Hosts (bridged pairs, ...) that the group spans at this level."""
        return math.ceil(self.size / self.inner.size) if self.inner else self.size

    @property
    def members_per_subgroup(self) -> int:
        return self.inner.size if self.inner else 1

    @property
    def ranks_per_host(self) -> int:
        """Of a group that lies on several hosts alike; 1 where each is on a host of its own, or all are on one."""
        inner = self.inner if self.scope == "network" else None
        return inner.size if inner is not None and self.size % inner.size == 0 else 1

    def levels(self) -> list[GroupLink]:
        """Nearest first."""
        return [*(self.inner.levels() if self.inner else []), self]


def worse_link(first: Link, second: Link) -> Link:
    """The slower of the two, with the higher latency of the two."""
    slow, other = (first, second) if first.bytes_per_s <= second.bytes_per_s else (second, first)
    return slow if slow.latency_s >= other.latency_s else replace(slow, latency_s=other.latency_s)


def worst_link(links: Sequence[Link]) -> Link:
    worst = links[0]
    for link in links[1:]:
        worst = worse_link(worst, link)
    return worst


def worse_device(first: Device, second: Device) -> Device:
    """The element-wise worst of two devices; one of them where it is worst in everything."""
    rates = [dict(first.peaks), dict(second.peaks)]
    keys = list(dict.fromkeys([*rates[0], *rates[1]]))
    peaks = tuple((key, min(first.peak_flops_per_s(key), second.peak_flops_per_s(key))) for key in keys)
    if first == second:
        return first
    worst = replace(
        first,
        rates=first.rates if first.rates == second.rates else None,
        peaks=peaks,
        memory_bytes=min(first.memory_bytes, second.memory_bytes),
        nominal_memory_bytes=min(first.nominal_memory_bytes, second.nominal_memory_bytes),
        memory_bytes_per_s=min(first.memory_bytes_per_s, second.memory_bytes_per_s),
        host_link=worse_link(first.host_link, second.host_link),
        host_memory_bytes=min(first.host_memory_bytes, second.host_memory_bytes),
        host_memory_bytes_per_s=min(first.host_memory_bytes_per_s, second.host_memory_bytes_per_s),
        nvme_bytes=min(first.nvme_bytes, second.nvme_bytes),
        nvme_bytes_per_s=min(first.nvme_bytes_per_s, second.nvme_bytes_per_s),
        measured=first.measured and second.measured,
    )
    for one in (first, second):
        same = worst.memory_bytes == one.memory_bytes and worst.memory_bytes_per_s == one.memory_bytes_per_s
        if same and all(rate == one.peak_flops_per_s(key) for key, rate in peaks):
            return one
    return replace(worst, name=f"worst of {first.name} and {second.name}")
