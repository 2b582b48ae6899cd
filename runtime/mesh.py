"""Where this process stands in the plan's mesh, and the process groups along its axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ExitCode, ShardwrightError
from ..plans.document import MESH_AXES, Mesh
from .extents import DataCut, Level


def build_mesh(mesh: Mesh, device_type: str = "cpu") -> DeviceMesh | None:
    """The DeviceMesh of a plan: pp, dp, tp, and cp, ep where they are used, in the order of MESH_AXES.

    None for one process without torch.distributed.

    Global rank = row-major index. Raises ShardwrightError where the job has another number of processes.
    """
    if not dist.is_initialized():
        if mesh.num_devices == 1:
            return None
        raise ShardwrightError(
            f"the plan is for {mesh.num_devices} processes and torch.distributed is not initialized",
            means="this process runs alone",
            change="start it with torchrun",
            works=f"torchrun --nproc-per-node {mesh.num_devices} SCRIPT",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    if dist.get_world_size() != mesh.num_devices:
        raise ShardwrightError(
            f"the plan is for {mesh.num_devices} processes; this job has {dist.get_world_size()}",
            change="the number of processes",
            works=f"torchrun --nproc-per-node {mesh.num_devices} SCRIPT",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    axes = tuple(axis for axis in MESH_AXES if axis in ("pp", "dp", "tp") or getattr(mesh, axis) > 1)
    ranks = torch.arange(mesh.num_devices).view([getattr(mesh, axis) for axis in axes])
    return DeviceMesh(device_type, ranks, mesh_dim_names=axes)


@dataclass
class RankGrid:
    """This rank's coordinates. The rank grid is one tensor and every coordinate is read off it."""

    mesh: DeviceMesh | None
    sizes: dict[str, int]
    coords: dict[str, int]
    ranks: torch.Tensor  # global ranks, one dimension for each axis of MESH_AXES
    _subset_groups: dict[tuple[tuple[int, ...], tuple[str, ...]], Any] = field(default_factory=dict)
    _data_groups: dict[tuple[int, int], Any] = field(default_factory=dict)
    _axes_groups: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> RankGrid:
        """Axes that the DeviceMesh lacks count as size one."""
        if mesh is None:
            one = torch.zeros([1] * len(MESH_AXES), dtype=torch.int64)
            return cls(None, dict.fromkeys(MESH_AXES, 1), dict.fromkeys(MESH_AXES, 0), one)
        names = mesh.mesh_dim_names or ()
        unknown = set(names) - set(MESH_AXES)
        assert not unknown, f"mesh axes {sorted(unknown)} are not among {MESH_AXES}"
        order = [names.index(axis) for axis in MESH_AXES if axis in names]
        sizes = {axis: mesh.size(names.index(axis)) if axis in names else 1 for axis in MESH_AXES}
        ranks = mesh.mesh.permute(order).reshape([sizes[axis] for axis in MESH_AXES]).clone()
        where = (ranks == dist.get_rank()).nonzero()[0].tolist()
        return cls(mesh, sizes, dict(zip(MESH_AXES, where, strict=True)), ranks)

    @property
    def rank(self) -> int:
        return int(self.ranks[tuple(self.coords[axis] for axis in MESH_AXES)])

    @property
    def world_size(self) -> int:
        return self.ranks.numel()

    @property
    def has_sharding(self) -> bool:
        """Is there any axis but the pipeline's?"""
        return any(size > 1 for axis, size in self.sizes.items() if axis != "pp")

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def coord(self, axis: str) -> int:
        return self.coords[axis]

    def group(self, axis: str) -> Any:
        assert self.mesh is not None and self.mesh.mesh_dim_names is not None and axis in self.mesh.mesh_dim_names
        return self.mesh.get_group(axis)

    def is_zero(self, axes: Iterable[str]) -> bool:
        """Does this rank stand at coordinate zero on all of these axes?"""
        return all(self.coords[axis] == 0 for axis in axes)

    def storage_mesh(self, cut: DataCut) -> DeviceMesh | None:
        """Mesh ("tp", "dp") of this pipeline coordinate: where parameters live as DTensors.

        tp stands first, so that Shard(0) on both axes means: cut by tp, then each piece by dp. Where dp is not cut as a
        whole, its digits stand for it, those that cut first: ("tp", "dp_0", ..., "dp_copies").
        """
        if self.mesh is None or not self.has_sharding:
            return None
        fixed = tuple(slice(None) if axis in ("dp", "tp") else self.coords[axis] for axis in MESH_AXES)
        plane = self.ranks[fixed].t()  # dp x tp -> tp x dp
        digits = [*cut.levels, cut.copies]
        digits = [digit for digit in digits if digit[0] > 1] or [(1, 1)]
        names: tuple[str, ...] = ("dp",)
        if len(digits) > 1:
            names = tuple("dp_copies" if d == cut.copies else f"dp_{k}" for k, d in enumerate(digits))
            plane = plane.reshape(-1, *(size for size, _ in reversed(digits)))
            plane = plane.permute(0, *range(len(digits), 0, -1))
        groups = [self.group("tp"), *(self.data_group(*digit) for digit in digits)]
        mesh_names = ("tp", *names)
        plane = plane.contiguous()
        return DeviceMesh.from_group(groups, self.mesh.device_type, mesh=plane, mesh_dim_names=mesh_names)

    def make_data_groups(self, cut: DataCut) -> None:
        """The groups of each digit of the data-parallel coordinate. Collective: equal cuts on all ranks."""
        axis = MESH_AXES.index("dp")
        columns = self.ranks.movedim(axis, 0).reshape(self.sizes["dp"], -1)
        for size, stride in (*cut.levels, cut.copies):
            if size in (1, self.sizes["dp"]):
                continue
            for column in columns.t():
                for ranks in column.view(-1, size, stride).transpose(1, 2).reshape(-1, size).tolist():
                    group = dist.new_group(ranks)
                    if self.rank in ranks:
                        self._data_groups[size, stride] = group

    def data_group(self, size: int, stride: int) -> Any:
        return self.group("dp") if size in (1, self.sizes["dp"]) else self._data_groups[size, stride]

    def data_level(self, size: int, stride: int) -> Level:
        """A digit of the data-parallel coordinate; its group is None where the digit has one value."""
        group = self.data_group(size, stride) if size > 1 else None
        return Level(size, self.coords["dp"] // stride % size, group)

    def make_axes_groups(self, wanted: Iterable[tuple[str, ...]]) -> None:
        """Groups of the ranks that differ on several axes. Collective: equal wishes on all ranks."""
        for axes in sorted(set(wanted)):
            if len(axes) < 2:
                continue
            dims = [MESH_AXES.index(axis) for axis in axes]
            rows = self.ranks.movedim(dims, tuple(range(-len(dims), 0)))
            rows = rows.reshape(-1, math.prod(self.sizes[axis] for axis in axes))
            for ranks in rows.tolist() if len(rows) > 1 else ():
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    self._axes_groups[axes] = group

    def axes_group(self, axes: tuple[str, ...]) -> Any:
        """Of the ranks that differ on these axes alone; None where there are no axes."""
        if len(axes) < 2:
            return self.group(axes[0]) if axes else None
        return self._axes_groups.get(axes, dist.group.WORLD)

    def make_pipeline_subgroups(self, wanted: Iterable[tuple[Sequence[int], tuple[str, ...]]]) -> None:
        """wanted: some pipeline coordinates, and the axes on which their ranks may differ too. Collective: equal wishes
        on all ranks."""
        for subset, axes in sorted({(tuple(sorted(set(subset))), axes) for subset, axes in wanted}):
            dims = [0, *(MESH_AXES.index(axis) for axis in axes)]
            rows = self.ranks[list(subset)].movedim(dims, tuple(range(-len(dims), 0)))
            for ranks in rows.reshape(-1, len(subset) * math.prod(self.sizes[axis] for axis in axes)).tolist():
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    self._subset_groups[subset, axes] = group

    def pipeline_subgroup(self, subset: Sequence[int], axes: tuple[str, ...] = ()) -> Any:
        return self._subset_groups[tuple(sorted(subset)), axes]
