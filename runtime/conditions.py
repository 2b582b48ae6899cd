"""What the captured graph takes for granted of a batch, seen to by all ranks together.

A model that asks its data a question in Python was traced along one answer (profiler/assumptions.py). Answers that hang
on the batch alone are computed by prologue segments, and looked at before anything runs: bad data then stops every rank
with the user's line before a lookup fails on one of them. Whether numbers are finite is noted as the forward goes, and
looked at once at its end, before the optimizer writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..profiler.assumptions import answered_otherwise, noted
from ..profiler.graph import ModelGraph


class Conditions:
    """of one graph. num_ranks: that run it; each calls every method, in the same order."""

    def __init__(self, graph: ModelGraph, device: torch.device, num_ranks: int) -> None:
        self._early, self._later = graph.conditions, graph.later_conditions
        self._device, self._alone = device, num_ranks == 1
        self._noted: list[tuple[torch.Tensor, str]] = []

    def look_at_batch(self, values: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """values: of the prologue, of each microbatch. Raises ShardwrightError, on every rank, where one on any rank
        does not hold."""
        lines = list(self._early.values())
        self._require(lines, [(of_one[name], line) for of_one in values for name, line in self._early.items()])

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Around the forwards of a step: no microbatch waits for an answer."""
        with noted() as entries:
            yield
        self._noted = entries

    def look_at_forward(self) -> None:
        """After noting(): as look_at_batch, for the questions that are asked of computed numbers."""
        entries, self._noted = self._noted, []
        self._require(self._later, [entry for entry in entries if entry[1] in self._later])

    def _require(self, lines: Sequence[str], entries: Sequence[tuple[torch.Tensor, str]]) -> None:
        if not lines:
            return
        failed = torch.zeros(len(lines), dtype=torch.int32, device=self._device)
        for holds, line in entries:
            failed[lines.index(line)] += ~holds.all()
        if not self._alone:
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        for line, count in zip(lines, failed.tolist(), strict=True):
            if count:
                raise answered_otherwise(line)
