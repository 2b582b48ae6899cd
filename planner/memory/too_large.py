"""A proof that no cuts of a chain fit, without looking for any.

A relaxation: a rank may hold parts of positions, and any of them. Of the positions that it holds let L be the bytes
that last, gradients among them, and A those that one microbatch keeps. Pipeline rank r needs at least

    (L + h_r A + e) slack + reserve  <=  limit_r

h_r: microbatches that it holds at some moment, however A is spread over its chunks                (least_held)
e:   what one of its stages holds beside at a time: with v chunks at least the v-th least of any position

Positions that keep much for what lasts of them belong on the ranks of least h_r: two that lie otherwise leave more room
when parts of them change places. So filling the ranks in that order decides.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ...costmodel import memory
from ...costmodel.memory import StageState
from ...schedules.published.library import SCHEDULES
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.setting import Setting
from .beside import beside_of
from .rank_bytes import PROFILES, num_groups, placement_of, profile_table, state_memory_of

ROUNDS = 40  # of the game; more only raise h_r
ROUNDING = 1 + 1e-9  # of sums in another order


@lru_cache(maxsize=PROFILES)
def least_held(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> np.ndarray:
    """[rank] -> microbatches that the rank holds at some moment, weighed by its chunks' shares of its activations,
    whatever these are: a bound from below on the value of the game of moments against shares, by fictitious play."""
    held = profile_table(name, num_ranks, num_microbatches, num_chunks)  # [rank, moment, chunk]
    ranks = np.arange(num_ranks)
    shares = np.full((num_ranks, num_chunks), 1.0 / num_chunks)
    total, best = np.zeros((num_ranks, num_chunks)), np.zeros(num_ranks)
    for count in range(1, ROUNDS + 1):
        total += held[ranks, np.einsum("rkc,rc->rk", held, shares).argmax(axis=1)]
        best = np.maximum(best, total.min(axis=1) / count)  # of any mixture of moments, the chunk that holds least
        shares *= count / (count + 1)
        shares[ranks, total.argmin(axis=1)] += 1 / (count + 1)
    return best


def is_too_large(setting: Setting, candidate: Candidate, chain: Chain) -> bool:
    """Is it proven that no cuts fit? Of schedules of two directions nothing is."""
    c = candidate
    if SCHEDULES[c.schedule].directions == 2:
        return False
    size = position_bytes(setting, candidate, chain)
    lasting, kept = size.lasting[size.order], size.kept[size.order]
    room = rooms(setting, candidate, chain)
    held = least_held(c.schedule, c.pp, c.count, c.virtual_stages)
    places, placed = np.arange(len(kept) + 1), 0.0  # positions that the ranks so far hold, the last one in part
    for rank in np.argsort(held):
        needs = np.concatenate([[0.0], np.cumsum(lasting + held[rank] * kept)])
        filled = np.interp(placed, places, needs) + max(room[rank], 0.0)
        if filled >= needs[-1]:
            return False
        placed = float(np.interp(filled, needs, places))
    return True


class PositionBytes(NamedTuple):
    """Of each position, whatever stage it is in. beside: what a stage that ends with it needs besides at a time, least
    first, of all but the first and the last position; beside_ends: of those two, with which only the first and the last
    stage may end. order: those that keep most for what lasts first."""

    lasting: np.ndarray
    kept: np.ndarray  # of one microbatch
    beside: np.ndarray
    beside_ends: tuple[float, float]
    order: np.ndarray


def position_bytes(setting: Setting, candidate: Candidate, chain: Chain) -> PositionBytes:
    c = candidate
    key = (chain, c.state_ranks, c.zero, c.extents, c.on_host, c.count > 1)
    return setting.once(_position_bytes, key, setting, candidate, chain)


def rooms(setting: Setting, candidate: Candidate, chain: Chain) -> np.ndarray:
    """[rank] -> bytes for what lasts and what is kept."""
    kind = setting.mesh(candidate).devices[0].kind
    reserve = memory.reserve_bytes(kind, num_groups(candidate))
    size, chunks = position_bytes(setting, candidate, chain), candidate.virtual_stages
    place, least_beside = placement_of(candidate), np.empty(candidate.pp)
    for rank in range(candidate.pp):
        ends = [size.beside_ends[k] for k in (0, -1) if place[k] == rank]
        found = np.sort([*ends, *size.beside[:chunks]])[:chunks]
        least_beside[rank] = found[-1] if len(found) else 0.0
    least_beside[place[-1]] = max(least_beside[place[-1]], size.beside_ends[1])
    return (setting.limits(candidate) - reserve) / memory.slack_factor(kind) * ROUNDING - least_beside


def _position_bytes(setting: Setting, candidate: Candidate, chain: Chain) -> PositionBytes:
    params, trainable = chain.param_elements.copy(), chain.trainable_elements.copy()
    for repeat in chain.repeats:  # may be held once
        params[repeat.later] -= repeat.elements
        trainable[repeat.later] -= repeat.trainable
    # a stage's share is rounded up once, not for each of its positions
    whole, stepped = (np.maximum(elements - candidate.state_ranks, 0.0) for elements in (params, trainable))
    kind = setting.mesh(candidate).devices[0].kind
    largest = chain.param_elements, chain.summed_elements, chain.trainable_elements
    held = StageState(
        whole,
        stepped,
        chain.buffer_bytes,
        *largest,
        expert_elements=chain.expert_elements,
    )
    state = state_memory_of(setting, candidate, held, kind)
    lasting = state.parameters + state.optimizer + state.buffers + state.gradients
    order = np.argsort(-chain.activation_bytes / np.maximum(lasting, 1.0))
    beside = state.leaving_each + beside_of(setting, candidate, chain).least
    ends = float(beside[0]), float(beside[-1])
    return PositionBytes(lasting, chain.activation_bytes, np.sort(beside[1:-1]), ends, order)
