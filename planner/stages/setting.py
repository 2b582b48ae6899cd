"""Setting: what stays the same through a search."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ...costmodel.memory import StateBytes, memory_error, memory_sure, usable_bytes
from ...costmodel.model import CostModel
from ...plans.axes import MeshShape
from ...profiler.cluster import Cluster
from ...profiler.device import Device
from ...profiler.graph import ModelGraph
from ...profiler.workload import Workload
from ..interfaces import ShardingSolution
from ..space.candidates import Candidate
from ..space.mesh_costs import MeshCosts
from .chain import Chain, Recompute, Shape, build_chain, model_shape

T = TypeVar("T")


def state_kinds(workload: Workload) -> StateBytes:
    """Bytes of an element of each kind of training state."""
    spec = workload.optimizer
    return StateBytes.of(workload.precision, spec.state_tensors, spec.kept_tensors, spec.step_tensors)


@dataclass
class Setting:
    """What stays the same through a search, with the caches that it needs. memory_margin: share of each limit that
    plans leave free; None: as much as the memory model's stated error asks for."""

    graph: ModelGraph
    cluster: Cluster
    cost_model: CostModel
    workload: Workload
    memory_limit_bytes: int | None = None
    memory_margin: float | None = None
    shape: Shape = field(init=False)
    kinds: StateBytes = field(init=False)
    _meshes: dict[MeshShape, MeshCosts] = field(default_factory=dict, init=False)
    _values: dict[Hashable, Any] = field(default_factory=dict, init=False)
    _chains: dict[tuple[int, Recompute], tuple[ShardingSolution, Chain]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.shape = model_shape(self.graph)
        self.kinds = state_kinds(self.workload)

    def mesh(self, candidate: Candidate) -> MeshCosts:
        key = candidate.mesh
        if key not in self._meshes:
            self._meshes[key] = MeshCosts(self.cluster, self.cost_model, key, self.workload.precision.compute)
        return self._meshes[key]

    def chain(self, solution: ShardingSolution, recompute: Recompute) -> Chain:
        key = (id(solution), recompute)
        if key not in self._chains:
            self._chains[key] = solution, build_chain(self.graph, self.shape, solution, recompute)
        return self._chains[key][1]

    def limit(self, candidate: Candidate, rank: int) -> int:
        """What a plan may be predicted to use of the rank's memory: its limit less the margin."""
        return int(self.whole_limit(candidate, rank) * (1.0 - self.margin(candidate, rank)))

    def whole_limit(self, candidate: Candidate, rank: int) -> int:
        """The user's limit, or the device's memory; of a CPU's what other processes leave."""
        device = self.mesh(candidate).devices[rank]
        if self.memory_limit_bytes is not None:
            return min(device.memory_bytes, self.memory_limit_bytes)
        is_free = not self._is_limited and device.kind == "cpu"
        return usable_bytes(device.memory_bytes) if is_free else device.memory_bytes

    @property
    def _is_limited(self) -> bool:
        return self.memory_limit_bytes is not None or self.cluster.memory_limit_bytes is not None

    def margin(self, candidate: Candidate, rank: int) -> float:
        """Share of the limit that is left free: a peak that is higher than predicted by the stated error then still
        stays within the device's memory. A limit of the user's is one of the prediction, and taken as it is said."""
        if self.memory_margin is not None:
            return self.memory_margin
        if self._is_limited:
            return 0.0
        error = self.memory_error(self.mesh(candidate).devices[rank])
        return error / (1.0 + error)

    def memory_error(self, device: Device) -> float:
        return memory_error(device.kind, self.cost_model.stack)

    def memory_sure(self, device: Device) -> float:
        return memory_sure(device.kind)

    def once(self, make: Callable[..., T], key: Hashable, *arguments: Any) -> T:
        """make(*arguments), worked out once for each key until forget(). The key names all of the arguments that the
        value depends on; each function keeps its own values."""
        values = self._values
        if (make, key) not in values:
            values[make, key] = make(*arguments)
        return values[make, key]

    def forget(self) -> None:
        """Drop what was kept of chains: called between groups of candidates, which share no chain."""
        self._values.clear()
        self._chains.clear()

    def limits(self, candidate: Candidate) -> np.ndarray:
        return self.once(_limits, candidate.mesh, self, candidate)

    def most(self, candidate: Candidate) -> float:
        """The limit of the rank that may use most."""
        return self.once(_most, candidate.mesh, self, candidate)

    def optimizer_seconds(self, elements: float, device: Device) -> float:
        """Memory traffic alone."""
        moved = elements * self.kinds.moved_by_update
        return self.cost_model.op_seconds("_foreach_add", 0.0, moved, self.workload.precision.master, device)


def _limits(setting: Setting, candidate: Candidate) -> np.ndarray:
    return np.array([setting.limit(candidate, rank) for rank in range(candidate.pp)], dtype=float)


def _most(setting: Setting, candidate: Candidate) -> float:
    return float(setting.limits(candidate).max())
