"""The least work of the busiest rank, without looking for cuts: what memory asks for in recomputation, as seconds.

The relaxation of too_large.py with time: ranks may hold parts of positions, any of them, each on any rung of the ladder
of recomputation. Position k on rung g takes a_kg seconds of a microbatch, keeps b_kg bytes of it and lasting bytes l_k;
rank r has room for M_r bytes and holds h_r microbatches. If no rank works longer than W a microbatch, then for any
prices x_r of a second and y_r of a byte on rank r

    sum over k of the least over r, g of ( x_r a_kg + y_r (l_k + h_r b_kg) )  <=  sum over r of ( x_r W + y_r M_r )

since every position is held somewhere. Solved for W this is a bound from below, whatever the prices. They are taken
from the segment with most work: those at which a rank cannot do more of it, where all ranks together hold all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...schedules.published.library import SCHEDULES
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.setting import Setting
from ..stages.zero_seconds import stage_tables
from .too_large import least_held, position_bytes, rooms

HALVINGS = 30  # of the interval of W; more only make better prices


class _Points(NamedTuple):
    """[rung, position] seconds and bytes kept of a microbatch, and of the segment with most work its rungs: where it
    recomputes more than on the one before. size: positions, counted in those of that segment."""

    seconds: np.ndarray
    kept: np.ndarray
    rungs: np.ndarray
    position: int
    size: float


def least_work_s(setting: Setting, candidate: Candidate, chains: tuple[Chain, ...]) -> float:
    """Seconds of a forward and a backward of one microbatch on the rank that works most, at least, on the fastest rank.
    chains: of the rungs. 0 where nothing is known."""
    c = candidate
    if SCHEDULES[c.schedule].directions == 2:
        return 0.0
    first = chains[0]
    points = setting.once(_points, (chains, c.state_ranks > 1 or c.count > 1, c.mesh), setting, candidate, chains)
    held = least_held(c.schedule, c.pp, c.count, c.virtual_stages)[:, None]
    lasting = position_bytes(setting, candidate, first).lasting
    room = np.maximum(rooms(setting, candidate, first), 0.0)
    seconds_price, byte_price = _prices(points, lasting, held, room)
    # every rank has its own price: [rank, rung, position]
    priced = seconds_price[:, None, None] * points.seconds
    priced = priced + byte_price[:, None, None] * (lasting + held[:, :, None] * points.kept)
    over = priced.min(axis=(0, 1)).sum() - (byte_price * room).sum()
    return float(max(over, 0.0) / seconds_price.sum()) if seconds_price.any() else 0.0


def _points(setting: Setting, candidate: Candidate, chains: tuple[Chain, ...]) -> _Points:
    scale = min(setting.mesh(candidate).scales)
    accumulate_s = stage_tables(setting, candidate, chains[0]).accumulate_s
    seconds = np.stack([(chain.forward_s + chain.backward_s + accumulate_s) * scale for chain in chains])
    kept = np.stack([chain.activation_bytes for chain in chains])
    names = np.array(chains[0].shape.segments)
    work = {name: seconds[0][names == name].sum() for name in dict.fromkeys(names.tolist())}
    position = int((names == max(work, key=lambda name: work[name])).argmax())
    own = seconds[:, position]
    rungs = np.array([0, *(k for k in range(1, len(own)) if own[k] > own[:k].max())])
    return _Points(seconds, kept, rungs, position, float(seconds[0].sum() / max(own[0], 1e-30)))


def _prices(points: _Points, lasting: np.ndarray, held: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(of a second, of a byte) on each rank, at which a position of the segment costs 1 or more on every rung."""
    seconds = points.seconds[points.rungs, points.position][None, :]
    size = lasting[points.position] + held * points.kept[points.rungs, points.position]  # [rank, rung]
    size = np.maximum(size, 1.0)
    # corners: time alone binds; two rungs next to each other cost the same; memory alone binds
    across = seconds[:, :-1] * size[:, 1:] - seconds[:, 1:] * size[:, :-1]
    across = np.minimum(across, -1e-30)
    of_second = (size[:, 1:] - size[:, :-1]) / across
    of_byte = (seconds[:, :-1] - seconds[:, 1:]) / across
    first = np.broadcast_to(1 / np.maximum(seconds[:, :1], 1e-30), (len(size), 1))
    nothing = np.zeros((len(size), 1))
    x = np.maximum(np.hstack([first, of_second, nothing]), 0.0)
    y = np.maximum(np.hstack([nothing, of_byte, 1 / size[:, -1:]]), 0.0)
    ranks, beside = np.arange(len(size)), y * room[:, None]
    low, high = 0.0, float(seconds[0, -1]) * points.size
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (x * middle + beside).min(axis=1).sum() >= points.size:
            high = middle
        else:
            low = middle
    corner = (x * high + beside).argmin(axis=1)
    return x[ranks, corner], y[ranks, corner]
