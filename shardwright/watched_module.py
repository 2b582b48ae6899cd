"""The module of a decorated model, once it is planned: what a user changes on it that the program would not follow.

The program computes what was captured. A dropout rate set on the module, train() or eval(), values written into its
buffers, or into its parameters where the ranks hold them, would change nothing, and are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import ExitCode, ShardwrightError
from .runtime.program import Program

_ABSENT = object()
_PLAIN = (bool, int, float, str, type(None))
_AGAIN = "a new decorated model, changed before its first batch, and program.save() and load() between the two"


class WatchedModule:
    """released: its values are on the ranks, and its own tensors hold none. Otherwise the program trains its parameters
    where they are, and its buffers are made the program's own."""

    def __init__(self, module: nn.Module, program: Program, *, released: bool) -> None:
        self.module, self.program, self.released = module, program, released
        module.register_state_dict_pre_hook(self._before_state_dict)
        self._settings: dict[str, Any] = {}
        self._tensors: dict[str, tuple[int, int]] = {}
        self.note()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self.released:
            self._share_buffers()
        elif not prefix:  # a capture asks for it as a part of what it traces
            raise _no_values()

    def note(self) -> None:
        """As it is now is as it was captured."""
        if not self.released:
            self._share_buffers()
        self._settings, self._tensors = dict(self._set_now()), dict(self._written_now())

    @contextmanager
    def running(self) -> Iterator[None]:
        """What changes inside is changed by the module's own code, which runs where it is captured once more."""
        before = dict(self._set_now())
        yield
        after = dict(self._set_now())
        self._settings.update(
            {name: value for name, value in after.items() if _differ(before.get(name, _ABSENT), value)}
        )

    def refuse_changes(self) -> None:
        """Before a step. Raises ShardwrightError."""
        now = dict(self._set_now())
        if name := next((name for name in now if _differ(now[name], self._settings.get(name, now[name]))), None):
            raise _changed(name, self._settings[name], now[name])
        tensors = dict(self._written_now())
        if name := next((name for name in tensors if tensors[name] != self._tensors.get(name, tensors[name])), None):
            raise _written(name, is_buffer=name in dict(self.module.named_buffers()))

    def _set_now(self) -> Iterator[tuple[str, Any]]:
        for name, part in self.module.named_modules():
            for key, value in _settings(part):
                yield (f"{name}.{key}" if name else key), value

    def _written_now(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Of tensors that the program does not read: their identity and count of writes. Shared ones may be written."""
        yield from ((name, (id(b), b._version if self.released else 0)) for name, b in self.module.named_buffers())
        if self.released:
            yield from ((name, (id(p), p._version)) for name, p in self.module.named_parameters())

    def _share_buffers(self) -> None:
        """The program puts new tensors in the place of buffers that the forward writes."""
        for name, tensor in self.program.named_buffers():
            owner_name, _, leaf = name.rpartition(".")
            try:
                owner = self.module.get_submodule(owner_name)
            except AttributeError:  # a constant of the graph
                continue
            own = owner._buffers.get(leaf)
            if own is not None and (own.shape, own.dtype, own.device) == (tensor.shape, tensor.dtype, tensor.device):
                owner._buffers[leaf] = tensor


def _settings(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(part).items():
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
            yield key, value


def _differ(before: Any, now: Any) -> bool:
    """A NaN is as it was."""
    if isinstance(before, tuple) and isinstance(now, tuple) and len(before) == len(now):
        return any(map(_differ, before, now))
    return before is not now and before != now and (before == before or now == now)


def _changed(name: str, before: Any, now: Any) -> ShardwrightError:
    mode = name.rpartition(".")[2] == "training"
    evaluates = "model.evaluate(batch) computes as after eval() and needs no call; to train in another mode, "
    return ShardwrightError(
        f"{name} of the module was {before!r} when the model was captured, and is {now!r} now",
        means="the program trains what was captured; it would go on as before",
        change="module.train() and module.eval()" if mode else f"module.{name}",
        works=evaluates * mode + _AGAIN,
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _written(name: str, *, is_buffer: bool) -> ShardwrightError:
    where = "program.named_buffers()" if is_buffer else "model.named_parameters()"
    return ShardwrightError(
        f"{name} of the module was written to; the program holds its own values of it",
        means="what was written would change nothing",
        change=f"module.{name}",
        works=f"the tensors of {where}, written under torch.no_grad(), or program.load_state_dict()",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _no_values() -> ShardwrightError:
    return ShardwrightError(
        "the module's state_dict() has no values: they are on the ranks, each of which holds its part",
        means="saving it would save nothing",
        change="module.state_dict()",
        works="model.program.save(folder), or model.program.state_dict(), this rank's part",
    )
