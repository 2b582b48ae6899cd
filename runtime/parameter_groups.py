"""Hyperparameters of an optimizer's parameter groups, in checkpoints: by the parameters that they are of.

A rank of a pipeline has the groups of its own stages, so their positions mean nothing to another rank or layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from .trained import Trained


def options_of(program: Trained) -> list[dict[str, Any]]:
    """Of this rank's groups: {"parameters": names, and the hyperparameters that JSON can hold}."""
    groups = program.optimizer.param_groups if program.optimizer is not None else []
    return [{"parameters": _names(program, group), **_plain(group)} for group in groups]


def merged(ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All groups of all ranks, those of the same hyperparameters as one."""
    found: list[dict[str, Any]] = []
    for group in (group for rank in ranks for group in rank):
        names, options = group["parameters"], _without_names(group)
        same = next((g for g in found if _without_names(g) == options), None)
        if same is None:
            found.append({"parameters": list(names), **options})
        else:
            same["parameters"] += [name for name in names if name not in same["parameters"]]
    return found


def options_for(program: Trained, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each of this rank's groups what the checkpoint has for its parameters; {} where it knows none of them.

    A checkpoint from before groups were saved by name has them by position. Raises ShardwrightError where it has
    another number of them.
    """
    groups = program.optimizer.param_groups if program.optimizer is not None else []
    if not all("parameters" in group for group in saved):
        if groups and len(saved) != len(groups):
            raise _other_groups(len(saved), len(groups))
        return [_without_names(group) for group in saved][: len(groups)]
    by_name = {name: group for group in saved for name in group["parameters"]}
    firsts = (next((by_name[n] for n in _names(program, group) if n in by_name), {}) for group in groups)
    return [_without_names(first) for first in firsts]


def set_options(program: Trained, options: Sequence[Mapping[str, Any]]) -> None:
    """options: of each group, from options_for."""
    groups = program.optimizer.param_groups if program.optimizer is not None else []
    for group, own in zip(groups, options, strict=True):
        for key, value in own.items():
            here = group.get(key)
            group[key] = torch.full_like(here, value) if isinstance(here, torch.Tensor) else value


def _without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "parameters"}


def _other_groups(saved: int, here: int) -> ShardwrightError:
    return ShardwrightError(
        f"the checkpoint has {saved} parameter groups without the names of their parameters; this optimizer has {here}",
        means="it was written by an earlier version, which saved groups by position; nothing was loaded",
        change="the optimizer's parameter groups, or the plan",
        works="the groups and the plan that the checkpoint was written under",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _names(program: Trained, group: Mapping[str, Any]) -> list[str]:
    return [program.store.name_of(parameter) for parameter in group["params"]]


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if key != "params" and isinstance(value, (int, float, bool, str, list, tuple, type(None))):
            options[key] = value
    return options
