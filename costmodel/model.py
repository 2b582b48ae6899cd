"""CostModel: a cluster and the constants, and the pure functions over them. No global state, no device looked up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..profiler.cluster import Cluster
from ..profiler.device import Device, GroupLink, Link
from . import communication, compute
from .attention import AttentionCall
from .constants import Constants, default_constants
from .op_classes import op_class
from .stacks import Stack, own_stack

HOPPER = ("H100", "H200")


@dataclass(frozen=True)
class CostModel:
    """Seconds of ops, collectives and transfers on a cluster. stack: the software whose habits they have."""

    cluster: Cluster
    table: Constants = field(default_factory=default_constants)
    stack: Stack = field(default_factory=own_stack)

    def op_seconds(
        self,
        op_name: str,
        flops: float,
        bytes_moved: float,
        dtype: object,
        device: Device | None = None,
        launches: int = 1,
    ) -> float:
        """One op alone on device (the cluster's worst by default). op_name: as in the graph ('aten.mm.default', 'mm').

        flops: multiply and add count as two. bytes_moved: read and written. dtype: that of the op's operands. launches:
        kernels that follow each other.
        """
        device = device if device is not None else self.cluster.worst_device()
        seconds = compute.op_seconds(self.table, op_name, flops, bytes_moved, dtype, device, launches)
        return self._in_stack(op_name, seconds, device) if seconds else 0.0

    def _in_stack(self, op_name: str, seconds: float, device: Device) -> float:
        figures, kind = self.stack.figures, op_class(op_name)
        if kind.startswith("attention"):
            return seconds * figures.attention_factor + figures.op_s
        factor = figures.memory_factor
        if kind in ("matmul", "convolution"):
            factor = figures.product_factor * (figures.hopper_factor if device.name.startswith(HOPPER) else 1.0)
        return seconds * factor + figures.op_s

    def misaligned_factor(self) -> float:
        """Arithmetic of a product whose rows are no whole vectors, as if tensor cores did it, over what it does."""
        return self.table.get("misaligned_product_factor", self.cluster.worst_device().kind)

    def attention_seconds(self, call: AttentionCall, share: float) -> float | None:
        """Where attention runs as a formula on the cluster's worst device; None where a fused kernel does it."""
        device, figures = self.cluster.worst_device(), self.stack.figures
        if call.kernel(device) != "math":
            return None
        return call.formula_seconds(self.table, device, share) * figures.attention_factor + figures.op_s

    def attention_work(self, call: AttentionCall) -> float:
        """FLOPs of the fused kernel on the cluster's worst device, over those that the model needs."""
        device = self.cluster.worst_device()
        return call.computed_pairs(device) * call.widened_work(device)

    def attention_copies_seconds(self, call: AttentionCall, share: float) -> float:
        """Of values made as wide as keys for a fused kernel, and of results made as narrow as values again."""
        num_bytes = call.widened_bytes(self.cluster.worst_device(), share)
        return self.op_seconds("copy_", 0.0, 2 * num_bytes, call.dtypes[0]) if num_bytes else 0.0

    def attention_scratch_bytes(self, call: AttentionCall, share: float, mask_bytes: float) -> tuple[float, float]:
        """(held while the kernel runs, left for the next call with the same mask)."""
        return call.scratch_bytes(self.cluster.worst_device(), share, mask_bytes)

    def collective_seconds(self, kind: str, bytes_full_tensor: float, group: GroupLink) -> float:
        """kind: all_reduce | all_gather | reduce_scatter | all_to_all | broadcast; group: of cluster.axis_links.

        bytes_full_tensor: the whole tensor (all-gather's output, reduce-scatter's input).
        """
        return communication.collective_seconds(self.table, kind, bytes_full_tensor, group)

    def tensor_collective_seconds(self, kind: str, bytes_full_tensor: float, group: GroupLink) -> float:
        """collective_seconds between ops of a microbatch, where all ranks wait for the last."""
        return self.collective_seconds(kind, bytes_full_tensor, group) * self.stack.figures.tensor_factor

    def state_collective_seconds(self, kind: str, bytes_full_tensor: float, group: GroupLink) -> float:
        """collective_seconds of parameters or gradients, over data-parallel ranks."""
        seconds = self.collective_seconds(kind, bytes_full_tensor, group)
        contention = self.stack.figures.state_contention
        if not contention or not seconds:
            return seconds
        hosts = max((level.num_subgroups for level in group.levels() if level.scope == "network"), default=1)
        return seconds * (1 + contention * max(0.0, math.log2(hosts) - 1))

    def p2p_seconds(self, num_bytes: float, link: Link | GroupLink) -> float:
        """Until a message has arrived. link: of cluster.link_between, or of axis_links along 'pp'."""
        return communication.p2p_seconds(self.table, num_bytes, link)

    def transfer_host_seconds(self, num_bytes: float, device: Device | None = None, tier: str = "host") -> float:
        """A copy between device memory and host memory ('nvme': the disk), one direction."""
        device = device if device is not None else self.cluster.worst_device()
        return communication.transfer_host_seconds(self.table, num_bytes, device, tier)

    def host_memory_seconds(self, num_bytes: float, device: Device | None = None) -> float:
        """Memory traffic of the device's share of its host, by all cores of that share."""
        device = device if device is not None else self.cluster.worst_device()
        if device.kind == "cpu":
            return self.op_seconds("_foreach_add", 0.0, num_bytes, "fp32", device)
        if device.host_memory_bytes_per_s:
            return num_bytes / device.host_memory_bytes_per_s
        sharing = max(group.devices_per_host for group in self.cluster.groups)
        return num_bytes * sharing / self.table.get("host_update_bytes_per_s", device.name)

    def between_host_seconds(self, num_bytes: float, device: Device) -> float:
        """A copy between device memory and host memory; on a CPU, where both are one, of memory."""
        if device.kind == "cpu":
            return self.op_seconds("copy_", 0.0, 2 * num_bytes, "fp32", device)
        return self.transfer_host_seconds(num_bytes, device)

    def slowest_memory(self, devices: Sequence[Device]) -> Device:
        return min(devices, key=lambda device: device.memory_bytes_per_s)

    def fastest_memory(self, devices: Sequence[Device]) -> Device:
        return max(devices, key=lambda device: device.memory_bytes_per_s)

    def relative_time(self, device: Device, dtype: object) -> float:
        """Time of a device over that of the cluster's worst, on which ops are costed; at most 1."""
        worst = self.cluster.worst_device()
        arithmetic = worst.peak_flops_per_s(dtype) / device.peak_flops_per_s(dtype)
        return min(1.0, max(arithmetic, worst.memory_bytes_per_s / device.memory_bytes_per_s))

    def model_flops_utilization(self, flops: float, step_s: float, dtype: object) -> float:
        """MFU: flops of a step over those that all devices of the cluster could do in it, by the datasheet."""
        peak_rate, first = 0.0, 0
        for group in self.cluster.groups:
            peak_rate += group.num_devices * self.cluster.device(first).peak_flops_per_s(dtype)
            first += group.num_devices
        return flops / (peak_rate * step_s)

    def peak_flops_per_s(self, dtype: object) -> float:
        """Datasheet dense peak of the worst device: what MFU is measured against."""
        return self.cluster.worst_device().peak_flops_per_s(dtype)

    def constants(self) -> list[dict[str, str]]:
        """Every constant with its value, kind, source, date and meaning, for printing."""
        return self.table.rows()
