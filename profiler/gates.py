"""What an expert does between its two products, as text that an operator can carry.

Experts differ in what makes of the first product ([M, A], a row for each choice) what the second one takes ([M, I]):
silu of one half times the other, halves that are interleaved, clamped or scaled, or no gate at all. Usual forms have a
name. Any other is traced once, forward and backward, into a list of aten ops that work on each row alone; as text it is
an argument of shardwright::expert_mlp like any other, so that a graph holds all that it computes.

    gate_of(text).forward(both) -> product        gate_of(text).backward(both, grad) -> product, gradient of both
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ._torch import engine_restored, outside_trace_and_fakes, writes_operands

aten = torch.ops.aten
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # of one half, times the other: forms that have a name

# numbers of rows that a gate is traced with. What it does must not depend on how many there are: not by a number made
# of it, nor by a decision, be it on one row, on odd and even, or on few and many
_ROWS = (2, 2**31 - 1, 1)
_STRUCTURAL = {
    aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default, aten.full.default,
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default,
    aten.scalar_tensor.default, aten.zeros.default, aten.ones.default, aten.empty_like.default, operator.getitem,
}  # fmt: skip
# ops on each entry that torch does not mark as such
_OF_ENTRIES = {
    aten.elu_backward.default, aten.fill_.Scalar, aten.hardshrink_backward.default, aten.hardsigmoid_backward.default,
    aten.hardswish.default, aten.hardswish_backward.default, aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default, aten.log_sigmoid_backward.default, aten.log_sigmoid_forward.default,
    aten.masked_fill_.Scalar, aten.softplus_backward.default, aten.softshrink_backward.default,
}  # fmt: skip
# (where ops that cut or join take the dimension, which is this one where it is not given)
_DIMENSIONS = {
    aten.slice.Tensor: (1, 0), aten.slice_backward.default: (2, 0), aten.split.Tensor: (2, 0), aten.cat.default: (1, 0),
    aten.split_with_sizes.default: (2, 0), aten.glu.default: (1, -1), aten.glu_backward.default: (2, -1),
}  # fmt: skip
# where ops that make a tensor take its sizes, the first of which may be the number of rows
_SIZES = {
    aten.full.default: 0, aten.zeros.default: 0, aten.ones.default: 0, aten.new_zeros.default: 1,
    aten.slice_backward.default: 1,
}  # fmt: skip
Function = Callable[..., Any]


class Gate(NamedTuple):
    forward: Function
    backward: Function


@functools.lru_cache(maxsize=64)
def gate_of(text: str) -> Gate:
    """The function that a name of ACTIVATIONS, or the text of a traced gate, stands for."""
    if text in ACTIVATIONS:
        return Gate(functools.partial(_named, text), functools.partial(_named_backward, text))
    forward, backward = _programs(text)
    return Gate(functools.partial(_run, forward), functools.partial(_run, backward))


def traced_gate(function: Function, width: int, dtype: torch.dtype) -> str | None:
    """The text of a function of [M, width] that looks at each row alone; None where it cannot be told to."""
    texts: list[str] = []
    for rows in _ROWS:
        text = _text_at(rows, function, width, dtype)
        if text is None:
            return None
        texts.append(text)
    few, many, one = texts
    return few if few == many and few.replace('["rows"]', "1") == one else None


def _text_at(rows: int, function: Function, width: int, dtype: torch.dtype) -> str | None:
    """The text as it is traced with this number of rows."""
    graphs = _graphs_at(rows, function, width, dtype)
    programs = [_program(graph, rows) for graph in graphs]
    if not programs or None in programs:
        return None
    return json.dumps(dict(zip(("forward", "backward"), programs, strict=True)), separators=(",", ":"))


def _graphs_at(rows: int, function: Function, width: int, dtype: torch.dtype) -> list[fx.Graph]:
    """Of the function, and of it with its gradient; none where it gives no row for each, or cannot be traced."""

    def backward(both: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            both = both.detach().requires_grad_()
            product = function(both)
            (found,) = torch.autograd.grad(product, both, grad)
        return product.detach(), found

    with outside_trace_and_fakes(), engine_restored():
        both = torch.empty(rows, width, dtype=dtype, device="meta")
        try:
            with torch.no_grad():
                grad = torch.empty_like(function(both))
            if grad.dim() != 2 or grad.shape[0] != rows:
                return []
            return [make_fx(lambda rows: function(rows))(both).graph, make_fx(backward)(both, grad).graph]
        except Exception:  # whatever the user's code raises where rows have no data: it then runs as it is written
            return []


def gate_scratch_bytes(text: str, width: int, dtype: torch.dtype, *, is_backward: bool) -> int:
    """Bytes that a gate holds for a row at its worst moment beside what it is given, its results among them. width: of
    what it is given."""
    if text not in ACTIVATIONS:
        return _replayed_bytes(text, width, dtype, is_backward)
    # backward: what is activated, its gradient, the gradient of either half, and both of these joined
    return (5 if is_backward else 2) * (width // 2) * dtype.itemsize


@functools.lru_cache(maxsize=256)
def _replayed_bytes(text: str, width: int, dtype: torch.dtype, is_backward: bool) -> int:
    forward, backward = _programs(text)
    with outside_trace_and_fakes(), torch.no_grad():
        row = torch.zeros(1, width, dtype=dtype)
        live = _Live([row])
        product = _run(forward, row, watch=live.see)
        if is_backward:
            grad = torch.zeros_like(product)
            live = _Live([row, grad])
            _run(backward, row, grad, watch=live.see)
    return live.peak_bytes


class _Live:
    """The most bytes that are held at once beside those that are given."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.peak_bytes = 0

    def see(self, values: list[Any]) -> None:
        tensors = [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,))]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak_bytes = max(self.peak_bytes, sum(n for at, n in held.items() if at not in self._given))


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


def _program(graph: fx.Graph, rows: int) -> dict[str, Any] | None:
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
                given = _arguments(node, places, rows), {k: _written(v, places) for k, v in _kept(node)}
            except ValueError:
                return None
            steps.append([_name_of(node.target), *given])
        elif node.op != "placeholder":
            return None  # a parameter or a buffer of the gate's own
        places[node] = len(places)
    return None


def _works_on_rows(node: fx.Node) -> bool:
    """Is it an op on each entry, or one that cuts and joins rows within themselves?"""
    if node.target in _DIMENSIONS:
        at, default = _DIMENSIONS[node.target]  # type: ignore[index]
        return (node.args[at] if len(node.args) > at else default) in (1, -1)
    if node.target in _STRUCTURAL:
        return True
    return _is_pointwise(node.target) and (not writes_operands(node.target) or _is_new(node.args[0]))


def _is_pointwise(op: Any) -> bool:
    return op in _OF_ENTRIES or torch.Tag.pointwise in getattr(op, "tags", ())


def _is_new(value: Any) -> bool:
    """Has it memory of its own, which is no input's, so that a write into it is seen nowhere else?"""
    while value.op == "call_function" and writes_operands(value.target):
        value = value.args[0]  # what it gives is what it wrote into
    if value.op != "call_function":
        return False
    return value.target is aten.empty_like.default or _is_pointwise(value.target)


def _kept(node: fx.Node) -> list[tuple[str, Any]]:
    """Keywords, but for where and how a new tensor is laid out."""
    return [(k, v) for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory", "memory_format")]


def _name_of(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target).removeprefix("aten.")


def _arguments(node: fx.Node, places: dict[fx.Node, int], rows: int) -> list[Any]:
    written = [_written(value, places) for value in node.args]
    at = _SIZES.get(node.target)  # type: ignore[call-overload]
    if at is not None and rows > 1 and written[at][1:2] == [rows]:
        written[at][1] = ["rows"]
    return written


def _written(value: Any, places: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return ["value", places[value]]
    if isinstance(value, (list, tuple)):
        return ["list", *(_written(v, places) for v in value)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).split(".")[1]]
    if value is None or isinstance(value, (bool, int, float, str)):
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
    return getattr(torch, rest[0]) if kind == "dtype" else [_read(v, values, rows) for v in rest]


@functools.lru_cache(maxsize=256)
def _op(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


_CREATES = {"full.default", "ones.default", "scalar_tensor.default", "zeros.default"}


class _Program(NamedTuple):
    steps: list[list[Any]]
    frees: list[list[int]]  # places of values that no step behind this one reads
    out: list[int]


@functools.lru_cache(maxsize=64)
def _programs(text: str) -> tuple[_Program, _Program]:
    """Forward and backward."""
    told = json.loads(text)
    return _with_frees(told["forward"], 1), _with_frees(told["backward"], 2)


def _with_frees(told: dict[str, Any], num_inputs: int) -> _Program:
    last = {num_inputs + step: step for step in range(len(told["steps"]))}  # place -> the step that reads it last
    for step, (_, args, kwargs) in enumerate(told["steps"]):
        last.update(dict.fromkeys(_places_in([args, list(kwargs.values())]), step))
    frees: list[list[int]] = [[] for _ in told["steps"]]
    for place, step in last.items():
        if place not in told["out"]:
            frees[step].append(place)
    return _Program(told["steps"], frees, told["out"])


def _places_in(value: Any) -> list[int]:
    if not isinstance(value, list):
        return []
    return [value[1]] if value[:1] == ["value"] else [place for inner in value for place in _places_in(inner)]


def _run(program: _Program, *inputs: torch.Tensor, watch: Callable[[list[Any]], None] | None = None) -> Any:
    """Results of a program; its values go when they have been read for the last time. watch: called with those held."""
    rows, device = inputs[0].shape[0], inputs[0].device
    values: list[Any] = list(inputs)
    for (name, args, kwargs), frees in zip(program.steps, program.frees, strict=True):
        given = {key: _read(value, values, rows) for key, value in kwargs.items()}
        if name in _CREATES:
            given["device"] = device
        values.append(_op(name)(*(_read(a, values, rows) for a in args), **given))
        if watch is not None:
            watch(values)
        for place in frees:
            values[place] = None
    found = [values[place] for place in program.out]
    return found[0] if len(found) == 1 else tuple(found)
