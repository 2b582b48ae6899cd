"""ModelGraph: the captured training step, cut into segments, each distinct segment stored once.

Values that cross a segment edge have one name for the whole model:
    input:NAME      an entry of the user's batch
    SEGMENT.K/OUT   output OUT of instance K (unique; the first producer names it)
Parameters and buffers keep their fully qualified names (FQNs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from .slots import JointSignature

LossOver = Literal["mean", "sum", "each"]


@dataclass(frozen=True)
class ValueInfo:
    """One tensor that crosses segment edges. shape is that of the captured (global) microbatch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Leaf:
    """A tensor in what the model returns. name: of the value."""

    name: str


@dataclass(frozen=True)
class OpCost:
    """What one op does, at the captured shapes, before any sharding."""

    node: str
    op: str
    flops: int
    bytes_moved: int
    output_bytes: int
    source: str  # "file:line", or "" where the trace kept none
    module_path: str


@dataclass(frozen=True)
class Segment:
    """A distinct piece of the forward graph with its joint forward+backward graph.

    joint has the placeholders and results of slots.py: an update for each name in mutated_buffers, and None for the
    gradient of what is frozen or does not require one.
    """

    name: str
    joint: fx.GraphModule
    forward: fx.GraphModule  # before differentiation, of composite ops: where fusing passes look
    param_shapes: tuple[tuple[int, ...], ...]
    param_dtypes: tuple[torch.dtype, ...]
    param_requires_grad: tuple[bool, ...]
    num_buffers: int
    mutated_buffers: tuple[int, ...]  # slots among the buffers that the forward writes
    inputs: tuple[ValueInfo, ...]  # names are those of the first instance
    outputs: tuple[ValueInfo, ...]
    has_random: bool
    structure_hash: str
    is_prologue: bool = False  # depends on inputs and buffers only: every stage that needs it runs it itself

    @property
    def signature(self) -> JointSignature:
        return JointSignature(
            self.param_requires_grad,
            self.num_buffers,
            [info.requires_grad for info in self.inputs],
            len(self.mutated_buffers),
            [info.requires_grad for info in self.outputs],
        )


@dataclass(frozen=True)
class SegmentInstance:
    """One place in the model where a distinct segment stands. Slots follow the segment's own order."""

    index: int  # position in execution order
    segment: str
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    random_base: int  # number of random ops in the model before this instance
    module_path: str


@dataclass
class ModelGraph:
    """The whole training step: forward to the loss, folded."""

    name: str
    segments: dict[str, Segment]
    instances: list[SegmentInstance]  # execution order; prologue instances first
    values: dict[str, ValueInfo]
    input_names: tuple[str, ...]  # user inputs, as "input:NAME"
    params: dict[str, tuple[tuple[int, ...], torch.dtype, bool]]  # FQN -> shape, dtype, requires_grad (tied ones once)
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]]
    tied: dict[str, str] = field(default_factory=dict)  # other FQN -> the FQN that stands for it
    loss: str = ""  # value name of the scalar loss
    outputs: tuple[str, ...] = ()  # value names of the model's outputs kept for evaluation
    output_leaves: tuple[Any, ...] = ()  # of (loss, what the model returns): a Leaf where it is a tensor
    output_form: Any = None  # what makes (loss, what the model returns) of these
    batch_size: int = 0  # sequences (or samples) in the captured microbatch
    batch_dims: dict[str, int] = field(default_factory=dict)  # entry of the batch -> its dimension that counts samples
    # entry of the batch that stands for a number of the whole batch -> value of a microbatch's part of it, and whether
    # parts add up ("sum") or count by their samples ("mean"); see global_loss.py
    totals: dict[str, tuple[str, str]] = field(default_factory=dict)
    loss_over: LossOver = "mean"  # of the batch: its samples' "mean", their "sum", or neither; see loss_over.py
    # value of a prologue segment that must be true of every microbatch -> the line that asks for it, and lines that ask
    # other numbers; see assumptions.py
    conditions: dict[str, str] = field(default_factory=dict)
    later_conditions: tuple[str, ...] = ()
    structure_hash: str = ""
    attributes_set: tuple[str, ...] = ()  # of modules, by the forward; see attributes.py
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # "constant:NAME", tensors written into the code

    @property
    def wiring(self) -> tuple[Any, ...]:
        """What must agree for programs of one graph to run in the places of another's: all but what is in segments."""
        places = [(i.segment, i.params, i.buffers, i.inputs, i.outputs) for i in self.instances]
        return tuple(places), self.loss, self.outputs, tuple(self.totals.items()), tuple(self.conditions)

    @property
    def num_params(self) -> int:
        total = 0
        for shape, _, _ in self.params.values():
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return total
