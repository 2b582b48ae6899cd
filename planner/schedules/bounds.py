"""Lower bounds on the makespan of a placement, whatever the order, where activations are held to the end of W.

For each rank, with q its first stage, `arrival` the earliest that anything can reach a stage, k the most chunk
activations that its memory holds:

    busy    arrival of its first forward + all its work
    reach   until its earliest backward can start only forwards run, no more than k of them; after its last input
    gradient
            the stages below q must still run theirs, and the weight gradients left over, again at most k of them
    turn    m microbatches each live on the rank for at least one way there and back, at most `limit` bytes at once
"""

from __future__ import annotations

from collections.abc import Sequence

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
