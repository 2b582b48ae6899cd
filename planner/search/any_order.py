"""What every order pays on a mesh with several pipeline ranks, published or synthesized: fill, drain, and memory.

Fill and drain. Stages are runs of positions in order, so the rank whose earliest stage stands r-th among the ranks' has
r positions before it at least. Its first forward waits for their forwards, and their backwards come after its last one,
which is no wait where a backward is split: what it has left of the weights' part fills it. With a second direction two
ranks stand r-th.

Memory, by Little's law. A microbatch's values of position k are held from its forward to its backward, which takes at
least H_k, the forwards and the backwards with respect to inputs of the positions from k on. In a step of Z seconds, m
microbatches, all ranks together hold on average at least

    sum over k of  b_k m H_k / Z      bytes, b_k: what position k keeps of a microbatch

beside what lasts, and no rank may hold more than its limit. So a short step keeps little, and recomputes: the least Z
for which there is room. What is let go of for one microbatch alone takes its forward again, and leaves nothing.
"""

from __future__ import annotations

import numpy as np

from ...schedules.published.library import SCHEDULES
from ..memory.rank_bytes import mean_room
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.setting import Setting
from ..stages.zero_seconds import stage_tables

HALVINGS = 30
PRICES = 32  # of a byte held for a second
MOST = 64  # times the step without recomputation: no longer steps are looked at


def mean_wait(forward_s: np.ndarray, backward_s: np.ndarray, candidate: Candidate, *, any_order: bool) -> np.ndarray:
    """Seconds (before its first forward, after its last backward) that the mean rank waits at least; by position."""
    own = SCHEDULES[candidate.schedule]
    before = np.arange(candidate.pp) // (2 if any_order else own.directions)
    if any_order or own.splits_backward:
        backward_s = np.zeros_like(backward_s)
    sums = np.cumsum(np.stack([forward_s, backward_s]), axis=1)
    sums = np.hstack([np.zeros((2, 1)), sums])
    return np.asarray(sums[:, np.minimum(before, len(forward_s))].mean(axis=1))


def held_bound(setting: Setting, candidate: Candidate, chains: tuple[Chain, ...], tail_s: float) -> float:
    """Least seconds of a step under which memory holds what the order must keep. chains: of the rungs, the first keeps
    most. tail_s: of the mean rank after its last backward at least. 0 where one rank has all stages."""
    p, m = candidate.pp, candidate.count
    if p == 1:
        return 0.0
    first, scale = chains[0], min(setting.mesh(candidate).scales)
    forward, backward = first.forward_s * scale, first.backward_s * scale
    accumulate_s = stage_tables(setting, candidate, first).accumulate_s * scale
    once_s = float((forward + backward + accumulate_s).sum())
    waits = float(mean_wait(forward, backward, candidate, any_order=True)[0]) + tail_s
    prices, gains, kept = setting.once(_trades, (chains, scale), chains, scale)
    room = mean_room(setting, candidate, first) * p / m  # in a second of the step, of each microbatch

    def least_s(step_s: float) -> float:
        """Seconds that ranks work and wait at least in a step so long."""
        extra_s = max(0.0, float((prices * (kept - room * step_s) - gains).max()))
        return m * (once_s + extra_s) / p + waits

    low = high = m * once_s / p + waits
    while least_s(high) > high and high < MOST * low:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if least_s(middle) > middle else (low, middle)
    return low


def _trades(chains: tuple[Chain, ...], scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(prices, gains, kept), so that it takes price * (kept - room) - gain seconds at least to leave no more than room,
    at each of the prices of a byte held for a second: the dual of what to recompute at which position.

    kept: by a microbatch without recomputation."""
    first = chains[0]
    load = (first.forward_s + first.backward_s) * scale
    held_s = ((first.forward_s + first.backward_input_s)[::-1].cumsum()[::-1] - first.forward_s) * scale
    own = np.maximum(first.forward_s - first.forward_comm_s, 0.0) * scale
    extra = np.stack([*((chain.forward_s + chain.backward_s) * scale - load for chain in chains[1:]), own])
    left = np.stack([*(chain.activation_bytes for chain in chains[1:]), np.zeros_like(own)])
    freed = np.maximum(first.activation_bytes - left, 0.0) * held_s
    rates = (extra / np.maximum(freed, 1e-30))[freed > 0]
    prices = np.quantile(rates[rates > 0], np.linspace(0.0, 1.0, PRICES)) if (rates > 0).any() else np.zeros(1)
    gains = np.array([np.maximum(price * freed - extra, 0.0).max(axis=0).sum() for price in prices])
    return prices, gains, float((first.activation_bytes * held_s).sum())
