"""What the simulator is told of virtual stages, of the transfers between them and of what follows the last action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageTimes:
    """What one virtual stage costs on one rank for one microbatch. Seconds and bytes.

    The three durations include the collectives inside the stage, those of ZeRO among them; forward_comm_s and
    backward_comm_s say how much of them that is (for the account of exposed communication). Recomputation that is not
    an action of its own is in backward_input_s.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    forward_comm_s: float = 0.0
    backward_comm_s: float = 0.0
    activation_bytes: int = 0  # start of F to end of B or W
    recompute_bytes: int = 0  # share of them that an R computes again; 0: no R is offered
    offload_bytes: int = 0  # share of them that host memory can take; 0: none is offered
    offload_s: float = 0.0  # of the copy there, and of the copy back
    reduce_s: float = 0.0  # gradients reduced once, after the stage's last backward

    @property
    def backward_s(self) -> float:
        return self.backward_input_s + self.backward_weight_s


@dataclass(frozen=True)
class Hop:
    """The transfer between virtual stages s and s+1: activations forward, gradients backward. Seconds.

    A link is busy for the occupancy; the value arrives occupancy + latency after its producer ended.
    """

    forward_latency_s: float = 0.0
    forward_occupancy_s: float = 0.0
    backward_latency_s: float = 0.0
    backward_occupancy_s: float = 0.0

    @classmethod
    def latency(cls, seconds: float) -> Hop:
        return cls(seconds, 0.0, seconds, 0.0)


NO_HOP = Hop()


@dataclass(frozen=True)
class Tail:
    """What a rank does after its last action and reduction. Seconds."""

    optimizer_s: float = 0.0
    gather_s: float = 0.0  # parameters gathered after the step (ZeRO-1 and 2)


@dataclass(frozen=True)
class StepTimes:
    """All that takes time in a step.

    hops: the transfer after each virtual stage but the last, or one for all. tails: what each rank does at the end;
    where tails_wait, it begins when every rank is done (clipping by global norm).
    """

    stages: Sequence[StageTimes]
    hops: Sequence[Hop] | Hop = NO_HOP
    tails: Sequence[Tail] = ()
    tails_wait: bool = False

    @property
    def hop_list(self) -> list[Hop]:
        needed = len(self.stages) - 1
        hops = [self.hops] * needed if isinstance(self.hops, Hop) else list(self.hops)
        assert len(hops) >= needed, f"{len(self.stages)} stages need {needed} hops, got {len(hops)}"
        return hops
