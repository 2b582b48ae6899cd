"""Lower bounds on the makespan of a placement, whatever the order, where activations are held to the end of W.

For each rank, with q its first stage, `arrival` the earliest that anything can reach a stage, k the most chunk
activations that its memory holds:

    busy    arrival of its first forward + all its work
    reach   until its earliest backward can start only forwards run, no more than k of them; after its last input
    gradient
            the stages below q must still run theirs, and the weight gradients left over, again at most k of them
    turn    m microbatches each live on the rank for at least one way there and back, at most `limit` bytes at once

Where activations may be let go, busy and reach hold with memory for all, and so does turn with what may be saved: in T
seconds the rank has T - arrival - work left to recompute in, and T for the copies out. What saves most byte-seconds for
its time goes first (a linear program whose optimum is greedy: a stage may do both).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .problem import PipelineProblem


def earliest_arrivals(problem: PipelineProblem) -> tuple[list[float], list[float]]:
    """Earliest start of each stage's forward and of its backward, for one microbatch alone."""
    stages, last = problem.stages, problem.num_stages - 1
    forward, backward = [0.0] * (last + 1), [0.0] * (last + 1)
    for stage in range(last):
        forward[stage + 1] = forward[stage] + stages[stage].forward_s + problem.forward_hop_s(stage)
    backward[last] = forward[last] + stages[last].forward_s
    for stage in range(last, 0, -1):
        backward[stage - 1] = backward[stage] + stages[stage].backward_input_s + problem.backward_hop_s(stage)
    return forward, backward


def _heaviest(seconds: Sequence[float], copies: int, at_most: int) -> float:
    """Greatest sum of at_most values, each available `copies` times."""
    total, left = 0.0, at_most
    for value in sorted(seconds, reverse=True):
        taken = min(left, copies)
        total += taken * value
        left -= taken
    return total


def lower_bound(problem: PipelineProblem) -> float:
    """Seconds. Infinite where some rank cannot hold one microbatch. Backwards may be split freely."""
    if problem.offers:
        turns = (_turn_with_offers(problem, rank) for rank in range(problem.num_ranks))
        unlimited = replace(problem.keeping_all(), memory_limit=(float("inf"),) * problem.num_ranks)
        return max(lower_bound(unlimited), *turns)
    stages, m = problem.stages, problem.num_microbatches
    arrival_f, arrival_i = earliest_arrivals(problem)
    below = [0.0] * (problem.num_stages + 1)  # from the end of a stage's input gradient to the end of stage 0's
    for stage in range(1, problem.num_stages):
        below[stage] = below[stage - 1] + problem.backward_hop_s(stage) + stages[stage - 1].backward_input_s
    best = 0.0
    for rank, limit in enumerate(problem.memory_limit):
        own = problem.stages_of(rank)
        if not own:
            continue
        if sum(stages[s].activation_bytes for s in own) > limit:
            return float("inf")
        first = min(own)
        forwards = [stages[s].forward_s for s in own]
        inputs = sum(stages[s].backward_input_s for s in own)
        weights = [stages[s].backward_weight_s for s in own]
        smallest = min(stages[s].activation_bytes for s in own)
        held = m * len(own) if smallest <= 0 or limit == float("inf") else min(m * len(own), int(limit / smallest))
        early, late = _heaviest(forwards, m, held), _heaviest(weights, m, held)
        reach = max(min(arrival_i[s] for s in own), arrival_f[first] + early)
        reach += m * (sum(forwards) + inputs + sum(weights)) - early - late
        best = max(best, reach + max(late, below[first] + stages[0].backward_weight_s))
        best = max(best, arrival_f[first] + m * (sum(forwards) + inputs + sum(weights)))
        if limit < float("inf"):
            lives = (arrival_i[s] + stages[s].backward_s - arrival_f[s] for s in own)
            turn = sum(life * stages[s].activation_bytes for life, s in zip(lives, own, strict=True))
            best = max(best, arrival_f[first] + m * turn / limit)
    return best


def _turn_with_offers(problem: PipelineProblem, rank: int) -> float:
    stages, m = problem.stages, problem.num_microbatches
    limit, own = problem.memory_limit[rank], problem.stages_of(rank)
    if not own or limit == float("inf"):
        return 0.0
    least = 0.0  # of the microbatch's activations on the stages before
    for s in own:
        if least + stages[s].activation_bytes > limit:
            return float("inf")
        least += stages[s].activation_bytes - max(stages[s].recompute_bytes, stages[s].offload_bytes)
    arrival_f, arrival_i = earliest_arrivals(problem)
    begin_s, work_s = arrival_f[min(own)], m * problem.work_s[rank]
    byte_s, again, away = 0.0, [], []
    for s in own:
        stage, life_s = stages[s], arrival_i[s] + stages[s].backward_s - arrival_f[s]
        byte_s += m * life_s * stage.activation_bytes
        out_s = life_s - stage.forward_s - stage.backward_s
        again.append((m * max(out_s, 0.0) * stage.recompute_bytes, m * stage.forward_s))
        away.append((m * max(out_s - 2 * stage.offload_s, 0.0) * stage.offload_bytes, m * stage.offload_s))

    def holds(end_s: float) -> bool:
        saved = _most(again, end_s - begin_s - work_s) + _most(away, end_s)
        return byte_s - saved <= limit * (end_s - begin_s)

    low, high = begin_s + work_s, begin_s + work_s + sum(seconds for _, seconds in again) + byte_s / limit
    if holds(low):
        return low
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low


def _most(offers: Iterable[tuple[float, float]], seconds: float) -> float:
    """Greatest saving in so much time. offers: (saving, seconds), to be taken in part or in full."""
    saved = 0.0
    for saving, needed_s in sorted(offers, key=lambda offer: -offer[0] / max(offer[1], 1e-30)):
        saved += saving * min(1.0, max(0.0, seconds) / max(needed_s, 1e-30))
        seconds -= needed_s
    return saved
