"""DTensor's own sharding rules as strategies on one axis, asked on a mesh without a backend.

DTensor registers rules in two forms: for one mesh dimension (a list of placements), and for whole meshes (an
OpStrategy). Both are asked here with a one-dimensional mesh and every placement that the operands could have.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.utils import _pytree as pytree

from ..profiler.op_view import OpView
from . import _torch
from .placement import P, R
from .strategy import Strategy

logger = logging.getLogger(__name__)
_MESH_SIZE = 2


@functools.cache
def _mesh() -> Any:
    return _torch.offline_mesh(_MESH_SIZE)


def dtensor_strategies(view: OpView) -> list[Strategy] | None:
    """None where DTensor has no rule for the op, or its rule fails on these arguments."""
    if not isinstance(view.op, torch._ops.OpOverload):
        return None
    propagator = _torch.propagator()
    single = getattr(propagator, "op_single_dim_strategy_funcs", {}).get(view.op)
    whole = propagator.op_strategy_funcs.get(view.op)
    try:
        if single is not None:
            return _single_dim(view, single)
        if whole is not None:
            return _whole_mesh(view, whole)
    except Exception as error:  # a rule of another library on arguments that it may not expect: plan the op replicated
        logger.debug("DTensor's rule for %s failed: %s", view.op, error)
    return None


def _meta(tensor: torch.Tensor) -> Any:
    return _torch.TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)


def _single_dim(view: OpView, rule: Any) -> list[Strategy]:
    args, kwargs = torch.fx.node.map_arg((view.args, view.kwargs), lambda n: _meta(n.meta["val"]))
    count = len(view.outputs)
    found = []
    for row in rule(view.op, args, kwargs):
        places = [_place(p) for p in row]
        if None not in places:
            found.append(Strategy(tuple(places[count:]), tuple(places[:count]), even=True))  # type: ignore[arg-type]
    return found


def _place(placement: Any) -> int | None:
    if placement is None or isinstance(placement, Replicate):
        return R
    if type(placement) is Partial:
        return P if placement.reduce_op == "sum" else None
    if type(placement) is Shard or type(placement).__name__ == "_ShardingPlaceholder":
        return int(placement.dim)
    return None


def _whole_mesh(view: OpView, rule: Any) -> list[Strategy]:
    def options(node: torch.fx.Node) -> Any:
        tensor = node.meta["val"]
        places: list[Any] = [Replicate()]
        places += [Shard(d) for d in range(tensor.dim()) if tensor.shape[d] % _MESH_SIZE == 0]
        specs = [_torch.DTensorSpec(_mesh(), (p,), tensor_meta=_meta(tensor)) for p in places]
        return _torch.OpStrategy([_torch.OpSpec(output_specs=s, input_specs=[s]) for s in specs])

    args, kwargs = torch.fx.node.map_arg((view.args, view.kwargs), options)
    args = tuple(_torch.TupleStrategy(a) if isinstance(a, (list, tuple)) and a and
                 all(isinstance(x, _torch.OpStrategy) for x in a) else a for a in args)  # fmt: skip
    info = _torch.propagator().op_to_schema_info.get(view.op)
    strategy = rule(_torch.OpSchema(view.op, args, kwargs, schema_info=info))
    found = []
    for spec in strategy.strategies:
        inputs = [s for s in pytree.tree_leaves(spec.input_specs) if s is not None]
        outputs = spec.output_specs
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        row = [_place(s.placements[0]) if s is not None else R for s in (*inputs, *outputs)]
        if None not in row and len(inputs) == len(view.inputs) and len(outputs) == len(view.outputs):
            found.append(Strategy(tuple(row[: len(inputs)]), tuple(row[len(inputs) :]), even=True))  # type: ignore[arg-type]
    return found
