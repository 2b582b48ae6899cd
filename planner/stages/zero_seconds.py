"""Seconds of a stage over any run of positions, with the collectives of ZeRO around its segments.

Parameters are gathered, and gradients reduced, by segment instance, beside the compute of its neighbours. With F_k, B_k
the forward and backward of instance k, g_k its gather, r_k its reduction, a stage i..j-1 takes

    ZeRO-3     forward    g_i + sum over k < j-1 of max(F_k, g_k+1) + F_j-1
               backward   g_j-1 + sum over k > i of max(B_k, g_k-1 + r_k) + B_i + r_i
    ZeRO-2     backward   max(B, r - F), sums over the stage: reductions pass beside all of its work
    hybrid     the sums across the groups that share a copy come once a step, like the reductions of ZeRO-0
    ZeRO-0, 1  after the stage's last backward, what is left of a queue of r_k that each joined when B_k ended
    tensor     gradients that are partial sums over the tensor axis, because the parameter is whole on it, join the same
               queue: under ZeRO-0 one all-reduce over data and tensor ranks, else one over tensor ranks of what ZeRO
               leaves of them. A parameter that is whole on the tensor axis costs what it costs on the data axis

Under ZeRO-0 to 2 the gradients of small instances travel together (costmodel/communication.py: bucket_bytes).

A stage split in two never takes less, so the table's entry of the whole chain bounds the sum over any cut. Each
backward also adds gradients to those accumulated (or packs them): memory traffic, in the weight part. On a CPU nothing
hides: collectives take the cores that compute needs. Elsewhere the stack's unhidden_fraction e of what passes beside
something longer adds to it: max(a, b) above stands for max(a, b) + e min(a, b).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ...costmodel.communication import bucket_bytes
from ...costmodel.memory import Extents, leave_early
from ..space.candidates import Candidate
from ..space.mesh_costs import MeshCosts
from .chain import Chain, interval_sums
from .host_state import microbatch_seconds
from .setting import Setting

Collective = tuple[Callable[[float], float], Callable[[float], float]]  # bytes -> seconds: of experts the second


@dataclass(frozen=True, eq=False)
class StageTables:
    """[i, j] -> seconds over positions i..j-1, for one microbatch."""

    forward_of: np.ndarray
    backward_of: np.ndarray
    accumulate_s: np.ndarray  # of each position; inside backward_of
    reduce_s: np.ndarray  # of each position, once a step (ZeRO-0 and 1, and sums across replicas)
    refresh_s: np.ndarray  # of each position, once after the optimizer (parameters split over fewer ranks than it)
    backward_s: np.ndarray  # of each position, as far as reductions pass beside it
    unhidden: float = 0.0  # share that adds of what passes beside something longer
    _reductions: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def load_of(self) -> np.ndarray:
        return self.forward_of + self.backward_of

    def reduction_left(self, start: int, stop: int) -> float:
        """Seconds from the end of the stage's last backward to the end of its reductions."""
        key = (start, stop)
        if key not in self._reductions:
            now = free = 0.0
            for k in range(stop - 1, start - 1, -1):
                now += self.backward_s[k]
                free = max(free, now) + self.reduce_s[k]
            whole_s = float(self.reduce_s[start:stop].sum())
            left_s = min(whole_s, max(0.0, free - now)) if whole_s else 0.0
            self._reductions[key] = left_s + self.unhidden * (whole_s - left_s)
        return self._reductions[key]


def stage_tables(setting: Setting, candidate: Candidate, chain: Chain) -> StageTables:
    """Cached for each chain, mesh and ZeRO stage."""
    zero = candidate.zero if candidate.state_ranks > 1 else 0
    accumulates = candidate.state_ranks > 1 or candidate.count > 1
    extents = candidate.extents
    key = (chain, candidate.mesh, zero, extents, accumulates)
    tables = setting.once(_build, key, setting, setting.mesh(candidate), chain, zero, extents, accumulates)
    if not candidate.on_host or not leave_early(candidate.state_ranks, zero, extents):
        return tables
    return setting.once(_with_gradients_away, tables, setting, candidate, chain, tables)


def _with_gradients_away(setting: Setting, candidate: Candidate, chain: Chain, tables: StageTables) -> StageTables:
    """Gradients that no other rank adds to go to the host after each microbatch, and are added up there."""
    device = setting.cost_model.slowest_memory(setting.mesh(candidate).devices)
    kinds, parts = setting.kinds, candidate.extents.gradients
    element_bytes = kinds.compute if candidate.state_ranks == 1 else kinds.reduce
    away = chain.trainable_elements - chain.summed_elements
    seconds = {e: microbatch_seconds(setting, e / parts, element_bytes, device) for e in set(away.tolist()) if e > 0}
    moves = np.array([seconds.get(elements, 0.0) for elements in away.tolist()])
    kept = chain.summed_elements / np.maximum(chain.trainable_elements, 1.0)
    accumulate = tables.accumulate_s * kept if candidate.state_ranks == 1 else tables.accumulate_s
    saved = interval_sums(tables.accumulate_s - accumulate)
    if device.kind == "cpu":
        accumulate = accumulate + moves
        backward_of = tables.backward_of - saved + interval_sums(moves)
    else:
        backward_of = np.maximum(tables.backward_of - saved, interval_sums(moves))
    return replace(tables, accumulate_s=accumulate, backward_of=backward_of, _reductions={})


def _build(
    setting: Setting, mesh: MeshCosts, chain: Chain, zero: int, extents: Extents, accumulates: bool
) -> StageTables:
    kinds, n = setting.kinds, chain.num_instances
    device = setting.cost_model.slowest_memory(mesh.devices)

    def per_position(elements: np.ndarray, seconds: Callable[[float], float]) -> np.ndarray:
        known = {value: seconds(value) for value in set(elements.tolist()) if value > 0}
        return np.array([known.get(value, 0.0) for value in elements.tolist()])

    def moving(num_bytes: float) -> float:
        return setting.cost_model.op_seconds("copy_", 0.0, num_bytes, setting.workload.precision.master, device)

    nothing, experts = np.zeros(n), chain.expert_elements
    accumulated = chain.trainable_elements if accumulates else chain.summed_elements
    accumulate = per_position(accumulated, lambda e: moving(e * kinds.moved_by_accumulation))
    inside, use = extents.optimizer, extents.parameters

    def over(kind: str, extent: int, across: bool = False) -> Collective:
        """Of bytes; those of experts go over the data ranks that have the same ones."""
        return (
            lambda b: mesh.state_seconds(kind, b, extent, across),
            lambda b: mesh.expert_seconds(kind, b, extent, across),
        )

    def each(elements: np.ndarray, element_bytes: int, parts: int, collective: Collective) -> np.ndarray:
        """elements: of all; what is left of them behind a split over `parts` ranks moves."""
        rest, of_experts = collective
        seconds = per_position((elements - experts) / parts, lambda e: rest(e * element_bytes))
        left = experts / mesh.expert_extent(parts)
        return seconds + per_position(left, lambda e: of_experts(e * element_bytes))

    def in_buckets(elements: np.ndarray, seconds: Callable[[float], float]) -> np.ndarray:
        """seconds: of a collective, by bytes."""
        total = float(elements.sum()) * kinds.reduce
        bucket = min(total, bucket_bytes(total / mesh.pp)) if zero < 3 else 0.0

        def share(held: float) -> float:
            together = max(held * kinds.reduce, bucket)
            return seconds(together) * held * kinds.reduce / together

        return per_position(elements, share)

    summed, alone = chain.summed_elements, chain.trainable_elements - chain.summed_elements
    if zero:
        rest, of_experts = over("reduce_scatter", inside)
        scatters = in_buckets(chain.trainable_elements - experts, rest) + in_buckets(experts, of_experts)
        sums = each(chain.trainable_elements, kinds.reduce, inside, over("all_reduce", inside, True))
        sums = sums + in_buckets(summed / inside, lambda b: mesh.sum_seconds(b, False))
    else:
        rest, of_experts = over("all_reduce", mesh.state_ranks)
        scatters = in_buckets(np.maximum(alone - experts, 0.0), rest) + in_buckets(experts, of_experts)
        scatters = scatters + in_buckets(summed, lambda b: mesh.sum_seconds(b, True))
        sums = nothing
    gathers = each(chain.param_elements, kinds.compute, 1, over("all_gather", use)) if zero == 3 else nothing
    refreshed = nothing
    if zero and inside > use:  # ranks with the same part of the parameters put together what each of them stepped
        collective = over("all_gather", inside) if use == 1 else over("all_gather", use, inside == mesh.state_ranks)
        refreshed = each(chain.param_elements, kinds.compute, use, collective)
    forward, backward = chain.forward_s, chain.backward_s + accumulate
    forward_of, backward_of = interval_sums(forward), interval_sums(backward)
    hides = device.kind != "cpu"
    unhidden = setting.cost_model.stack.figures.unhidden_fraction if hides else 0.0
    unpacked = chain.param_elements - (experts if mesh.expert_extent(use) == 1 else 0.0)
    unpack = per_position(unpacked, lambda e: moving(2 * e * kinds.compute)) if zero == 3 else nothing
    if zero >= 2 and not hides:
        forward, backward = forward + unpack, backward + unpack + scatters
        if zero == 3:
            forward, backward = forward + gathers, backward + gathers
        forward_of, backward_of = interval_sums(forward), interval_sums(backward)
    elif zero == 2:
        backward_of = _beside(backward_of + forward_of, interval_sums(scatters), unhidden) - forward_of
    elif zero == 3:
        forward, backward = forward + unpack, backward + unpack
        forward_of = _gathered_forward(forward, gathers, unhidden)
        backward_of = _gathered_backward(backward, gathers, scatters, unhidden)
    return StageTables(
        forward_of=forward_of,
        backward_of=backward_of,
        accumulate_s=accumulate,
        reduce_s=sums + (scatters if zero < 2 else nothing),
        refresh_s=refreshed,
        backward_s=backward if hides else nothing,
        unhidden=unhidden,
    )


def _beside(compute_s: np.ndarray, collective_s: np.ndarray, unhidden: float) -> np.ndarray:
    longer = np.maximum(compute_s, collective_s)
    return longer + unhidden * np.minimum(compute_s, collective_s) if unhidden else longer


def _gathered_forward(forward: np.ndarray, gathers: np.ndarray, unhidden: float) -> np.ndarray:
    steps = np.append(_beside(forward[:-1], gathers[1:], unhidden), 0.0)  # at k: until k+1 may begin
    between = interval_sums(steps)
    table = np.zeros_like(between)
    table[:-1, 1:] = gathers[:, None] + between[:-1, :-1] + forward[None, :]
    return table


def _gathered_backward(backward: np.ndarray, gathers: np.ndarray, scatters: np.ndarray, unhidden: float) -> np.ndarray:
    before = np.append(0.0, gathers[:-1])  # g_k-1
    steps = _beside(backward, before + scatters, unhidden)
    between = interval_sums(steps)
    table = np.zeros_like(between)
    # gather of j-1, steps of i+1..j-1, then B_i and r_i
    table[:-1, 1:] = gathers[None, :] + between[1:, 1:] + (backward + scatters)[:, None]
    return table
