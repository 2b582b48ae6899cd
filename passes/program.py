"""What the passes hand to the runtime: one distinct segment, rewritten for the coordinates of this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..profiler.graph import SegmentInstance
from .gradients import Into
from .split import SplitBackward
from .verify import Collective


def _plain(graph: Any) -> Callable[..., Any]:
    """A graph called not as a module, so that hooks that a user has put on every module do not run for it."""
    return getattr(graph, "forward", graph)


@dataclass(frozen=True)
class SegmentProgram:
    """Pure functions over this rank's local tensors.

    forward(*params, *buffers, *inputs, key) -> (*outputs, *buffer_updates, *saved)
    backward(*params, *buffers, key, *saved, *tangents, *into) -> (*param_grads, *input_grads)

    saved never holds a parameter or a buffer. Under full recomputation it is just the inputs that the backward needs.
    Gradients stand as None where nothing is differentiated. A gradient may be partial over the axes named in
    grad_partial_axes: the runtime sums it there, once per step. into: see into_slots; may be left out.
    """

    name: str
    forward: fx.GraphModule
    backward: fx.GraphModule | None  # None where no gradient flows
    num_params: int
    num_buffers: int
    mutated_buffers: tuple[int, ...]
    num_inputs: int
    num_outputs: int
    num_saved: int
    tangent_outputs: tuple[int, ...]  # output slots that take a tangent, in the backward's order
    input_grads: tuple[bool, ...]  # per input slot: is there a gradient
    param_grads: tuple[bool, ...]
    # how each parameter slot lies inside the segment: mesh axis -> tensor dim it is sharded on (absent: replicated)
    param_shards: tuple[dict[str, int], ...]
    # per parameter slot: mesh axes over which its gradient is a partial sum
    grad_partial_axes: tuple[tuple[str, ...], ...]
    # per output slot: local shape and dtype on this rank (for receive buffers)
    output_meta: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    input_meta: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    # per output slot: mesh axis -> tensor dim it is sharded on; () where nobody asks
    output_shards: tuple[dict[str, int], ...] = ()
    saved_bytes: int = 0
    # per tangent, in the backward's order: its local shape and dtype; () where all lie as their outputs do
    tangent_meta: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    # parameter slots whose gradient the backward can write into memory that it is given
    into_slots: tuple[int, ...] = ()
    # the backward in two parts, where the schedule runs them apart
    split: SplitBackward | None = None
    collectives: tuple[Collective, ...] = ()  # of one run of both graphs

    def run_forward(
        self,
        params: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        key: torch.Tensor,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Returns (outputs, buffer_updates, saved)."""
        out = list(_plain(self.forward)(*params, *buffers, *inputs, key))
        split = self.num_outputs + len(self.mutated_buffers)
        return out[: self.num_outputs], out[self.num_outputs : split], out[split:]

    def run_backward(
        self,
        params: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        key: torch.Tensor,
        saved: Sequence[torch.Tensor],
        tangents: Sequence[torch.Tensor],
        into: Sequence[Into | None] = (),
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Returns (param_grads, input_grads), one entry per slot. into: for each of into_slots."""
        assert self.backward is not None
        out = list(_plain(self.backward)(*params, *buffers, key, *saved, *tangents, *into))
        return out[: self.num_params], out[self.num_params :]

    def run_backward_input(
        self,
        params: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        key: torch.Tensor,
        saved: Sequence[torch.Tensor],
        tangents: Sequence[torch.Tensor],
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """Returns (input_grads, what run_backward_weight takes)."""
        assert self.split is not None
        out = list(_plain(self.split.inputs)(*params, *buffers, key, *saved, *tangents))
        return out[: self.num_inputs], out[self.num_inputs :]

    def run_backward_weight(
        self,
        params: Sequence[torch.Tensor | None],
        buffers: Sequence[torch.Tensor],
        key: torch.Tensor,
        carried: Sequence[torch.Tensor],
        into: Sequence[Into | None] = (),
    ) -> list[torch.Tensor | None]:
        """params: Nones where split.reads_params is false. into: for each of split.into_slots."""
        assert self.split is not None
        return list(_plain(self.split.weights)(*params, *buffers, key, *carried, *into))


def own_key(instance: int) -> str:
    """Of a segment instance that recomputes otherwise than its segment, among the programs of a rank."""
    return f"instance{instance}"


def program_of(programs: Mapping[str, SegmentProgram], instance: SegmentInstance) -> SegmentProgram:
    """The instance's own, or that of its distinct segment."""
    own = programs.get(own_key(instance.index))
    return programs[instance.segment] if own is None else own
