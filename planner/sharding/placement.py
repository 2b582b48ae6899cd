"""Placements on one mesh axis, and what it costs to go from one to another.

A placement is a small integer, so that tables over it are quick: R (whole on every rank), P (a partial sum on each
rank), or d >= 0 (split on tensor dimension d). They are DTensor's Replicate, Partial("sum") and Shard(d); uneven
shards follow DTensor's rule, which is that of torch.chunk.
"""

from __future__ import annotations

from collections.abc import Callable

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


def transition_seconds(
    before: int,
    after: int,
    full_bytes: int,
    parts: int,
    collective_s: Callable[[str, int], float],
    memory_s: Callable[[int], float],
) -> float:
    """full_bytes: of the tensor whole on this axis. A split on a dimension that is not the first costs a local copy."""
    kind = transition(before, after)
    if kind is None:
        return INFINITE
    if kind == "":
        return 0.0
    if kind == "local":
        return memory_s(full_bytes // parts)
    seconds = collective_s(kind, full_bytes)
    if before > 0 or after > 0:
        seconds += memory_s(2 * full_bytes)
    return seconds
