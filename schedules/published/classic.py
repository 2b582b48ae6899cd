"""GPipe, 1F1B and interleaved 1F1B, for any number of microbatches, and the forward-only order of evaluation."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ...costmodel.actions import Action
from ..schedule import PipelineSchedule, loop_placement


def gpipe(num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> PipelineSchedule:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv:1811.06965).

    Bubble fraction (p-1)/(m+p-1) with one chunk; every rank holds all m microbatches. With several chunks on the looped
    placement this is the breadth-first order (Lamy-Poirier, arXiv:2211.05953).
    """
    p, m, v = num_ranks, num_microbatches, num_chunks
    placement = loop_placement(p, v)
    ranks = []
    for rank in range(p):
        stages = range(rank, p * v, p)
        forward = [Action("F", stage, i) for stage in stages for i in range(m)]
        backward = [Action("B", stage, i) for stage in reversed(stages) for i in range(m)]
        ranks.append(tuple(forward + backward))
    return PipelineSchedule("gpipe", m, placement, tuple(ranks))


def breadth_first(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> PipelineSchedule:
    """Each stage runs all microbatches before the next one does (Lamy-Poirier, arXiv:2211.05953, section 3).

    Bubble fraction (p-1)/(v m + p-1) where m is at least p; every rank holds all m microbatches, and ZeRO-3 gathers
    each stage's parameters once in each direction.
    """
    return replace(gpipe(num_ranks, num_microbatches, num_chunks), name="breadth_first")


def one_f_one_b(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """After p-r-1 warm-up forwards one forward, one backward in turn (PipeDream-Flush, arXiv:2006.09503).

    Bubble fraction (p-1)/(m+p-1); rank r holds min(m, p-r) microbatches.
    """
    p, m = num_ranks, num_microbatches
    ranks = [
        _alternate([Action("F", r, i) for i in range(m)], [Action("B", r, i) for i in range(m)], warm_up=p - r - 1)
        for r in range(p)
    ]
    return PipelineSchedule("1f1b", m, loop_placement(p, 1), tuple(ranks))


def _alternate(forward: list[Action], backward: list[Action], warm_up: int) -> tuple[Action, ...]:
    """warm_up forwards; then forward and backward in turn; then the backwards that are left."""
    warm_up = min(warm_up, len(forward))
    actions = forward[:warm_up]
    for index, action in enumerate(backward):
        if warm_up + index < len(forward):
            actions.append(forward[warm_up + index])
        actions.append(action)
    return tuple(actions)


@lru_cache(maxsize=256)
def interleaved_1f1b(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> PipelineSchedule:
    """Rank r runs stages r, r+p, ... in rounds of microbatches (Narayanan et al., arXiv:2104.04473, section 2.2).

    With m a multiple of p and equal stages the bubble is (p-1)/v of a microbatch's forward and backward on one rank, a
    fraction (p-1)/(v m + p-1), and rank r holds min(v m, 2(p-r-1) + (v-1)p + 1) chunk activations.

    Any m: the m microbatches are dealt to max(1, m // p) rounds, sizes p or more and differing by at most one. A round
    of at least p keeps the order free of deadlock: backward j of the last rank needs backward j - round of rank 0,
    which needs forward warm_up(0) + j - 2 round of the last rank, and warm_up(0) - warm_up(p-1) = 2(p-1) < 2 round.
    Fewer than p microbatches make one round, where every warm-up is capped by the number of forwards.
    """
    p, m, v = num_ranks, num_microbatches, num_chunks
    if v == 1:
        plain = one_f_one_b(p, m)
        return PipelineSchedule("interleaved_1f1b", m, plain.stage_rank, plain.ranks)
    num_rounds = max(1, m // p)
    rounds = _deal(m, num_rounds)
    widest = max(len(part) for part in rounds)
    ranks = []
    for rank in range(p):
        forward = [Action("F", chunk * p + rank, i) for part in rounds for chunk in range(v) for i in part]
        backward = [Action("B", chunk * p + rank, i) for part in rounds for chunk in reversed(range(v)) for i in part]
        ranks.append(_alternate(forward, backward, warm_up=(v - 1) * widest + 2 * (p - rank - 1)))
    return PipelineSchedule("interleaved_1f1b", m, loop_placement(p, v), tuple(ranks))


def _deal(count: int, num_parts: int) -> list[range]:
    """range(count) in num_parts contiguous parts, the larger ones first."""
    size, larger = divmod(count, num_parts)
    parts, start = [], 0
    for index in range(num_parts):
        stop = start + size + (index < larger)
        parts.append(range(start, stop))
        start = stop
    return parts
