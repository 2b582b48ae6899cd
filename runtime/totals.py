"""Numbers of the whole batch that its loss is divided by, as the count of tokens that are not ignored.

They depend on the batch alone (profiler/global_loss.py). Before the first forward of a step every rank whose stages
read one runs, for each microbatch, the prologue instances that compute its part; the sum goes to all microbatches as an
input. No rank waits for another pipeline stage. What the model asks of its batch (conditions.py) is computed with them.
Where the loss is that of each microbatch (loss_over "each"), every microbatch is given its own part, as the model by
itself would divide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..profiler.global_loss import SHARE
from ..profiler.graph import ModelGraph
from .batch import MicrobatchPart
from .conditions import Conditions
from .microbatches import Microbatches
from .stage import StageRunner
from .wiring import USER_INPUT, StageWiring, Wiring, prologue_needed


def counting_stage(graph: ModelGraph, wiring: Wiring, rank: int) -> StageWiring | None:
    """The prologue instances that compute the totals which this pipeline coordinate reads, and what must hold of the
    batch, on every one; None where there is nothing to compute."""
    by_index = {inst.index: inst for inst in graph.instances}
    read = {name for stage in wiring.stages_of(rank) for i in stage.instances for name in by_index[i].inputs}
    names = [value for entry, (value, _) in graph.totals.items() if USER_INPUT + entry in read]
    names += graph.conditions
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
        conditions: Conditions,
        *,
        of_each: bool = False,
    ) -> None:
        self._of_each, self._conditions = of_each, conditions
        self._totals = graph.totals
        self._dtypes = {entry: graph.values[USER_INPUT + entry].dtype for entry in self._entries(graph)}
        self._stage = stage
        self._runners = [make(stage)] if stage is not None else []

    @staticmethod
    def _entries(graph: ModelGraph) -> list[str]:
        names = [value.removeprefix(USER_INPUT) for value in graph.input_names]
        return [name for name in names if name in graph.totals or name == SHARE]

    def fill(self, parts: Sequence[MicrobatchPart], microbatches: Microbatches) -> None:
        """Give each microbatch the totals of all, and its share of the samples. Raises ShardwrightError, on all ranks,
        where the batch is not as the graph assumes."""
        if self._stage is None:
            return
        found = [self._count(k, part, microbatches) for k, part in enumerate(parts)]
        self._conditions.look_at_batch(found)
        if self._of_each:
            for part, values in zip(parts, found, strict=True):
                self._fill([part], [values], microbatches.device)
        else:
            self._fill(parts, found, microbatches.device)

    def _fill(
        self, parts: Sequence[MicrobatchPart], found: Sequence[Mapping[str, torch.Tensor]], device: torch.device
    ) -> None:
        """Of these microbatches together. found: the values of each."""
        samples = sum(part.size for part in parts)
        shares = [part.size / samples for part in parts]
        for entry, (name, kind) in self._totals.items():
            if name not in found[0]:
                continue
            values = [values[name] * share if kind == "mean" else values[name]
                      for values, share in zip(found, shares, strict=True)]  # fmt: skip
            total = torch.stack(values).sum(0).to(values[0].dtype)
            for part in parts:
                part.tensors[entry] = total
        for part, share in zip(parts, shares, strict=True):
            part.tensors[SHARE] = torch.full((), share, dtype=self._dtypes.get(SHARE), device=device)

    def _count(self, k: int, part: MicrobatchPart, microbatches: Microbatches) -> dict[str, torch.Tensor]:
        (variant,) = microbatches.variants(part, self._runners)
        entries = microbatches.inputs(part, [variant])
        return self._runners[0].forward(k, variant, entries, [], training=False)
