"""PipelineProblem: what a schedule is made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..costmodel.stage_times import Hop, StageTimes


@dataclass(frozen=True)
class PipelineProblem:
    """One direction. stages: seconds and activation bytes of each virtual stage; hops: transfers between neighbours.

    memory_limit: most activation bytes on each rank, infinite where there is none. A transfer takes its occupancy and
    its latency, on links that never make it wait.
    """

    num_microbatches: int
    stage_rank: tuple[int, ...]
    stages: tuple[StageTimes, ...]
    hops: tuple[Hop, ...]
    memory_limit: tuple[float, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.memory_limit)

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def offers(self) -> bool:
        """May activations be let go and brought back?"""
        return any(stage.recompute_bytes or stage.offload_bytes for stage in self.stages)

    def keeping_all(self, memory_share: float = 1.0) -> PipelineProblem:
        """The same with no such offer. memory_share: of the limits, to search with."""
        stages = tuple(replace(stage, recompute_bytes=0, offload_bytes=0) for stage in self.stages)
        return replace(self, stages=stages, memory_limit=tuple(memory_share * limit for limit in self.memory_limit))

    @property
    def num_actions(self) -> int:
        return 3 * self.num_stages * self.num_microbatches

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, place in enumerate(self.stage_rank) if place == rank]

    def forward_hop_s(self, stage: int) -> float:
        """From stage to stage+1; 0 on one rank."""
        if self.stage_rank[stage] == self.stage_rank[stage + 1]:
            return 0.0
        return self.hops[stage].forward_latency_s + self.hops[stage].forward_occupancy_s

    def backward_hop_s(self, stage: int) -> float:
        """From stage to stage-1; 0 on one rank."""
        if self.stage_rank[stage] == self.stage_rank[stage - 1]:
            return 0.0
        return self.hops[stage - 1].backward_latency_s + self.hops[stage - 1].backward_occupancy_s

    @property
    def work_s(self) -> list[float]:
        """Seconds of one microbatch on each rank."""
        work = [0.0] * self.num_ranks
        for stage, rank in enumerate(self.stage_rank):
            work[rank] += self.stages[stage].forward_s + self.stages[stage].backward_s
        return work


def problem_of_shares(
    num_microbatches: int,
    stage_rank: Sequence[int],
    times: tuple[float, float, float],
    transfer_s: float = 0.0,
    *,
    stage_extra: tuple[float, float] = (0.0, 0.0),
    memory_limit: float = float("inf"),
    recompute: bool = False,
    offload_s: float | None = None,
) -> PipelineProblem:
    """times: F, I, W of one rank's share of the model; each of its v chunks takes 1/v of it and holds 1/v of a
    microbatch's activations. stage_extra: shares that the first and the last virtual stage carry besides.
    memory_limit: microbatches. recompute: any activations may be recomputed, then nothing of them is kept. offload_s:
    they may go to host memory; a rank's share takes so long each way.
    """
    num_stages, num_ranks = len(stage_rank), max(stage_rank) + 1
    chunks = num_stages // num_ranks
    shares = [1.0 / chunks] * num_stages
    shares[0] += stage_extra[0]
    shares[-1] += stage_extra[1]
    forward_s, input_s, weight_s = times
    stages = tuple(
        StageTimes(
            forward_s * share,
            input_s * share,
            weight_s * share,
            activation_bytes=1,
            recompute_bytes=int(recompute),
            offload_bytes=int(offload_s is not None),
            offload_s=(offload_s or 0.0) / chunks,
        )
        for share in shares
    )
    return PipelineProblem(
        num_microbatches,
        tuple(stage_rank),
        stages,
        (Hop.latency(transfer_s),) * (num_stages - 1),
        (memory_limit * chunks + 1e-6,) * num_ranks,
    )
