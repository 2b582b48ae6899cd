"""What a rank must hold through a training step: parameters, gradients, optimizer state, activations and the rest.

P parameter elements of a stage (T of them trainable) after tensor sharding, u those of its largest segment instance (of
gradients: the trainable ones), D
data-parallel ranks; c, g, o bytes of the compute, gradient-reduction and master types, n state tensors of the
optimizer. ZeRO as in Rajbhandari et al., arXiv:1910.02054:

    zero                         0        1              2                   3
    parameters                   P c      P c            P c                 P/D c
    gradients                    T g      T g + T/D g    T/D g               T/D g
    master copy and state        T (k+n)o T/D (k+n) o    T/D (k+n) o         T/D (k+n) o

With Extents the D of a row is that of its kind of state: hybrid sharding splits inside a node and repeats across
nodes, and parameters may be split over fewer ranks than the optimizer's state (PaRO, arXiv:2310.06003; AMSP,
arXiv:2311.00257).

Experts that are cut over e of the data ranks have each kind of state over the other D/e of them alone: X such elements
count as X gcd(D, e), of which a D-th is left.

With the optimizer's state in host memory the last row is there, master copies too where k would be 0, with the
gradients that it steps by; of gradients the device then keeps what leaves it at the end of the step alone:

    gradients                    leave as they are made on one data-parallel rank and under ZeRO-2 and 3 over all ranks
                                 (u c on their way), but for partial sums over the tensor axis, which stay as above

k is 0 where master and compute type are the same (the parameters are the optimizer's copy), else 1. One data-parallel
rank and one microbatch keep gradients in c. What is gathered for use under ZeRO-3, and gradients on their way there,
depend on where the stage is at work: planner/memory/beside.py.

The peak is the greater of two moments: inside the pipeline, with activations and workspace, and in the optimizer step,
with gradients in the master type (of a shard under ZeRO-1 to 3), the optimizer's temporaries (none of torch's fused
updates), and what a roll-back of the step would need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .constants import assumed
from .stacks import Stack

ITEMS = (
    "parameters",
    "gathered_parameters",
    "gradients",
    "gradient_buffers",
    "optimizer",
    "buffers",
    "activations",
    "workspace",
    "communication",
    "reserve",
)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one element of each kind of training state. state_tensors, kept_tensors (in the optimizer step, for a
    roll-back), step_tensors (of the update itself, in the optimizer step): of a parameter's size, in the master type.
    """

    compute: int
    master: int
    reduce: int
    state_tensors: int
    single_copy: bool  # master and compute type are the same
    reduces_in_master: bool = True
    kept_tensors: int = 0
    step_tensors: int = 1

    @classmethod
    def of(cls, precision: object, state_tensors: int, kept_tensors: int = 0, step_tensors: int = 1) -> StateBytes:
        """precision: profiler.workload.Precision (or anything with its three dtypes)."""
        compute, master, reduce = (getattr(precision, name) for name in ("compute", "master", "grad_reduce"))
        wide = max(compute, reduce, key=lambda dtype: dtype.itemsize)
        single_copy, in_master = compute == master, wide == master
        sizes = compute.itemsize, master.itemsize, wide.itemsize
        return cls(*sizes, state_tensors, single_copy, in_master, kept_tensors, step_tensors)

    @property
    def moved_by_update(self) -> int:
        """Of an element, by the optimizer: reads gradient, master copy and state; writes master copy, state and compute
        copy."""
        written = 0 if self.single_copy else self.compute
        return self.reduce + 2 * (1 + self.state_tensors) * self.master + written

    @property
    def moved_by_accumulation(self) -> int:
        """Of an element, where its gradient is added to those of other microbatches."""
        return self.compute + 2 * self.reduce

    @property
    def of_trained(self) -> int:
        """Of an element that is trained, where nothing is split: parameter, gradient, master copy and state."""
        return self.compute + self.reduce + self.of_master

    @property
    def of_master(self) -> int:
        """Of an element that the optimizer steps over: its own copy and its state."""
        return (self.state_tensors + (0 if self.single_copy else 1)) * self.master


class Extents(NamedTuple):
    """Data-parallel ranks, next to each other, that share one copy of each kind of state; 1: every rank has it all."""

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1

    @classmethod
    def of(cls, zero: int, parameters: int, others: int | None = None) -> Extents:
        """What ZeRO stage `zero` splits, over so many ranks (others: gradients and optimizer state)."""
        rest = parameters if others is None else others
        return cls(parameters if zero == 3 else 1, rest if zero >= 2 else 1, rest if zero >= 1 else 1)


@dataclass(frozen=True)
class StageState:
    """Elements and bytes that one virtual stage keeps, after tensor sharding, before ZeRO. Numbers, or arrays.

    param_elements: as many as take the bytes of all parameters in the compute type; frozen ones may be of another."""

    param_elements: Any
    trainable_elements: Any
    buffer_bytes: Any
    largest_segment_elements: Any  # parameter elements of its largest segment instance
    summed_elements: Any = 0  # of the trainable ones: gradients are partial sums over a tensor axis
    largest_trainable_elements: Any = None  # of the instance with most of them; None: of the largest, all are
    expert_elements: Any = 0  # of all: experts that are cut over data ranks
    expert_ranks: int = 1  # so many of them


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one stage (or arrays of them). *_each: of the one stage in use; the others add up over a rank's
    stages. host: of host memory; all else is the device's."""

    parameters: Any
    optimizer: Any
    buffers: Any
    gradients: Any
    leaving_each: Any  # gradients on their way to host memory
    step_gradients: Any  # in the optimizer step
    step_temporaries: Any
    host: Any = 0


def gradients_are_written(kinds: StateBytes, zero: int, on_host: bool) -> bool:
    """May a backward write gradients of parameters where they are added up (passes/gradients.py)?"""
    return not zero and not on_host and kinds.reduce == kinds.compute


def leave_early(state_ranks: int, zero: int, extents: Extents) -> bool:
    """Where state is in host memory: do gradients go there as they are made? Others are summed over ranks first."""
    return state_ranks == 1 or (zero >= 2 and extents.gradients == extents.optimizer == state_ranks)


def state_memory(
    state: StageState,
    kinds: StateBytes,
    state_ranks: int,
    zero: int,
    num_microbatches: int,
    device_kind: str,
    extents: Extents | None = None,
    *,
    on_host: bool = False,
) -> StateMemory:
    """See the module's table. state_ranks: over which ZeRO may split; with one of them `zero` counts for
    nothing. extents: over all of them where None. on_host: the optimizer's state is in host memory."""
    zero = zero if state_ranks > 1 else 0
    extents = extents if extents is not None and zero else Extents.of(zero, state_ranks)
    params, trainable, largest = state.param_elements, state.trainable_elements, state.largest_trainable_elements
    largest = state.largest_segment_elements if largest is None else largest

    def _share(elements: Any, parts: int) -> Any:
        """Rounded up; elements may be an array."""
        elements = held_elements(elements, state.expert_elements, parts, state.expert_ranks)
        return elements if parts <= 1 else -(-elements // parts)

    shard = _share(trainable, extents.optimizer)
    accumulates = state_ranks > 1 or num_microbatches > 1
    each = kinds.reduce if accumulates else kinds.compute
    in_master = kinds.reduces_in_master if accumulates else kinds.single_copy
    # on CPU torch steps one parameter at a time
    stepped = _smaller(shard, largest) if device_kind == "cpu" or on_host else shard
    step_temporaries = (stepped * kinds.step_tensors + shard * kinds.kept_tensors) * kinds.master
    parameters = _share(params, extents.parameters) * kinds.compute
    if on_host:
        early = leave_early(state_ranks, zero, extents)
        kept = state.summed_elements if early else trainable
        kept = -(-kept // extents.gradients) if early else _share(kept, extents.gradients)
        gradients = (kept + (shard if zero == 1 else 0)) * each
        stepped_by = kinds.reduce + (0 if kinds.reduces_in_master else kinds.master)
        return StateMemory(
            parameters=parameters,
            optimizer=0 * shard,
            buffers=state.buffer_bytes,
            gradients=gradients,
            leaving_each=largest * kinds.compute if early and state_ranks == 1 else 0 * largest,
            step_gradients=gradients,
            step_temporaries=0 * shard,
            host=shard * ((1 + kinds.state_tensors) * kinds.master + stepped_by) + step_temporaries,
        )
    return StateMemory(
        parameters=parameters,
        optimizer=shard * kinds.of_master,
        buffers=state.buffer_bytes,
        gradients=(_share(trainable, extents.gradients) + (shard if zero == 1 else 0)) * each,
        leaving_each=0 * largest,
        step_gradients=shard * (each + (0 if in_master else kinds.master)),
        step_temporaries=step_temporaries,
    )


def are_experts_gathered(extent: int, expert_ranks: int) -> bool:
    """Does ZeRO-3 over `extent` ranks split experts that are cut over expert_ranks of them already?"""
    return extent > math.gcd(extent, expert_ranks)


def held_elements(elements: Any, experts: Any, extent: int, expert_ranks: int) -> Any:
    """As many elements as, split over `extent` ranks, leave what a rank has: experts, which are among the elements and
    cut over expert_ranks of them already, are split over the others alone."""
    return elements + experts * (math.gcd(extent, expert_ranks) - 1)


def _smaller(first: Any, second: Any) -> Any:
    return np.minimum(first, second)


def reserve_bytes(device_kind: str, num_groups: int) -> int:
    """What a process takes before the first tensor. num_groups: communicators it belongs to."""
    context, communicator = assumed("context_bytes", device_kind), assumed("communicator_bytes", device_kind)
    return round(context) + num_groups * round(communicator)


def slack_factor(device_kind: str) -> float:
    """Of what is allocated, over what is in use."""
    return 1.0 + assumed("fragmentation_fraction", device_kind)


def usable_bytes(memory_bytes: int) -> int:
    """Of memory that other processes use too, a host's or a CPU's, what a plan may fill where nobody sets a limit."""
    return int(memory_bytes * assumed("usable_memory_fraction"))


def memory_error(device_kind: str, stack: Stack) -> float:
    """What measured memory may take beyond the predicted peak, as a share of it: of memory_sure() of runs no more. A
    CPU's tensors are counted alike under every stack."""
    if device_kind == "cpu" or stack.memory_error is None:
        return assumed("memory_error", device_kind)
    return stack.memory_error


def memory_sure(device_kind: str) -> float:
    """Of how many runs memory stayed within the error that is stated, as a share."""
    return assumed("memory_sure", device_kind)


def boundary_bytes(cut_bytes: Any, device_kind: str) -> Any:
    """Of the buffers between two stages, by the bytes that pass there (or arrays of them)."""
    return round(assumed("boundary_buffers", device_kind)) * cut_bytes


def pinned_bytes(offloaded_bytes: int) -> int:
    """Of host memory, that offloading takes."""
    return round(assumed("pinned_memory_factor")) * offloaded_bytes


@dataclass(frozen=True)
class RankMoments:
    """Bytes of a rank by kind. lasting: all through the step; pipeline: beside the activations, where a backward runs;
    step: in the optimizer step in place of both. slack_fraction, reserve_bytes: what is added to the sum."""

    lasting: Mapping[str, int]
    pipeline: Mapping[str, int]
    step: Mapping[str, int]
    slack_fraction: float
    reserve_bytes: int

    def with_reserve(self, held: Mapping[str, int]) -> dict[str, int]:
        """What is held at a moment, with what the allocator and the process take besides."""
        reserve = self.reserve_bytes + round(self.slack_fraction * sum(held.values()))
        return {name: reserve if name == "reserve" else held.get(name, 0) for name in ITEMS}

    def worst(self, activation_bytes: int) -> dict[str, int]:
        """All items of the worst moment; their sum is the rank's peak. activation_bytes: at the worst moment of its
        order."""
        in_pipeline = {**self.pipeline, "activations": int(activation_bytes)}
        moment = in_pipeline if sum(in_pipeline.values()) >= sum(self.step.values()) else self.step
        return self.with_reserve({**self.lasting, **moment})


def rank_moments(
    stages: Sequence[StateMemory],
    *,
    beside: Mapping[str, int],
    communication_bytes: int,
    device_kind: str,
    num_groups: int,
) -> RankMoments:
    """stages: of the virtual stages that it holds. beside: what the one at work holds beyond that and what is kept, at
    most, by kind."""

    def total(name: str) -> int:
        return sum(int(getattr(stage, name)) for stage in stages)

    def most(name: str) -> int:
        return max(int(getattr(stage, name)) for stage in stages)

    return RankMoments(
        lasting={name: total(name) for name in ("parameters", "optimizer", "buffers")}
        | {"communication": int(communication_bytes)},
        pipeline={
            **beside,
            "gradients": total("gradients"),
            "gradient_buffers": beside.get("gradient_buffers", 0) + most("leaving_each"),
        },
        step={"gradients": total("step_gradients"), "workspace": total("step_temporaries")},
        slack_fraction=slack_factor(device_kind) - 1.0,
        reserve_bytes=reserve_bytes(device_kind, num_groups),
    )


def rank_items(stages: Sequence[StateMemory], *, activation_bytes: int, **others: Any) -> dict[str, int]:
    """All items of the worst moment of a rank; others: of rank_moments."""
    return rank_moments(stages, **others).worst(activation_bytes)
