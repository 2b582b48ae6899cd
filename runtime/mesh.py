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
from ..plans.axes import batch_axes, names, role_of, stage_axes, state_axes, tensor_axes
from ..plans.document import Mesh
from .extents import DataCut, Level


def build_mesh(mesh: Mesh, device_type: str = "cpu") -> DeviceMesh | None:
    """The DeviceMesh of a plan: the axes that are searched, and others where they are used, in the order of plans/axes.

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
    shape = mesh.shape
    axes = tuple(axis for axis in shape.axes if role_of(axis).is_searched or shape.size(axis) > 1)
    ranks = torch.arange(mesh.num_devices).view([shape.size(axis) for axis in axes])
    return DeviceMesh(device_type, ranks, mesh_dim_names=axes)


@dataclass
class RankGrid:
    """This rank's coordinates. The rank grid is one tensor and every coordinate is read off it."""

    mesh: DeviceMesh | None
    sizes: dict[str, int]
    coords: dict[str, int]
    ranks: torch.Tensor  # global ranks, one dimension for each axis of sizes
    _subset_groups: dict[tuple[tuple[int, ...], tuple[str, ...]], Any] = field(default_factory=dict)
    _data_groups: dict[tuple[tuple[str, ...], int, int], Any] = field(default_factory=dict)
    _axes_groups: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> RankGrid:
        """Axes that the DeviceMesh lacks count as size one."""
        axes = names()
        if mesh is None:
            one = torch.zeros([1] * len(axes), dtype=torch.int64)
            return cls(None, dict.fromkeys(axes, 1), dict.fromkeys(axes, 0), one)
        present = mesh.mesh_dim_names or ()
        unknown = set(present) - set(axes)
        assert not unknown, f"mesh axes {sorted(unknown)} are not among {axes}"
        order = [present.index(axis) for axis in axes if axis in present]
        sizes = {axis: mesh.size(present.index(axis)) if axis in present else 1 for axis in axes}
        ranks = mesh.mesh.permute(order).reshape(list(sizes.values())).clone()
        where = (ranks == dist.get_rank()).nonzero()[0].tolist()
        return cls(mesh, sizes, dict(zip(axes, where, strict=True)), ranks)

    @property
    def rank(self) -> int:
        return int(self.ranks[tuple(self.coords.values())])

    @property
    def world_size(self) -> int:
        return self.ranks.numel()

    @property
    def has_sharding(self) -> bool:
        """Is there any axis but the pipeline's?"""
        return any(size > 1 for axis, size in self.sizes.items() if axis not in stage_axes())

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def coord(self, axis: str) -> int:
        return self.coords[axis]

    def wide(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of them that are wider than one."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def span(self, axes: Iterable[str]) -> Level:
        """Several axes as one, whose groups were made. Its group is None where it has one rank."""
        wide, index = self.wide(axes), 0
        for axis in wide:
            index = index * self.sizes[axis] + self.coords[axis]
        return Level(math.prod(self.sizes[axis] for axis in wide), index, self.axes_group(wide))

    @property
    def batch(self) -> Level:
        """The ranks that together hold a microbatch."""
        return self.span(batch_axes())

    @property
    def state(self) -> Level:
        """The ranks over which ZeRO splits training state."""
        return self.span(state_axes())

    @property
    def state_sizes(self) -> tuple[tuple[str, int], ...]:
        """The axes that they are indices into, with their sizes."""
        return tuple((axis, self.sizes[axis]) for axis in state_axes())

    def group(self, axis: str) -> Any:
        assert self.mesh is not None and self.mesh.mesh_dim_names is not None and axis in self.mesh.mesh_dim_names
        return self.mesh.get_group(axis)

    def is_zero(self, axes: Iterable[str]) -> bool:
        """Does this rank stand at coordinate zero on all of these axes?"""
        return all(self.coords[axis] == 0 for axis in axes)

    def storage_mesh(self, cut: DataCut) -> DeviceMesh | None:
        """Mesh of this pipeline coordinate where parameters live as DTensors: the axes that cut them, then those over
        which ZeRO splits their state, as one.

        In that order Shard(0) on all of them means: cut by the first ones, then each piece by the last. Where ZeRO does
        not cut over all its ranks, the digits of their index stand for it, those that cut first: (tp, dp_0, ...,
        dp_copies).
        """
        if self.mesh is None or not self.has_sharding:
            return None
        present = self.mesh.mesh_dim_names or ()
        over = [axis for axis in cut.names if axis in present]
        tensor = [axis for axis in (*state_axes(), *tensor_axes()) if axis in present and axis not in over]
        state = "_".join(over) or "state"
        fixed = tuple(self.coords[axis] if axis in stage_axes() else slice(None) for axis in self.sizes)
        digits = [*cut.levels, cut.copies]
        digits = [digit for digit in digits if digit[0] > 1] or [(1, 1)]
        digit_names: tuple[str, ...] = (state,)
        if len(digits) > 1:
            digit_names = tuple(f"{state}_copies" if d == cut.copies else f"{state}_{k}" for k, d in enumerate(digits))
        # axes of state to the front, then those that cut parameters; digits of the first, slowest first, to the end
        inside = [axis for axis in self.sizes if axis not in stage_axes()]
        first = [inside.index(axis) for axis in over]
        plane = self.ranks[fixed].movedim(first, tuple(range(len(first))))
        plane = plane.reshape(*(size for size, _ in reversed(digits)), *(self.sizes[a] for a in tensor))
        count = len(digits)
        plane = plane.permute(*range(count, count + len(tensor)), *reversed(range(count))).contiguous()
        groups = [*(self.group(axis) for axis in tensor), *(self.data_group(*digit, cut.names) for digit in digits)]
        mesh_names = (*tensor, *digit_names)
        return DeviceMesh.from_group(groups, self.mesh.device_type, mesh=plane, mesh_dim_names=mesh_names)

    def make_data_groups(self, cut: DataCut) -> None:
        """The groups of the ranks that hold a microbatch, of those over which ZeRO splits state, and of each digit of
        the index among the latter. Collective: equal cuts on all ranks."""
        self.make_axes_groups([self.wide(batch_axes()), self.wide(cut.names)])
        dims = [list(self.sizes).index(axis) for axis in cut.names]
        columns = self.ranks.movedim(dims, tuple(range(len(dims)))).reshape(cut.num_ranks, -1)
        for size, stride in (*cut.levels, cut.copies):
            if size in (1, cut.num_ranks):
                continue
            for column in columns.t():
                for ranks in column.view(-1, size, stride).transpose(1, 2).reshape(-1, size).tolist():
                    group = dist.new_group(ranks)
                    if self.rank in ranks:
                        self._data_groups[cut.names, size, stride] = group

    def data_group(self, size: int, stride: int, axes: tuple[str, ...]) -> Any:
        wide = self.wide(axes)
        if size in (1, math.prod(self.sizes[axis] for axis in wide)):
            present = self.mesh.mesh_dim_names or () if self.mesh is not None else ()
            return self.axes_group(wide or tuple(axis for axis in axes if axis in present)[-1:])
        return self._data_groups[axes, size, stride]

    def data_level(self, size: int, stride: int, axes: tuple[str, ...]) -> Level:
        """A digit of the index among the ranks over which ZeRO splits state, on these axes; its group is None where the
        digit has one value."""
        group = self.data_group(size, stride, axes) if size > 1 else None
        return Level(size, self.span(axes).index // stride % size, group)

    def make_axes_groups(self, wanted: Iterable[tuple[str, ...]]) -> None:
        """Groups of the ranks that differ on several axes. Collective: equal wishes on all ranks."""
        for axes in sorted(set(wanted)):
            if len(axes) < 2 or axes in self._axes_groups:
                continue
            dims = [list(self.sizes).index(axis) for axis in axes]
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
            dims = [0, *(list(self.sizes).index(axis) for axis in axes)]
            rows = self.ranks[list(subset)].movedim(dims, tuple(range(-len(dims), 0)))
            for ranks in rows.reshape(-1, len(subset) * math.prod(self.sizes[axis] for axis in axes)).tolist():
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    self._subset_groups[subset, axes] = group

    def make_hop_groups(self, axis: str, per_host: int) -> tuple[str, str]:
        """Names of the groups that this rank's index on an axis falls into: of the ranks in the same place on each host
        of `per_host` neighbours, and of those of one host. Collective."""
        rows = self.ranks.movedim(list(self.sizes).index(axis), -1).reshape(-1, self.sizes[axis])
        found: list[str] = []
        for digits in (rows.unflatten(1, (-1, per_host)).transpose(1, 2), rows.unflatten(1, (-1, per_host))):
            for ranks in digits.reshape(-1, digits.shape[2]).tolist():
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    found.append(group.group_name)
        across, inside = found
        return across, inside

    def pipeline_subgroup(self, subset: Sequence[int], axes: tuple[str, ...] = ()) -> Any:
        return self._subset_groups[tuple(sorted(subset)), axes]
