"""What trades time for memory inside a candidate: placements off the sharding frontier, and recomputation.

An option is a point of the frontier together with the distinct segments whose forward runs again in the backward.
Segments are taken in the order of bytes freed per second spent; of all options those stay that no other beats in
seconds, bytes kept for the backward and bytes of training state, fastest first.

Besides, an order of its own may be offered to let go of single activations: of one stage and one microbatch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...costmodel.stage_times import StageTimes
from ..interfaces import ShardingSolution
from ..stages.chain import Chain, Shape


@dataclass(frozen=True)
class Offers:
    """What an order may do with single activations. offload: to host memory."""

    recompute: bool = False
    offload: bool = False


def offering(
    offers: Offers,
    stages: Sequence[StageTimes],
    chain: Chain,
    bounds: Sequence[int],
    host_seconds: Callable[[float, int], float],
) -> list[StageTimes]:
    """The stages with what may be let go of. chain: of activations that are all kept.

    host_seconds: (bytes, stage) to the seconds of a copy between the stage's device and its host.

    Recomputation starts from the values that the stage received. Offloaded may be all that its instances save.
    """
    found = []
    for stage, times in enumerate(stages):
        start, stop = bounds[stage], bounds[stage + 1]
        received = chain.cut_forward_bytes[start] if stage else 0.0
        again = max(0, int(times.activation_bytes - received)) if offers.recompute else 0
        away = int(chain.activation_bytes[start:stop].sum()) if offers.offload else 0
        away_s = host_seconds(away, stage)
        found.append(replace(times, recompute_bytes=again, offload_bytes=away, offload_s=away_s))
    return found


@dataclass(frozen=True)
class MemoryOption:
    solution: ShardingSolution
    recompute: frozenset[str]
    recompute_all: bool = False


def memory_options(shape: Shape, solutions: Sequence[ShardingSolution], forced: str) -> list[MemoryOption]:
    """forced: 'all', 'none' or 'auto' recomputation. Never empty."""
    counts = Counter(shape.segments)
    listed = [option for solution in solutions for option in _of_solution(counts, solution, forced)]
    if len(solutions) == 1:
        return listed
    weighed = sorted((*_weigh(counts, option), option.solution.state_bytes, at) for at, option in enumerate(listed))
    found: list[tuple[float, float, int]] = []
    for _, kept, state, at in weighed:
        if not any(less <= kept and least <= state for less, least, _ in found):
            found.append((kept, state, at))
    return [listed[at] for _, _, at in found]


def _of_solution(counts: Counter[str], solution: ShardingSolution, forced: str) -> list[MemoryOption]:
    costs = {name: solution.costs[name] for name in counts}

    def freed_per_second(name: str) -> float:
        cost = costs[name]
        return (cost.saved_bytes - cost.recompute_saved_bytes) / max(cost.forward_s + cost.forward_comm_s, 1e-12)

    order = sorted(costs, key=freed_per_second, reverse=True)
    if forced == "all":
        return [MemoryOption(solution, frozenset(order), True)]
    if forced == "none":
        return [MemoryOption(solution, frozenset())]
    useful = [name for name in order if costs[name].saved_bytes > costs[name].recompute_saved_bytes]
    return [MemoryOption(solution, frozenset(useful[:k]), 0 < k == len(useful)) for k in range(len(useful) + 1)]


def _weigh(counts: Counter[str], option: MemoryOption) -> tuple[float, float]:
    """(seconds, bytes kept) of one microbatch through all instances."""
    seconds = kept = 0.0
    for name, count in counts.items():
        cost = option.solution.costs[name]
        again = name in option.recompute
        once = cost.forward_s + cost.forward_comm_s
        seconds += count * (once * (2 if again else 1) + cost.backward_s + cost.backward_comm_s)
        kept += count * (cost.recompute_saved_bytes if again else cost.saved_bytes)
    return seconds, kept
