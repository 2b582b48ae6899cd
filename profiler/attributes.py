"""What a forward sets on the model's modules: self.ema = ..., self.attention = ..., self.calls += 1.

torch.export runs the forward once on tensors without values. A buffer that is bound anew is a write to it, as the next
step reads it. Other attributes are put back as they were, so that no tensor of the trace stays on the model; which they
are is kept, since a forward that reads what an earlier one set computes something else than its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError

_OF_MODULE = set(vars(nn.Module()))  # parameters, buffers, hooks, the mode: all that torch itself keeps


class Attributes:
    """Of one capture. changed: 'Module.attribute' of those that the forward set."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: list[str] = []
        self._before: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, str]] = []

    def begin(self) -> None:
        """In the trace, before the forward."""
        self._tensors = [
            (table, name, tensor, f"{path}.{name}".lstrip("."))
            for path, module in self.model.named_modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]

    def write_buffers(self) -> None:
        """In the trace, after the forward: what a buffer was bound to becomes its value."""
        for table, name, tensor, path in self._tensors:
            new = table.get(name)
            if new is tensor:
                continue
            if not isinstance(new, torch.Tensor) or isinstance(tensor, nn.Parameter) or new.shape != tensor.shape:
                raise ShardwrightError(
                    f"the forward sets {path}, of shape {tuple(tensor.shape)}, to "
                    f"{f'one of shape {tuple(new.shape)}' if isinstance(new, torch.Tensor) else new}",
                    means="parameters, and the shapes of buffers, are the same in each step of a plan",
                    change=f"where it is set; a buffer of the same shape may be written: {path}.copy_(new)",
                    works="a forward that sets buffers of the same shape alone",
                    exit_code=ExitCode.UNSUPPORTED_MODEL,
                )
            with torch.no_grad():
                tensor.copy_(new.detach())
            table[name] = tensor

    def note_changes(self) -> None:
        """In the trace, after the forward: torch.export itself puts some of them back."""
        for path, module, held in self._before:
            now = _held(module)
            names = (n for n in {**held, **now} if not _same(held.get(n, _Absent), now.get(n, _Absent)))
            self.changed += [f"{path}.{name}".lstrip(".") for name in names]

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        self._before = [(path, module, _held(module)) for path, module in self.model.named_modules()]
        try:
            yield
        finally:
            for _, module, held in self._before:
                now = vars(module)
                for name in [n for n in now if n not in held and n not in _OF_MODULE]:
                    del now[name]
                for name, value in held.items():
                    now[name] = _restored(now.get(name), value)
            self._before = []


class _Absent:
    pass


class _Held(NamedTuple):
    """A list or a dictionary, and what was in it; a type of its own, as the attributes themselves may be tuples."""

    value: Any
    content: Any


def _with_content(value: Any) -> Any:
    return _Held(value, type(value)(value)) if type(value) in (list, dict) else value


def _held(module: nn.Module) -> dict[str, Any]:
    """The module's own attributes; of lists and dictionaries what is in them."""
    return {name: _with_content(value) for name, value in vars(module).items() if name not in _OF_MODULE}


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, _Held):
        if not isinstance(now, _Held) or now.value is not before.value or len(now.content) != len(before.content):
            return False
        a, b = (list(c.items()) if isinstance(c, dict) else list(enumerate(c)) for c in (before.content, now.content))
        return all(m == n and _same(v, w) for (m, v), (n, w) in zip(a, b, strict=True))
    return before is now or (type(before) is type(now) and isinstance(before, (int, float, str)) and before == now)


def _restored(now: Any, held: Any) -> Any:
    if not isinstance(held, _Held):
        return held
    kept, content = held
    if not _same(held, _with_content(now)):
        kept.clear()
        kept.extend(content) if isinstance(kept, list) else kept.update(content)
    return kept
