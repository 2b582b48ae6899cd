"""Stages and memory policy of a plan for another capture of its model, whose segments may be cut otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .plans.document import MemoryPolicy, Stage
from .profiler.graph import ModelGraph
from .runtime.evaluation import follow_stages
from .runtime.wiring import prologue_needed


def _same_cut(graph: ModelGraph, other: ModelGraph) -> bool:
    return [i.params for i in graph.instances] == [i.params for i in other.instances]


def moved_stages(graph: ModelGraph, stages: Sequence[Stage], other: ModelGraph) -> list[Stage]:
    """Each instance of other where the parameters are that it reads; prologue instances where their results are."""
    if _same_cut(graph, other):
        return list(stages)
    rows = follow_stages(graph, [stage.segments for stage in stages], other)
    by_index = {inst.index: inst for inst in other.instances}
    parts = {f"input:{entry}": part for entry, (part, _) in other.totals.items()}
    found = []
    for row in rows:
        read = [name for index in row for name in by_index[index].inputs]
        found.append(sorted({*row, *prologue_needed(other, [parts.get(name, name) for name in read])}))
    lost = set(by_index) - {index for row in found for index in row}
    found[0] = sorted({*found[0], *lost})  # what nobody reads
    return [stage.model_copy(update={"segments": row}) for stage, row in zip(stages, found, strict=True)]


def moved_policy(graph: ModelGraph, policy: MemoryPolicy, other: ModelGraph) -> MemoryPolicy:
    if not policy.recompute:
        return policy
    if _same_cut(graph, other):
        pairs = zip(graph.instances, other.instances, strict=True)
        chosen = {new.segment: policy.recompute.get(old.segment, "none") for old, new in pairs}
        return policy.model_copy(update={"recompute": chosen})  # instances have the same indices
    made = {*policy.recompute.values(), *policy.instances.values()}
    every: Literal["none", "all"] = "none" if made <= {"none"} else "all"
    return MemoryPolicy(recompute=dict.fromkeys(other.segments, every))
