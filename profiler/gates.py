"""What an expert does between its two products, as text that an operator can carry.

Experts differ in what makes of the first product ([M, A], a row for each choice) what the second one takes ([M, I]):
silu of one half times the other, halves that are interleaved, clamped or scaled, or no gate at all. Usual forms have a
name. Any other is traced once, forward and backward, into a list of aten ops that work on each row alone; as text it is
an argument of shardwright::expert_mlp like any other, so that a graph holds all that it computes.

    gate_of(text).forward(both) -> product        gate_of(text).backward(both, grad) -> product, gradient of both
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ._torch import engine_restored, outside_trace_and_fakes

aten = torch.ops.aten
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # of one half, times the other: forms that have a name

_ROWS = 8191  # of the traced example: a prime, which no other size or number of a gate is a multiple of
_STRUCTURAL = {
    aten.slice.Tensor, aten.slice_backward.default, aten.split.Tensor, aten.split_with_sizes.default, aten.cat.default,
    aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.full.default,
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default,
    aten.scalar_tensor.default, operator.getitem,
}  # fmt: skip
_DTYPES = {str(t).split(".")[1]: t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool)}
Function = Callable[..., Any]


class Gate(NamedTuple):
    forward: Function
    backward: Function


@functools.lru_cache(maxsize=64)
def gate_of(text: str) -> Gate:
    """The function that a name of ACTIVATIONS, or the text of a traced gate, stands for."""
    if text in ACTIVATIONS:
        return Gate(functools.partial(_named, text), functools.partial(_named_backward, text))
    programs = json.loads(text)
    return Gate(functools.partial(_run, programs["forward"]), functools.partial(_run, programs["backward"]))


def traced_gate(function: Function, width: int, dtype: torch.dtype) -> str | None:
    """The text of a function of [M, width] that looks at each row alone; None where it cannot be told to."""

    def backward(both: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            both = both.detach().requires_grad_()
            product = function(both)
            (found,) = torch.autograd.grad(product, both, grad)
        return product.detach(), found

    # tensors of the function's own lie elsewhere, and a decision on data cannot be made: torch refuses either
    with contextlib.suppress(RuntimeError), outside_trace_and_fakes(), engine_restored():
        both = torch.empty(_ROWS, width, dtype=dtype, device="meta")
        with torch.no_grad():
            grad = torch.empty_like(function(both))
        if grad.dim() != 2 or grad.shape[0] != _ROWS:
            return None
        forward = _program(make_fx(lambda rows: function(rows))(both).graph)
        joint = None if forward is None else _program(make_fx(backward)(both, grad).graph)
        if joint is not None:
            return json.dumps({"forward": forward, "backward": joint}, separators=(",", ":"))
    return None


# --------------------------------------------------------------------------- gates with a name


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return aten.silu_backward(grad, gate)
    if activation == "relu":
        return aten.threshold_backward(grad, gate, 0)
    return aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _named(activation: str, both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return _activate(gate, activation) * up


def _named_backward(activation: str, both: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = both.chunk(2, dim=-1)
    activated = _activate(gate, activation)
    found = torch.cat([_activate_backward(grad * up, gate, activation), grad * activated], dim=-1)
    return activated * up, found


# --------------------------------------------------------------------------- traced gates
# A program: {"steps": [[op, arguments, keywords], ...], "out": [...]}. Arguments are numbers, lists, and
# ["value", k]: an input or the result of a step, counted together; ["rows"]; ["dtype", name]; ["list", ...].


def _program(graph: fx.Graph) -> dict[str, Any] | None:
    places: dict[fx.Node, int] = {}
    steps: list[list[Any]] = []
    for node in graph.nodes:
        if node.op == "output":
            out = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            return {"steps": steps, "out": [places[value] for value in out]}
        if node.op == "call_function":
            if not _works_on_rows(node):
                return None
            try:
                given = [_written(a, places) for a in node.args], {k: _written(v, places) for k, v in _kept(node)}
            except ValueError:
                return None
            steps.append([_name_of(node.target), *given])
        elif node.op != "placeholder":
            return None  # a parameter or a buffer of the gate's own
        places[node] = len(places)
    return None


def _works_on_rows(node: fx.Node) -> bool:
    """Is it an op on each entry, or one that cuts and joins rows within themselves?"""
    if node.target not in _STRUCTURAL:
        return _is_pointwise(node.target) and (not _writes(node.target) or _is_new(node.args[0]))
    at = {aten.slice.Tensor: 1, aten.slice_backward.default: 2, aten.split.Tensor: 2, aten.cat.default: 1,
          aten.split_with_sizes.default: 2}.get(node.target)  # type: ignore[call-overload]  # fmt: skip
    return at is None or (len(node.args) > at and node.args[at] in (1, -1))


def _is_pointwise(op: Any) -> bool:
    return torch.Tag.pointwise in getattr(op, "tags", ())


def _writes(op: Any) -> bool:
    return bool(op._schema.is_mutable)


def _is_new(value: Any) -> bool:
    """Has it memory of its own, which is no input's, so that a write into it is seen nowhere else?"""
    return value.op == "call_function" and _is_pointwise(value.target) and not _writes(value.target)


def _kept(node: fx.Node) -> list[tuple[str, Any]]:
    """Keywords, but for where and how a new tensor is laid out."""
    return [(k, v) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory", "memory_format")]


def _name_of(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target).removeprefix("aten.")


def _written(value: Any, places: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return ["value", places[value]]
    if isinstance(value, (list, tuple)):
        return ["list", *(_written(v, places) for v in value)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).split(".")[1]]
    if isinstance(value, bool) or value is None or isinstance(value, (float, str)):
        return value
    if isinstance(value, int):
        if value and value % _ROWS == 0:
            if value != _ROWS:
                raise ValueError
            return ["rows"]
        return value
    raise ValueError


def _read(value: Any, values: Sequence[Any], rows: int) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "value":
        return values[rest[0]]
    if kind == "rows":
        return rows
    return _DTYPES[rest[0]] if kind == "dtype" else [_read(v, values, rows) for v in rest]


@functools.lru_cache(maxsize=256)
def _op(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


_CREATES = {"full.default", "scalar_tensor.default"}


def _run(program: dict[str, Any], *inputs: torch.Tensor) -> Any:
    rows = inputs[0].shape[0]
    values: list[Any] = list(inputs)
    for name, args, kwargs in program["steps"]:
        given = {key: _read(value, values, rows) for key, value in kwargs.items()}
        if name in _CREATES:
            given["device"] = inputs[0].device
        values.append(_op(name)(*(_read(a, values, rows) for a in args), **given))
    found = [values[place] for place in program["out"]]
    return found[0] if len(found) == 1 else tuple(found)
