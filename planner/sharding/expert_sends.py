"""What the expert ops of a segment send under given placements, and what of it the backward may send again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import fx

from ...costmodel.experts import chunks_scratch_bytes
from ...ops.expert_rules import is_expert_op, weights_at
from ...plans.placements import kept_key
from ...profiler.expert_ops import ROWS
from ...profiler.joint import is_getitem
from ...profiler.op_view import origin
from .expert_costs import came_bytes, dispatch_s, dispatched
from .routes import Placed


class Sent(NamedTuple):
    """Tokens that came to experts in a forward and stay for its backward. again_s: of sending them again instead."""

    forward: fx.Node
    num_bytes: float
    again_s: float

    @property
    def key(self) -> str:
        """As what is made again."""
        return kept_key(self.forward.name, ROWS)


def experts_moved(placed: Placed, op_s: Mapping[fx.Node, float]) -> tuple[dict[fx.Node, float], list[Sent]]:
    """(seconds that each expert op's messages add to it, tokens that stay). op_s: of every op."""
    seconds: dict[fx.Node, float] = {}
    stay: list[Sent] = []
    for node, view in placed.facts.views.items():
        if not is_expert_op(node):
            continue
        mesh, strategies = placed.mesh, placed.strategies(node)
        operands = [mesh.sizes(*origin(n)) for n in view.operands]
        seconds[node] = dispatch_s(mesh, strategies, operands, op_s[node])
        forward = _forward_of(node, view.operands)
        if forward is not None:
            again_s = dispatch_s(mesh, strategies, operands, op_s[node], again=True) - seconds[node]
            sizes = [mesh.sizes(*origin(n)) for n in placed.facts.views[forward].operands]
            num_bytes = came_bytes(mesh, placed.strategies(forward), sizes)
            if num_bytes:
                stay.append(Sent(forward, num_bytes, again_s))
    return seconds, stay


def chunks_bytes(placed: Placed) -> dict[fx.Node, float]:
    """What backwards of experts hold more for tokens that come in several chunks."""
    mesh = placed.mesh
    if mesh.expert_chunks == 1:
        return {}
    found: dict[fx.Node, float] = {}
    for node, view in placed.facts.views.items():
        if not is_expert_op(node) or weights_at(node).start == 3:
            continue
        strategies = placed.strategies(node)
        if dispatched(mesh, strategies) is not None:
            weights = {k: view.operands[k] for k in weights_at(node)}
            shares = {k: mesh.shares(tuple(s.inputs[k] for s in strategies)) for k in weights}
            sizes = [
                (mesh.sizes(*origin(w)).num_bytes / shares[k], w.meta["val"].element_size()) for k, w in weights.items()
            ]
            found[node] = chunks_scratch_bytes(sizes, mesh.expert_chunks)
    return found


def _forward_of(node: fx.Node, operands: Sequence[fx.Node]) -> fx.Node | None:
    """Of a backward, what kept something for it."""
    if weights_at(node).start == 3:
        return None
    pre = operands[-1]
    source, output = origin(pre)
    return source if output == 1 and is_getitem(pre) and is_expert_op(source) else None
