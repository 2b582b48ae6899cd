"""What a segment's joint graph returns, and which ops of its backward each kind of gradient needs."""

from __future__ import annotations

from torch import fx

from .graph import Segment
from .joint import flatten_outputs
from .nodes import needed_for
from .op_view import is_op, origin


def results(segment: Segment) -> list[tuple[str, tuple[fx.Node, int], str]]:
    """(key in the plan, producing op and result, phase) of everything that the joint graph returns."""
    found = []
    nodes = flatten_outputs(segment.joint.graph)
    num_outputs, num_updates, num_params = len(segment.outputs), len(segment.mutated_buffers), len(segment.param_shapes)
    for k, node in enumerate(nodes):
        if not isinstance(node, fx.Node):
            continue
        if k < num_outputs:
            key, phase = f"output_{k}", "forward"
        elif k < num_outputs + num_updates:
            key, phase = f"update_{k - num_outputs}", "forward"
        elif k < num_outputs + num_updates + num_params:
            key, phase = f"param_grad_{k - num_outputs - num_updates}", "backward"
        else:
            key, phase = f"input_grad_{k - num_outputs - num_updates - num_params}", "backward"
        found.append((key, origin(node), phase))
    return found


def split_backward(segment: Segment) -> tuple[set[fx.Node], set[fx.Node]]:
    """Backward nodes that input gradients need, and those that only weight gradients need (Zero Bubble, section 2)."""
    sources = [source for key, (source, _), _ in results(segment) if key.startswith("input_grad")]
    wanted = needed_for(sources, lambda node: node.meta.get("phase") != "backward")
    backward = {n for n in segment.joint.graph.nodes if n.meta.get("phase") == "backward" and is_op(n)}
    return backward & wanted, backward - wanted
