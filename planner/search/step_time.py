"""One candidate: a lower bound on its step, its best cuts, its memory and its simulated step.

The bound is the greater of two that every order and every cut must pay. p pipeline ranks, m microbatches; F and B the
forward and backward of one microbatch through all positions (stages/zero_seconds.py), T = F + B:

    work   m T / p + fill + tail or drain          some rank does at least the mean, and its own tail after it; before
                                                   and after, it waits for others (any_order.py)
    path   gpipe        T + (m-1) T / p             the greatest stage is at least the mean
           1f1b         T + ((m-1) B + (m - min(m, p)) F) / p     cuts.pipeline_cost, averaged over stages
           interleaved  T
           and, where clipping makes all ranks wait for each other, the mean optimizer step and gather

The tail of work is the least reduction left of any position, the mean rank's optimizer step and its gathers after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...costmodel.constants import assumed
from ...costmodel.memory import leave_early
from ...costmodel.stage_times import Hop, StageTimes, Tail
from ...costmodel.timeline import Timeline
from ...schedules.schedule import PipelineSchedule
from ..memory.limits import fits
from ..memory.rank_bytes import (
    cached_schedule,
    interval_bytes,
    mean_bytes,
    placement_of,
    placements_of,
    profile_table,
    stage_activation,
    stages_by_rank,
)
from ..space.candidates import Candidate
from ..space.mesh_costs import MeshCosts
from ..stages.chain import Between, Chain
from ..stages.cuts import Cuts, WindowCuts, around_of, best_cuts, improve_cuts, pipeline_cost, windows
from ..stages.host_state import optimizer_seconds
from ..stages.setting import Setting
from ..stages.zero_seconds import StageTables, stage_tables
from .any_order import mean_wait

# Orders longer than this are simulated at two smaller microbatch counts and extended along their steady state.
MAX_SIMULATED_ACTIONS = 12_000
LEVELLED = 1.1  # of a rank's work: more than level_ranks was seen to take off


def busiest_path_s(setting: Setting, candidate: Candidate, chain: Chain, work_s: float) -> float:
    """Seconds at least where a rank works so long a microbatch or longer. chain: of the least recomputation.

    pipeline_cost of such a stage: forwards are no greater share of its work than of any position's."""
    c, m = candidate, candidate.count
    if c.num_stages > c.pp or len(stages_by_rank(c.schedule, c.pp, c.virtual_stages)) > 1:
        return m * work_s
    once_s = float((chain.forward_s + chain.backward_s).sum()) * min(setting.mesh(candidate).scales)
    if c.schedule == "gpipe":
        return max(m * work_s, once_s + (m - 1) * work_s)
    if c.schedule != "1f1b":
        return m * work_s
    forward = float((chain.forward_s / np.maximum(chain.forward_s + chain.backward_s, 1e-30)).max())
    return max(m * work_s, once_s + (m - 1 - (min(m, c.pp) - 1) * forward) * work_s)


def path_seconds(schedule: str, forward_s: float, backward_s: float, num_ranks: int, num_microbatches: int) -> float:
    """path of the bound above, or the work without its tail where that is more. schedule: "" for any."""
    p, m, once = num_ranks, num_microbatches, forward_s + backward_s
    work = m * once / p
    if schedule == "gpipe":
        return max(work, once + (m - 1) * once / p)
    if schedule == "1f1b":
        return max(work, once + ((m - 1) * backward_s + (m - min(m, p)) * forward_s) / p)
    return max(work, once)


class _Once(NamedTuple):
    """Forward and backward of one microbatch through all positions, were all ranks the fastest; of the step's end, the
    mean optimizer step with its gathers and the least reduction left of any position."""

    forward_s: float
    backward_s: float
    step_s: float
    reduce_s: float


def _once_through(setting: Setting, candidate: Candidate, chain: Chain | Between) -> _Once:
    """The same for all candidates that share their tables."""
    if isinstance(chain, Between):
        lower, upper = (_once_through(setting, candidate, one) for one in (chain.lower, chain.upper))
        plain_s = [_plain_backward(setting, candidate, one) for one in (chain.lower, chain.upper)]
        # what hides behind ZeRO's collectives need not grow with the share
        return lower._replace(
            backward_s=max(lower.backward_s, plain_s[0] + chain.share * (plain_s[1] - plain_s[0])),
            step_s=min(lower.step_s, upper.step_s),
            reduce_s=min(lower.reduce_s, upper.reduce_s),
        )
    tables = stage_tables(setting, candidate, chain)
    return setting.once(_once_of, tables, setting, candidate, chain, tables)


def _plain_backward(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """Seconds of a backward through all positions without ZeRO's collectives, were all ranks the fastest."""
    tables = stage_tables(setting, candidate, chain)
    return float((chain.backward_s + tables.accumulate_s).sum()) * min(setting.mesh(candidate).scales)


def _once_of(setting: Setting, candidate: Candidate, chain: Chain, tables: StageTables) -> _Once:
    mesh, n, p = setting.mesh(candidate), chain.num_instances, candidate.pp
    scale = min(mesh.scales)
    stepped = chain.stepped(0, n, candidate.extents.optimizer, candidate.mesh.expert_ranks) / p
    fastest = setting.cost_model.fastest_memory(mesh.devices)
    return _Once(
        float(tables.forward_of[0, n]) * scale,
        float(tables.backward_of[0, n]) * scale,
        optimizer_seconds(setting, candidate, stepped, 0.0, fastest) + float(tables.refresh_s.sum()) / p,
        float(tables.reduce_s.min()),
    )


def lower_bound(setting: Setting, candidate: Candidate, chain: Chain | Between, *, any_order: bool = False) -> float:
    """Seconds that no cut of this candidate beats; any_order: under no other schedule either. See the module's
    docstring."""
    p, m = candidate.pp, candidate.count
    forward_s, backward_s, step_s, reduce_s = _once_through(setting, candidate, chain)
    path = path_seconds("" if any_order else candidate.schedule, forward_s, backward_s, p, m)
    waits = setting.workload.optimizer.waits_for_norm
    work = m * (forward_s + backward_s) / p
    fastest = chain.lower if isinstance(chain, Between) else chain
    filled, drained = _waits(setting, candidate, fastest, any_order)
    return max(work + filled + max(reduce_s + step_s, drained), path + (step_s if waits else 0.0))


def least_tail(setting: Setting, candidate: Candidate, chain: Chain) -> float:
    """Of the mean rank, seconds after its last backward at least."""
    _, _, step_s, reduce_s = _once_through(setting, candidate, chain)
    return step_s + reduce_s


def _waits(setting: Setting, candidate: Candidate, chain: Chain, any_order: bool) -> tuple[float, float]:
    """mean_wait, were all ranks the fastest."""
    if candidate.pp == 1:
        return 0.0, 0.0
    key = (chain, candidate.pp, any_order, candidate.schedule, candidate.mesh)
    return setting.once(_waits_of, key, setting, candidate, chain, any_order)


def _waits_of(setting: Setting, candidate: Candidate, chain: Chain, any_order: bool) -> tuple[float, float]:
    filled, drained = mean_wait(chain.forward_s, chain.backward_s, candidate, any_order=any_order)
    scale = min(setting.mesh(candidate).scales)
    return float(filled) * scale, float(drained) * scale


def estimate(setting: Setting, candidate: Candidate, chain: Chain | Between, work_s: float = 0.0) -> float:
    """lower_bound, for interleaving with the least share of the bubble that equal stages have: (p-1) T / (p v).

    work_s: of the busiest rank at least."""
    bound = lower_bound(setting, candidate, chain)
    if candidate.virtual_stages == 1 or candidate.schedule == "gpipe":
        return bound
    p, v = candidate.pp, candidate.virtual_stages
    once_s = sum(_once_through(setting, candidate, chain)[:2])
    bubble = assumed("interleaved_bubble_fraction") * (p - 1) / v
    return max(bound, max(candidate.count * once_s / p, work_s) + bubble * once_s / p)


def levelled_estimate(setting: Setting, candidate: Candidate, load: np.ndarray) -> float:
    """What cuts may come to once level_ranks has moved them. load: of each stage, as they lie."""
    return loads_bound(setting, candidate, load) / (1.0 if candidate.virtual_stages == 1 else LEVELLED)


def find_cuts(setting: Setting, candidate: Candidate, chain: Chain, *, ignore_memory: bool = False) -> Cuts | None:
    """Best cuts that fit in memory (see stages/cuts.py). None: no cut fits (with several chunks on a rank: none was
    found).
    """
    n, num_stages = chain.num_instances, candidate.num_stages
    mesh = setting.mesh(candidate)
    tables = stage_tables(setting, candidate, chain)
    if len(stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)) > 1:
        return _find_interleaved_cuts(setting, candidate, chain, ignore_memory)
    in_flight = profile_table(candidate.schedule, candidate.pp, candidate.count, 1).max(axis=1)[:, 0]
    limits = setting.limits(candidate)
    held = interval_bytes(setting, candidate, chain)
    if not ignore_memory and mean_bytes(setting, candidate, chain) > limits.max():
        return None

    around = around_of(tables.load_of, min(mesh.scales))

    def cost(stage: int) -> np.ndarray:
        seconds = pipeline_cost(
            tables.forward_of,
            tables.backward_of,
            candidate.count,
            stage,
            num_stages,
            schedule=candidate.schedule,
            scale=mesh.scales[stage],
            around=around,
        )
        if ignore_memory:
            return seconds
        return np.where(held.with_in_flight(int(in_flight[stage])) <= limits[stage], seconds, np.inf)

    return best_cuts(cost, num_stages, n, secondary(mesh, chain))


def secondary(mesh: MeshCosts, chain: Chain) -> Callable[[int], np.ndarray]:
    """Transfers over the cut at the end of a stage, then evenness of the loads."""
    load = chain.forward_of + chain.backward_of
    whole = max(float(load[0, -1]), 1e-30)
    even = load * load / whole * 1e-3
    hop = mesh.hop(0, 1, 1e9, 1e9) if mesh.pp > 1 else Hop()
    cut = chain.cut_forward_bytes * hop.forward_occupancy_s / 1e9
    cut = cut + chain.cut_backward_bytes * hop.backward_occupancy_s / 1e9

    both = even + cut[None, :]
    return lambda stage: both


def _find_interleaved_cuts(setting: Setting, candidate: Candidate, chain: Chain, ignore_memory: bool) -> Cuts | None:
    """Even chunks first; where they do not fit, chunks that each keep to their share of the rank's memory, then chunks
    of least memory."""
    p, v, n = candidate.pp, candidate.virtual_stages, chain.num_instances
    mesh, limits = setting.mesh(candidate), setting.limits(candidate)
    load = stage_tables(setting, candidate, chain).load_of
    loads = {scale: load * scale for scale in set(mesh.scales)}
    second = secondary(mesh, chain)
    place, order = placement_of(candidate), stages_by_rank(candidate.schedule, p, v)
    chunk_of = {int(stage): chunk for chunk, row in enumerate(order[:v]) for stage in row}
    key = (chain, place, candidate.mesh, v, candidate.zero, candidate.extents)
    cuts = setting.once(best_cuts, key, lambda stage: loads[mesh.scales[place[stage]]], p * v, n, second)
    if cuts is None or ignore_memory or fits(setting, candidate, chain, cuts.bounds):
        return cuts
    held = interval_bytes(setting, candidate, chain)
    if mean_bytes(setting, candidate, chain) > limits.max():
        return None
    in_flight = profile_table(candidate.schedule, p, candidate.count, v).max(axis=1)
    held_at_once = np.array([in_flight[place[stage], chunk_of[stage]] for stage in range(p * v)])
    rooms = np.array([(limits[rank] - held.reserve) / len(order) + held.reserve for rank in place])
    shares = held.windows(held_at_once) / rooms[:, None, None]
    by_share = WindowCuts(shares, windows(second(0), p * v))

    def by_load(stage: int) -> np.ndarray:
        """Of chunks that each keep to their share."""
        share = held.with_in_flight(int(held_at_once[stage])) / rooms[stage]
        return np.where(share <= 1.0, loads[mesh.scales[place[stage]]], np.inf)

    if by_share.bottleneck <= 1.0:
        cuts = best_cuts(by_load, p * v, n, second)
        if cuts is not None and fits(setting, candidate, chain, cuts.bounds):
            return cuts
    cuts = by_share.cuts()
    return cuts if cuts is not None and fits(setting, candidate, chain, cuts.bounds) else None


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
    return setting.once(_unevenness, (chain, num_stages), chain, num_stages)


def _unevenness(chain: Chain, num_stages: int) -> float:
    load = chain.forward_of + chain.backward_of
    cuts = best_cuts(lambda stage: load, num_stages, chain.num_instances)
    return np.inf if cuts is None else cuts.bottleneck * num_stages / max(float(load[0, -1]), 1e-30)


def stage_loads(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> np.ndarray:
    """Of each stage, seconds of a forward and a backward, were its rank the one that tables are made for."""
    edges = np.asarray(bounds)
    return stage_tables(setting, candidate, chain).load_of[edges[:-1], edges[1:]]


def loop_bound(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> float:
    """loads_bound of these cuts."""
    return loads_bound(setting, candidate, stage_loads(setting, candidate, chain, bounds))


def loads_bound(setting: Setting, candidate: Candidate, load: np.ndarray) -> float:
    """Seconds that stages of these loads take at least, whatever the order: greatest over the ranks of the first
    microbatch's way to it and the last one's way on from it, and its own work."""
    p, v = candidate.pp, candidate.virtual_stages
    order, scales = stages_by_rank(candidate.schedule, p, v), np.array(setting.mesh(candidate).scales)
    directions = placements_of(candidate)
    bound_s, work_s = np.full(p, np.inf), np.zeros(p)
    for k, place in enumerate(map(np.array, directions)):
        times = load * scales[place]
        before = np.concatenate([[0.0], np.cumsum(times)[:-1]])
        bound_s = np.minimum(bound_s, before[order[k * v]])
        count = (candidate.count + (k == 0)) // 2 if len(directions) == 2 else candidate.count
        work_s += count * np.bincount(place, weights=times, minlength=p)
    return float((bound_s + work_s).max())


def order_bound(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> float:
    """loop_bound, and the least tail of any rank."""
    tail_s = min(tail.optimizer_s + tail.gather_s for tail in tails(setting, candidate, chain, bounds))
    return loop_bound(setting, candidate, chain, bounds) + tail_s


def stage_times(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[StageTimes]:
    mesh, tables, directions = (
        setting.mesh(candidate),
        stage_tables(setting, candidate, chain),
        placements_of(candidate),
    )
    result = []
    for stage in range(candidate.num_stages):
        i, j = bounds[stage], bounds[stage + 1]
        scale = max(mesh.scales[place[stage]] for place in directions)
        prologue_s = sum(chain.prologue_s[index] for index in chain.prologue_of(i, j))
        forward, backward = float(tables.forward_of[i, j]), float(tables.backward_of[i, j])
        weight = float((chain.backward_weight_s + tables.accumulate_s)[i:j].sum())
        own_forward = float((chain.forward_s - chain.forward_comm_s)[i:j].sum())
        own_backward = float((chain.backward_s - chain.backward_comm_s + tables.accumulate_s)[i:j].sum())
        faster = (1.0 - scale) * np.array([own_forward, own_backward - weight, weight])
        result.append(
            StageTimes(
                forward_s=forward + prologue_s - faster[0],
                backward_input_s=backward - weight - faster[1],
                backward_weight_s=weight - faster[2],
                forward_comm_s=max(0.0, forward - own_forward),  # a difference of sums may be below zero by rounding
                backward_comm_s=max(0.0, backward - own_backward),
                activation_bytes=int(stage_activation(chain, i, j)),
                reduce_s=tables.reduction_left(i, j) + _copies_sum_s(setting, candidate, chain, i, j, stage),
            )
        )
    return result


def _copies_sum_s(setting: Setting, candidate: Candidate, chain: Chain, i: int, j: int, stage: int) -> float:
    """Of the gradients of a stage that two directions hold on two ranks: each sends the other what it has."""
    first, *others = (place[stage] for place in placements_of(candidate))
    if others in ([], [first]):
        return 0.0
    held = chain.stepped(i, j, candidate.extents.optimizer, candidate.mesh.expert_ranks)
    num_bytes = held * setting.kinds.reduce
    hop = setting.mesh(candidate).hop(first, others[0], num_bytes, 0.0)
    return float(hop.forward_latency_s + hop.forward_occupancy_s)


def tails(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[Tail]:
    """Optimizer step, the gathers after it, and sums over the stages that share a parameter."""
    mesh, tables, p = setting.mesh(candidate), stage_tables(setting, candidate, chain), candidate.pp
    parts, place = candidate.extents.optimizer, placement_of(candidate)
    elements, late, gather_s = [0.0] * p, [0.0] * p, [0.0] * p
    early = leave_early(candidate.state_ranks, candidate.zero, candidate.extents)
    for stage in range(candidate.num_stages):
        i, j = bounds[stage], bounds[stage + 1]
        for rank in {row[stage] for row in placements_of(candidate)}:
            stepped = chain.stepped(i, j, parts, candidate.mesh.expert_ranks)
            elements[rank] += stepped
            late[rank] += chain.summed_of[i, j] / parts if early else stepped
            gather_s[rank] += float(tables.refresh_s[i:j].sum())
    rank_of = np.repeat(place, np.diff(bounds))
    for repeat in chain.repeats:
        ends = int(rank_of[repeat.earlier]), int(rank_of[repeat.later])
        if ends[0] != ends[1]:
            hop = mesh.hop(*ends, repeat.trainable / parts * setting.kinds.reduce, 0.0)
            for rank in ends:
                gather_s[rank] += 2 * (hop.forward_latency_s + hop.forward_occupancy_s)
    return [
        Tail(optimizer_seconds(setting, candidate, elements[r], late[r], mesh.devices[r]), gather_s[r])
        for r in range(p)
    ]


def hops(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> list[Hop]:
    """Between each stage and the next."""
    mesh, place = setting.mesh(candidate), placement_of(candidate)
    forward, backward = chain.cut_forward_bytes, chain.cut_backward_bytes
    return [
        mesh.hop(place[s], place[s + 1], forward[bounds[s + 1]], backward[bounds[s + 1]])
        for s in range(candidate.num_stages - 1)
    ]


def run_timeline(
    setting: Setting,
    candidate: Candidate,
    chain: Chain,
    bounds: tuple[int, ...],
    *,
    schedule: PipelineSchedule | None = None,
    stages: Sequence[StageTimes] | None = None,
    with_events: bool = False,
    with_memory: bool = False,
) -> Timeline:
    """schedule, stages: in place of the candidate's and the chain's.
    with_memory: also the most activation bytes at once on each rank."""
    if schedule is None:
        schedule = _own_schedule(candidate, candidate.count)
    return schedule.simulate(
        stage_times(setting, candidate, chain, bounds) if stages is None else stages,
        hops(setting, candidate, chain, bounds),
        tails=tails(setting, candidate, chain, bounds),
        wait_for_all=setting.workload.optimizer.waits_for_norm,
        with_events=with_events,
        with_memory=with_memory,
    )


def _own_schedule(candidate: Candidate, num_microbatches: int) -> PipelineSchedule:
    return cached_schedule(candidate.schedule, candidate.pp, num_microbatches, candidate.virtual_stages)


def step_seconds(setting: Setting, candidate: Candidate, chain: Chain, bounds: tuple[int, ...]) -> float:
    """Simulated step. Long orders: simulated at 4 and 5 rounds of p microbatches (and the remainder), then extended."""
    p, m = candidate.pp, candidate.count
    if 2 * m * candidate.num_stages <= MAX_SIMULATED_ACTIONS or m <= 5 * p + m % p:
        return run_timeline(setting, candidate, chain, bounds).makespan_s
    rest = m % p
    near, far = (
        run_timeline(setting, candidate, chain, bounds, schedule=_own_schedule(candidate, k * p + rest)).makespan_s
        for k in (4, 5)
    )
    return far + (far - near) * (m - 5 * p - rest) / p
