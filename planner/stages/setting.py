"""Setting: what stays the same through a search."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...costmodel.memory import StateBytes, usable_bytes
from ...costmodel.model import CostModel
from ...plans.axes import MeshShape
from ...profiler.cluster import Cluster
from ...profiler.device import Device
from ...profiler.graph import ModelGraph
from ...profiler.workload import Workload
from ..interfaces import ShardingSolution
from ..space.candidates import Candidate
from ..space.mesh_costs import MeshCosts
from .chain import Chain, Shape, build_chain, model_shape


def state_kinds(workload: Workload) -> StateBytes:
    """Bytes of an element of each kind of training state."""
    spec = workload.optimizer
    return StateBytes.of(workload.precision, spec.state_tensors, spec.kept_tensors, spec.step_tensors)


@dataclass
class Setting:
    """What stays the same through a search, with the caches that it needs."""

    graph: ModelGraph
    cluster: Cluster
    cost_model: CostModel
    workload: Workload
    memory_limit_bytes: int | None = None
    shape: Shape = field(init=False)
    kinds: StateBytes = field(init=False)
    _meshes: dict[MeshShape, MeshCosts] = field(default_factory=dict, init=False)
    cache: dict[Any, Any] = field(default_factory=dict, init=False)
    _chains: dict[tuple[int, frozenset[str]], tuple[ShardingSolution, Chain]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.shape = model_shape(self.graph)
        self.kinds = state_kinds(self.workload)

    def mesh(self, candidate: Candidate) -> MeshCosts:
        key = candidate.mesh
        if key not in self._meshes:
            self._meshes[key] = MeshCosts(self.cluster, self.cost_model, key, self.workload.precision.compute)
        return self._meshes[key]

    def chain(self, solution: ShardingSolution, recompute: Collection[str]) -> Chain:
        key = (id(solution), frozenset(recompute))
        if key not in self._chains:
            self._chains[key] = solution, build_chain(self.graph, self.shape, solution, recompute)
        return self._chains[key][1]

    def limit(self, candidate: Candidate, rank: int) -> int:
        """What a plan may use of the rank's memory: the user's limit, or the device's less some headroom."""
        device = self.mesh(candidate).devices[rank]
        if self.memory_limit_bytes is None and self.cluster.memory_limit_bytes is None:
            return usable_bytes(device.memory_bytes)
        return (
            device.memory_bytes
            if self.memory_limit_bytes is None
            else min(device.memory_bytes, self.memory_limit_bytes)
        )

    def forget(self) -> None:
        """Drop what was cached of chains: called between groups of candidates, which share no chain."""
        self.cache.clear()
        self._chains.clear()

    def limits(self, candidate: Candidate) -> np.ndarray:
        key = ("limits", candidate.mesh)
        if key not in self.cache:
            self.cache[key] = np.array([self.limit(candidate, rank) for rank in range(candidate.pp)], dtype=float)
        return self.cache[key]

    def most(self, candidate: Candidate) -> float:
        """The limit of the rank that may use most."""
        key = ("most", candidate.mesh)
        if key not in self.cache:
            self.cache[key] = float(self.limits(candidate).max())
        return self.cache[key]

    def optimizer_seconds(self, elements: float, device: Device) -> float:
        """Memory traffic alone."""
        moved = elements * self.kinds.moved_by_update
        return self.cost_model.op_seconds("_foreach_add", 0.0, moved, self.workload.precision.master, device)
