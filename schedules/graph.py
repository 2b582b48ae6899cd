"""A pipeline's actions as numbered nodes, for searches over their order.

Nodes: (kind * S + stage) * m + microbatch, kinds F, I, W. A node starts when the one before it on its rank has ended
and what it waits for has arrived. An order is one array of nodes for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..costmodel.actions import Action
from .list_scheduling import Targets, list_schedule
from .native import binding as native
from .problem import PipelineProblem

INFINITE = float("inf")
JUSTIFY_LIMIT_S = 0.5
Order = list[np.ndarray]


class OrderGraph:
    """seconds, rank, change (of the rank's memory), before (what a node waits for, -1: nothing) and lag (how long after
    its end), after (up to two nodes that wait for it), own (up to two of its rank that must come earlier): arrays over
    the nodes. limit: of each row's memory."""

    kinds = "FIW"

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        stages, num_stages, m = problem.stages, problem.num_stages, problem.num_microbatches
        self.num_stages, self.m, self.num_nodes = num_stages, m, 3 * num_stages * m
        last = num_stages - 1
        sizes, nothing = [float(stage.activation_bytes) for stage in stages], [0.0] * num_stages
        self.seconds = self._spread(
            [stage.forward_s for stage in stages],
            [stage.backward_input_s for stage in stages],
            [stage.backward_weight_s for stage in stages],
        )
        self.change = self._spread(sizes, nothing, [-size for size in sizes])
        self.rank = self._spread(*[problem.stage_rank] * 3)
        on = [problem.forward_hop_s(stage - 1) if stage else 0.0 for stage in range(num_stages)]
        back = [problem.backward_hop_s(stage + 1) if stage < last else 0.0 for stage in range(num_stages)]
        self.lag = self._spread(on, back, nothing)
        nodes = np.arange(self.num_nodes).reshape(3, num_stages, m)
        before = np.full_like(nodes, -1)
        before[0, 1:], before[1, :-1], before[1, -1], before[2] = nodes[0, :-1], nodes[1, 1:], nodes[0, -1], nodes[1]
        self.before = before.ravel()
        after = np.full((3, num_stages, m, 2), -1)
        after[0, :-1, :, 0], after[0, -1, :, 0] = nodes[0, 1:], nodes[1, -1]
        after[1, 1:, :, 0], after[1, :, :, 1] = nodes[1, :-1], nodes[2]
        self.after = after.reshape(-1, 2)
        self.own = np.full((self.num_nodes, 2), -1)
        # a rank's activations may come to the limit exactly, whatever the rounding
        self.limit = np.minimum(np.array(problem.memory_limit) * (1 + 1e-12), 1e300)

    def _spread(self, *by_stage: Sequence[float]) -> np.ndarray:
        """Values of each kind and stage, for all microbatches."""
        return np.repeat(np.array(by_stage), self.m)

    def of_actions(self, ranks: Sequence[Sequence[Action]]) -> Order:
        code = {kind: index * self.num_stages for index, kind in enumerate(self.kinds)}
        return [
            np.array([(code[kind] + stage) * self.m + i for kind, stage, i in row], dtype=np.int32) for row in ranks
        ]

    def actions(self, order: Order) -> list[list[Action]]:
        num_stages, m = self.num_stages, self.m
        return [
            [Action(self.kinds[node // m // num_stages], node // m % num_stages, node % m) for node in row.tolist()]
            for row in order
        ]

    def periodic(self, starts: Sequence[Sequence[float]] | np.ndarray, period: float) -> np.ndarray:
        """Of all nodes: [kind][stage] for microbatch 0, each further one a period later."""
        return (np.asarray(starts, dtype=float).reshape(-1, 1) + period * np.arange(self.m)).reshape(-1)

    def by_starts(self, starts: np.ndarray) -> Order:
        """Each rank's nodes by starts given for all nodes, whatever their true ones."""
        own = (np.flatnonzero(self.rank == rank) for rank in range(self.problem.num_ranks))
        return [nodes[np.argsort(starts[nodes], kind="stable")].astype(np.int32) for nodes in own]

    def starts(self, order: Order) -> np.ndarray:
        return np.array(self.ends([row.tolist() for row in order])[0]) - self.seconds

    def fits(self, order: Order) -> bool:
        held = (np.cumsum(self.change[row]) for row in order)
        return all(not len(row) or row.max() <= limit for row, limit in zip(held, self.limit, strict=True))

    def frozen(self, order: Order) -> list[range]:
        """Places of each row that annealing leaves alone; empty: none."""
        return []

    def pipeline(self, order: Order | None = None, frozen: Sequence[range] = ()) -> native.Pipeline:
        """For the searches in C, which write to its row; annealing leaves the frozen places of each row alone."""
        if order is None:
            counts = np.bincount(self.rank, minlength=len(self.limit)).tolist()
        else:
            counts = [len(row) for row in order]
        offset = np.concatenate([[0], np.cumsum(counts, dtype=int)])
        places = [(places.start, places.stop) for places in frozen] or [(0, 0)] * len(counts)
        return native.Pipeline(
            self.num_nodes,
            len(self.limit),
            self.m,
            seconds=self.seconds,
            lag=self.lag,
            change=self.change,
            limit=self.limit,
            rank=self.rank,
            before=self.before,
            own=self.own,
            after=self.after,
            offset=offset,
            frozen=(np.array(places) + offset[:-1, None]).reshape(-1),
            row=np.zeros(self.num_nodes) if order is None else np.concatenate(order),
        )

    def listed(
        self,
        targets: np.ndarray,
        *,
        patience: float = 0.0,
        in_order: bool = False,
        thrift_s: float = -1.0,
        give_up_s: float = INFINITE,
    ) -> tuple[Order, float] | None:
        """List scheduling by the targets of all nodes; list_scheduling.py says how.

        in_order: forwards of a rank strictly by those starts. Memory then goes to whom it is meant for, but the list
        may come to where nothing can run. None there, where nothing fits, and beyond give_up_s. thrift_s: weight
        gradients only where a rank would otherwise have been idle for that much longer than any other (not in Python).
        """
        pipeline = self.pipeline()
        found = native.list_schedule(pipeline, targets, patience, in_order, thrift_s, give_up_s)
        if found is None:
            if in_order:
                return None
            forwards, backwards, weights = targets.reshape(len(self.kinds), self.num_stages, self.m).tolist()
            meant = Targets(forwards, backwards, weights, patience)
            listing = list_schedule(self.problem, meant, give_up_s=give_up_s)
            return None if listing is None else (self.of_actions(listing.ranks), listing.makespan_s)
        return None if found == INFINITE else (pipeline.order(), found)

    def justified(self, order: Order) -> tuple[Order, float] | None:
        """The order with actions moved into gaps, forwards in time and backwards in turn, within the
        memory limit, and its makespan, never longer: forward-backward improvement (Tormos and Lova, A Competitive
        Heuristic Solution Technique for Resource-Constrained Project Scheduling, Annals of Operations Research 102,
        2001). None where it cannot finish, and where there is no C compiler.
        """
        pipeline = self.pipeline(order)
        found = native.justify(pipeline, JUSTIFY_LIMIT_S)
        return None if found is None or found == INFINITE else (pipeline.order(), found)

    def makespan_s(self, order: Order) -> float:
        """Infinite where the orders cannot finish."""
        found = native.evaluate(self.pipeline(order))
        return max(self.ends([row.tolist() for row in order])[1]) if found is None else found

    def ends(self, order: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
        """End of each node, and of each rank: infinite where the orders cannot finish."""
        end = [-1.0] * self.num_nodes
        seconds, before, lag = self.seconds.tolist(), self.before.tolist(), self.lag.tolist()
        own = [[one for one in pair if one >= 0] for pair in self.own.tolist()]
        at, clock = [0] * len(order), [0.0] * len(order)
        waiting: dict[int, list[int]] = {}
        runnable = list(range(len(order)))
        done = 0
        while runnable:
            rank = runnable.pop()
            row, index, now = order[rank], at[rank], clock[rank]
            start, length = index, len(row)
            while index < length:
                node = row[index]
                source = before[node]
                if any(end[one] < 0.0 for one in own[node]):
                    return end, [INFINITE] * len(order)
                if source >= 0:
                    arrival = end[source]
                    if arrival < 0.0:
                        waiting.setdefault(source, []).append(rank)
                        break
                    arrival += lag[node]
                    if arrival > now:
                        now = arrival
                now += seconds[node]
                end[node] = now
                index += 1
                if node in waiting:
                    runnable += waiting.pop(node)
            done += index - start
            at[rank], clock[rank] = index, now
        return end, clock if done == sum(map(len, order)) else [INFINITE] * len(order)
