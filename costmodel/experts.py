"""What computing experts holds beside its operands and results, and to how many ranks their tokens go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..profiler.gates import gate_scratch_bytes


class ExpertSizes(NamedTuple):
    hidden: int  # of a token
    both: int  # of the first product
    inner: int  # of what the second product takes
    dtype: torch.dtype
    activation: str  # as shardwright::expert_mlp has it
    has_biases: bool


_ORDER_BYTES = 32  # of a choice: its place, token and expert in the order of experts, and in the order that was given


def expert_scratch_bytes(rows: float, sizes: ExpertSizes, *, is_backward: bool) -> float:
    """Bytes of shardwright::expert_mlp at its worst moment, beside operands and results.

    rows: choices of experts that are computed here, K of each token. Counted in profiler/expert_ops.py, of which each
    line here is a moment.
    """
    hidden, both, inner = (width * sizes.dtype.itemsize for width in sizes[:3])
    bias = int(sizes.has_biases)
    of_gate = gate_scratch_bytes(sizes.activation, sizes.both, sizes.dtype, is_backward=is_backward)
    if not is_backward:
        moments = [
            hidden + bias * both,  # rows of tokens, biases of rows; the product is a result
            of_gate,
            inner + (1 + bias) * hidden,  # what the second product takes and gives
            3 * hidden,  # that, in the order of tokens, and times their weights
            both,  # in the order of experts, beside the result
        ]
        return rows * (max(moments) + _ORDER_BYTES)
    wide = 4 if sizes.dtype.itemsize < 4 else 0  # biases' gradients are summed in float32
    moments = [
        both + 2 * inner + of_gate,  # gradient of what the second product took, before and after the scale
        both + inner + 2 * hidden,  # gradients of rows, and in the order of tokens
        both + inner + 3 * hidden * bias,  # scaled gradients, biases of rows, their product
        both + inner + (hidden + wide * max(sizes.both, sizes.hidden)) * bias,
    ]
    return rows * (2 * hidden + max(moments) + _ORDER_BYTES)  # rows of tokens and of their gradients all the while


def chunks_scratch_bytes(weights: Sequence[tuple[float, int]], chunks: int) -> float:
    """Of a backward whose tokens come in chunks, beside what one chunk holds: the sums of experts' gradients over all
    chunks, in float32 where they are narrower, and one chunk's own of one weight; less the results, which come after.
    weights: (bytes, bytes of an element) of each. Rows of all chunks are joined when nothing of expert_scratch_bytes()
    is alive any more, and one tensor at a time: that takes no more than it counts."""
    if chunks == 1 or not weights:
        return 0.0
    wider = sum(num_bytes * (max(4, size) / size - 1.0) for num_bytes, size in weights)
    return wider + max(num_bytes for num_bytes, _ in weights)


def copies_of_token(num_choices: int, ranks: int, parts: int = 1) -> float:
    """Of `ranks`, to how many a token goes on average, whose choices fall on any expert alike. parts: of each rank's
    experts, of which this rank sends to one."""
    return ranks * (1.0 - (1.0 - 1.0 / (ranks * parts)) ** num_choices)


def imbalances(counts: Sequence[Sequence[float]]) -> dict[int, float]:
    """Number of ranks -> tokens of the rank with most of them over the mean, where each has as many experts, next to
    each other: the mean of all layers, of which each waits for its own. counts: of each layer, tokens of each expert.
    """
    fewest = min(len(layer) for layer in counts)
    found = {}
    for ranks in range(2, fewest + 1):
        if all(len(layer) % ranks == 0 for layer in counts):
            found[ranks] = sum(_imbalance(layer, len(layer) // ranks) for layer in counts) / len(counts)
    return found


def _imbalance(layer: Sequence[float], each: int) -> float:
    of_ranks = [sum(layer[k : k + each]) for k in range(0, len(layer), each)]
    return max(of_ranks) * len(of_ranks) / sum(of_ranks)


FEWER_ROWS = 1.5  # between hosts, from which on a second hop within each, with counts of its own, is worth it


def goes_by_hosts(num_choices: int, ranks: int, per_host: int) -> bool:
    """Should a token cross to each host once, and go on to its ranks from there? per_host: of `ranks`."""
    if per_host < 2 or per_host >= ranks or ranks % per_host:
        return False
    return copies_of_token(num_choices, ranks) >= FEWER_ROWS * copies_of_token(num_choices, ranks // per_host)


class Work(NamedTuple):
    """Of one chunk. way: what does it, one thing at a time: the links of a hop, or the device. is_waited_for: does what
    follows need it?"""

    way: str
    seconds: float
    is_waited_for: bool = True


DEVICE = "device"
CHUNKS = (1, 2, 4)  # in which tokens may go to experts


def in_turns_s(chunk: Sequence[Work], count: int) -> float:
    """Seconds until `count` equal chunks are done, whose works are started in turns(): each up to where it waits for a
    message. Ways do what was started first."""
    free: dict[str, float] = {}
    done = [0.0] * count
    pieces = _up_to_messages(chunk)
    for k, turn in turns(count, len(pieces)):
        for work in pieces[turn]:
            ready = done[k] if work.is_waited_for else 0.0  # else it needs what this way did for the chunk before
            free[work.way] = max(free.get(work.way, 0.0), ready) + work.seconds
            if work.is_waited_for:
                done[k] = free[work.way]
    return max(*done, *free.values())


def turns(count: int, each: int) -> Iterator[tuple[int, int]]:
    """(chunk, its turn), in order: each chunk is a turn behind the one before, and sends before that waits."""
    for step in range(count + each - 1):
        yield from ((k, step - k) for k in reversed(range(count)) if 0 <= step - k < each)


def _up_to_messages(chunk: Sequence[Work]) -> list[list[Work]]:
    found: list[list[Work]] = [[]]
    for work in chunk:
        if found[-1] and found[-1][-1].way != DEVICE:
            found.append([])
        found[-1].append(work)
    return found
