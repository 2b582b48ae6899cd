"""What trades time for memory inside a candidate: placements off the sharding frontier, and recomputation.

Each point of the sharding frontier has a ladder of what the backward makes again. Its rungs are points of the recompute
frontier of each distinct segment: steps along these are taken in the order of bytes freed per second spent, which is
the hull of all choices together; but last those that free nothing before it is needed again, at the chain's end. Each
stage then stands on the lowest rung on which it fits (stage_recompute.py).

Besides, an order of its own may be offered to let go of single activations: of one stage and one microbatch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ...costmodel.segment import RecomputePoint, SegmentCost
from ...costmodel.stage_times import StageTimes
from ..interfaces import ShardingSolution
from ..stages.chain import NOTHING, Chain, Recompute, Shape, everywhere, levels_of, points_of, whole_segments

MAX_RUNGS = 12  # of a ladder whose every step is a rung
ROUNDING = 1.0 + 1e-4  # bytes and seconds of steps on one edge of a hull
DEARER = 3.0  # a step whose bytes cost so much more seconds than those before: a rung stands before it
LEAST_STEP = 0.04  # of all bytes that recomputation can free: rungs of longer ladders are no nearer to each other


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


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Ladder:
    """Of the same placements ever more recomputation: each rung takes longer and keeps less than the one before.

    A stage stands on a rung, or between two: where the upper one recomputes more of one segment alone, some of the
    stage's positions may do so and the others not. ends_in_all: no more than the last rung recomputes would be of use.
    is_free: positions may do otherwise than any rung (fewest.py).
    """

    shape: Shape
    solution: ShardingSolution
    rungs: tuple[Recompute, ...]
    ends_in_all: bool
    is_free: bool = False

    @cached_property
    def risers(self) -> tuple[np.ndarray, ...]:
        """[position] -> does it recompute more on the rung than on the one before? Of the first rung: nowhere."""
        levels = [np.array(levels_of(self.shape, rung)) for rung in self.rungs]
        return tuple(levels[k] != levels[max(k - 1, 0)] for k in range(len(levels)))

    @cached_property
    def is_divided(self) -> tuple[bool, ...]:
        """Of each rung: may only some positions of a stage rise to it?"""
        rising = (zip(self.shape.segments, rises, strict=True) for rises in self.risers)
        return tuple(len({name for name, rises in pairs if rises}) == 1 for pairs in rising)

    @cached_property
    def every_step(self) -> Ladder:
        """With each step along each segment's points as a rung, in the order of bytes freed per second, none of them
        late: no choice of all positions frees as much for less, so that bounds are computed from it."""
        if not self.is_free:
            return self
        taken: dict[str, int] = {}
        rungs = [NOTHING]
        for step in sorted(_all_steps(self.shape, self.solution), key=lambda step: -step.freed_per_s):
            taken = taken | {step.segment: step.level}
            rungs.append(everywhere(self.shape, taken))
        return replace(self, rungs=tuple(rungs))

    def is_all(self, recompute: Recompute) -> bool:
        return self.ends_in_all and recompute == self.rungs[-1]


def ladders(shape: Shape, solutions: Sequence[ShardingSolution], forced: str) -> list[Ladder]:
    """forced: 'all', 'none', 'selective' or 'auto' recomputation. Of all rungs those that no other beats in seconds,
    bytes kept for the backward and bytes of training state; those with the fastest first. Never empty."""
    found = [_of_solution(shape, solution, forced) for solution in solutions]
    if len(found) == 1:
        return found
    weighed = sorted(
        (*_weigh(shape, ladder.solution, rung), ladder.solution.state_bytes, at, height)
        for at, ladder in enumerate(found)
        for height, rung in enumerate(ladder.rungs)
    )
    left: list[tuple[float, float, int, int]] = []
    for _, kept, state, at, height in weighed:
        if not any(less <= kept and least <= state for less, least, _, _ in left):
            left.append((kept, state, at, height))
    heights: dict[int, list[int]] = {}
    for _, _, at, height in left:
        heights.setdefault(at, []).append(height)
    return [_of_rungs(found[at], sorted(rungs)) for at, rungs in heights.items()]


def _of_rungs(ladder: Ladder, heights: Sequence[int]) -> Ladder:
    whole = ladder.ends_in_all and heights[-1] == len(ladder.rungs) - 1
    return replace(ladder, rungs=tuple(ladder.rungs[k] for k in heights), ends_in_all=whole)


def _of_solution(shape: Shape, solution: ShardingSolution, forced: str) -> Ladder:
    if forced == "all":
        return Ladder(shape, solution, (whole_segments(shape, solution),), True)
    if forced == "none":
        return Ladder(shape, solution, (NOTHING,), False)
    counts = Counter(shape.segments)
    steps = sorted(
        _all_steps(shape, solution),
        key=lambda step: (step.is_late and forced != "selective", -step.freed_per_s),
    )
    all_bytes = sum(counts[step.segment] * step.freed_bytes for step in steps)
    if forced == "selective":
        *_, half = _prefixes(counts, steps, 0.0, 0.5 * all_bytes)
        return Ladder(shape, solution, (everywhere(shape, half),), False)
    least = LEAST_STEP * all_bytes if len(steps) > MAX_RUNGS else 0.0
    rungs = [everywhere(shape, taken) for taken in _prefixes(counts, steps, least, all_bytes)]
    rungs = [rung for rung in rungs if rung != NOTHING]
    return Ladder(shape, solution, (NOTHING, *rungs), bool(rungs), is_free=True)


def _all_steps(shape: Shape, solution: ShardingSolution) -> Iterator[_Step]:
    counts = Counter(shape.segments)
    for name in counts:
        yield from _steps(name, solution.costs[name], is_last=counts[name] == 1 and name == shape.segments[-1])


def _prefixes(counts: Counter[str], steps: Sequence[_Step], least: float, most: float) -> Iterator[dict[str, int]]:
    """Levels of each distinct segment after so many of the steps, where at least so many bytes were freed since the
    last time or where freeing more becomes much dearer, until most are freed; and at the end."""
    taken: dict[str, int] = {}
    freed = freed_before = 0
    for step, then in zip(steps, [*steps[1:], None], strict=False):
        if freed >= most:
            break
        taken = taken | {step.segment: step.level}
        freed += counts[step.segment] * step.freed_bytes
        is_corner = then is not None and then.freed_per_s * DEARER < step.freed_per_s
        if (freed - freed_before >= least or is_corner) and then is not None and freed < most:
            yield taken
            freed_before = freed
    yield taken


class _Step(NamedTuple):
    """From one recompute point of a segment to the next, in one instance. is_late: after all steps that are not."""

    segment: str
    level: int
    freed_bytes: int
    freed_per_s: float
    is_late: bool


def _steps(name: str, cost: SegmentCost, *, is_last: bool) -> Iterator[_Step]:
    """As long as they free ever less a second. is_last: of the chain, so that its backward comes right after its
    forward: what it makes again there is of use to other microbatches alone, if any are in flight."""
    seconds, num_bytes, most = 0.0, cost.saved_bytes, math.inf
    is_late, at_once = False, _at_once(cost, None)
    for level, point in enumerate(cost.recompute_points):
        freed_bytes = num_bytes - point.saved_bytes
        freed_per_s = freed_bytes / max(point.seconds - seconds, 1e-12)
        if 0 < freed_per_s <= most * ROUNDING:
            most = min(freed_per_s, most)  # so that sorting leaves levels in their order
            is_late = is_late or (is_last and _at_once(cost, point) >= at_once)
            at_once = min(at_once, _at_once(cost, point))
            yield _Step(name, level, freed_bytes, most, is_late)
            seconds, num_bytes = point.seconds, point.saved_bytes


def _at_once(cost: SegmentCost, point: RecomputePoint | None) -> int:
    """What the segment holds in its forward, or in a backward that comes right after it."""
    held = cost.held_at(point)
    return (cost.saved_bytes if point is None else point.saved_bytes) + max(held.forward, held.backward)


def again_seconds(shape: Shape, solution: ShardingSolution, recompute: Recompute) -> float:
    """Of one microbatch through all instances, what is made again."""
    return sum(point.seconds for point in points_of(shape, solution, recompute) if point is not None)


def _weigh(shape: Shape, solution: ShardingSolution, recompute: Recompute) -> tuple[float, float]:
    """(seconds, bytes kept) of one microbatch through all instances."""
    costs = [solution.costs[name] for name in shape.segments]
    once = sum(c.forward_s + c.forward_comm_s + c.backward_s + c.backward_comm_s for c in costs)
    points = points_of(shape, solution, recompute)
    kept = sum(c.saved_bytes if p is None else p.saved_bytes for c, p in zip(costs, points, strict=True))
    return once + again_seconds(shape, solution, recompute), kept
