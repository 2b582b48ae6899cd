"""What a mesh of a cluster offers the search: data-parallel collectives, transfers between stages, memory, speed."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

from ...costmodel.model import CostModel
from ...costmodel.stage_times import Hop
from ...plans.axes import MeshShape, expert_axes, state_axes, tensor_axes
from ...profiler.cluster import Cluster

SAMPLE_BYTES = 1 << 30


class MeshCosts:
    """Of one mesh. Ranks are row-major indices into its axes; pipeline rank r holds ranks r * ranks_per_stage and
    on."""

    def __init__(self, cluster: Cluster, cost_model: CostModel, shape: MeshShape, compute_dtype: Any) -> None:
        self.cluster, self.cost_model, self.shape, self.compute_dtype = cluster, cost_model, shape, compute_dtype
        self.pp, self.state_ranks, self.ranks_per_stage = shape.pipeline_ranks, shape.state_ranks, shape.ranks_per_stage
        self.state_seconds = lru_cache(maxsize=4096)(self._state_seconds)
        self.sum_seconds = lru_cache(maxsize=4096)(self._sum_seconds)
        self._lines: dict[tuple[int, int], tuple[float, float]] = {}

    def ranks_of(self, pipeline_rank: int) -> list[int]:
        first = pipeline_rank * self.ranks_per_stage
        return list(range(first, first + self.ranks_per_stage))

    def _links(self, extent: int, across: bool) -> Any:
        """Of the groups of `extent` neighbours among the ranks that ZeRO splits state over, or of their copies
        across."""
        shape, copies, shards = self.shape.in_copies(extent)
        return self.cluster.axis_links(shape.factors, copies if across else shards)

    def _state_seconds(self, kind: str, num_bytes: float, extent: int | None = None, across: bool = False) -> float:
        """A collective over `extent` neighbours of the ranks that ZeRO splits state over (all where None), or across
        those groups.

        num_bytes: of the whole tensor in the group.
        """
        extent = extent or self.state_ranks
        size = self.state_ranks // extent if across else extent
        if size == 1 or num_bytes <= 0:
            return 0.0
        return self.cost_model.state_collective_seconds(kind, num_bytes, self._links(extent, across))

    def expert_extent(self, extent: int) -> int:
        """Over how many ranks a kind of state of experts is split, where that of the rest is over `extent`."""
        return extent // math.gcd(extent, self.shape.expert_ranks)

    def expert_seconds(self, kind: str, num_bytes: float, extent: int, across: bool = False) -> float:
        """The same of what experts have there: over the data ranks that hold the same experts."""
        if num_bytes <= 0:
            return 0.0
        ranks, inside = self.state_ranks // self.shape.expert_ranks, self.expert_extent(extent)
        size = ranks // inside if across else inside
        if size == 1:
            return 0.0
        return self.cost_model.collective_seconds(kind, num_bytes, self._expert_links(inside, across))

    def _expert_links(self, extent: int, across: bool) -> Any:
        shape, copies, shards = self.shape.in_copies(extent, beside=expert_axes())
        return self.cluster.axis_links(shape.factors, copies if across else shards)

    def _sum_seconds(self, num_bytes: float, with_data: bool) -> float:
        """An all-reduce over the axes that cut parameters, or over them and the data-parallel axes as one."""
        axes = (*state_axes(), *tensor_axes()) if with_data else tensor_axes()
        if self.shape.size_of(axes) == 1 or num_bytes <= 0:
            return 0.0
        links = self.cluster.axis_links(self.shape.factors, axes)
        return self.cost_model.state_collective_seconds("all_reduce", num_bytes, links)

    def _line(self, source: int, target: int) -> tuple[float, float]:
        """(latency in s, s per byte) between two pipeline ranks: the worst of their first and last pairs."""
        key = (source, target)
        if key not in self._lines:
            per_stage = self.ranks_per_stage
            lines = []
            for offset in {0, per_stage - 1}:
                link = self.cluster.link_between(source * per_stage + offset, target * per_stage + offset)
                latency_s = self.cost_model.p2p_seconds(1, link)
                lines.append((latency_s, (self.cost_model.p2p_seconds(SAMPLE_BYTES, link) - latency_s) / SAMPLE_BYTES))
            self._lines[key] = max(line[0] for line in lines), max(line[1] for line in lines)
        return self._lines[key]

    def hop(self, source: int, target: int, forward_bytes: float, backward_bytes: float) -> Hop:
        """Between the pipeline ranks of two neighbouring stages."""
        if source == target:
            return Hop()
        latency_s, per_byte_s = self._line(source, target)
        back_latency_s, back_per_byte_s = self._line(target, source)
        return Hop(
            latency_s if forward_bytes else 0.0,
            per_byte_s * forward_bytes,
            back_latency_s if backward_bytes else 0.0,
            back_per_byte_s * backward_bytes,
        )

    @cached_property
    def devices(self) -> list[Any]:
        """The worst device of each pipeline rank."""
        if self.cluster.is_homogeneous:
            return [self.cluster.device(0)] * self.pp
        return [self.cluster.worst_device(self.ranks_of(rank)) for rank in range(self.pp)]

    @cached_property
    def scales(self) -> list[float]:
        """Time of each pipeline rank over that of the cluster's worst device, which sharding was costed on; at most
        1.
        """
        if self.cluster.is_homogeneous:
            return [1.0] * self.pp
        return [self.cost_model.relative_time(device, self.compute_dtype) for device in self.devices]
