"""Hyperparameters of an optimizer's parameter groups, in checkpoints: by the parameters that they are of.

A rank of a pipeline has the groups of its own stages, so their positions mean nothing to another rank or layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .trained import Trained


def options_of(program: Trained) -> list[dict[str, Any]]:
    """Of this rank's groups: {"parameters": names, and the hyperparameters that JSON can hold}."""
    groups = program.optimizer.param_groups if program.optimizer is not None else []
    return [{"parameters": _names(program, group), **_plain(group)} for group in groups]


def merged(ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All groups of all ranks, those of the same hyperparameters as one."""
    found: list[dict[str, Any]] = []
    for group in (group for rank in ranks for group in rank):
        names = group["parameters"]
        options = {key: value for key, value in group.items() if key != "parameters"}
        same = next((g for g in found if {k: v for k, v in g.items() if k != "parameters"} == options), None)
        if same is None:
            found.append({"parameters": list(names), **options})
        else:
            same["parameters"] += [name for name in names if name not in same["parameters"]]
    return found


def set_options(program: Trained, saved: Sequence[Mapping[str, Any]]) -> None:
    """Each group gets what the checkpoint has for its parameters; one that it knows none of stays as it is."""
    by_name = {name: group for group in saved for name in group.get("parameters", ())}
    for group in program.optimizer.param_groups if program.optimizer is not None else []:
        found = next((by_name[name] for name in _names(program, group) if name in by_name), None)
        if found is not None:
            group.update({key: value for key, value in found.items() if key != "parameters"})


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
