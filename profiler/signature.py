"""What a segment's joint graph returns, and which ops of its backward each kind of gradient needs."""

from __future__ import annotations

from torch import fx

from .graph import Segment
from .joint import flatten_outputs
from .nodes import needed_for
from .op_view import is_op, origin
from .slots import GRADIENTS, INPUT_GRAD, kind_of


def results(segment: Segment) -> list[tuple[str, tuple[fx.Node, int], str]]:
    """(key in the plan, producing op and result, phase) of everything that the joint graph returns."""
    found = []
    for key, node in zip(segment.signature.results, flatten_outputs(segment.joint.graph), strict=False):
        if isinstance(node, fx.Node):
            found.append((key, origin(node), "backward" if kind_of(key) in GRADIENTS else "forward"))
    return found


def split_backward(segment: Segment) -> tuple[set[fx.Node], set[fx.Node]]:
    """Backward nodes that input gradients need, and those that only weight gradients need (Zero Bubble, section 2)."""
    sources = [source for key, (source, _), _ in results(segment) if kind_of(key) == INPUT_GRAD]
    wanted = needed_for(sources, lambda node: node.meta.get("phase") != "backward")
    backward = {n for n in segment.joint.graph.nodes if n.meta.get("phase") == "backward" and is_op(n)}
    return backward & wanted, backward - wanted
