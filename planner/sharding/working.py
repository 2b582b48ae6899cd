"""What one forward and backward of a segment hold beside what is kept between them, under given placements."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ...costmodel.segment import Workspace
from ...profiler.slots import INPUT, TANGENT, kind_of, slot_names
from .lifetimes import Result
from .routes import Placed


class Working:
    """scratch: what each op holds while it runs. lasting: what stays of that for the next."""

    def __init__(self, placed: Placed, scratch: Mapping[fx.Node, float], lasting: float) -> None:
        self.placed, self.scratch, self.lasting = placed, scratch, lasting
        placeholders, segment = placed.facts.placeholders, placed.segment
        self.inputs = [placeholders[name] for name in slot_names(INPUT, len(segment.inputs))]
        tangents = [node for name, node in placeholders.items() if kind_of(name) == TANGENT]
        self.tangent_bytes = sum(placed.local_bytes(node, 0) for node in tangents)
        self._sizes: dict[Result, float] = {}

    def _bytes(self, result: Result) -> float:
        if result not in self._sizes:
            self._sizes[result] = self.placed.local_bytes(*result)
        return self._sizes[result]

    def of(self, kept: frozenset[Result]) -> Workspace:
        lifetimes, on_cpu = self.placed.facts.lifetimes, self.placed.mesh.on_cpu
        forward, backward = lifetimes.forward(kept, on_cpu), lifetimes.backward(kept, on_cpu)

        def peak(writes: bool) -> float:
            found = backward.peak(self._bytes, lambda node: self.scratch.get(node, 0.0), writes_gradients=writes)
            return found + self.tangent_bytes + self.lasting

        kept_inputs = [self._bytes((node, 0)) if (node, 0) in kept else 0.0 for node in self.inputs]
        made = sum(self._bytes(result) for result in kept) - sum(kept_inputs)
        others = sum(self._bytes((node, 0)) for node in self.inputs) - sum(kept_inputs)
        inside = forward.peak(self._bytes, lambda node: self.scratch.get(node, 0.0), writes_gradients=False)
        return Workspace(
            int(inside + others - made + self.lasting),
            int(peak(True)),
            int(peak(False)),
            int(backward.at_end(self._bytes) + self.tangent_bytes),
            tuple(map(int, kept_inputs)),
        )
