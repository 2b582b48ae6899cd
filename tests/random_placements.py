"""Random but valid placements of a segment: what any plan might ask of the passes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import fx

from shardwright.ops.catalog import strategies
from shardwright.ops.placement import P, R, can_shard
from shardwright.ops.strategy import Strategy
from shardwright.planner.sharding.mesh import compatible
from shardwright.plans.placements import AxisSolution
from shardwright.profiler.graph import Segment
from shardwright.profiler.op_view import is_op, origin, view_of
from shardwright.profiler.signature import results


def random_solutions(
    segment: Segment, sizes: dict[str, int], seed: int, replicate: float = 0.1
) -> tuple[AxisSolution, ...]:
    """One solution for each axis. replicate: share of the ops that stay whole where they could be split."""
    draw = _Draw(segment, random.Random(seed), replicate)
    for size in sizes.values():
        draw.axis(size)
    return tuple(draw.done)


@dataclass
class _Draw:
    segment: Segment
    random: random.Random
    replicate: float
    done: list[AxisSolution] = field(default_factory=list)
    copied: dict[str, bool] = field(default_factory=dict)  # results whose readers share a form, the same on every axis

    def axis(self, size: int) -> None:
        name, solution = self.segment.name, AxisSolution()
        for node in self.segment.joint.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, solution, size)
            elif is_op(node):
                solution.strategies[(name, node.name)] = self._strategy(node, solution, size)
        for key, (source, output), _ in results(self.segment):
            if not key.startswith("update_"):
                made = solution.of_result(name, source, output)
                solution.places[(name, key)] = self._place(source, output, size, made, key, key.startswith("output_"))
        self.done.append(solution)

    def _placeholder(self, node: fx.Node, solution: AxisSolution, size: int) -> None:
        kind = node.name.partition("_")[0]
        if kind in ("param", "input", "tangent") and isinstance(node.meta["val"], torch.Tensor):
            whole = kind == "param" or kind == "input"
            solution.places[(self.segment.name, node.name)] = self._place(node, 0, size, R, node.name, whole)

    def _place(self, source: fx.Node, output: int, size: int, made: int, key: str, no_sum: bool) -> int:
        """A placement that `made` can be brought to, of a tensor that other axes may have split already."""
        tensor = source.meta["val"]
        tensor = tensor[output] if isinstance(tensor, (tuple, list)) else tensor
        taken = {
            s.places.get((self.segment.name, key), s.of_result(self.segment.name, source, output)) for s in self.done
        }
        options = [R] + [d for d, n in enumerate(tensor.shape) if n > 1 and can_shard(n, size) and d not in taken]
        if not no_sum and made < 0 and tensor.is_floating_point():
            options.append(P)
        return self.random.choice(options)

    def _strategy(self, node: fx.Node, solution: AxisSolution, size: int) -> Strategy:
        name, view, phase = self.segment.name, view_of(node), node.meta["phase"]
        made = [self._form(*origin(n), phase, solution, size) for n in view.operands]

        def fits(strategy: Strategy) -> bool:
            if any(a >= 0 and b == P for a, b in zip(made, strategy.inputs, strict=True)):
                return False
            tensors = [
                *zip(strategy.inputs, view.inputs, strict=True),
                *zip(strategy.outputs, view.outputs, strict=True),
            ]
            if any(p >= 0 and t is not None and not can_shard(t.shape[p], size, strategy.even) for p, t in tensors):
                return False
            return all(compatible(s.strategies[(name, node.name)], strategy) for s in self.done)

        options = [s for s in strategies(node)[0] if not s.of_sequence and fits(s)]
        return options[0] if self.random.random() < self.replicate else self.random.choice(options)

    def _form(self, source: fx.Node, output: int, phase: str, solution: AxisSolution, size: int) -> int:
        """The form in which readers of a phase find a result: as it is made, or a copy that they share."""
        made = solution.of_result(self.segment.name, source, output)
        forward = (self.segment.name, f"{source.name}.{output}>forward")
        if phase == "backward" and forward in solution.places:
            kept = f"{source.name}.{output}>kept"
            if self.copied.setdefault(kept, self.random.random() < 0.5):
                solution.places[(self.segment.name, kept)] = made = solution.places[forward]
        key = f"{source.name}.{output}>{phase}"
        if key not in self.copied:
            self.copied[key] = self.random.random() < 0.2
        if (self.segment.name, key) not in solution.places and self.copied[key]:
            solution.places[(self.segment.name, key)] = self._place(source, output, size, made, key, False)
        return solution.places.get((self.segment.name, key), made)
