"""What a user changes on the parameters between steps: requires_grad, and values written in place.

A parameter that is frozen gets no gradient from the next step on, so the optimizer leaves it alone, as in PyTorch. One
that the captured graph has no gradient for cannot be thawed. Values that were written count from the next step on.
"""

from __future__ import annotations

from torch import nn

from ..errors import ExitCode, ShardwrightError
from ..profiler.graph import ModelGraph
from .parameters import ParameterStore


class ByHand:
    """Looked at before each step. model: the user's own, whose flags count beside those of the program's parameters."""

    def __init__(self, store: ParameterStore, graph: ModelGraph, model: nn.Module) -> None:
        self.store, self.graph, self.model = store, graph, model
        self._before = {name: p.requires_grad for name, p in model.named_parameters()}

    def follow(self) -> None:
        """Raises ShardwrightError where a parameter is to train that was planned frozen. Every rank calls it."""
        store = self.store
        now = {name: p.requires_grad for name, p in self.model.named_parameters()}
        changed = {name: flag for name, flag in now.items() if flag != self._before.get(name, flag)}
        flags = {name: changed.get(name, p.requires_grad) for name, p in store.parameters.items()}
        thawed = [name for name, flag in {**changed, **flags}.items() if flag and not self._trains(name)]
        if thawed:
            raise _thawed(sorted(thawed))
        store.frozen = {name for name, flag in flags.items() if not flag and self._trains(name)}
        if store.were_written():
            store.refresh()

    def _trains(self, name: str) -> bool:
        name = self.graph.tied.get(name, name)
        return name not in self.graph.params or self.graph.params[name][2]


def _thawed(names: list[str]) -> ShardwrightError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ShardwrightError(
        f"{names[0]}{more} requires a gradient now and did not when the model was captured",
        means="the program's backward has no gradient for it, so it would stay as it is",
        change="when it is frozen",
        works="build with requires_grad=True and set requires_grad_(False) where it rests; or plan and build again",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
