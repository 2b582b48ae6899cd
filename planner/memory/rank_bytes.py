"""Bytes of each pipeline rank under a candidate, a chain and stage cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...costmodel import memory
from ...costmodel.memory import StageState, boundary_bytes
from ...schedules.published.library import SCHEDULES, build_schedule
from ...schedules.schedule import PipelineSchedule
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.cuts import windows
from ..stages.setting import Setting
from .beside import beside_of

ALL = slice(None)
PROFILES = 8192  # orders whose small tables are kept: a search asks for each of its candidates' several times


@lru_cache(maxsize=128)
def cached_schedule(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> PipelineSchedule:
    return build_schedule(name, num_ranks, num_microbatches, num_chunks)


@lru_cache(maxsize=PROFILES)
def placements(name: str, num_ranks: int, num_chunks: int) -> tuple[tuple[int, ...], ...]:
    """For each direction, the pipeline rank of each virtual stage; the same for any number of microbatches."""
    if num_chunks == 1 and SCHEDULES[name].directions == 1:
        return (tuple(range(num_ranks)),)
    return tuple(cached_schedule(name, num_ranks, 2 * num_ranks, num_chunks).placements)


@lru_cache(maxsize=PROFILES)
def stages_by_rank(name: str, num_ranks: int, num_chunks: int) -> np.ndarray:
    """[chunk, rank] -> virtual stage, in order of execution on each rank; those of a second direction follow."""
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for place in placements(name, num_ranks, num_chunks):
        for stage, rank in enumerate(place):
            rows[rank].append(stage)
    return np.array(rows).T


def placements_of(candidate: Candidate) -> tuple[tuple[int, ...], ...]:
    return placements(candidate.schedule, candidate.pp, candidate.virtual_stages)


def placement_of(candidate: Candidate) -> tuple[int, ...]:
    """Of the first direction."""
    return placements_of(candidate)[0]


@lru_cache(maxsize=PROFILES)
def in_flight_profiles(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[np.ndarray, ...]:
    """For each rank, the greatest numbers of microbatches held on its chunks (stages_by_rank) at once: rows that no
    other row covers."""
    p, m, v = num_ranks, num_microbatches, num_chunks
    if name == "1f1b":
        return tuple(np.array([[min(m, p - rank)]]) for rank in range(p))
    if name == "gpipe" and v == 1:
        return tuple(np.array([[m]]) for _ in range(p))
    # beyond a few rounds the steady state of one direction repeats, where there is one
    few, more = (min(m, rounds * p + m % p) for rounds in (4, 5))
    return _profiles(name, p, few if _repeats(name, p, few, more, v) else m, v)


@lru_cache(maxsize=PROFILES)
def _repeats(name: str, num_ranks: int, few: int, more: int, num_chunks: int) -> bool:
    """Does the order of so many microbatches hold as many at once as that of more?"""
    if SCHEDULES[name].directions == 2:
        return False
    held = [cached_schedule(name, num_ranks, count, num_chunks).in_flight() for count in (few, more)]
    return held[0] == held[1]


@lru_cache(maxsize=PROFILES)
def _profiles(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[np.ndarray, ...]:
    p, v = num_ranks, num_chunks
    schedule = cached_schedule(name, p, num_microbatches, v)
    profiles = []
    direction, stages = schedule.direction, stages_by_rank(name, p, v)
    for rank, actions in enumerate(schedule.ranks):
        chunk_of = {(chunk // v, stage): chunk for chunk, stage in enumerate(stages[:, rank].tolist())}
        held = [0] * len(chunk_of)
        seen: set[tuple[int, ...]] = set()
        for kind, stage, microbatch in actions:
            if kind == "F":
                held[chunk_of[direction[microbatch], stage]] += 1
                seen.add(tuple(held))
            elif kind in "BW":
                held[chunk_of[direction[microbatch], stage]] -= 1
        rows = np.array(sorted(seen))
        covered = (rows[:, None, :] <= rows[None, :, :]).all(-1).sum(1) > 1
        profiles.append(rows[~covered])
    return tuple(profiles)


def num_groups(candidate: Candidate) -> int:
    """Communicators of a rank: the world, and one for each axis wider than 1."""
    return 1 + sum(size > 1 for size in candidate.mesh.sizes) + 2 * (candidate.split is not None)


@dataclass(frozen=True, eq=False)
class IntervalBytes:
    """[i, j] -> bytes of a stage over positions i..j-1, on a rank that holds no other.

    lasting: held all through, boundary buffers included. activation: of one microbatch. pipeline: held beside
    activations; pipeline_each, workspace: by one stage of the rank at a time. step: held in the optimizer step in their
    place. slack, reserve: what is added to a rank's sum.
    """

    lasting: np.ndarray
    activation: np.ndarray
    pipeline: np.ndarray
    pipeline_each: np.ndarray
    workspace: np.ndarray
    step: np.ndarray
    slack: float
    reserve: int

    def with_in_flight(
        self, in_flight: int, window: tuple[slice, slice] = (ALL, ALL), *, pipeline_only: bool = False
    ) -> np.ndarray:
        """[i, j] of the window -> bytes of a rank with this stage alone. pipeline_only: not in the optimizer step."""
        pipeline = in_flight * self.activation[window] + self.pipeline[window]
        pipeline = pipeline + self.pipeline_each[window] + self.workspace[window]
        held = pipeline if pipeline_only else np.maximum(pipeline, self.step[window])
        return (self.lasting[window] + held) * self.slack + self.reserve

    def windows(self, in_flight: np.ndarray) -> np.ndarray:
        """[stage, i, j] -> the same for the windows of stages (stages/cuts.py), each with its own in_flight."""

        def of(table: np.ndarray) -> np.ndarray:
            return windows(table, len(in_flight))

        pipeline = in_flight[:, None, None] * of(self.activation) + of(self.pipeline)
        pipeline = pipeline + of(self.pipeline_each) + of(self.workspace)
        return (of(self.lasting) + np.maximum(pipeline, of(self.step))) * self.slack + self.reserve

    def peaks(self, bounds: Sequence[int], profiles: np.ndarray, stages: np.ndarray) -> np.ndarray:
        """Bytes of each pipeline rank. profiles: [rank, row, chunk] of in_flight_profiles. stages: [chunk, rank]."""
        edges = np.asarray(bounds)
        at = edges[stages], edges[stages + 1]
        return self.peaks_of(bounds, profiles, stages, self.activation[at], self.workspace[at])

    def peaks_of(
        self,
        bounds: Sequence[int],
        profiles: np.ndarray,
        stages: np.ndarray,
        activation: np.ndarray,
        workspace: np.ndarray,
    ) -> np.ndarray:
        """The same of stages with other bytes of a microbatch and workspace: [chunk, rank]."""
        edges = np.asarray(bounds)
        at = edges[stages], edges[stages + 1]

        def of(table: np.ndarray) -> np.ndarray:
            return table[at]

        activations = np.einsum("rkc,cr->rk", profiles, activation).max(axis=1)
        pipeline = activations + of(self.pipeline).sum(axis=0) + (of(self.pipeline_each) + workspace).max(axis=0)
        held = of(self.lasting).sum(axis=0) + np.maximum(pipeline, of(self.step).sum(axis=0))
        return held * self.slack + self.reserve


def interval_bytes(setting: Setting, candidate: Candidate, chain: Chain) -> IntervalBytes:
    """Cached: the same for all candidates that share a chain, data-parallel ranks, ZeRO stage and communicators."""
    several = candidate.count > 1
    key = (
        chain,
        candidate.state_ranks,
        candidate.zero,
        candidate.extents,
        candidate.on_host,
        several,
        candidate.num_stages > 1,
        num_groups(candidate),
    )
    return setting.once(_interval_bytes, key, setting, candidate, chain)


def state_memory_of(setting: Setting, candidate: Candidate, state: StageState, kind: str) -> memory.StateMemory:
    c = candidate
    ranks, zero, kinds = c.state_ranks, c.zero, setting.kinds
    if c.mesh.expert_ranks > 1:
        state = replace(state, expert_ranks=c.mesh.expert_ranks)
    return memory.state_memory(state, kinds, ranks, zero, c.count, kind, c.extents, on_host=c.on_host)


def _interval_bytes(setting: Setting, candidate: Candidate, chain: Chain) -> IntervalBytes:
    kind = setting.mesh(candidate).devices[0].kind
    whole = chain.param_of, chain.trainable_of, chain.buffer_of
    largest = chain.largest_of, chain.summed_of, chain.largest_trainable_of
    state = StageState(*whole, *largest, expert_elements=chain.expert_of)
    held = state_memory_of(setting, candidate, state, kind)
    lasting = held.parameters + held.optimizer + held.buffers
    if candidate.num_stages > 1:
        cut = boundary_bytes(chain.cut_forward_bytes + chain.cut_backward_bytes, kind)
        lasting = lasting + cut[:, None] + cut[None, :]
    return IntervalBytes(
        lasting=lasting,
        activation=chain.activation_of,
        pipeline=held.gradients,
        pipeline_each=held.leaving_each,
        workspace=beside_of(setting, candidate, chain).table(chain.activation_bytes),
        step=held.step_gradients + held.step_temporaries,
        slack=memory.slack_factor(kind),
        reserve=memory.reserve_bytes(kind, num_groups(candidate)),
    )


@lru_cache(maxsize=PROFILES)
def profile_table(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> np.ndarray:
    """[rank, row, chunk]: in_flight_profiles, rows repeated to equal number."""
    profiles = in_flight_profiles(name, num_ranks, num_microbatches, num_chunks)
    rows = max(len(profile) for profile in profiles)
    return np.stack([np.resize(profile, (rows, profile.shape[1])) for profile in profiles]).astype(float)


def quick_peaks(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> np.ndarray:
    """Bytes of each pipeline rank; never less than the sum of rank_breakdown."""
    c = candidate
    table = profile_table(c.schedule, c.pp, c.count, c.virtual_stages)
    stages = stages_by_rank(c.schedule, c.pp, c.virtual_stages)
    return interval_bytes(setting, candidate, chain).peaks(bounds, table, stages)


@lru_cache(maxsize=PROFILES)
def least_in_flight(name: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> int:
    """At some moment every chunk of every rank holds at least this many microbatches (the moment may differ by
    rank).
    """
    profiles = in_flight_profiles(name, num_ranks, num_microbatches, num_chunks)
    return min(int(rows.min(axis=1).max()) for rows in profiles)


def mean_bytes(setting: Setting, candidate: Candidate, chain: Chain, in_flight: int | None = None) -> float:
    """What the mean rank needs at least, whatever the cuts: lasting state, and activations that all chunks hold at
    once. in_flight: microbatches of those, in place of what the candidate's schedule holds.
    """
    return float(_mean_bytes(candidate, _whole(setting, candidate, chain), in_flight))


def _mean_bytes(candidate: Candidate, whole: _WholeBytes, in_flight: int | None) -> np.ndarray:
    """whole: of one chain, or arrays of several."""
    held = _in_flight(candidate, in_flight) * whole.activations + whole.gradients
    return (whole.lasting + np.maximum(held, whole.step)) * whole.slack / candidate.pp + whole.reserve


def _in_flight(candidate: Candidate, in_flight: int | None) -> int:
    """Those given, or what the candidate's schedule holds at least."""
    c = candidate
    return least_in_flight(c.schedule, c.pp, c.count, c.virtual_stages) if in_flight is None else in_flight


def first_in_mean(
    setting: Setting, candidate: Candidate, chains: tuple[Chain, ...], in_flight: int | None = None
) -> int | None:
    """Of chains that keep ever less, which is the first whose mean_bytes the rank that may use most has; None where
    none is."""
    whole = setting.once(_stacked, _whole_key(candidate, chains), setting, candidate, chains)
    enough = _mean_bytes(candidate, whole, in_flight) <= setting.most(candidate)
    return int(enough.argmax()) if enough.any() else None


def _stacked(setting: Setting, candidate: Candidate, chains: tuple[Chain, ...]) -> _WholeBytes:
    """Of each chain; arrays."""
    columns: list[Any] = [
        np.array(column) for column in zip(*(_whole(setting, candidate, c) for c in chains), strict=True)
    ]
    return _WholeBytes(*columns)


def mean_share(setting: Setting, candidate: Candidate, chains: tuple[Chain, Chain], in_flight: int | None) -> float:
    """How much of what the second chain recomputes more the mean rank must recompute, where it fits under that alone:
    as mean_bytes counts."""
    in_flight = _in_flight(candidate, in_flight)
    lower, upper = (_whole(setting, candidate, chain) for chain in chains)
    over = in_flight * lower.activations - mean_room(setting, candidate, chains[0]) * candidate.pp
    return float(np.clip(over / max(in_flight * (lower.activations - upper.activations), 1e-30), 0.0, 1.0))


def mean_room(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """Bytes that the mean rank has for what is kept for the backward; below 0 where it has none."""
    whole = _whole(setting, candidate, chain)
    room = (setting.most(candidate) - whole.reserve) / whole.slack
    return float(room - (whole.lasting + whole.gradients) / candidate.pp)


class _WholeBytes(NamedTuple):
    """Of the whole chain, without ranks. step: beside what lasts, in the optimizer step. slack, reserve: what is added
    to a rank's sum."""

    lasting: float
    activations: float  # of one microbatch
    gradients: float
    step: float
    slack: float
    reserve: int


def _whole(setting: Setting, candidate: Candidate, chain: Chain) -> _WholeBytes:
    return setting.once(_whole_bytes, _whole_key(candidate, chain), setting, candidate, chain)


def _whole_key(candidate: Candidate, chains: Chain | tuple[Chain, ...]) -> tuple[Any, ...]:
    c = candidate
    return chains, c.mesh, c.zero, c.split, c.on_host, c.count > 1


def _whole_bytes(setting: Setting, candidate: Candidate, chain: Chain) -> _WholeBytes:
    n, kind = chain.num_instances, setting.mesh(candidate).devices[0].kind
    summed = chain.summed_of[0, n]
    elements = chain.param_of[0, n], chain.trainable_of[0, n], chain.buffer_of[0, n]
    whole = StageState(*elements, 0, summed, expert_elements=chain.expert_of[0, n])
    held = state_memory_of(setting, candidate, whole, kind)
    return _WholeBytes(
        held.parameters + held.optimizer + held.buffers,
        float(chain.activation_bytes.sum()),
        held.gradients,
        held.step_gradients + held.step_temporaries,
        memory.slack_factor(kind),
        memory.reserve_bytes(kind, num_groups(candidate)),
    )


def state_share(setting: Setting, candidate: Candidate) -> float:
    """What a byte of training state, before ZeRO, weighs beside one that a microbatch keeps for the backward."""
    unit = 1 << 20
    held = state_memory_of(setting, candidate, StageState(unit, unit, 0, 0), setting.mesh(candidate).devices[0].kind)
    each = (held.parameters + held.optimizer + held.gradients) / unit / setting.kinds.of_trained
    in_flight = least_in_flight(candidate.schedule, candidate.pp, candidate.count, candidate.virtual_stages)
    return float(f"{each / in_flight:.1g}")


def rank_breakdown(
    setting: Setting,
    candidate: Candidate,
    chain: Chain,
    bounds: tuple[int, ...],
    rank: int,
    activation_bytes: int | None = None,
) -> dict[str, int]:
    """Every item of the worst rank among those of a pipeline rank; their sum is its peak. activation_bytes: in place of
    what the candidate's schedule holds at once."""
    moments = rank_moments(setting, candidate, chain, bounds, rank)
    if activation_bytes is None:
        chunks = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)[:, rank]
        each = np.array([stage_activation(chain, bounds[s], bounds[s + 1]) for s in chunks.tolist()])
        profiles = in_flight_profiles(candidate.schedule, candidate.pp, candidate.count, candidate.virtual_stages)[rank]
        activation_bytes = int((profiles @ each).max())
    return moments.worst(activation_bytes)


def rank_moments(
    setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...], rank: int
) -> memory.RankMoments:
    """Of the worst rank among those of a pipeline rank."""
    chunks = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)[:, rank].tolist()
    stages = [(bounds[s], bounds[s + 1]) for s in sorted(set(chunks))]  # two directions may share one
    kind = setting.mesh(candidate).devices[rank].kind
    held = [state_memory_of(setting, candidate, chain.stage_state(i, j), kind) for i, j in stages]
    sizes = beside_of(setting, candidate, chain)
    beside = [sizes.of_stage(chain.activation_bytes[i:j], i, j) for i, j in stages]
    boundary = 0.0
    if candidate.num_stages > 1:
        cut = chain.cut_forward_bytes + chain.cut_backward_bytes
        boundary = boundary_bytes(sum(cut[i] + cut[j] for i, j in stages), kind)
    return memory.rank_moments(
        held,
        beside=max(beside, key=lambda by_kind: sum(by_kind.values())),
        communication_bytes=int(boundary),
        device_kind=kind,
        num_groups=num_groups(candidate),
    )


def activation_room(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...], rank: int) -> float:
    """Bytes of activations that a pipeline rank can hold at once beside all else."""
    share = memory.slack_factor(setting.mesh(candidate).devices[rank].kind)
    much = setting.limit(candidate, rank)  # more than there is room for, so that the pipeline is the worst moment
    over = sum(rank_breakdown(setting, candidate, chain, bounds, rank, much).values()) - much
    return much - over / share


def stage_activation(chain: Chain, start: int, stop: int) -> float:
    prologue = sum(chain.prologue_bytes[index] for index in chain.prologue_of(start, stop))
    return float(chain.activation_bytes[start:stop].sum()) + prologue + shared_bytes(chain, start, stop)


def shared_bytes(chain: Chain, start: int, stop: int) -> float:
    """Of values that a stage keeps and positions before it keep as well."""
    return sum(value.num_bytes for value in chain.shared if value.earlier < start <= value.later < stop)
