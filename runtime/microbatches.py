"""A batch becomes microbatches; each microbatch finds the segment programs built for its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from ..passes.program import SegmentProgram
from ..profiler.calling import Form
from ..profiler.global_loss import SHARE
from ..profiler.graph import ModelGraph
from .batch import BatchPart, MicrobatchPart, check_shape, conform, shard_batch, split_part, whole_shape
from .mesh import RankGrid
from .stage import StageRunner, Variant
from .wiring import USER_INPUT

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
# (shape of each entry of a whole microbatch) -> segment programs for it. A batch that does not divide over the
# data-parallel ranks is to be run whole by each of them; the runtime counts its gradients once.
Rebuild = Callable[[dict[str, tuple[int, ...]]], Mapping[str, SegmentProgram]]


class Microbatches:
    """size: samples of the planned microbatch, all data-parallel ranks together. form: of the user's batches, None: a
    dictionary of tensors."""

    def __init__(
        self,
        graph: ModelGraph,
        programs: Mapping[str, SegmentProgram],
        size: int,
        grid: RankGrid,
        device: torch.device,
        rebuild: Rebuild | None,
        form: Form | None = None,
    ) -> None:
        self.graph, self.size, self.grid, self.device, self.rebuild = graph, size, grid, device, rebuild
        entries = [value.removeprefix(USER_INPUT) for value in graph.input_names]
        self.names = [name for name in entries if name != SHARE and name not in graph.totals]
        captured = {name: tuple(graph.values[USER_INPUT + name].shape) for name in self.names}
        self.form = form
        self.dims = graph.batch_dims
        planned = {
            n: tuple(size if d == self.dims.get(n) else s for d, s in enumerate(shape)) for n, shape in captured.items()
        }
        self.planned: Shapes = tuple(sorted(planned.items()))
        self._programs: dict[Shapes, Mapping[str, SegmentProgram]] = {self.planned: dict(programs)}
        self._variants: dict[tuple[Shapes, int], list[Variant]] = {}

    def shard(self, batch: Any) -> BatchPart:
        return shard_batch(self._tensors(batch), self.dims, self.size, self.grid.batch.size, self.grid.batch.index)

    def split(self, batch: Any) -> list[MicrobatchPart]:
        """This rank's part of a batch, on the device, by microbatch."""
        tensors = {name: t.to(self.device, non_blocking=True) for name, t in self._tensors(batch).items()}
        if not self.dims:
            return [MicrobatchPart(tensors, self.size)]
        part = BatchPart(tensors, batch.global_size) if isinstance(batch, BatchPart) else tensors
        return split_part(part, self.dims, self.size, self.grid.batch.size, self.grid.batch.index)

    def _tensors(self, batch: Any) -> dict[str, torch.Tensor]:
        """By the captured names. Raises ShardwrightError where the batch has other entries."""
        if self.form is not None and not isinstance(batch, BatchPart):
            return self.form.tensors_of(batch)
        missing = [name for name in self.names if name not in batch]
        unknown = [name for name in batch if name not in self.names]
        if missing or unknown:
            raise ShardwrightError(
                f"the batch lacks {', '.join(missing)}; it has {', '.join(sorted(batch))}"
                if missing
                else f"the batch has {', '.join(map(repr, unknown))}, which the example batch had not",
                means="the model was captured with these entries",
                change="the batch",
                works=f"a mapping with {', '.join(self.names)}",
            )
        return {name: batch[name] for name in self.names}

    def variants(self, part: MicrobatchPart, runners: Sequence[StageRunner]) -> list[Variant]:
        """For each stage, its steps for this microbatch's shape."""
        shapes = self._shapes(part)
        key = (shapes, id(runners))
        if key not in self._variants:
            programs = self._programs_for(shapes)
            self._variants[key] = [runner.variant(programs) for runner in runners]
        return self._variants[key]

    def programs(self, part: MicrobatchPart) -> Mapping[str, SegmentProgram]:
        """Of this microbatch's shape, by distinct segment."""
        return self._programs_for(self._shapes(part))

    def _shapes(self, part: MicrobatchPart) -> Shapes:
        found = {n: whole_shape(part.tensors[n], self.dims.get(n), part.size) for n in self.names}
        return tuple(sorted(found.items()))

    def _programs_for(self, shapes: Shapes) -> Mapping[str, SegmentProgram]:
        if shapes not in self._programs:
            if self.rebuild is None:
                planned = dict(self.planned)
                name, found = next((name, shape) for name, shape in shapes if planned[name] != shape)
                raise ShardwrightError(
                    f"{name} of a microbatch has shape {found}; the plan has {planned[name]}",
                    means="the program was built for one microbatch shape",
                    change="the batch size, or pass rebuild= when the program is built",
                    works=f"a global batch that is a multiple of {self.size}",
                    exit_code=ExitCode.PLAN_MISMATCH,
                )
            self._programs[shapes] = self.rebuild(dict(shapes))
        return self._programs[shapes]

    def inputs(self, part: MicrobatchPart, variants: Sequence[Variant]) -> dict[str, torch.Tensor]:
        """The user inputs that these stages read, as their segments want them."""
        over = (self.grid.batch.group, self.grid.batch.size)
        inputs = {}
        for variant in variants:
            for name, shape in variant.input_shapes.items():
                if name in inputs:
                    continue
                entry = name.removeprefix(USER_INPUT)
                tensor = part.tensors[entry]
                if entry in self.dims:
                    dim = self.dims[entry]
                    tensor = conform(entry, tensor, shape, whole_shape(tensor, dim, part.size), dim, over)
                else:
                    check_shape(entry, tensor, shape)
                inputs[name] = tensor
        return inputs


class Keys:
    """The counter-based generator's key of each instance: [seed, step, microbatch, random ops before the instance]."""

    def __init__(self, graph: ModelGraph, seed: int, device: torch.device) -> None:
        random = [inst for inst in graph.instances if graph.segments[inst.segment].has_random]
        self._rows = {inst.index: row for row, inst in enumerate(random)}
        self._none = torch.zeros(4, dtype=torch.int64, device=device)
        bases = [[seed, 0, 0, inst.random_base] for inst in random]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device).view(1, len(random), 4)
        self._table = self._none

    def begin(self, step: int, num_microbatches: int) -> None:
        """What differs from step to step is filled in on the device: a copy from the host would wait for it."""
        if self._rows:
            self._table = self._bases.repeat(num_microbatches, 1, 1)
            self._table.select(2, 1).fill_(step)
            microbatches = torch.arange(num_microbatches, device=self._table.device)
            self._table.select(2, 2).copy_(microbatches.unsqueeze(1))

    def __call__(self, microbatch: int, instance: int) -> torch.Tensor:
        row = self._rows.get(instance)
        return self._none if row is None else self._table[microbatch, row]
