"""V-Min, V-Half and ZB-V: one building block a microbatch, repeated every 6 units (Qi et al., arXiv:2405.15362,
section 3).

Two chunks on a rank, down the ranks and up again; a unit is a chunk's F, I or W. The block is given by the units from
rank to rank of its four passes: first chunk's forwards down, second chunk's forwards up, its input gradients down,
first chunk's up. What they leave of the 6 units of a rank takes the weight gradients. Pauses at the three turns are
those that keep the four passes apart on every rank with least memory, then least length, found by trying.

                units between ranks    activations, microbatches of one rank's share
    V-Min       1, 1, 1, 1             about p/3
    V-Half      1, 3, 1, 3             about p/2
    ZB-V        1, 2, 4, 2             p, no bubble where F = I = W but the last rank's wait for its first input

Blocks overlap freely in steady state; in warm-up and cool-down list scheduling closes the gaps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from ...costmodel.actions import Action
from ...costmodel.stage_times import Hop, StageTimes
from ..graph import OrderGraph
from ..problem import PipelineProblem
from ..schedule import PipelineSchedule, v_placement

PERIOD = 6
WEIGHT_DELAYS = (0, 2, 6, 12, 10**6)  # the last: only where nothing else is ready
STEPS = {"v_min": (1, 1, 1, 1), "v_half": (1, 3, 1, 3), "zb_v": (1, 2, 4, 2)}


@dataclass(frozen=True)
class VBlock:
    """Start, in units, of each stage's F, I and W of microbatch 0; most chunk activations on a rank at once."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    weight: tuple[int, ...]
    peak: int


@lru_cache(maxsize=128)
def v_block(name: str, num_ranks: int) -> VBlock:
    found = [block for pauses in itertools.product(range(1, PERIOD + 1), repeat=3)
             if (block := _lay_out(num_ranks, STEPS[name], pauses)) is not None]  # fmt: skip
    return min(found, key=lambda block: (block.peak, block.backward[0]))


def _lay_out(p: int, steps: tuple[int, ...], pauses: tuple[int, ...]) -> VBlock | None:
    """None where two passes meet on a rank."""
    down = [steps[0] * r for r in range(p)]
    up = [down[-1] + pauses[0] + steps[1] * (p - 1 - r) for r in range(p)]
    back_down = [up[0] + pauses[1] + steps[2] * r for r in range(p)]
    back_up = [back_down[-1] + pauses[2] + steps[3] * (p - 1 - r) for r in range(p)]
    weight_first, weight_second, peak = [0] * p, [0] * p, 0
    for r in range(p):
        taken = {start[r] % PERIOD for start in (down, up, back_down, back_up)}
        if len(taken) < 4:
            return None
        free = [unit for unit in range(PERIOD) if unit not in taken]
        options = []
        for second, first in (free, free[::-1]):
            w_second = back_down[r] + 1 + (second - back_down[r] - 1) % PERIOD
            w_first = back_up[r] + 1 + (first - back_up[r] - 1) % PERIOD
            alive = [0] * PERIOD  # activations alive in each unit of the period, once blocks overlap
            for start, end in ((down[r], w_first), (up[r], w_second)):
                for unit in range(start, end + 1):
                    alive[unit % PERIOD] += 1
            options.append((max(alive), w_first, w_second))
        most, weight_first[r], weight_second[r] = min(options)
        peak = max(peak, most)
    return VBlock(
        (*down, *reversed(up)), (*back_up, *reversed(back_down)), (*weight_first, *reversed(weight_second)), peak
    )


def chunks_in_turn(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """ZB-V in phases: forwards of the first chunk fill the rank, the second chunk's start to drain it, then each chunk
    takes F, I, W in turn; at the end weight gradients stand back behind what other ranks wait for.

    No microbatch of a rank waits for its neighbour's of the same turn, so transfers hide better than under the block.
    """
    p, m = num_ranks, max(num_microbatches, 2 * num_ranks - 1)
    ranks = []
    for r in range(p):
        turns = "F0 " * (2 * (p - r) - 1) + "F1 F0 " * r + "F1 I1 W1 " * (p - r)
        first, second = turns.count("F0"), turns.count("F1")
        turns += "F0 I0 W0 F1 I1 W1 " * (m - first) + "I0 W0 F1 I1 W1 " * (first - second)
        turns += "I0 I1 " * r + "I0 W0 " * (p - r)
        turns += "W1 " * (m - turns.count("W1")) + "W0 " * (m - turns.count("W0"))
        taken: Counter[str] = Counter()
        row = []
        for turn in turns.split():
            stage = r if turn[1] == "0" else 2 * p - 1 - r
            if taken[turn] < num_microbatches:
                row.append(Action(turn[0], stage, taken[turn]))
            taken[turn] += 1
        ranks.append(tuple(row))
    return PipelineSchedule("zb_v", num_microbatches, v_placement(p), tuple(ranks))


@lru_cache(maxsize=128)
def v_schedule(name: str, num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """name: v_min, v_half or zb_v. The shortest, with F = I = W, of the repeated block, of lists by its times and, for
    ZB-V, of the order in phases, which is taken where it is as short."""
    p, m = num_ranks, num_microbatches
    block = v_block(name, p)
    problem = PipelineProblem(
        m,
        v_placement(p),
        (StageTimes(1.0, 1.0, 1.0, activation_bytes=1),) * (2 * p),
        (Hop(),) * (2 * p - 1),
        (float(max(2, block.peak)),) * p,
    )
    graph = OrderGraph(problem)
    best = graph.by_starts(graph.periodic((block.forward, block.backward, block.weight), PERIOD))
    makespan_s = graph.makespan_s(best)
    for delay in WEIGHT_DELAYS:
        for lead in (0, 10**6):
            backward, weight = [at - lead for at in block.backward], [at + delay for at in block.weight]
            targets = graph.periodic((block.forward, backward, weight), PERIOD)
            listed = graph.listed(targets, give_up_s=makespan_s)
            if listed is not None and listed[1] < makespan_s - 1e-9:
                best, makespan_s = listed
    schedule = PipelineSchedule(name, m, problem.stage_rank, tuple(map(tuple, graph.actions(best))))
    if name == "zb_v":
        phased = chunks_in_turn(p, m)
        if phased.simulate(problem.stages, with_memory=False).makespan_s <= makespan_s + 1e-9:
            return phased
    return schedule
