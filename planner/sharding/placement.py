"""Placements on mesh axes, and the collectives that lead from one to another.

A placement is a small integer, so that tables over it are quick: R (whole on every rank), P (a partial sum on each
rank), or d >= 0 (split on tensor dimension d). They are DTensor's Replicate, Partial("sum") and Shard(d); uneven
shards follow DTensor's rule, which is that of torch.chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

R, P = -1, -2
INFINITE = float("inf")


def to_text(place: int) -> str:
    return {R: "R", P: "P"}.get(place, f"S({place})")


def from_text(text: str) -> int:
    if text in ("R", "P"):
        return R if text == "R" else P
    return int(text[2:-1])


def shard_size(size: int, parts: int, index: int) -> int:
    """Length of shard `index` when `size` is cut in `parts` as torch.chunk does."""
    chunk = -(-size // parts)
    return max(0, min(chunk, size - chunk * index))


def shard_start(size: int, parts: int, index: int) -> int:
    chunk = -(-size // parts)
    return min(size, chunk * index)


def can_shard(size: int, parts: int, even: bool = False) -> bool:
    """Every rank must get something; `even` asks for equal parts."""
    if even or size % parts == 0:
        return size % parts == 0 and size >= parts
    return -(-size // parts) * (parts - 1) < size


def transition(before: int, after: int) -> str | None:
    """Which collective takes a tensor from one placement to another; '' for none, 'local' for no traffic."""
    if before == after:
        return ""
    if before == R:
        return "local"
    if before == P:
        return "all_reduce" if after == R else "reduce_scatter"
    if after == R:
        return "all_gather"
    if after == P:
        return None
    return "all_to_all"


Places = tuple[int, ...]  # one placement per mesh axis, outermost first
Step = tuple[int, int, int]  # axis, before, after


@cache
def route(before: Places, after: Places) -> tuple[Step, ...] | None:
    """The collectives, one axis at a time, that take a tensor between placements on a mesh; None where none do.

    What makes the tensor smaller goes first and what makes it larger last, so each collective moves as few bytes as
    any order lets it. An axis cuts or joins a dimension only while no other axis cuts it; two axes that swap
    dimensions are parted by making the tensor whole on one of them first.
    """
    current, pending = list(before), [k for k in range(len(before)) if before[k] != after[k]]
    if any(transition(before[k], after[k]) is None for k in pending):
        return None
    steps: list[Step] = []
    while pending:
        ready = [k for k in pending if not _touched(k, current, after[k])]
        if ready:
            k = min(ready, key=lambda k: (_GROWTH[_kind(current[k], after[k])], k))
            target = after[k]
            pending.remove(k)
        else:
            k, target = pending[-1], R
        steps.append((k, current[k], target))
        current[k] = target
    return tuple(steps)


_GROWTH = {"cut": 0, "reduce_scatter": 1, "all_to_all": 2, "local": 3, "all_reduce": 3, "all_gather": 4}


def _kind(before: int, after: int) -> str:
    return "cut" if before == R and after >= 0 else transition(before, after) or "local"


def _touched(k: int, current: list[int], target: int) -> bool:
    dims = {place for place in (current[k], target) if place >= 0}
    return any(current[j] in dims for j in range(len(current)) if j != k)


def shares(places: Places, sizes: Sequence[int]) -> int:
    """How many times smaller than the whole tensor one rank's part is."""
    return math.prod(size for place, size in zip(places, sizes, strict=True) if place >= 0)
