"""What a user changes on the parameters between steps: requires_grad, and values written in place.

A parameter that is frozen gets no gradient from the next step on, so the optimizer leaves it alone, as in PyTorch. One
that the captured graph has no gradient for cannot be thawed. Values that were written count from the next step on.

Each rank sees its own tensors alone, so what follows is decided together: a rank that brought new values to the others
by itself would wait for them, and copies of a parameter of which one rests would drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ExitCode, ShardwrightError
from ..profiler.graph import ModelGraph
from .parameters import ParameterStore
from .together import host_group, on_every_rank


class ByHand:
    """Looked at before each step. model: the user's own, whose flags count beside those of the program's parameters."""

    def __init__(self, store: ParameterStore, graph: ModelGraph, model: nn.Module) -> None:
        self.store, self.graph, self.model = store, graph, model
        self._before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._names = list(graph.params)
        self.group = host_group()

    def follow(self, stepped: bool = False) -> bool:
        """Raises ShardwrightError, on all ranks, where a parameter is to train that was planned frozen, or rests on one
        rank and trains on another. Every rank calls it. stepped: the user has stepped the optimizer of this rank; the
        result is whether that is so on any."""
        refused = self._take_new_tensors()
        own = self._flags()
        rests = [name in own and not own[name] for name in self._names]
        trains = [name in own and own[name] for name in self._names]
        local = [self.store.were_written(), stepped, refused is not None]
        rests, trains, (written, stepped, any_refused) = self._together(rests, trains, local)
        if any_refused:
            on_every_rank(lambda: _raise(refused), others="another rank refused: ")
        rows = list(zip(self._names, rests, trains, strict=True))
        if thawed := [name for name, _, train in rows if train and not self._can(name)]:
            raise _thawed(sorted(thawed))
        if differing := next((name for name, rest, train in rows if rest and train), None):
            raise _differs(differing)
        resting = {name for name, rest, _ in rows if rest and self._can(name)}
        self.store.frozen = resting & self.store.parameters.keys()
        if written:
            self.store.refresh()
        return stepped

    def _take_new_tensors(self) -> ShardwrightError | None:
        """What this rank refuses, which the others are to hear of before any raises."""
        try:
            self.store.take_new_tensors()
        except ShardwrightError as error:
            return error
        return None

    def _together(self, *lists: list[bool]) -> list[list[bool]]:
        """What is true on any rank. Said on the host: no device is waited for."""
        if self.group is None:
            return list(lists)
        table = torch.tensor([flag for flags in lists for flag in flags], dtype=torch.uint8)
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self.group)
        found = iter(table.bool().tolist())
        return [[next(found) for _ in flags] for flags in lists]

    def _flags(self) -> Mapping[str, bool]:
        """Does each parameter train, as far as this rank can say: it holds it, or the model's own flag was changed."""
        held = {name: p.requires_grad for name, p in self.store.parameters.items()}
        now = {name: p.requires_grad for name, p in self.model.named_parameters()}
        changed = {name: flag for name, flag in now.items() if flag != self._before.get(name, flag)}
        return {**held, **{self.graph.tied.get(name, name): flag for name, flag in changed.items()}}

    def _can(self, name: str) -> bool:
        return self.graph.params[name][2]


def _raise(error: ShardwrightError | None) -> None:
    if error is not None:
        raise error


def _differs(name: str) -> ShardwrightError:
    return ShardwrightError(
        f"{name} requires a gradient on one rank and not on another",
        means="its copies would drift apart",
        change="where requires_grad is set",
        works="for name, p in program.named_parameters(): p.requires_grad_(...), on every rank alike",
    )


def _thawed(names: list[str]) -> ShardwrightError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ShardwrightError(
        f"{names[0]}{more} requires a gradient now and did not when the model was captured",
        means="the program's backward has no gradient for it, so it would stay as it is",
        change="when it is frozen",
        works="build with requires_grad=True and set requires_grad_(False) where it rests; or plan and build again",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
