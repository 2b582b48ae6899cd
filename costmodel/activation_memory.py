"""Memory of a rank, along its list of actions.

A stage's activation bytes are taken at the start of F and given back at the end of B or W. What an R computes again is
not held before it, what was offloaded not between O and L.
"""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Action
from .stage_times import StageTimes


def change(kind: str, stage: StageTimes, recomputed: bool) -> int:
    """Bytes taken, or given back where negative, of an activation that is let go as its actions say."""
    if kind == "F":
        return stage.activation_bytes - (stage.recompute_bytes if recomputed else 0)
    if kind == "R":
        return stage.recompute_bytes
    if kind == "I":
        return 0
    if kind == "B" or kind == "W":
        return -stage.activation_bytes
    return stage.offload_bytes if kind == "L" else -stage.offload_bytes


def peak_memory(ranks: Sequence[Sequence[Action]], stages: Sequence[StageTimes]) -> tuple[list[int], list[int]]:
    """(peak bytes, most activations held at once) of each rank. Needs the order alone, not the times."""
    peaks, in_flight = [], []
    offers = any(stage.recompute_bytes for stage in stages)
    for actions in ranks:
        held = peak = count = most = 0
        again = {(stage, k) for kind, stage, k in actions if kind == "R"} if offers else set()
        for kind, stage, microbatch in actions:
            held += change(kind, stages[stage], (stage, microbatch) in again)
            if held > peak:
                peak = held
            if kind == "F":
                count += 1
                most = max(most, count)
            elif kind in "BW":
                count -= 1
        peaks.append(peak)
        in_flight.append(most)
    return peaks, in_flight


def peak_host_memory(ranks: Sequence[Sequence[Action]], stages: Sequence[StageTimes]) -> list[int]:
    """Bytes of each rank: what is offloaded is there from the end of its forward to its backward."""
    peaks = []
    for actions in ranks:
        away = {(stage, microbatch) for kind, stage, microbatch in actions if kind == "O"}
        held = peak = 0
        for kind, stage, microbatch in actions:
            if (stage, microbatch) in away and kind in "FIB":
                held += stages[stage].offload_bytes * (1 if kind == "F" else -1)
                peak = max(peak, held)
        peaks.append(peak)
    return peaks
