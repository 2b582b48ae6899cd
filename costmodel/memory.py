"""What a rank must hold through a training step: parameters, gradients, optimizer state, activations and the rest.

With P parameter elements of a stage (T of them trainable) after tensor sharding, D data-parallel ranks, and c, g, o the
bytes of the compute, gradient-reduction and master types (ZeRO: Rajbhandari et al., arXiv:1910.02054):

    zero                      0            1            2            3
    compute copy              P c          P c          P c          P/D c, and P c of the stage in use
    gradients                 T g          T g          T/D g        T/D g     (c instead of g: one microbatch, D = 1)
    gradients of one backward one segment  one segment  whole stage  whole stage, in c, before they are added or reduced
    master and state          T (k + n) o  T/D (k + n) o             k = 0 where master and compute type are the same,
                                                                     n state tensors

Where master and compute type are the same the shard that the optimizer steps over is the only copy under zero 0 and 3,
and stands beside the whole compute copy under zero 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..units import GIB, MIB

# Held by the driver's context, cuBLAS and cuDNN workspaces of a process that trains with torch on one GPU.
GPU_CONTEXT_BYTES = GIB
# NCCL: rings and trees of one communicator with default channels and buffers take roughly this much.
COMMUNICATOR_BYTES = 160 * MIB
# Blocks that the caching allocator holds but cannot hand out, as a share of what is allocated.
FRAGMENTATION = 0.03

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
    """Bytes of one element of each kind of training state. state_tensors: of a parameter's size, in the master type."""

    compute: int
    master: int
    reduce: int
    state_tensors: int
    single_copy: bool  # master and compute type are the same

    @classmethod
    def of(cls, precision: object, state_tensors: int) -> StateBytes:
        """precision: profiler.workload.Precision (or anything with its three dtypes)."""
        compute, master, reduce = (getattr(precision, name) for name in ("compute", "master", "grad_reduce"))
        return cls(compute.itemsize, master.itemsize, reduce.itemsize, state_tensors, compute == master)


@dataclass(frozen=True)
class StageState:
    """Elements and bytes that one virtual stage keeps, after tensor sharding, before ZeRO. Numbers, or arrays of
    them.
    """

    param_elements: Any
    trainable_elements: Any
    buffer_bytes: Any
    largest_segment_elements: Any  # trainable elements of its largest segment instance


def _share(elements: Any, parts: int) -> Any:
    """Rounded up; elements may be an array."""
    return -(-elements // max(1, parts))


def parameter_bytes(state: StageState, kinds: StateBytes, dp: int, zero: int) -> Any:
    """Compute copy (or its shard), and under zero 1 and 2 the shard beside it where there is no other master."""
    if zero == 3:
        return _share(state.param_elements, dp) * kinds.compute
    beside = (
        _share(state.trainable_elements, dp) * kinds.compute if kinds.single_copy and zero in (1, 2) and dp > 1 else 0
    )
    return state.param_elements * kinds.compute + beside


def gradient_bytes(state: StageState, kinds: StateBytes, dp: int, zero: int, num_microbatches: int) -> Any:
    each = kinds.reduce if dp > 1 or num_microbatches > 1 else kinds.compute
    elements = _share(state.trainable_elements, dp) if zero >= 2 else state.trainable_elements
    return elements * each


def gradient_buffer_bytes(state: StageState, kinds: StateBytes, dp: int, zero: int, num_microbatches: int) -> Any:
    """Fresh gradients of one backward, before they join the accumulated ones."""
    if zero >= 2 and dp > 1:
        return state.trainable_elements * kinds.compute
    return state.largest_segment_elements * kinds.compute if num_microbatches > 1 or dp > 1 else 0


def optimizer_bytes(state: StageState, kinds: StateBytes, dp: int, zero: int) -> Any:
    elements = _share(state.trainable_elements, dp) if zero >= 1 else state.trainable_elements
    copies = kinds.state_tensors + (0 if kinds.single_copy else 1)
    return elements * copies * kinds.master


def optimizer_step_bytes(state: StageState, kinds: StateBytes, dp: int, zero: int) -> Any:
    """Temporaries of torch's multi-tensor optimizers: one tensor of the size of each parameter that is stepped over."""
    elements = _share(state.trainable_elements, dp) if zero >= 1 else state.trainable_elements
    return elements * kinds.master


def reserve_bytes(device_kind: str, num_groups: int) -> int:
    """What a process takes before the first tensor. num_groups: communicators it belongs to."""
    if device_kind == "cpu":
        return 0
    return GPU_CONTEXT_BYTES + num_groups * COMMUNICATOR_BYTES


def state_breakdown(
    states: Sequence[StageState], kinds: StateBytes, dp: int, zero: int, num_microbatches: int
) -> dict[str, int]:
    """What the virtual stages of one rank keep whatever the order of actions."""
    gathered = max((s.param_elements for s in states), default=0) * kinds.compute if zero == 3 and dp > 1 else 0
    return {
        "parameters": sum(parameter_bytes(s, kinds, dp, zero) for s in states),
        "gathered_parameters": gathered,
        "gradients": sum(gradient_bytes(s, kinds, dp, zero, num_microbatches) for s in states),
        "gradient_buffers": max(
            (gradient_buffer_bytes(s, kinds, dp, zero, num_microbatches) for s in states), default=0
        ),
        "optimizer": sum(optimizer_bytes(s, kinds, dp, zero) for s in states),
        "buffers": sum(s.buffer_bytes for s in states),
    }


def finish_breakdown(
    state: Mapping[str, int],
    *,
    activation_bytes: int,
    workspace_bytes: int,
    communication_bytes: int,
    optimizer_step: int,
    device_kind: str,
    num_groups: int,
) -> dict[str, int]:
    """All items of the worst moment of a rank: inside the pipeline, or in the optimizer step where that needs more.

    activation_bytes and workspace_bytes: at the worst moment of the rank's order. The sum of the items is the peak.
    """
    items = dict(state)
    in_pipeline = activation_bytes + workspace_bytes + items["gathered_parameters"] + items["gradient_buffers"]
    if optimizer_step > in_pipeline:
        items |= {"gathered_parameters": 0, "gradient_buffers": 0, "activations": 0, "workspace": optimizer_step}
    else:
        items |= {"activations": activation_bytes, "workspace": workspace_bytes}
    items["communication"] = communication_bytes
    held = sum(items.values())
    items["reserve"] = reserve_bytes(device_kind, num_groups)
    if device_kind != "cpu":
        items["reserve"] += round(FRAGMENTATION * held)
    return {name: int(items[name]) for name in ITEMS}
