"""Families of targets for list scheduling: building blocks with a few numbers, drawn at random and then mutated.

A block lets a microbatch pass down and up the stages; each chunk (one stage on every rank) has its own pace, as a
multiple of what a stage takes, and its own pause before the next chunk. Paces and pauses are what the published blocks
differ in: V-Min, V-Half and V-ZB (Qi et al., arXiv:2405.15362) are points of this family.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from ..problem import PipelineProblem

BY_START = -1.0
THRIFTS = (BY_START, BY_START, 0.0, 0.3, 5.0)
NEVER_FIRST = 1e6  # periods: this kind of action only where nothing else is ready


@dataclass(frozen=True)
class Block:
    """Multiples of stage times for paces, of the period for pauses, delays and leads. One entry for each chunk.

    thrift: a weight gradient runs only where its rank would otherwise have been idle for that many periods longer than
    any other rank; BY_START: where its start says.
    """

    forward_pace: tuple[float, ...]
    backward_pace: tuple[float, ...]
    forward_pause: tuple[float, ...]
    backward_pause: tuple[float, ...]
    weight_delay: tuple[float, ...]
    period: float = 1.0
    backward_lead: float = 0.0  # all backwards earlier by this
    patience: float = 0.0
    in_order: bool = False  # memory goes to forwards strictly by their starts
    thrift: float = BY_START


def block_starts(problem: PipelineProblem, block: Block) -> tuple[list[list[float]], float]:
    """Starts of microbatch 0, [kind][stage] with kinds F, I, W, and the period."""
    stages, num_stages, p = problem.stages, problem.num_stages, problem.num_ranks
    chunks = num_stages // p
    period_s = max(problem.work_s)
    forward, backward, weight = [0.0] * num_stages, [0.0] * num_stages, [0.0] * num_stages
    now = 0.0
    for stage in range(num_stages):
        chunk = min(stage // p, chunks - 1)
        forward[stage] = now
        hop_s = problem.forward_hop_s(stage) if stage < num_stages - 1 else 0.0
        now += (stages[stage].forward_s + hop_s) * block.forward_pace[chunk]
        if (stage + 1) % p == 0:
            now += block.forward_pause[chunk] * period_s
    for stage in range(num_stages - 1, -1, -1):
        chunk = min(stage // p, chunks - 1)
        backward[stage] = now - block.backward_lead * period_s
        hop_s = problem.backward_hop_s(stage) if stage else 0.0
        now += (stages[stage].backward_input_s + hop_s) * block.backward_pace[chunk]
        if stage % p == 0:
            now += block.backward_pause[chunk] * period_s
        weight[stage] = backward[stage] + stages[stage].backward_input_s + block.weight_delay[chunk] * period_s
    return [forward, backward, weight], period_s * block.period


def draw_block(chunks: int, rng: random.Random) -> Block:
    def pace() -> float:
        return rng.uniform(0.6, 2.2) if rng.random() < 0.8 else 1.0

    def pause() -> float:
        return rng.uniform(-0.3, 0.6) if rng.random() < 0.5 else 0.0

    def delay() -> float:
        return rng.choice((0.0, 0.3, 0.7, 1.0, 2.0, 4.0, 8.0, NEVER_FIRST, rng.uniform(0.0, 3.0)))

    def of(draw: object) -> tuple[float, ...]:
        return tuple(draw() for _ in range(chunks))  # type: ignore[operator]

    return Block(
        of(pace),
        of(pace),
        of(pause),
        of(pause),
        of(delay),
        period=rng.choice((1.0, 1.0, 1.1, 1.2, 1.5)),
        backward_lead=rng.choice((0.0, 0.0, 0.0, 50.0, -50.0)),
        patience=rng.choice((0.0, 0.0, 0.5, 1.0, 1.5)),
        in_order=rng.random() < 0.6,
        thrift=rng.choice(THRIFTS),
    )


def mutate_block(block: Block, rng: random.Random) -> Block:
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(
            ("forward_pace", "backward_pace", "forward_pause", "backward_pause", "weight_delay", "period", "patience")
        )
        value = getattr(block, name)
        if isinstance(value, tuple):
            index = rng.randrange(len(value))
            moved = value[index] * rng.uniform(0.8, 1.25) + rng.gauss(0, 0.05)
            value = (*value[:index], moved, *value[index + 1 :])
        else:
            value = max(0.5 if name == "period" else 0.0, value * rng.uniform(0.9, 1.1) + rng.gauss(0, 0.03))
        block = replace(block, **{name: value})
    return block


def plain_blocks(chunks: int) -> list[Block]:
    """Where every search starts: input gradients first, weight gradients soon, late or only where nothing else is
    ready."""
    ones, zeros = (1.0,) * chunks, (0.0,) * chunks
    return [
        Block(ones, ones, zeros, zeros, (delay,) * chunks, backward_lead=lead, patience=patience, in_order=in_order)
        for in_order in (False, True)
        for delay in (0.0, 1.0, 4.0, NEVER_FIRST)
        for lead in (0.0, 50.0)
        for patience in (0.0, 1.0)
    ]
