"""Placements on mesh axes, and the collectives that lead from one to another.

A placement is a small integer, so that tables over it are quick: R (whole on every rank), P (a partial sum on each
rank), or d >= 0 (split on tensor dimension d). They are DTensor's Replicate, Partial("sum") and Shard(d); uneven
shards follow DTensor's rule, which is that of torch.chunk.
"""

from __future__ import annotations

import itertools
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

    Of all orders the one that moves the fewest bytes, those over outer axes, whose links are slower, counting for more
    (axes are taken as equally long, so that a route depends on the placements alone). Axes that cut the same dimension
    each cut what those outside them left, so an axis cuts or joins a dimension only while no axis inside it cuts it.
    Where that leaves no order, as for two axes that swap dimensions, the tensor is made whole on one of them first.
    """
    changed = [k for k in range(len(before)) if before[k] != after[k]]
    if any(transition(before[k], after[k]) is None for k in changed):
        return None
    orders = [steps for order in itertools.permutations(changed) if (steps := _steps(before, after, order)) is not None]
    if orders:
        return min(orders, key=lambda steps: _weight(before, steps))
    swapped = [k for k in changed if before[k] >= 0 and after[k] >= 0]
    innermost = max(k for k, place in enumerate(before) if place >= 0)
    k = swapped[-1] if swapped and not _blocked(swapped[-1], before, R) else innermost
    rest = route((*before[:k], R, *before[k + 1 :]), after)
    return ((k, before[k], R), *rest) if rest is not None else None


def way(before: Places, after: Places) -> tuple[Step, ...] | None:
    """The route of a value that is there. The gradient of a parameter may also be a shard that has to leave as a
    partial sum (on data axes all do): it is padded with zeros, first and without traffic. No op is offered that."""
    padded = tuple((k, before[k], P) for k in reversed(range(len(before))) if before[k] >= 0 and after[k] == P)
    sums = tuple(P if b >= 0 and a == P else b for b, a in zip(before, after, strict=True))
    rest = route(sums, after)
    return (*padded, *rest) if rest is not None else None


_BYTES = {"local": 0.0, "all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.5}


def _steps(before: Places, after: Places, order: Sequence[int]) -> tuple[Step, ...] | None:
    current, steps = list(before), []
    for k in order:
        if _blocked(k, current, after[k]):
            return None
        steps.append((k, current[k], after[k]))
        current[k] = after[k]
    return tuple(steps)


def _weight(before: Places, steps: Sequence[Step]) -> float:
    current, total = list(before), 0.0
    for k, source, target in steps:
        others = sum(place >= 0 for j, place in enumerate(current) if j != k)
        total += _BYTES[transition(source, target) or "local"] / 2**others * (len(before) - k)
        current[k] = target
    return total


def _blocked(k: int, current: Sequence[int], target: int) -> bool:
    """Does an axis inside this one cut a dimension that it would cut or join?"""
    dims = {place for place in (current[k], target) if place >= 0}
    return any(place in dims for place in current[k + 1 :])


def shares(places: Places, sizes: Sequence[int]) -> int:
    """How many times smaller than the whole tensor one rank's part is."""
    return math.prod(size for place, size in zip(places, sizes, strict=True) if place >= 0)
