"""Which sequences of a step go to which group of ranks, where groups may be of different widths.

A group of d ranks cuts each of its sequences over all of them (a context axis of d), and takes one pack of them after
the other; groups meet at the end of the step. With t[i, d] the seconds of sequence i on d ranks, infinite where its
tokens are more than d ranks hold, k[d] groups of each width and x[i, d] of 0 or 1:

    least T   with   sum over d of x[i, d] = 1               every sequence has a group            (_whole)
                     sum over i of t[i, d] x[i, d] <= T k[d] each width's groups hold its work     (_work)
                     sum over d of d k[d] <= N               ranks                                 (_ranks)

after FlexSP (arXiv:2412.01523), whose integer program names each group; this one knows widths alone, so that it has
no symmetric answers. Where some sequences need a group so wide that it leaves few ranks to others, they have a round
of their own, and the ranks are cut anew behind it. T k[d] is no linear term: for a given T the ranks are minimized,
and T is found by halving. The least T is a bound: what is left is to pack a width's sequences into its groups,
longest first, each to the group with least work, and then to move and swap sequences while the busiest group gets
less. Alike lengths are taken as one kind, of their mean work, where there are more than MOST_KINDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from ..solver import solve_model

MOST_KINDS = 20  # of lengths
IMPOSSIBLE, UNKNOWN = "impossible", "unknown"  # what a program of a limit came to
TOLERANCE = 5e-3  # of T
PROGRAM_S = 0.25  # of one integer program
MOST_MOVES = 400
MOST_ROUNDS = 2  # ways to cut a step into two


@dataclass(frozen=True)
class GroupWork:
    """What a sequence takes on a group of this width. linear_s: seconds for each token; quadratic_s: for each pair of
    tokens; both of forward and backward. most_tokens: that the group holds at once. ring_s: seconds for each token of
    what a ring sends beside attention, which hides as much as it takes, but for its first step."""

    width: int
    linear_s: float
    quadratic_s: float
    most_tokens: int
    ring_s: float = 0.0

    def seconds(self, lengths: np.ndarray) -> np.ndarray:
        """Of each of these lengths; infinite for what does not fit."""
        lengths = np.asarray(lengths, dtype=float)
        attention_s = self.quadratic_s * lengths**2
        sent_s = self.ring_s * lengths - (1.0 - 1.0 / self.width) * attention_s
        found = self.linear_s * lengths + attention_s + np.maximum(sent_s, 0.0)
        return np.where(lengths <= self.most_tokens, found, np.inf)


@dataclass(frozen=True)
class Group:
    """sequences: positions among those of the step. round: groups of one round run at once, rounds one by one."""

    width: int
    sequences: tuple[int, ...]
    seconds: float
    round: int = 0


@dataclass(frozen=True)
class Assignment:
    """seconds: of the busiest group of each round. bound_s: no assignment is faster, in one round; in any number of
    them, where there are several."""

    groups: tuple[Group, ...]
    seconds: float
    bound_s: float


def assign_in_rounds(lengths: Sequence[int], works: Sequence[GroupWork], num_ranks: int) -> Assignment | None:
    """As assign, or in two rounds: sequences that only the widest groups hold first, then the others, for which the
    ranks are cut anew. None: some sequence fits no group."""
    best = assign(lengths, works, num_ranks)
    if best is None:
        return None
    least_s = _least(
        np.stack([work.seconds(np.array(lengths)) for work in works], 1), [w.width for w in works], num_ranks
    )
    for work in sorted(works, key=lambda work: -work.width)[1 : 1 + MOST_ROUNDS]:
        parts = [
            [i for i, length in enumerate(lengths) if (length > work.most_tokens) == long] for long in (True, False)
        ]
        if not all(parts):
            continue
        found = [assign([lengths[i] for i in part], works, num_ranks) for part in parts]
        seconds = sum(one.seconds for one in found if one is not None)
        if seconds < best.seconds:
            groups = [
                Group(group.width, tuple(part[i] for i in group.sequences), group.seconds, number)
                for number, (part, one) in enumerate(zip(parts, found, strict=True))
                for group in one.groups  # type: ignore[union-attr]
            ]
            best = Assignment(tuple(groups), seconds, least_s)
    return best


def assign(lengths: Sequence[int], works: Sequence[GroupWork], num_ranks: int) -> Assignment | None:
    """works: of each width that there may be. None: some sequence fits no group."""
    seconds = np.stack([work.seconds(np.array(lengths)) for work in works], axis=1)
    widths = [work.width for work in works]
    if not np.isfinite(seconds).any(1).all():
        return None
    kinds = _kinds(np.array(lengths), seconds)
    exact = all(np.unique(np.array(lengths)[kind]).size == 1 for kind in kinds)
    best = single_width(lengths, works, num_ranks)
    high = best.seconds if best is not None else float(np.where(np.isfinite(seconds), seconds, 0).max(1).sum())
    bound_s = low = _least(seconds, widths, num_ranks)
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        found = _program(middle, seconds, kinds, widths, num_ranks)
        if found in (IMPOSSIBLE, UNKNOWN):
            low = middle
            if found == IMPOSSIBLE and exact:  # what averages out, or was not solved, proves nothing
                bound_s = middle
            continue
        assert not isinstance(found, str)
        packed = _packed(found, seconds, kinds, widths, num_ranks)
        best = packed if best is None or packed.seconds < best.seconds else best
        high = middle
        if best.seconds <= low * (1 + TOLERANCE):
            break
    assert best is not None
    return Assignment(best.groups, best.seconds, min(bound_s, best.seconds))


def single_width(lengths: Sequence[int], works: Sequence[GroupWork], num_ranks: int) -> Assignment | None:
    """The best where all groups are of one width."""
    found = [one for work in works if (one := of_width(lengths, work, num_ranks)) is not None]
    return min(found, key=lambda one: one.seconds, default=None)


def of_width(lengths: Sequence[int], work: GroupWork, num_ranks: int) -> Assignment | None:
    """All groups of this width; None where a sequence does not fit."""
    seconds = work.seconds(np.array(lengths))
    count = num_ranks // work.width
    if not np.isfinite(seconds).all() or count == 0:
        return None
    groups = _improved(_longest_first(list(range(len(lengths))), seconds[:, None], [0] * count), seconds[:, None])
    bound = max(float(seconds.sum()) / count, float(seconds.max(initial=0.0)))
    return _as_assignment(groups, seconds[:, None], [work.width], bound)


def _least(seconds: np.ndarray, widths: Sequence[int], num_ranks: int) -> float:
    """Of any assignment: the work at its cheapest, evenly over all ranks, and the sequence that takes longest."""
    ranks_s = (seconds * np.array(widths)).min(1).sum()
    return max(float(ranks_s) / num_ranks, float(seconds.min(1).max(initial=0.0)))


def _kinds(lengths: np.ndarray, seconds: np.ndarray) -> list[np.ndarray]:
    """Positions of alike sequences, longest first: of one length where there are few, else of about equal work."""
    order = np.argsort(-lengths, kind="stable")
    distinct = np.unique(lengths)
    if len(distinct) <= MOST_KINDS:
        return [order[lengths[order] == length] for length in distinct[::-1]]
    share = np.cumsum(np.where(np.isfinite(seconds), seconds, 0.0).max(1)[order])
    at = np.minimum((share / share[-1] * MOST_KINDS).astype(int), MOST_KINDS - 1)
    return [order[at == kind] for kind in range(MOST_KINDS) if (at == kind).any()]


def _program(
    limit_s: float, seconds: np.ndarray, kinds: Sequence[np.ndarray], widths: Sequence[int], num_ranks: int
) -> tuple[np.ndarray, list[int]] | str:
    """(sequences of each kind on each width, groups of each width) within limit_s; IMPOSSIBLE, or UNKNOWN where the
    time for it was too short."""
    fits = np.array([[np.isfinite(seconds[kind, d]).all() and seconds[kind, d].max() <= limit_s
                      for d in range(len(widths))] for kind in kinds])  # fmt: skip
    if not fits.any(1).all():
        return IMPOSSIBLE
    model = pulp.LpProblem("groups", pulp.LpMinimize)
    groups = [pulp.LpVariable(f"k{d}", 0, num_ranks // width, pulp.LpInteger) for d, width in enumerate(widths)]
    chosen = {
        (q, d): pulp.LpVariable(f"x{q}_{d}", 0, len(kind), pulp.LpInteger)
        for q, kind in enumerate(kinds)
        for d in range(len(widths))
        if fits[q, d]
    }
    ranks = pulp.lpSum(width * count for width, count in zip(widths, groups, strict=True))
    model += ranks
    model += ranks <= num_ranks  # _ranks
    for q, kind in enumerate(kinds):  # _whole
        model += pulp.lpSum(chosen[q, d] for d in range(len(widths)) if fits[q, d]) == len(kind)
    for d in range(len(widths)):  # _work
        work = [float(seconds[kind, d].mean()) / limit_s * chosen[q, d] for q, kind in enumerate(kinds) if fits[q, d]]
        model += pulp.lpSum(work) <= groups[d]
    status = solve_model(model, time_limit_s=PROGRAM_S, gap=1.0).status
    if status not in ("optimal", "feasible"):
        return IMPOSSIBLE if status == "infeasible" else UNKNOWN
    counts = np.zeros((len(kinds), len(widths)), dtype=int)
    for (q, d), variable in chosen.items():
        counts[q, d] = round(variable.value() or 0)
    return counts, [round(count.value() or 0) for count in groups]


def _packed(
    found: tuple[np.ndarray, list[int]],
    seconds: np.ndarray,
    kinds: Sequence[np.ndarray],
    widths: Sequence[int],
    num_ranks: int,
) -> Assignment:
    counts, groups = found
    places: list[int] = []  # width of each group, by its place among the widths
    for d, count in enumerate(groups):
        places += [d] * count
    left = num_ranks - sum(widths[d] for d in places)
    while (d := max((d for d, width in enumerate(widths) if width <= left), key=lambda d: widths[d], default=-1)) >= 0:
        places.append(d)
        left -= widths[d]
    loads: list[tuple[list[int], int]] = []
    for d in sorted(set(places)):
        own = []
        for q, kind in enumerate(kinds):  # of a kind, the longest go to the widest
            first = int(counts[q, d + 1 :].sum())
            own += kind[first : first + counts[q, d]].tolist()
        loads += _longest_first(own, seconds, [d] * places.count(d))
    return _as_assignment(_improved(loads, seconds), seconds, widths, 0.0)


def _longest_first(sequences: list[int], seconds: np.ndarray, places: Sequence[int]) -> list[tuple[list[int], int]]:
    """Each sequence to the group with least work, those of most work first. places: column of each group's width."""
    groups: list[tuple[list[int], int]] = [([], d) for d in places]
    work = np.zeros(len(places))
    for i in sorted(sequences, key=lambda i: -seconds[i, places[0]]):
        at = int(work.argmin())
        groups[at][0].append(i)
        work[at] += seconds[i, places[at]]
    return groups


def _improved(groups: list[tuple[list[int], int]], seconds: np.ndarray) -> list[tuple[list[int], int]]:
    """In place: sequences of the busiest group move, or change places with one of another, while that leaves both with
    less than it had."""
    work = np.array([seconds[sequences, d].sum() for sequences, d in groups])
    for _ in range(MOST_MOVES):
        busiest = int(work.argmax())
        sequences, own = groups[busiest]
        best, change = work[busiest] * (1 - 1e-9), None
        for other, (theirs, d) in enumerate(groups):
            if other == busiest or not sequences:
                continue
            given = [*theirs, -1]  # -1: nothing in return
            back = np.append(seconds[theirs, own], 0.0)[None, :]
            here = work[busiest] - seconds[sequences, own][:, None] + back
            there = work[other] + seconds[sequences, d][:, None] - np.append(seconds[theirs, d], 0.0)[None, :]
            worst = np.maximum(here, there)
            at = np.unravel_index(int(worst.argmin()), worst.shape)
            if worst[at] < best:
                best, change = worst[at], (other, sequences[at[0]], given[at[1]])
        if change is None:
            break
        other, mine, theirs_one = change
        sequences.remove(mine)
        groups[other][0].append(mine)
        if theirs_one >= 0:
            groups[other][0].remove(theirs_one)
            sequences.append(theirs_one)
        for at_group in (busiest, other):
            work[at_group] = seconds[groups[at_group][0], groups[at_group][1]].sum()
    return groups


def _as_assignment(
    groups: list[tuple[list[int], int]], seconds: np.ndarray, widths: Sequence[int], bound_s: float
) -> Assignment:
    found = [Group(widths[d], tuple(sorted(sequences)), float(seconds[sequences, d].sum())) for sequences, d in groups]
    return Assignment(tuple(found), max(group.seconds for group in found), bound_s)
