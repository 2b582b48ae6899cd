"""What of the training job, and of its step, weighs on placements: bytes of state, and gradients summed once a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ...costmodel.communication import bucket_bytes, most_bucket_bytes
from ...costmodel.memory import StateBytes
from ...costmodel.model import CostModel
from ...plans.axes import MeshShape, placement_axes, state_axes, tensor_axes
from ...profiler.graph import ModelGraph

MOST_BUCKETS = 4  # of the most bytes, in one collective: larger ones are no faster for a byte
SAMPLE_BYTES = 1 << 30  # of a copy


@dataclass(frozen=True)
class Job:
    """global_batch: sequences of a step; 0: one microbatch. zero: the highest ZeRO stage that may split state.
    prefer: "time"; "state", placements that split all weights but vectors, whatever they take; "memory", those of
    least training state, and then of least bytes kept. attention: its form where sequences are cut
    (ops/attention_rules.FORMS). experts: their form on an expert axis (ops/expert_rules.FORMS). sequence_parallel: may
    axes that carry heads and features divide what lies between the products that they cut, by tokens say?
    imbalances: ranks that hold experts, 0 for any number, with the work of the busiest over the mean."""

    kinds: StateBytes = field(default_factory=lambda: StateBytes(2, 4, 4, 2, False))
    global_batch: int = 0
    zero: int = 3
    prefer: str = "time"
    attention: str = "auto"
    experts: str = "auto"
    sequence_parallel: bool = True
    imbalances: tuple[tuple[int, float], ...] = ()

    def imbalance(self, ranks: int, otherwise: float) -> float:
        """Of so many ranks that hold experts: as is known of them, or of the next fewer."""
        known = [factor for of_ranks, factor in sorted(self.imbalances) if of_ranks <= ranks]
        return known[-1] if known else otherwise

    def num_microbatches(self, batch_ranks: int, local_batch: int) -> int:
        return max(1, self.global_batch // (batch_ranks * local_batch))

    def state_of(self, elements: float, num_bytes: float, is_trained: bool) -> float:
        return elements * self.kinds.of_trained if is_trained else num_bytes

    def state_left(self, state_ranks: int) -> float:
        """Share of kinds.of_trained that a rank keeps under `zero`."""
        kinds = self.kinds
        split = [0, kinds.of_master, kinds.reduce, kinds.compute][: self.zero + 1]
        return 1.0 - sum(split) / kinds.of_trained * (1.0 - 1.0 / state_ranks)


class Sums:
    """Seconds of what comes once a step: the all-reduce of gradients over data and tensor ranks, as parts of large
    collectives, and the memory traffic of the update."""

    def __init__(self, graph: ModelGraph, cost_model: CostModel, kinds: StateBytes, mesh: MeshShape) -> None:
        """mesh: of one stage."""
        cluster = cost_model.cluster
        self.axes = placement_axes(mesh)
        mesh = mesh.within(cluster.num_devices)
        self.kinds, self.state_ranks = kinds, mesh.state_ranks
        self.byte_s = cost_model.op_seconds("copy_", 0.0, SAMPLE_BYTES, torch.float32) / SAMPLE_BYTES
        self.hides = cluster.is_accelerated
        held = [sum(math.prod(shape) for shape in segment.param_shapes) for segment in graph.segments.values()]
        total = sum(math.prod(graph.params[name][0]) for name in graph.params)
        most = MOST_BUCKETS * most_bucket_bytes()
        bucket = bucket_bytes(total * kinds.reduce / mesh.pipeline_ranks)
        together = max(bucket, min(max(held, default=0) * kinds.reduce, most))

        def per_element(axes: tuple[str, ...]) -> float:
            if mesh.size_of(axes) == 1:
                return 0.0
            seconds = cost_model.state_collective_seconds(
                "all_reduce", together, cluster.axis_links(mesh.factors, axes)
            )
            return seconds / together * kinds.reduce

        self._rate = lru_cache(None)(per_element)
        self.over_data_s = per_element(state_axes())
        self.over_both_s = per_element((*state_axes(), *tensor_axes()))

    def seconds(self, over: tuple[bool, ...], elements: float) -> float:
        """over: which of the mesh's placement axes sum."""
        axes = tuple(name for name, sums in zip(self.axes, over, strict=True) if sums)
        return self._rate(axes) * elements if axes else 0.0

    def of(self, trained: float, summed: float) -> float:
        """Of a rank's trained elements, `summed` of them partial over axes that cut parameters."""
        return self.over_data_s * (trained - summed) + self.over_both_s * summed

    def update_s(self, num_microbatches: int, zero: int) -> float:
        """Of a trained element: the optimizer's step, and the accumulation of every microbatch."""
        parts = self.state_ranks if zero else 1
        accumulated = num_microbatches if self.state_ranks > 1 or num_microbatches > 1 else 0
        moved = self.kinds.moved_by_update / parts + accumulated * self.kinds.moved_by_accumulation
        return moved * self.byte_s

    def exposed_s(self, trained: float, summed: float, backward_s: float) -> float:
        """What of it the step's last backward cannot hide."""
        return max(0.0, self.of(trained, summed) - (backward_s if self.hides else 0.0))
