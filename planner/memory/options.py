"""What trades time for memory inside a candidate: placements off the sharding frontier, and recomputation.

An option is a point of the sharding frontier together with a point of the recompute frontier of each distinct segment:
which of its results the backward makes again. Steps along these are taken in the order of bytes freed per second spent,
which is the hull of all choices together; of all options those stay that no other beats in
seconds, bytes kept for the backward and bytes of training state, fastest first.

Besides, an order of its own may be offered to let go of single activations: of one stage and one microbatch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...costmodel.segment import SegmentCost
from ...costmodel.stage_times import StageTimes
from ..interfaces import ShardingSolution
from ..stages.chain import NOTHING, Chain, Recompute, Shape, chosen_points, whole_segments

LEAST_STEP = 0.04  # of all bytes that recomputation can free: options nearer to each other are one


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
    """recompute_all: every segment's whole forward that may be of use runs again."""

    solution: ShardingSolution
    recompute: Recompute
    recompute_all: bool = False


def memory_options(shape: Shape, solutions: Sequence[ShardingSolution], forced: str) -> list[MemoryOption]:
    """forced: 'all', 'none', 'selective' or 'auto' recomputation. Never empty."""
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
    if forced == "all":
        return [MemoryOption(solution, whole_segments(solution, counts), True)]
    if forced == "none":
        return [MemoryOption(solution, NOTHING)]
    steps = sorted(
        (step for name in counts for step in _steps(name, solution.costs[name])),
        key=lambda step: step.freed_per_s,
        reverse=True,
    )
    all_bytes = sum(counts[step.segment] * step.freed_bytes for step in steps)
    if forced == "selective":
        *_, half = _prefixes(counts, steps, 0.0, 0.5 * all_bytes)
        return [MemoryOption(solution, half)]
    last = {step.segment: step.level for step in steps}  # the most that frees anything
    found = [MemoryOption(solution, NOTHING)]
    for taken in _prefixes(counts, steps, LEAST_STEP * all_bytes, all_bytes):
        found.append(MemoryOption(solution, taken, taken >= last.items()))
    return found


def _prefixes(counts: Counter[str], steps: Sequence[_Step], least: float, most: float) -> Iterator[Recompute]:
    """What is recomputed after so many of the steps, where at least so many bytes were freed since the last time,
    until most are freed; and at the end."""
    taken, freed, freed_before = NOTHING, 0, 0
    for step in steps:
        if freed >= most:
            break
        taken |= {(step.segment, step.level)}
        freed += counts[step.segment] * step.freed_bytes
        if freed - freed_before >= least and step is not steps[-1] and freed < most:
            yield taken
            freed_before = freed
    yield taken


class _Step(NamedTuple):
    """From one recompute point of a segment to the next, in one instance."""

    segment: str
    level: int
    freed_bytes: int
    freed_per_s: float


def _steps(name: str, cost: SegmentCost) -> Iterator[_Step]:
    """As long as they free ever less a second."""
    seconds, num_bytes, most = 0.0, cost.saved_bytes, math.inf
    for level, point in enumerate(cost.recompute_points):
        freed_bytes = num_bytes - point.saved_bytes
        freed_per_s = freed_bytes / max(point.seconds - seconds, 1e-12)
        if 0 < freed_per_s <= most:
            yield _Step(name, level, freed_bytes, freed_per_s)
            seconds, num_bytes, most = point.seconds, point.saved_bytes, freed_per_s


def _weigh(counts: Counter[str], option: MemoryOption) -> tuple[float, float]:
    """(seconds, bytes kept) of one microbatch through all instances."""
    points = chosen_points(option.solution, option.recompute)
    seconds = kept = 0.0
    for name, count in counts.items():
        cost, point = option.solution.costs[name], points.get(name)
        once = cost.forward_s + cost.forward_comm_s + cost.backward_s + cost.backward_comm_s
        seconds += count * (once + (point.seconds if point else 0.0))
        kept += count * (point.saved_bytes if point else cost.saved_bytes)
    return seconds, kept
