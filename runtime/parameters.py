"""The parameters that this rank holds: storage, use inside the segments, gradients.

Storage is one DTensor for each parameter on the storage mesh of the pipeline coordinate (RankGrid.storage_mesh): cut
over the tensor axes as the segments want it, then Shard(0) over the data-parallel ranks where ZeRO cuts it (over the
digits of their index, where it is cut over a part of them). A single rank per stage holds plain tensors. A whole
parameter never stands on a rank unless the plan replicates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..passes.gradients import Into
from ..plans.axes import stage_axes, state_axes
from ..profiler.workload import Precision
from ._torch import layout_of, local_part, with_layout
from .collectives import Pending
from .extents import DataCut, Level
from .given_data import take_data
from .host_link import HostLink
from .mesh import RankGrid
from .relayout import changed_axes, dim_cuts, grad_to_storage, relaid
from .sharded import ShardedUnit
from .shards import narrow_shape, shard_index
from .specs import ParamSpec, ParamUse, held_names, mirrors, summed_axes
from .units import Unit, WholeUnit, merge_units, unit_names

MAX_PENDING = 2  # collectives of whole units in flight on a rank; each holds a flat buffer of one
BUCKET_ELEMENTS = 1 << 25  # of one collective that sums several gradients: 128 MiB in float32


@dataclass(frozen=True)
class Storage:
    """Where parameters are kept. existing: tensors to adopt. link: to the host, where what the optimizer steps over is
    there."""

    device: torch.device
    existing: Mapping[str, torch.Tensor] = field(default_factory=dict)
    link: HostLink | None = None


@dataclass(frozen=True)
class StateRanks:
    """The ranks over which ZeRO splits the state of some parameters, as this rank sees them. mesh: where the parameters
    live as DTensors."""

    levels: tuple[Level, ...]
    copies: Level
    mesh: DeviceMesh | None

    @classmethod
    def of(cls, cut: DataCut, grid: RankGrid) -> StateRanks:
        levels = tuple(grid.data_level(*digit, cut.names) for digit in cut.levels)
        return cls(levels, grid.data_level(*cut.copies, cut.names), grid.storage_mesh(cut))


class ParameterStore:
    """names: parameters of each instance that runs here, by index. stage_of: its stage."""

    def __init__(
        self,
        specs: Mapping[str, ParamSpec],
        names: Mapping[int, Sequence[str]],
        stage_of: Mapping[int, int],
        grid: RankGrid,
        *,
        cut: DataCut,
        precision: Precision,
        storage: Storage,
    ) -> None:
        self.specs = {name: specs[name] for name in held_names(specs, grid.coord("pp"))}
        self.grid, self.device, self.link = grid, storage.device, storage.link
        self.cut = cut
        cuts = dict.fromkeys((cut, *(self.specs[name].state for name in sorted(self.specs))))
        self._state_of = {each: StateRanks.of(each, grid) for each in cuts}
        self.storage_mesh = self._state_of[cut].mesh
        users: dict[str, set[int]] = {}
        for index, row in names.items():
            for name in row:
                users.setdefault(name, set()).add(index)
        self._layouts: dict[tuple[str, torch.dtype], Any] = {}  # how each parameter's DTensor is described
        self._pending = Pending(MAX_PENDING)
        self._mirrored: list[Unit] = []  # in the order in which all ranks that have copies of them start to sum
        self.units = self._make_units(users, stage_of, precision, storage.existing)
        self._unit_of = {name: unit for unit in self.units for name in unit.names}
        self._units_of_instance = {
            index: tuple(dict.fromkeys(self._unit_of[name] for name in row)) for index, row in names.items()
        }
        self.parameters: dict[str, nn.Parameter] = {name: self._parameter(name) for name in self.specs}
        self.local_parameters = {name: self._local_parameter(name) for name in self.specs}
        self._names = {id(p): n for held in (self.parameters, self.local_parameters) for n, p in held.items()}
        self._left: dict[Unit, int] = {}
        self._unsummed: list[Unit] = []
        self.frozen: set[str] = set()  # by the user, since: they get no gradient
        self._versions: dict[str, tuple[int, ...]] = {}
        held = (*self.parameters.items(), *self.local_parameters.items())
        # held on to, so that no other storage comes to lie where one of them was
        self._storages = [(name, parameter, parameter.untyped_storage()) for name, parameter in held]

    def _make_units(
        self,
        users: Mapping[str, Collection[int]],
        stage_of: Mapping[int, int],
        precision: Precision,
        existing: Mapping[str, torch.Tensor],
    ) -> list[Unit]:
        grid = self.grid

        def levels(spec: ParamSpec) -> int:
            return spec.state.num_levels("optimizer" if spec.requires_grad else "parameters")

        def link(spec: ParamSpec) -> HostLink | None:
            return self.link if spec.requires_grad else None

        sums = {n: summed_axes(s, grid.sizes) for n, s in self.specs.items()}
        copies = {n: mirrors(s) for n, s in self.specs.items()}
        stages = {n: {stage_of[index] for index in users[n]} if copies[n] else set() for n in self.specs}
        kinds = {
            n: (
                s.dtype,
                s.master_dtype,
                s.has_grad,
                levels(s),
                sums[n],
                copies[n],
                tuple(sorted(stages[n])),
                link(s),
                s.state,
            )
            for n, s in self.specs.items()
        }
        units: list[Unit] = []
        groups = unit_names(list(self.specs), users, kinds)
        if not self.cut.num_levels("parameters"):  # what is gathered for an instance is no more than that instance uses
            sizes = {n: math.prod(self._used_shape(spec)) * spec.dtype.itemsize for n, spec in self.specs.items()}
            groups = merge_units(groups, users, kinds, sizes)
        for names in groups:
            first = self.specs[names[0]]
            subset, axes = copies[names[0]], sums[names[0]]
            ranks = self._state_of[first.state]
            common = {
                "dtype": first.dtype,
                "master_dtype": first.master_dtype,
                "reduce_dtype": torch.promote_types(first.dtype, precision.grad_reduce),
                "device": self.device,
                "link": link(first),
                "sum_group": grid.pipeline_subgroup(subset, axes) if subset else grid.axes_group(axes),
            }
            shapes = {name: self._used_shape(self.specs[name]) for name in names}
            unit: Unit
            if levels(first):
                unit = ShardedUnit(
                    shapes,
                    levels=ranks.levels[: levels(first)],
                    cut_params=first.state.num_levels("parameters"),
                    cut_grads=min(first.state.num_levels("gradients"), levels(first)),
                    copies=ranks.copies,
                    pending=self._pending,
                    **common,
                )
            else:
                adopted = {name: existing[name] for name in names if self._can_adopt(name, existing)}
                unit = WholeUnit(shapes, existing=adopted, **common)
            unit.expects_grads = first.has_grad
            units.append(unit)
            if subset:
                self._mirrored.append(unit)
        self._mirrored.sort(key=lambda unit: min(users[unit.names[0]]), reverse=True)
        return units

    def _can_adopt(self, name: str, existing: Mapping[str, torch.Tensor]) -> bool:
        tensor, spec = existing.get(name), self.specs[name]
        return (
            tensor is not None
            and not spec.cuts
            and tensor.shape == spec.shape
            and tensor.dtype == spec.dtype
            and tensor.device == self.device
        )

    def _used_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Inside the segments, before ZeRO cuts it."""
        return narrow_shape(spec.shape, dim_cuts(spec.cuts, self.grid))

    def placements(self, spec: ParamSpec) -> list[Shard | Replicate]:
        mesh = self._state_of[spec.state].mesh
        assert mesh is not None and mesh.mesh_dim_names is not None
        tensor = [axis for axis in mesh.mesh_dim_names if axis in self.grid.sizes and axis not in spec.state.names]
        cuts, levels = dict(spec.cuts), range(mesh.ndim - len(tensor))
        placed = [Shard(cuts[axis]) if axis in cuts else Replicate() for axis in tensor]
        return [*placed, *(Shard(0) if k < spec.state_levels else Replicate() for k in levels)]

    def as_dtensor(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A tensor that lies as the parameter does, as a DTensor; unchanged where one rank holds all of it."""
        if self.storage_mesh is None:
            return local
        key = name, local.dtype
        if key in self._layouts:
            return with_layout(local, self._layouts[key])
        spec = self.specs[name]
        stride = torch.empty(spec.shape, device="meta").stride()
        made = DTensor.from_local(  # of a tensor in host memory it would make one of the device
            torch.empty_like(local, device=self.device),
            self._state_of[spec.state].mesh,
            self.placements(spec),
            run_check=False,
            shape=torch.Size(spec.shape),
            stride=stride,
        )
        self._layouts[key] = layout_of(made)
        return with_layout(local, self._layouts[key])

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a parameter's gradient, put together from all ranks of its stage."""
        if not isinstance(tensor, DTensor):
            return tensor
        return with_layout(local_part(tensor).to(self.device), layout_of(tensor)).full_tensor()

    def _parameter(self, name: str) -> nn.Parameter:
        local = self._unit_of[name].masters[name]
        spec = self.specs[name]
        return nn.Parameter(self.as_dtensor(name, local), requires_grad=spec.requires_grad)

    def _local_parameter(self, name: str) -> nn.Parameter:
        """The same memory as a plain tensor, for optimizers that need not know of the mesh."""
        if self.storage_mesh is None:
            return self.parameters[name]
        return nn.Parameter(self._unit_of[name].masters[name], requires_grad=self.specs[name].requires_grad)

    def name_of(self, parameter: torch.Tensor) -> str:
        """Of an entry of parameters or local_parameters."""
        return self._names[id(parameter)]

    # values

    def local_index(self, name: str) -> tuple[slice, ...]:
        """Which part of the whole tensor this rank's storage holds."""
        spec, grid = self.specs[name], self.grid
        levels = self._state_of[spec.state].levels[: spec.state_levels]
        cuts = [(0, (level.size, level.index)) for level in levels]
        return shard_index(spec.shape, [*dim_cuts(spec.cuts, grid), *cuts])

    @torch.no_grad()
    def assign(self, name: str, whole: Any) -> None:
        """Fill the storage of one parameter from a whole tensor, or from what gives parts of it by index."""
        self._unit_of[name].masters[name].copy_(whole[self.local_index(name)])

    @torch.no_grad()
    def refresh(self) -> None:
        """After the parameters were written (a step, a load): bring the new values into the segments' tensors."""
        with self.refreshing() as refresh:
            for unit in self.units:
                refresh(unit)

    @contextmanager
    def refreshing(self) -> Iterator[Callable[[Unit], None]]:
        """Inside, the given function begins with one unit after another; at the end all of them are done. Every rank
        gives it all units, in one order."""
        pending = Pending(MAX_PENDING)
        yield lambda unit: pending.start(unit.refresh())
        pending.drain()
        if self.link is not None:
            self.link.arrive()
        self._versions = self._versions_now()

    def _versions_now(self) -> dict[str, tuple[int, ...]]:
        """A write through a DTensor counts on that alone, one through its local tensor on the memory that it shows."""
        held = (self.parameters, self.local_parameters)
        return {n: (self._unit_of[n].masters[n]._version, *(h[n]._version for h in held)) for n in self.parameters}

    def were_written(self) -> bool:
        """In place, by anyone, since the segments' tensors were last brought up to date?"""
        return self._versions != self._versions_now()

    @torch.no_grad()
    def take_new_tensors(self) -> None:
        """Values that were given by `parameter.data = tensor` come to where the segments read them. Raises
        ShardwrightError where that does nothing, as with DTensors, or the shape is another, before it takes any."""
        take_data((name, p, storage, self._unit_of[name].masters[name]) for name, p, storage in self._storages)

    # use by the segments

    def prefetch(self, index: int) -> None:
        for unit in self._units_of_instance[index]:
            unit.prefetch()

    def add_instances(self, names: Mapping[int, Sequence[str]]) -> None:
        """Instances of another graph, by index, that read these parameters of those held here."""
        for index, row in names.items():
            self._units_of_instance[index] = tuple(dict.fromkeys(self._unit_of[name] for name in row))

    def acquire(self, index: int, uses: Sequence[ParamUse]) -> list[torch.Tensor]:
        """Parameter tensors of an instance as its slots want them, until release()."""
        opened = {unit: unit.open() for unit in self._units_of_instance[index]}
        return [self._convert(use, opened[self._unit_of[use.name]][use.name]) for use in uses]

    def _convert(self, use: ParamUse, tensor: torch.Tensor) -> torch.Tensor:
        spec = self.specs[use.name]
        return relaid(tensor, spec.shape, spec.cuts, use.cuts, self.grid)

    def release(self, index: int) -> None:
        for unit in self._units_of_instance[index]:
            unit.close()

    # gradients

    def begin_step(self, backward_uses: Mapping[int, int]) -> None:
        """backward_uses: how often the backward of each instance will run in this step."""
        self._left = dict.fromkeys(self.units, 0)
        for index, count in backward_uses.items():
            for unit in self._units_of_instance[index]:
                self._left[unit] += count
        self._unsummed = list(self._mirrored)
        self._sum_mirrored()  # a direction without microbatches has nothing to wait for

    def _sum_mirrored(self) -> None:
        """Two directions finish their stages in unlike orders; the last stage is done first in either, so the sums
        start from there, each as soon as those before it have."""
        while self._unsummed and not self._left[self._unsummed[0]]:
            self._unsummed.pop(0).start_reduce()

    def gradient_memory(self, uses: Sequence[ParamUse], slots: Sequence[int]) -> list[Into | None]:
        """For each slot, where its backward is to write the gradient. What is handed out counts as written.

        A parameter in two slots gets memory for the first alone: the backward may come to the second one before it.
        """
        found: list[Into | None] = []
        seen: set[str] = set()
        for slot in slots:
            use = uses[slot]
            as_stored = use.has_grad and use.cuts == self.specs[use.name].cuts
            writes = as_stored and self.grid.is_zero(use.skip_axes) and use.name not in seen
            found.append(self._unit_of[use.name].memory_for(use.name) if writes else None)
            seen.add(use.name)
        return found

    def accumulate(self, index: int, uses: Sequence[ParamUse], grads: Sequence[torch.Tensor | None]) -> None:
        """Parameter gradients of one instance for one microbatch. The reduction of a unit starts with its last one."""
        for use, grad in zip(uses, grads, strict=True):
            if not use.has_grad:
                continue
            spec = self.specs[use.name]
            skip = use.skip_axes
            if grad is not None and use.cuts != spec.cuts:
                grad = grad_to_storage(grad, spec.shape, use, spec.cuts, self.grid)
                complete = {*skip, *changed_axes(use.cuts, spec.cuts)} & {*spec.partial_axes, *spec.state.names}
                skip = tuple(axis for axis in self.grid.sizes if axis in complete)
            counts = self.grid.is_zero(skip)
            self._unit_of[use.name].add_grad(use.name, grad if counts else None)
        for unit in self._units_of_instance[index]:
            self._left[unit] -= 1
            if not self._left[unit]:
                if unit in self._mirrored:
                    self._sum_mirrored()
                else:
                    unit.start_reduce()

    def flush_plan(self, instances: Sequence[int]) -> dict[int, tuple[Unit, ...]]:
        """instances: of one stage, in forward order. Backward goes the other way, so a unit has all its contributions
        of a microbatch after the first instance that uses it."""
        seen: set[Unit] = set()
        plan = {}
        for index in instances:
            plan[index] = tuple(unit for unit in self._units_of_instance[index] if unit not in seen)
            seen.update(plan[index])
        return plan

    def finish_gradients(self, scale: float = 1.0) -> None:
        """Complete all sums, scale, and set .grad of the parameters. Every rank calls it once a step."""
        grads: dict[str, torch.Tensor] = {}
        for unit in self.units:
            if unit.expects_grads:
                grads.update(unit.finish_reduce())
        if self.link is not None:
            self.link.settle()
        rest = {n: s for n, s in self.specs.items() if s.has_grad and not mirrors(s)}
        for subset in tied_subsets(rest.values()):
            tied = {}
            for name in (n for n, s in rest.items() if s.pipeline_ranks == subset):
                grad = grads[name] if name in grads else torch.zeros_like(self._unit_of[name].masters[name])
                tied[name] = grad.to(self.device, self._unit_of[name].reduce_dtype)  # the same on every rank that adds
            grads.update(sum_together(tied, self.grid.pipeline_subgroup(subset)))
        for name in list(grads):
            grad = grads.pop(name)
            if not self.specs[name].has_grad or name in self.frozen:
                continue
            master = self._unit_of[name].masters[name]
            grad = grad.to(master.device, master.dtype)
            if grad.stride() != master.stride():  # fused updates go through both memories in step
                grad = torch.empty_like(master).copy_(grad)
            if scale != 1.0:
                grad.mul_(scale)
            self.parameters[name].grad = self.as_dtensor(name, grad)
            self.local_parameters[name].grad = local_tensor(self.parameters[name].grad)

    def clear_gradients(self) -> None:
        for held in (self.parameters, self.local_parameters):
            for parameter in held.values():
                parameter.grad = None

    def take_gradients(self) -> None:
        """Before the optimizer steps: what the user has put into .grad of the parameters counts."""
        for name, parameter in self.parameters.items():
            self.local_parameters[name].grad = None if parameter.grad is None else local_tensor(parameter.grad)

    def local_grads(self) -> dict[str, torch.Tensor]:
        return {n: local_tensor(p.grad) for n, p in self.parameters.items() if p.grad is not None}

    def counts_once(self, name: str) -> bool:
        """Is this rank the one that counts its part of the parameter in sums over the whole model?"""
        spec, grid = self.specs[name], self.grid
        distinct = {*stage_axes(), *state_axes(), *dict(spec.cuts)}
        copies = [axis for axis in grid.sizes if axis not in distinct]
        ranks = self._state_of[spec.state]
        first = not any(level.index for level in [*ranks.levels[spec.state_levels :], ranks.copies])
        return first and grid.is_zero(copies) and grid.coord("pp") == spec.pipeline_ranks[0]

    def param_bytes(self) -> int:
        return sum(unit.param_bytes() for unit in self.units)

    def grad_bytes(self) -> int:
        """Of the device."""
        accumulating = sum(unit.grad_bytes() for unit in self.units) + self._pending.num_bytes()
        if self.link is not None:
            return accumulating + self.link.num_bytes()
        return accumulating + sum(g.numel() * g.element_size() for g in self.local_grads().values())

    def host_bytes(self) -> int:
        """What the optimizer steps over in host memory, and the gradients there."""
        return sum(unit.host_bytes() for unit in self.units)


def local_tensor(tensor: Any) -> torch.Tensor:
    return local_part(tensor) if isinstance(tensor, DTensor) else tensor


def tied_subsets(specs: Iterable[ParamSpec]) -> list[tuple[int, ...]]:
    """Sets of pipeline coordinates that share some parameter with a gradient."""
    return sorted({spec.pipeline_ranks for spec in specs if spec.has_grad and len(spec.pipeline_ranks) > 1})


def sum_together(tensors: Mapping[str, torch.Tensor], group: Any) -> dict[str, torch.Tensor]:
    """The sums of these tensors over a group, in few collectives. The given tensors are not written to."""
    summed: dict[str, torch.Tensor] = {}
    bucket: list[str] = []
    elements = 0
    for name, tensor in tensors.items():
        if bucket and (elements + tensor.numel() > BUCKET_ELEMENTS or tensor.dtype != tensors[bucket[0]].dtype):
            summed.update(_sum_bucket(tensors, bucket, group))
            bucket, elements = [], 0
        bucket.append(name)
        elements += tensor.numel()
    if bucket:
        summed.update(_sum_bucket(tensors, bucket, group))
    return summed


def _sum_bucket(tensors: Mapping[str, torch.Tensor], names: Sequence[str], group: Any) -> dict[str, torch.Tensor]:
    flat = torch.cat([tensors[name].reshape(-1) for name in names])
    dist.all_reduce(flat, group=group)
    pieces = torch.split(flat, [tensors[name].numel() for name in names])
    return {name: piece.view(tensors[name].shape) for name, piece in zip(names, pieces, strict=True)}
