"""What is proven of the whole space: the least bound over all candidates that may hold a plan.

Where the schedule is free, a candidate stands for every order on its mesh and microbatch, published or synthesized, so
its bound is that of any order (step_time.lower_bound), under the least recomputation with which one microbatch at a
time fits on the mean rank: a synthesized order may recompute or offload single activations. Where the schedule is
forced, the bounds are those that the search found.

Placements that split more of the parameters than the fastest ones do step less of them, and sum less over the tensor
axis: optimizer and ZeRO traffic are counted as if the tensor axis split all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...plans.axes import searched_axes, stage_axes, tensor_axes
from ..memory.options import Ladder
from ..space.candidates import MAX_PP, Candidate
from ..stages.chain import Between, Chain
from .any_order import held_bound, mean_wait
from .scoring import least_of_each, mean_fits
from .stage_recompute import rungs_of
from .state import MemoryPool, SearchState
from .step_time import least_tail, lower_bound, path_seconds

MAX_TIGHTENED = 4
WHOLE = 0.999  # of what the tensor axis could split


def base_of(candidate: Candidate) -> Candidate:
    """What all orders on the candidate's mesh and microbatch have in common."""
    return replace(candidate, schedule="1f1b", virtual_stages=1)


def any_order_bound(state: SearchState, candidate: Candidate, ladders: Sequence[Ladder]) -> float:
    """Seconds that no plan on the candidate's mesh and microbatch beats, under any order; infinite where none fits."""
    base, bound_s = base_of(candidate), math.inf
    for ladder, least in least_of_each(state, base, ladders, in_flight=1):
        seconds = lower_bound(state.setting, base, _split_least(state, base, least), any_order=True)
        if not state.forced.offload and state.may_win(seconds):
            rungs = tuple(_split(state, base, chain) for chain in rungs_of(state.setting, ladder.every_step))
            tail_s = least_tail(state.setting, base, rungs[0])
            seconds = max(seconds, held_bound(state.setting, base, rungs, tail_s))
        bound_s = min(bound_s, seconds * ladder.solution.proven_share)
    return bound_s


def own_order_bound(state: SearchState, candidate: Candidate, least: Sequence[tuple[Ladder, Chain | Between]]) -> float:
    """The same under the candidate's own schedule, before its cuts are known. least: scoring.least_of_each of it."""
    found = [math.inf]
    for ladder, chain in least:
        seconds = lower_bound(state.setting, candidate, _split_least(state, candidate, chain))
        found.append(seconds * ladder.solution.proven_share)
    return min(found)


def _split_least(state: SearchState, candidate: Candidate, least: Chain | Between) -> Chain | Between:
    if isinstance(least, Chain):
        return _split(state, candidate, least)
    return replace(least, lower=_split(state, candidate, least.lower), upper=_split(state, candidate, least.upper))


def _split(state: SearchState, candidate: Candidate, chain: Chain) -> Chain:
    """The chain, with the parameters that axes which split all of them leave."""
    ranks = candidate.tensor_ranks * candidate.mesh.expert_ranks
    return chain if ranks == 1 else state.setting.once(_split_over, (chain, ranks), state, ranks, chain)


def _split_over(state: SearchState, ranks: int, chain: Chain) -> Chain:
    held = chain.param_elements.sum(), chain.trainable_elements.sum()
    shares = [min(1.0, least / ranks / max(have, 1.0)) for least, have in zip(_elements(state), held, strict=True)]
    if min(shares) > WHOLE and not chain.summed_elements.any() and not chain.expert_elements.any():
        return chain
    return replace(
        chain,
        summed_elements=np.zeros_like(chain.summed_elements),
        expert_elements=np.zeros_like(chain.expert_elements),
        param_elements=chain.param_elements * shares[0],
        trainable_elements=chain.trainable_elements * shares[1],
        repeats=(),
    )


def _elements(state: SearchState) -> tuple[float, float]:
    """Parameters of the model, and the trainable ones among them."""
    params = state.setting.graph.params.values()
    return sum(math.prod(dims) for dims, _, _ in params), sum(math.prod(dims) for dims, _, trains in params if trains)


def ideal_seconds(state: SearchState, candidate: Candidate, schedule: str) -> float:
    """Step without collectives but those that send tokens to experts, every op as efficient as on the whole batch.
    schedule: '' for any."""
    parts = candidate.mesh.ranks_per_stage * candidate.count
    forward_s, backward_s = state.whole_forward_s / parts, state.whole_backward_s / parts
    if not len(forward_s):
        return 0.0
    once_s = np.array([forward_s.sum(), backward_s.sum()])
    if candidate.mesh.expert_ranks > 1:
        once_s = once_s + state.sharder.dispatch_seconds(candidate.mesh, candidate.local_batch)
    path = path_seconds(schedule, float(once_s[0]), float(once_s[1]), candidate.pp, candidate.count)
    work = candidate.count * float(once_s.sum()) / candidate.pp
    return max(path, work + float(mean_wait(forward_s, backward_s, candidate, any_order=not schedule).sum()))


def learn_any_order(state: SearchState, base: Candidate, pool: MemoryPool) -> None:
    bound_s = any_order_bound(state, base, pool.ladders)
    state.any_order_s[base] = max(ideal_seconds(state, base, ""), bound_s)


def certified_bound(state: SearchState, step_s: float, *, tighten: bool) -> float:
    """Seconds that no plan in the searched space beats; step_s: of the plan found. tighten: solve a few meshes that
    were passed over, where they alone keep the bound low."""
    if state.forced.schedule is not None:
        return min([step_s, *(_bound(state, candidate) for candidate in state.candidates)])
    bounds = {base: _any_order(state, base) for base in {base_of(candidate) for candidate in state.candidates}}
    for _ in range(MAX_TIGHTENED if tighten else 0):
        lowest = min(bounds, key=lambda base: (bounds[base], base.local_batch))
        if lowest in state.any_order_s or bounds[lowest] >= step_s:
            break
        solution = state.solve(lowest)
        if solution is None:
            state.any_order_s[lowest] = math.inf
        else:
            pool = state.pool(lowest, solution)
            if not mean_fits(state, lowest, pool.ladders[0], in_flight=1):
                state.widen(pool)
            learn_any_order(state, lowest, pool)
        bounds[lowest] = state.any_order_s[lowest]
    return min(step_s, *bounds.values())


def not_searched(state: SearchState) -> list[str]:
    """In few words, what a plan could have that none of the candidates has."""
    forced, cluster = state.forced, state.setting.cluster
    cut = any(candidate.mesh.sequence_ranks > 1 for candidate in state.candidates)
    left_out = ["other orders of the axes"] if cut else ["context axes", "other orders of the axes"]
    for axis in searched_axes():
        widest = max(candidate.mesh.size(axis) for candidate in state.candidates)
        if axis in tensor_axes() and not forced.sizes and widest < cluster.num_devices:
            left_out.append(f"{axis} above {widest}")
    for axis in stage_axes():
        if cluster.num_devices > MAX_PP and forced.size(axis) is None:
            left_out.append(f"{axis} above {MAX_PP}")
    if any(outcome.assumed for outcome in state.outcomes.values()):
        left_out.append("larger microbatches than one that does not fit")
    if not forced.offload and cluster.is_accelerated:
        left_out.append("offload")
    return left_out


def _bound(state: SearchState, candidate: Candidate) -> float:
    outcome = state.outcomes.get(candidate)
    return ideal_seconds(state, candidate, candidate.schedule) if outcome is None else outcome.bound_s


def _any_order(state: SearchState, base: Candidate) -> float:
    found = state.any_order_s.get(base)
    return ideal_seconds(state, base, "") if found is None else found
