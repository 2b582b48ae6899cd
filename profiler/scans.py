"""Scans of transformers models while a model is captured: each call of one of scan_ops.KINDS as one operator.

The functions stand at the top of transformers' modeling files, which call them by name; older files keep one in an
attribute of a module. Both are replaced. A call that also wants the last state (generation) is left to the function.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import scan_ops


@contextlib.contextmanager
def scans(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.callback(scan_ops.originals.clear)
        for module_name in sorted({type(module).__module__ for module in model.modules()}):
            family = module_name.rpartition(".modeling_")[2]
            source = sys.modules.get(module_name)
            for name in scan_ops.KINDS:
                original = getattr(source, name, None)
                if module_name != f"transformers.models.{family}.modeling_{family}" or original is None:
                    continue
                function = f"{family}:{name}"
                scan_ops.originals[function] = original
                new = _as_operator(function, original)
                stack.callback(setattr, source, name, original)
                setattr(source, name, new)
                _replace_attributes(stack, model, original, new)
        yield


def _replace_attributes(
    stack: contextlib.ExitStack, model: nn.Module, original: Callable[..., Any], new: Callable[..., Any]
) -> None:
    for module in model.modules():
        for attribute, held in list(vars(module).items()):
            if held is original:
                stack.callback(setattr, module, attribute, held)
                setattr(module, attribute, new)


def _as_operator(function: str, original: Callable[..., Any]) -> Callable[..., Any]:
    kind, signature = scan_ops.kind_of(function), inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        given.pop("kwargs", None)
        tensors = [given.pop(name, None) for name in kind.tensors]
        rest = {name: value for name, value in given.items() if value is not None}
        if rest.get(kind.final) or any(isinstance(value, torch.Tensor) for value in rest.values()):
            return original(*args, **kwargs)
        options = {name: value for name, value in rest.items() if name in signature.parameters}
        tensors += [None] * (scan_ops.SLOTS - len(tensors))
        if not all(isinstance(value, (bool, int, float, str, tuple, list)) for value in options.values()):
            return original(*args, **kwargs)
        out = scan_ops.scan(*tensors, function, json.dumps(options, sort_keys=True))
        return (out, None) if function.endswith("gated_delta_rule") else out

    return call
