"""Keys of a state dictionary that a user gives: ours, or those of the model itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import ExitCode, ShardwrightError, near_matches
from . import optimizer_state
from .trained import Trained

LOSS_SCALE = "loss_scale.state"


def by_our_keys(program: Trained, state: Mapping[str, torch.Tensor], *, strict: bool) -> dict[str, torch.Tensor]:
    """The values by the keys of program.state_dict(). What the model has and the program does not read is left out.

    Raises ShardwrightError for a key that is neither, and under `strict` where a parameter of this rank is missing.
    """
    graph, model = program.graph, program.workload.model
    ours = {f"model.{name}" for name in graph.params} | {f"buffer.{name}" for name in graph.buffers}
    theirs = {name: f"model.{name}" for name in graph.params} | {name: f"buffer.{name}" for name in graph.buffers}
    theirs |= {name: theirs[tied] for name, tied in graph.tied.items() if tied in theirs}
    parameters = model.named_parameters(remove_duplicate=False)  # tied ones by each of their names
    unread = {name for name, _ in (*parameters, *model.named_buffers(remove_duplicate=False))}
    unread |= {f"{kind}.{name}" for kind in ("model", "buffer") for name in unread}
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key in ours or _is_state(key, graph.params) or key == LOSS_SCALE:
            found[key] = value
        elif key in theirs:
            found.setdefault(theirs[key], value)
        elif key not in unread:
            raise _unknown(key, [*theirs, *ours])
    missing = sorted(name for name, _ in program.named_parameters() if f"model.{name}" not in found)
    if strict and missing:
        raise _missing(missing)
    return found


def _is_state(key: str, parameters: Collection[str]) -> bool:
    """Of the optimizer: kept for one of the parameters, or for none."""
    if not optimizer_state.is_state(key):
        return False
    name = optimizer_state.parameter_of(key)
    return name is None or name in parameters


def _unknown(key: str, known: list[str]) -> ShardwrightError:
    return ShardwrightError(
        f"the model has no {key!r}, which the state dictionary holds",
        means=near_matches(key, known) or "it belongs to another model; nothing was loaded",
        change="the state dictionary",
        works="program.state_dict() of this model, or the model's own state_dict()",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _missing(names: list[str]) -> ShardwrightError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ShardwrightError(
        f"the state dictionary has no {names[0]}{more}",
        means="it would keep the value that it has; nothing was loaded",
        change="the state dictionary, or strict",
        works="load_state_dict(state, strict=False), which leaves what is missing as it is",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
