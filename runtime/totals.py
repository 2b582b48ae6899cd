"""Numbers of the whole batch that its loss is divided by, as the count of tokens that are not ignored.

They depend on the batch alone (profiler/global_loss.py). Before the first forward of a step every rank whose stages
read one runs, for each microbatch, the prologue instances that compute its part; the sum goes to all microbatches as an
input. No rank waits for another pipeline stage. Where the loss is that of each microbatch (loss_over "each"), every
microbatch is given its own part, as the model by itself would divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..profiler.global_loss import SHARE
from ..profiler.graph import ModelGraph
from .batch import MicrobatchPart
from .microbatches import Microbatches
from .stage import StageRunner
from .wiring import USER_INPUT, StageWiring, Wiring, prologue_needed


def counting_stage(graph: ModelGraph, wiring: Wiring, rank: int) -> StageWiring | None:
    """The prologue instances that compute the totals which this pipeline coordinate reads; None where it reads none."""
    by_index = {inst.index: inst for inst in graph.instances}
    read = {name for stage in wiring.stages_of(rank) for i in stage.instances for name in by_index[i].inputs}
    names = [value for entry, (value, _) in graph.totals.items() if USER_INPUT + entry in read]
    if not names:
        return None
    instances = prologue_needed(graph, names)
    frees = tuple(() for _ in instances)
    return StageWiring(-1, 0, rank, tuple(instances), (), tuple(dict.fromkeys(names)), (), (), frees)


class BatchTotals:
    """make: the runner of the counting stage. of_each: every microbatch is divided by its own numbers."""

    def __init__(
        self,
        graph: ModelGraph,
        stage: StageWiring | None,
        make: Callable[[StageWiring], StageRunner],
        *,
        of_each: bool = False,
    ) -> None:
        self._of_each = of_each
        self._totals = graph.totals
        self._dtypes = {entry: graph.values[USER_INPUT + entry].dtype for entry in self._entries(graph)}
        self._stage = stage
        self._runners = [make(stage)] if stage is not None else []

    @staticmethod
    def _entries(graph: ModelGraph) -> list[str]:
        names = [value.removeprefix(USER_INPUT) for value in graph.input_names]
        return [name for name in names if name in graph.totals or name == SHARE]

    def fill(self, parts: Sequence[MicrobatchPart], microbatches: Microbatches) -> None:
        """Give each microbatch the totals of all, and its share of the samples."""
        if self._stage is None:
            return
        groups = [[part] for part in parts] if self._of_each else [list(parts)]
        first = 0
        for group in groups:
            self._fill(first, group, microbatches)
            first += len(group)

    def _fill(self, first: int, parts: Sequence[MicrobatchPart], microbatches: Microbatches) -> None:
        """Of these microbatches together. first: index of the first of them."""
        samples = sum(part.size for part in parts)
        shares = [part.size / samples for part in parts]
        found = [self._count(k, part, microbatches) for k, part in enumerate(parts, first)]
        for entry, (name, kind) in self._totals.items():
            if name not in found[0]:
                continue
            values = [values[name] * share if kind == "mean" else values[name]
                      for values, share in zip(found, shares, strict=True)]  # fmt: skip
            total = torch.stack(values).sum(0).to(values[0].dtype)
            for part in parts:
                part.tensors[entry] = total
        for part, share in zip(parts, shares, strict=True):
            part.tensors[SHARE] = torch.full((), share, dtype=self._dtypes.get(SHARE), device=microbatches.device)

    def _count(self, k: int, part: MicrobatchPart, microbatches: Microbatches) -> dict[str, torch.Tensor]:
        (variant,) = microbatches.variants(part, self._runners)
        entries = microbatches.inputs(part, [variant])
        return self._runners[0].forward(k, variant, entries, [], training=False)
