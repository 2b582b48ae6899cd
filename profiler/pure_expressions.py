"""Computes an expression of the user's a second time, where that does nothing but give its value.

A closed list says what that is: names, constants, operators, and attributes, methods and functions of PyTorch's and
Python's own that neither write, draw random numbers nor use up what they are given. An operator, a property or a method
that the user wrote may do anything, and so nothing of it is run. A size or a number that data would set is not asked
for either: a trace notes such a one on the tensor it comes from, and would go on from there.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import nn

from . import _torch


class NotPure(Exception):
    """The expression may do more than give its value."""


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.Invert: operator.invert,
    ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_,
}  # fmt: skip
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "T", "mT", "real", "imag", "requires_grad", "is_cuda"}
# Names of methods of tensors; the functions of torch of the same names are taken too.
_OF_TENSORS = frozenset(
    """abs absolute all allclose amax amin any argmax argmin bitwise_and bitwise_not bitwise_or ceil clamp clip
    count_nonzero cumsum diff dim detach div eq exp flatten floor ge gt isclose isfinite isinf isnan isneginf isposinf
    le log log1p logical_and logical_not logical_or logical_xor logsumexp lt max maximum mean median min minimum mul
    ndimension ne neg norm numel permute pow prod remainder reshape round rsqrt sigmoid sign size softmax sqrt square
    squeeze std sub sum t tanh transpose trunc unbind unsqueeze var bool double float half bfloat16 int long to type_as
    is_floating_point is_complex element_size sort topk""".split()
)
_OF_CONTAINERS = frozenset("get keys values items count index startswith endswith lower upper".split())
_FUNCTIONS: tuple[Any, ...] = (
    abs, all, any, bool, len, max, min, sum, tuple, list, range, isinstance, type, float, int, round, str,
    *(function for name, function in vars(math).items() if callable(function)),
    *(getattr(torch, name) for name in _OF_TENSORS if inspect.isbuiltin(getattr(torch, name, None))),
    *(getattr(torch, name) for name in ("norm", "is_tensor") if hasattr(torch, name)),
)  # fmt: skip
# These make a number of a tensor of the trace.
_OF_NUMBERS: tuple[Any, ...] = (
    float, int, round, str, range, *(function for name, function in vars(math).items() if callable(function)),
)  # fmt: skip
_CONTAINERS = (tuple, list, dict, set, frozenset, str, range)
_SCALARS = (bool, int, float, complex, bytes, type(None), type(Ellipsis), slice)


def is_true(found: Any) -> bool:
    """The truth value of a Python object, which its class may compute as it likes."""
    if not _is_plain(found) and any(hasattr(type(found), name) for name in ("__bool__", "__len__")):
        raise NotPure
    return bool(found)


def computed(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The expression's value; raises NotPure where it may do more than give that, and what its own ops raise."""
    found = _value(node, names)
    if isinstance(found, torch.Tensor) and _torch.has_sizes_of_data(found):
        raise NotPure
    return found


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:

    def each(nodes: Iterable[ast.expr]) -> list[Any]:
        return [computed(n, names) for n in nodes]

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id] if node.id in names else getattr(builtins, node.id)
    if isinstance(node, ast.Attribute):
        return _attribute(computed(node.value, names), node.attr)
    if isinstance(node, ast.Tuple):
        return tuple(each(node.elts))
    if isinstance(node, ast.List):
        return each(node.elts)
    if isinstance(node, ast.Slice):
        return slice(*(None if n is None else computed(n, names) for n in (node.lower, node.upper, node.step)))
    if isinstance(node, ast.Subscript):
        return _item(computed(node.value, names), computed(node.slice, names))
    if isinstance(node, ast.UnaryOp):
        return _operated(node.op, computed(node.operand, names))
    if isinstance(node, ast.BinOp):
        return _operated(node.op, *each([node.left, node.right]))
    if isinstance(node, ast.Compare):
        return _compared(node, names)
    if isinstance(node, ast.BoolOp):
        found: Any = None
        for part in node.values:
            found = computed(part, names)
            if is_true(found) is isinstance(node.op, ast.Or):
                break
        return found
    if isinstance(node, ast.IfExp):
        return computed(node.body if is_true(computed(node.test, names)) else node.orelse, names)
    if isinstance(node, ast.Call):
        return _called(node, names)
    raise NotPure


def _compared(node: ast.Compare, names: Mapping[str, Any]) -> Any:
    left, found = computed(node.left, names), None
    for place, (op, side) in enumerate(zip(node.ops, node.comparators, strict=True)):
        right = computed(side, names)
        found = _operated(op, left, right)
        if place + 1 < len(node.ops) and not is_true(found):
            break
        left = right
    return found


def _operated(op: ast.AST, *sides: Any) -> Any:
    if type(op) not in _OPERATORS:
        raise NotPure
    if isinstance(op, ast.Not):
        return not is_true(sides[0])
    if not isinstance(op, (ast.Is, ast.IsNot)) and not all(map(_is_plain, sides)):
        raise NotPure
    return _OPERATORS[type(op)](*sides)


def _called(node: ast.Call, names: Mapping[str, Any]) -> Any:
    args = [computed(argument, names) for argument in node.args]
    named = {given.arg or "**": computed(given.value, names) for given in node.keywords}
    if "out" in named or "**" in named or "key" in named:
        raise NotPure
    if isinstance(node.func, ast.Attribute):
        owner = computed(node.func.value, names)
        listed = _OF_TENSORS if _is_torchs(owner) else _OF_CONTAINERS if type(owner) in _CONTAINERS else ()
        if node.func.attr in listed and all(map(_is_plain, (owner, *args, *named.values()))):
            return getattr(owner, node.func.attr)(*args, **named)
    function = computed(node.func, names)
    if not any(function is one for one in _FUNCTIONS):
        raise NotPure
    if function is isinstance:
        return _is_one_of(*args)
    if function is type and len(args) == 1:
        return type(args[0])
    if not all(map(_is_plain, (*args, *named.values()))) or (
        any(function is one for one in _OF_NUMBERS) and any(isinstance(one, torch.Tensor) for one in args)
    ):
        raise NotPure
    return function(*args, **named)


def _is_one_of(thing: Any, classes: Any) -> bool:
    each = classes if isinstance(classes, tuple) else (classes,)
    if not all(type(one) is type or one in (torch.Tensor, nn.Parameter) for one in each):
        raise NotPure
    return isinstance(thing, classes)


def _attribute(owner: Any, name: str) -> Any:
    """What is stored under a name; of a tensor, what is listed. A property is a function, and is not run."""
    if isinstance(owner, ModuleType):
        return vars(owner)[name]
    if isinstance(owner, torch.Tensor):
        if not _is_torchs(owner) or name not in _ATTRIBUTES:
            raise NotPure
        return getattr(owner, name)
    usual: tuple[Any, ...] = (object.__getattribute__, type.__getattribute__)
    if type(owner).__getattribute__ not in usual:
        raise NotPure
    if isinstance(owner, nn.Module) and type(owner).__getattr__ is nn.Module.__getattr__:
        for stored in (vars(owner), owner._parameters, owner._buffers, owner._modules):
            if name in stored:
                return stored[name]
    found = inspect.getattr_static(owner, name)
    if isinstance(found, MemberDescriptorType):
        return found.__get__(owner)
    if hasattr(type(found), "__get__"):
        raise NotPure
    return found


def _item(owner: Any, index: Any) -> Any:
    if isinstance(owner, nn.ModuleList) and type(owner) is nn.ModuleList and type(index) is int:
        return owner[index]
    if not _is_plain(owner) or not _is_plain(index):
        raise NotPure
    parts = index if isinstance(index, tuple) else (index,)
    if isinstance(owner, torch.Tensor) and not all(_has_known_size(part) for part in parts):
        raise NotPure
    return owner[index]


def _has_known_size(index: Any) -> bool:
    """Does what it selects have a size that no data set?"""
    if isinstance(index, torch.Tensor):
        return index.dim() > 0 and index.dtype not in (torch.bool, torch.uint8)
    return type(index) in (int, slice, type(None), type(Ellipsis))


def _is_torchs(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor) and type(thing).__module__.split(".")[0] == "torch"


def _is_plain(thing: Any) -> bool:
    """Do operators and built-in functions read it, and do nothing else? Not so of an iterator, which is used up."""
    if type(thing) is dict:
        return all(map(_is_plain, thing)) and all(map(_is_plain, thing.values()))
    if type(thing) in (tuple, list, set, frozenset, torch.Size):
        return all(map(_is_plain, thing))
    return (
        _is_torchs(thing)
        or type(thing) in (*_SCALARS, *_CONTAINERS, type({}.keys()), type({}.values()), type({}.items()))
        or isinstance(thing, (torch.dtype, torch.device, torch.layout))
        or (isinstance(thing, tuple) and type(thing).__module__ == "torch.return_types" and all(map(_is_plain, thing)))
        or thing is torch.Tensor
        or type(thing) is type
    )
