"""One candidate: a lower bound on its step, its best cuts, its memory and its simulated step.

The bound is the greater of two that every order and every cut must pay. p pipeline ranks, m microbatches; F and B the
forward and backward of one microbatch through all stages, F' and B' with ZeRO's collectives around them:

    work   m (F' + B') / p + tail                          some rank does at least the mean, and its own tail after it
    path   gpipe        F + B + (m-1) (F' + B') / p         the greatest stage is at least the mean
           1f1b         F + B + ((m-1) B' + (m - min(m, p)) F') / p     stages.pipeline_cost, averaged over stages
           interleaved  F + B
           and, where clipping makes all ranks wait for each other, the mean optimizer step and gather

The tail of work is the mean rank's reduction (with one chunk a rank: else other chunks may hide it), optimizer step and
gather. The time of a collective grows at most in proportion to its bytes, so that of a p-th of them is at least a p-th.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..costmodel.simulator import Hop, StageTimes, Tail, Timeline
from .candidates import Candidate
from .chain import Chain
from .footprint import cached_schedule, fits, interval_bytes, mean_bytes, profile_table, stage_activation
from .mesh_costs import MeshCosts
from .setting import DataParallel, Setting
from .stages import Cuts, best_cuts, improve_cuts, pipeline_cost

# Orders longer than this are simulated at two smaller microbatch counts and extended along their steady state.
MAX_SIMULATED_ACTIONS = 12_000
# Uneven stages can have a smaller bubble than equal ones; the least share seen with 4 to 8 ranks and 2 to 4 chunks is
# 0.6.
INTERLEAVED_BUBBLE = 0.6


@dataclass(frozen=True)
class Passes:
    """Seconds of one microbatch through all stages; *_full_s with ZeRO's collectives around each action."""

    forward_s: float
    backward_s: float
    forward_full_s: float
    backward_full_s: float

    @classmethod
    def plain(cls, forward_s: float, backward_s: float) -> Passes:
        return cls(forward_s, backward_s, forward_s, backward_s)

    @property
    def full_s(self) -> float:
        return self.forward_full_s + self.backward_full_s


def path_seconds(schedule: str, passes: Passes, num_ranks: int, num_microbatches: int) -> float:
    """path of the bound above, or the work without its tail where that is more."""
    p, m, once = num_ranks, num_microbatches, passes.forward_s + passes.backward_s
    work = m * passes.full_s / p
    if schedule == "gpipe":
        return max(work, once + (m - 1) * passes.full_s / p)
    if schedule == "1f1b":
        return max(work, once + ((m - 1) * passes.backward_full_s + (m - min(m, p)) * passes.forward_full_s) / p)
    return max(work, once)


def passes_of(setting: Setting, candidate: Candidate, chain: Chain) -> Passes:
    """On the fastest rank."""
    mesh, n = setting.mesh(candidate), chain.num_instances
    shared = DataParallel.of(mesh, setting.kinds, candidate.zero, chain.param_of[0, n], chain.trainable_of[0, n])
    scale = min(mesh.scales)
    forward, backward = float(chain.forward_s.sum()) * scale, float(chain.backward_s.sum()) * scale
    return Passes(forward, backward, forward + shared.gather_s, backward + shared.gather_s + shared.reduce_each_s)


def lower_bound(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """Seconds that no cut of this candidate beats. See the module's docstring."""
    mesh, p, m, n = setting.mesh(candidate), candidate.pp, candidate.count, chain.num_instances
    passes = passes_of(setting, candidate, chain)
    trainable = chain.trainable_of[0, n]
    shared = DataParallel.of(mesh, setting.kinds, candidate.zero, chain.param_of[0, n], trainable)
    stepped = trainable / (candidate.dp if candidate.zero else 1) / p
    fastest = max(mesh.devices, key=lambda device: device.memory_bytes_per_s)
    step_s = setting.optimizer_seconds(stepped, fastest) + shared.tail_gather_s / p
    reduce_s = shared.reduce_s / p if candidate.virtual_stages == 1 else 0.0
    path = path_seconds(candidate.schedule, passes, p, m)
    waits = setting.workload.optimizer.max_grad_norm is not None
    return max(m * passes.full_s / p + reduce_s + step_s, path + (step_s if waits else 0.0))


def estimate(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """lower_bound, for interleaving with INTERLEAVED_BUBBLE of the bubble that equal stages have: (p-1) T / (p v)."""
    bound = lower_bound(setting, candidate, chain)
    if candidate.virtual_stages == 1 or candidate.schedule == "gpipe":
        return bound
    p, v = candidate.pp, candidate.virtual_stages
    passes = passes_of(setting, candidate, chain)
    return max(bound, (candidate.count + INTERLEAVED_BUBBLE * (p - 1) / v) * passes.full_s / p)


def _gather_and_reduce(
    setting: Setting, candidate: Candidate, chain: Chain
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """[i, j] -> seconds of ZeRO's gather before an action, of its reduction after a backward: a share, by bytes, of the
    whole model's, which is at most what the stage's own takes."""
    mesh, n = setting.mesh(candidate), chain.num_instances
    if candidate.dp == 1 or candidate.zero < 2:
        return 0.0, 0.0
    key = ("zero", chain, candidate.pp, candidate.dp, candidate.tp, candidate.zero)
    if key not in setting.cache:
        whole = DataParallel.of(mesh, setting.kinds, candidate.zero, chain.param_of[0, n], chain.trainable_of[0, n])
        setting.cache[key] = (
            chain.param_of * (whole.gather_s / max(1.0, chain.param_of[0, n])),
            chain.trainable_of * (whole.reduce_each_s / max(1.0, chain.trainable_of[0, n])),
        )
    return setting.cache[key]


def find_cuts(setting: Setting, candidate: Candidate, chain: Chain, *, ignore_memory: bool = False) -> Cuts | None:
    """Best cuts that fit in memory (see stages.py). None: no cut fits (with several chunks on a rank: none was
    found).
    """
    n, num_stages = chain.num_instances, candidate.num_stages
    mesh = setting.mesh(candidate)
    gather_s, reduce_s = _gather_and_reduce(setting, candidate, chain)
    if candidate.virtual_stages > 1:
        return _find_interleaved_cuts(setting, candidate, chain, 2 * gather_s + reduce_s, ignore_memory)
    in_flight = profile_table(candidate.schedule, candidate.pp, candidate.count, 1).max(axis=1)[:, 0]
    limits = setting.limits(candidate)
    held = interval_bytes(setting, candidate, chain)
    if not ignore_memory and mean_bytes(setting, candidate, chain) > limits.max():
        return None

    def cost(stage: int) -> np.ndarray:
        seconds = pipeline_cost(
            chain,
            candidate.count,
            stage,
            num_stages,
            schedule=candidate.schedule,
            gather_s=gather_s,
            reduce_s=reduce_s,
            scale=mesh.scales[stage],
            least_scale=min(mesh.scales),
        )
        if ignore_memory:
            return seconds
        return np.where(held.with_in_flight(int(in_flight[stage])) <= limits[stage], seconds, np.inf)

    return best_cuts(cost, num_stages, n, _secondary(mesh, chain))


def _secondary(mesh: MeshCosts, chain: Chain) -> Callable[[int], np.ndarray]:
    """Transfers over the cut at the end of a stage, then evenness of the loads."""
    load = chain.forward_of + chain.backward_of
    whole = max(float(load[0, -1]), 1e-30)
    even = load * load / whole * 1e-3
    hop = mesh.hop(0, 1, 1e9, 1e9) if mesh.pp > 1 else Hop()
    cut = chain.cut_forward_bytes * hop.forward_occupancy_s / 1e9
    cut = cut + chain.cut_backward_bytes * hop.backward_occupancy_s / 1e9

    def secondary(stage: int) -> np.ndarray:
        return even + cut[None, :]

    return secondary


def _find_interleaved_cuts(
    setting: Setting, candidate: Candidate, chain: Chain, extra: np.ndarray | float, ignore_memory: bool
) -> Cuts | None:
    """Even chunks first; where they do not fit, chunks that each keep to their share of the rank's memory, then chunks
    of least memory."""
    p, v, n = candidate.pp, candidate.virtual_stages, chain.num_instances
    mesh, limits = setting.mesh(candidate), setting.limits(candidate)
    load = chain.forward_of + chain.backward_of + extra
    loads = {scale: load * scale for scale in set(mesh.scales)}
    secondary = _secondary(mesh, chain)
    key = ("even", chain, candidate.pp, candidate.dp, candidate.tp, v, candidate.zero)
    if key not in setting.cache:
        setting.cache[key] = best_cuts(lambda stage: loads[mesh.scales[stage % p]], p * v, n, secondary)
    cuts: Cuts | None = setting.cache[key]
    if cuts is None or ignore_memory or fits(setting, candidate, chain, cuts.bounds):
        return cuts
    in_flight = profile_table(candidate.schedule, p, candidate.count, v).max(axis=1)
    held = interval_bytes(setting, candidate, chain)
    if mean_bytes(setting, candidate, chain) > limits.max():
        return None
    tables: dict[tuple[float, float], np.ndarray] = {}

    def share_used(stage: int) -> np.ndarray:
        rank, chunk = stage % p, stage // p
        key = (float(in_flight[rank, chunk]), float(limits[rank]))
        if key not in tables:
            tables[key] = held.with_in_flight(int(key[0])) / ((key[1] - held.reserve) / v + held.reserve)
        return tables[key]

    def by_share(stage: int) -> np.ndarray:
        return np.where(share_used(stage) <= 1.0, loads[mesh.scales[stage % p]], np.inf)

    for cost in (by_share, share_used):
        cuts = best_cuts(cost, p * v, n, secondary)
        if cuts is not None and fits(setting, candidate, chain, cuts.bounds):
            return cuts
    return None


def level_ranks(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> tuple[int, ...]:
    """Move single cuts while the most loaded rank of an interleaved candidate gets faster and all of it still fits."""
    if candidate.virtual_stages == 1:
        return bounds
    best = loop_bound(setting, candidate, chain, bounds)

    def score(trial: tuple[int, ...]) -> float:
        nonlocal best
        seconds = loop_bound(setting, candidate, chain, trial)
        if trial != bounds and (seconds >= best or not fits(setting, candidate, chain, trial)):
            return np.inf
        best = min(best, seconds)
        return seconds

    return improve_cuts(bounds, score, max_rounds=3)


def unevenness(setting: Setting, chain: Chain, num_stages: int) -> float:
    """Greatest over mean stage time of the most even cuts; 1: all equal."""
    key = ("uneven", chain, num_stages)
    if key not in setting.cache:
        load = chain.forward_of + chain.backward_of
        cuts = best_cuts(lambda stage: load, num_stages, chain.num_instances)
        setting.cache[key] = np.inf if cuts is None else cuts.bottleneck * num_stages / max(float(load[0, -1]), 1e-30)
    return setting.cache[key]


def loop_bound(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> float:
    """Seconds that these cuts take at least, whatever the order: greatest over the ranks of the first microbatch's way
    to it and the last one's way on from it, and its own work."""
    p, m = candidate.pp, candidate.count
    gather_s, reduce_s = _gather_and_reduce(setting, candidate, chain)
    scales = np.array(setting.mesh(candidate).scales)
    edges = np.asarray(bounds)
    at = (edges[:-1], edges[1:])
    times = (chain.forward_of + chain.backward_of)[at].reshape(-1, p) * scales
    around = (2 * gather_s + reduce_s + np.zeros_like(chain.forward_of))[at].reshape(-1, p)
    lead = np.concatenate([[0.0], np.cumsum(times[0])[:-1]])
    return float((lead + m * (times + around).sum(axis=0) - around.sum(axis=0)).max())


def order_bound(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> float:
    """loop_bound, and the least tail of any rank."""
    tail_s = min(tail.optimizer_s + tail.gather_s for tail in tails(setting, candidate, chain, bounds))
    return loop_bound(setting, candidate, chain, bounds) + tail_s


def stage_times(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[StageTimes]:
    mesh = setting.mesh(candidate)
    result = []
    for stage in range(candidate.num_stages):
        i, j = bounds[stage], bounds[stage + 1]
        scale = mesh.scales[stage % candidate.pp]
        data = DataParallel.of(mesh, setting.kinds, candidate.zero, chain.param_of[i, j], chain.trainable_of[i, j])
        prologue_s = sum(chain.prologue_s[index] for index in chain.prologue_of(i, j))
        forward_comm, backward_comm = float(chain.forward_comm_s[i:j].sum()), float(chain.backward_comm_s[i:j].sum())
        forward, backward = float(chain.forward_s[i:j].sum()), float(chain.backward_input_s[i:j].sum())
        result.append(
            StageTimes(
                forward_s=(forward - forward_comm + prologue_s) * scale + forward_comm,
                backward_input_s=(backward - backward_comm) * scale + backward_comm,
                backward_weight_s=float(chain.backward_weight_s[i:j].sum()) * scale,
                forward_comm_s=forward_comm,
                backward_comm_s=backward_comm,
                activation_bytes=int(stage_activation(chain, i, j)),
                gather_s=data.gather_s,
                reduce_each_s=data.reduce_each_s,
                reduce_s=data.reduce_s,
            )
        )
    return result


def tails(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[Tail]:
    mesh, result = setting.mesh(candidate), []
    for rank in range(candidate.pp):
        elements, gather_s = 0.0, 0.0
        for stage in range(rank, candidate.num_stages, candidate.pp):
            i, j = bounds[stage], bounds[stage + 1]
            elements += chain.trainable_of[i, j] / (candidate.dp if candidate.zero else 1)
            data = DataParallel.of(mesh, setting.kinds, candidate.zero, chain.param_of[i, j], chain.trainable_of[i, j])
            gather_s += data.tail_gather_s
        result.append(Tail(setting.optimizer_seconds(elements, mesh.devices[rank]), gather_s))
    return result


def run_timeline(
    setting: Setting,
    candidate: Candidate,
    chain: Chain,
    bounds: tuple[int, ...],
    *,
    num_microbatches: int | None = None,
    with_events: bool = False,
) -> Timeline:
    mesh, p = setting.mesh(candidate), candidate.pp
    schedule = cached_schedule(candidate.schedule, p, num_microbatches or candidate.count, candidate.virtual_stages)
    place = schedule.stage_rank
    hops = [
        mesh.hop(
            place[s], place[s + 1], chain.cut_forward_bytes[bounds[s + 1]], chain.cut_backward_bytes[bounds[s + 1]]
        )
        for s in range(candidate.num_stages - 1)
    ]
    return schedule.simulate(
        stage_times(setting, candidate, chain, bounds),
        hops,
        overlap_reductions=True,
        tails=tails(setting, candidate, chain, bounds),
        wait_for_all=setting.workload.optimizer.max_grad_norm is not None,
        with_events=with_events,
        with_memory=False,
    )


def step_seconds(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> float:
    """Simulated step. Long orders: simulated at 4 and 5 rounds of p microbatches (and the remainder), then extended."""
    p, m = candidate.pp, candidate.count
    if 2 * m * candidate.num_stages <= MAX_SIMULATED_ACTIONS or m <= 5 * p + m % p:
        return run_timeline(setting, candidate, chain, bounds).makespan_s
    rest = m % p
    near, far = (
        run_timeline(setting, candidate, chain, bounds, num_microbatches=k * p + rest).makespan_s for k in (4, 5)
    )
    return far + (far - near) * (m - 5 * p - rest) / p
