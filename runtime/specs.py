"""What the runtime must know of each parameter: how it is stored, who uses it, where its gradient is partial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ExitCode, ShardwrightError
from ..passes.program import SegmentProgram
from ..plans.axes import expert_axes, tensor_axes
from ..profiler.graph import ModelGraph, SegmentInstance
from ..profiler.workload import Precision
from .extents import DataCut
from .wiring import Wiring

Cuts = tuple[tuple[str, int], ...]  # (mesh axis, dimension), in the order of the axes: each cuts what the last left


@dataclass(frozen=True)
class ParamSpec:
    """shape is global. cuts: over the axes that cut parameters, in storage (as its first use has it).

    partial_axes: mesh axes over which some use leaves a partial gradient. pipeline_ranks: pipeline coordinates that
    hold it, more than one where it is tied over stages or its stages have copies. state: the ranks that ZeRO splits its
    state over. state_levels: how many digits of the index among them cut its dimension 0 in storage
    (runtime/extents.py), finest first.
    is_mirrored: each of the pipeline_ranks runs all instances that use it, because their stages belong to two
    directions.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # inside the segments
    master_dtype: torch.dtype  # what the optimizer steps over
    requires_grad: bool
    has_grad: bool  # a gradient reaches it
    cuts: Cuts
    state_levels: int
    partial_axes: tuple[str, ...]
    pipeline_ranks: tuple[int, ...]
    state: DataCut
    is_mirrored: bool = False


@dataclass(frozen=True)
class ParamUse:
    """A parameter slot of one instance.

    skip_axes: only coordinate zero on them counts this use's gradient, because it is whole there on every rank while
    another use of the same parameter leaves partial sums.
    """

    name: str
    cuts: Cuts
    has_grad: bool
    partial_axes: tuple[str, ...]
    skip_axes: tuple[str, ...]


def master_dtype(dtype: torch.dtype, requires_grad: bool, precision: Precision) -> torch.dtype:
    """Trainable parameters are stepped over in the master precision, never in less than they compute in."""
    if not requires_grad or not dtype.is_floating_point:
        return dtype
    return torch.promote_types(dtype, precision.master)


def param_specs(
    graph: ModelGraph,
    programs: Mapping[str, SegmentProgram],
    wiring: Wiring,
    precision: Precision,
    *,
    cut: DataCut,
    sizes: Mapping[str, int],
) -> dict[str, ParamSpec]:
    """Specs of all parameters of the model. sizes: of the mesh axes."""
    by_index = {inst.index: inst for inst in graph.instances}
    holders: dict[str, dict[int, set[int]]] = {}  # parameter -> pipeline rank -> instances
    slots: dict[str, list[tuple[int, int]]] = {}  # parameter -> (instance, slot), in execution order
    for stage in wiring.stages:
        for index in stage.instances:
            for slot, name in enumerate(by_index[index].params):
                holders.setdefault(name, {}).setdefault(stage.rank, set()).add(index)
                if (index, slot) not in slots.setdefault(name, []):
                    slots[name].append((index, slot))
    specs: dict[str, ParamSpec] = {}
    for name, (shape, dtype, requires_grad) in graph.params.items():
        users = list(holders.get(name, {}).values())
        used = [(index, programs[by_index[index].segment], slot) for index, slot in sorted(slots.get(name, []))]
        differentiated = [(p, slot) for i, p, slot in used if i in wiring.backward_runs and p.param_grads[slot]]
        partial = {axis for program, slot in differentiated for axis in program.grad_partial_axes[slot]}
        partial = {axis for axis in partial if sizes[axis] > 1}
        cuts = _cuts(used[0][1].param_shards[used[0][2]], sizes) if used else ()
        partial -= {axis for axis, _ in cuts}  # each rank has its own piece; a use that differs is converted at once
        state = cut.beside(axis for axis, _ in cuts)
        levels = state.num_levels("optimizer" if requires_grad else "parameters")
        specs[name] = ParamSpec(
            name,
            tuple(shape),
            dtype,
            master_dtype(dtype, requires_grad, precision),
            requires_grad,
            bool(differentiated),
            cuts,
            levels if shape else 0,
            tuple(axis for axis in sizes if axis in partial),
            tuple(sorted(holders.get(name, {0}))),  # an unused parameter stays with the first pipeline rank
            state,
            len(users) > 1 and all(instances == users[0] for instances in users),
        )
    return specs


def param_uses(
    specs: Mapping[str, ParamSpec], inst: SegmentInstance, program: SegmentProgram, runs: bool, sizes: Mapping[str, int]
) -> tuple[ParamUse, ...]:
    """The parameter slots of one instance. runs: its backward runs."""
    return tuple(_use(specs[name], program, slot, runs, sizes) for slot, name in enumerate(inst.params))


def _use(spec: ParamSpec, program: SegmentProgram, slot: int, runs: bool, sizes: Mapping[str, int]) -> ParamUse:
    partial = tuple(axis for axis in program.grad_partial_axes[slot] if sizes[axis] > 1)
    summed = {*spec.partial_axes, *(axis for axis in spec.state.names if sizes[axis] > 1)}  # over these all units sum
    completed = summed | {axis for axis, _ in spec.cuts}  # over those that cut it, what a use leaves partial is summed
    assert set(partial) <= completed, (
        f"{spec.name}: a partial gradient over {partial} where the plan sums over {summed}"
    )
    return ParamUse(
        spec.name,
        _cuts(program.param_shards[slot], sizes),
        runs and program.param_grads[slot],
        partial,
        tuple(axis for axis in sizes if axis not in partial and axis in summed),
    )


def mirrors(spec: ParamSpec) -> tuple[int, ...]:
    """Pipeline ranks whose gradients one collective sums together with summed_axes; empty: none. Where ZeRO cuts the
    parameter they are summed at the end of the step, as those of tied parameters are."""
    return spec.pipeline_ranks if spec.is_mirrored and spec.has_grad and not spec.state.num_levels("optimizer") else ()


def summed_axes(spec: ParamSpec, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes over which the gradients of one stage are summed whole: those that ZeRO splits over among them where it
    cuts nothing."""
    state = set(spec.state.names)
    wanted = set(spec.partial_axes) - state | (set() if spec.state.num_levels("optimizer") else state)
    return tuple(axis for axis in sizes if sizes[axis] > 1 and spec.has_grad and axis in wanted)


def _cuts(shards: Mapping[str, int], sizes: Mapping[str, int]) -> Cuts:
    """In the order of the mesh. Raises ShardwrightError for a cut over an axis on which parameters are whole."""
    cuts = tuple((axis, shards[axis]) for axis in sizes if axis in shards and sizes[axis] > 1)
    if wrong := [axis for axis, _ in cuts if axis not in (*tensor_axes(), *expert_axes())]:
        raise ShardwrightError(
            f"the plan cuts a parameter over {wrong[0]}",
            means=f"inside a segment parameters are whole on {wrong[0]}; ZeRO splits their state over it",
            change="make the plan again",
            works="shardwright plan MODEL --hardware NAME -o plan.json",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return cuts


def held_names(specs: Mapping[str, ParamSpec], pipeline_rank: int) -> Sequence[str]:
    return [name for name, spec in specs.items() if pipeline_rank in spec.pipeline_ranks]
