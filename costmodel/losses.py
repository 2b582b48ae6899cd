"""What the cross entropy of a linear layer's rows, taken some rows at a time, moves and holds besides its operands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..kernels.linear_cross_entropy import logits_traffic, scratch_bytes
from ..profiler.nodes import named_arguments

NAMES = ("shardwright.linear_cross_entropy", "shardwright.linear_cross_entropy_backward")


@dataclass(frozen=True)
class LossCall:
    """One node of a captured graph: sizes [N, H] of hidden and [V, H] of the weight, bytes of an element of hidden and
    of one of the loss."""

    hidden: fx.Node
    weight: fx.Node
    widths: tuple[int, int]
    is_backward: bool

    @classmethod
    def read(cls, node: fx.Node) -> LossCall | None:
        """None where the node is no such loss."""
        name = str(getattr(node.target, "overloadpacket", ""))
        if name not in NAMES:
            return None
        given, is_backward = named_arguments(node), name == NAMES[1]
        wide = given["lse"].meta["val"].element_size() if is_backward else given["dtype"].itemsize
        return cls(given["hidden"], given["weight"], (given["hidden"].meta["val"].element_size(), wide), is_backward)

    def traffic_bytes(self, share: float) -> float:
        """share: of the captured op's work, one rank's."""
        rows, classes = self.hidden.meta["val"].shape[0], self.weight.meta["val"].shape[0]
        return logits_traffic(rows, classes, self.widths, is_backward=self.is_backward) * share

    def scratch(self, hidden_bytes: float, weight_bytes: float, kind: str) -> float:
        """Of one rank. Both: of its parts of the operands."""
        features = self.hidden.meta["val"].shape[1]
        classes = weight_bytes / (self.weight.meta["val"].element_size() * features)
        rows = hidden_bytes / (self.widths[0] * features)
        return scratch_bytes(rows, (classes, features), self.widths, kind, is_backward=self.is_backward)
