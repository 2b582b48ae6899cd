"""Local search on the order of actions: annealing over moves on the critical path.

An action on the critical path that starts when its neighbour on the rank ends is moved past it, or a few places
further; everything else keeps its order. Moves that break memory are refused, those that close a cycle never finish and
are refused too (van Laarhoven et al., Job Shop Scheduling by Simulated Annealing, Operations Research 40(1), 1992).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

from ...costmodel.actions import Action
from .problem import PipelineProblem

INFINITE = float("inf")
STEPS = (1, 1, 1, 2, 3, 5)


class OrderState:
    """Orders of all ranks, with start times. Nodes: (kind * S + stage) * m + microbatch, kinds F, I, W."""

    def __init__(self, problem: PipelineProblem, ranks: Sequence[Sequence[Action]]) -> None:
        self.problem = problem
        m, num_stages, place = problem.num_microbatches, problem.num_stages, problem.stage_rank
        self.m, self.size = m, 3 * num_stages * m
        code = {"F": 0, "I": num_stages, "W": 2 * num_stages}
        self.orders = [[(code[a.kind] + a.stage) * m + a.microbatch for a in row] for row in ranks]
        self.seconds = [0.0] * self.size
        self.before = [-1] * self.size  # what it waits for, and how long after its end
        self.lag = [0.0] * self.size
        self.change = [0.0] * self.size  # of the rank's memory
        self.rank = [0] * self.size
        for stage, times in enumerate(problem.stages):
            for i in range(m):
                f, b, w = (stage * m + i, (num_stages + stage) * m + i, (2 * num_stages + stage) * m + i)
                durations = (times.forward_s, times.backward_input_s, times.backward_weight_s)
                for node, seconds in zip((f, b, w), durations, strict=True):
                    self.seconds[node], self.rank[node] = seconds, place[stage]
                self.change[f], self.change[w] = times.activation_bytes, -times.activation_bytes
                if stage:
                    self.before[f], self.lag[f] = f - m, problem.forward_hop_s(stage - 1)
                if stage < num_stages - 1:
                    self.before[b], self.lag[b] = b + m, problem.backward_hop_s(stage + 1)
                else:
                    self.before[b] = f
                self.before[w] = b
        self.end: list[float] = []
        self.position = [0] * self.size
        for row in self.orders:
            for index, node in enumerate(row):
                self.position[node] = index

    def evaluate(self) -> float:
        """Makespan, infinite where the orders cannot finish. Sets `end`."""
        end = [-1.0] * self.size
        seconds, before, lag, orders = self.seconds, self.before, self.lag, self.orders
        at, clock = [0] * len(orders), [0.0] * len(orders)
        waiting: dict[int, int] = {}
        runnable = list(range(len(orders)))
        done = 0
        while runnable:
            rank = runnable.pop()
            row, index, now = orders[rank], at[rank], clock[rank]
            start, length = index, len(row)
            while index < length:
                node = row[index]
                source = before[node]
                if source >= 0:
                    arrival = end[source]
                    if arrival < 0.0:
                        waiting[source] = rank
                        break
                    arrival += lag[node]
                    if arrival > now:
                        now = arrival
                now += seconds[node]
                end[node] = now
                index += 1
                if node in waiting:
                    runnable.append(waiting.pop(node))
            done += index - start
            at[rank], clock[rank] = index, now
        if done < self.size:
            return INFINITE
        self.end = end
        return max(clock)

    def critical_pairs(self, rng: random.Random) -> list[tuple[int, int]]:
        """(rank, index) of neighbours index, index+1 along one critical path, the second not waiting for the first."""
        end, seconds, before, lag, orders = self.end, self.seconds, self.before, self.lag, self.orders
        node = max((row[-1] for row in orders if row), key=end.__getitem__)
        pairs: list[tuple[int, int]] = []
        while True:
            start = end[node] - seconds[node]
            if start <= 1e-9:
                return pairs
            rank, index, source = self.rank[node], self.position[node], before[node]
            previous = orders[rank][index - 1] if index else -1
            by_rank = previous >= 0 and end[previous] >= start - 1e-9
            by_data = source >= 0 and end[source] + lag[node] >= start - 1e-9
            if by_rank and previous != source:
                pairs.append((rank, index - 1))
            if by_data and (not by_rank or rng.random() < 0.5):
                node = source
            elif by_rank:
                node = previous
            else:
                return pairs

    def fits(self, rank: int) -> bool:
        held, limit = 0.0, self.problem.memory_limit[rank]
        change = self.change
        for node in self.orders[rank]:
            held += change[node]
            if held > limit:
                return False
        return True

    def actions(self) -> list[list[Action]]:
        num_stages, kinds = self.problem.num_stages, "FIW"
        result = []
        for row in self.orders:
            codes = (divmod(node, self.m) for node in row)
            result.append([Action(kinds[code // num_stages], code % num_stages, i) for code, i in codes])
        return result


def anneal(
    problem: PipelineProblem,
    ranks: Sequence[Sequence[Action]],
    *,
    deadline: float,
    rng: random.Random,
    bound_s: float = 0.0,
    start_temperature_s: float | None = None,
) -> tuple[list[list[Action]], float]:
    """(orders, makespan), never worse than what it is given. deadline: of time.monotonic()."""
    state = OrderState(problem, ranks)
    current = best = state.evaluate()
    best_actions = state.actions()
    began = time.monotonic()
    hottest = 0.04 * max(problem.work_s) if start_temperature_s is None else start_temperature_s
    while best > bound_s * (1 + 1e-9):
        now = time.monotonic()
        if now >= deadline:
            break
        temperature = hottest * (1.0 - (now - began) / max(deadline - began, 1e-9)) + 1e-3 * hottest
        pairs = state.critical_pairs(rng)
        if not pairs:
            break
        rank, index = rng.choice(pairs)
        row = state.orders[rank]
        kept, kept_end = list(row), state.end
        step = rng.choice(STEPS)
        if rng.random() < 0.5:
            row.insert(max(0, index + 1 - step), row.pop(index + 1))
        else:
            row.insert(min(len(row) - 1, index + step), row.pop(index))
        makespan = state.evaluate() if state.fits(rank) else INFINITE
        if makespan <= current or rng.random() < math.exp((current - makespan) / temperature):
            current = makespan
            for position, node in enumerate(row):
                state.position[node] = position
            if makespan < best * (1 - 1e-12):
                best, best_actions = makespan, state.actions()
        else:
            state.orders[rank], state.end = kept, kept_end
    return best_actions, best
